//! A fleet in virtual time around the real guardian: hosts that run guests and keep shadows, a manager that writes to
//! a disk and can crash between any two things it does, connections that break, and a checker that looks after each
//! step.
//!
//! Not modelled: a network that separates a living primary from the manager and all witnesses. Against that only leases
//! and fencing help.
#![allow(dead_code, reason = "each test uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use placement::fleet::{FleetError, Question, Topology};
use placement::guardian::{
    Action, Event, FailoverStep, Guardian, GuestPlan, HostIntro, Order, Outcome, Phase, Ready, Reply, Request,
    RequestError, RequestId, Save, Settings, SwitchoverStep, Token, Wish,
};
use placement::solver::OneByOne;
use placement::{GuestId, HostName, Moment, Term};

pub mod host;

use host::SimHost;

const TICK_US: u64 = 50_000;
const HEARTBEAT_US: u64 = 200_000;

/// xorshift64*: the only source of chance, so that a seed replays everything.
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// Something that is going to happen. `run` is the manager's run it belongs to.
#[derive(Debug)]
enum What {
    Tick { run: u64 },
    Tell { run: u64, event: Event },
    Deliver { run: u64, host: HostName, connection: u64, token: Token, order: Order },
    Reply { run: u64, host: HostName, connection: u64, token: Token, outcome: Outcome },
    Connect { host: HostName },
    Heartbeat { host: HostName, connection: u64 },
    Epochs,
    ManagerStarts,
}

pub struct World {
    pub now_us: u64,
    pub rng: Rng,
    pub hosts: BTreeMap<HostName, SimHost>,
    pub guardian: Option<Guardian>,
    pub saved_hosts: BTreeMap<HostName, HostIntro>,
    pub saved: BTreeMap<GuestId, GuestPlan>,
    pub forgotten: BTreeMap<GuestId, Term>,
    pub answers: BTreeMap<RequestId, Result<Reply, RequestError>>,
    /// Whom each term was promised to.
    pub promised: BTreeMap<(GuestId, Term), HostName>,
    pub log: Vec<String>,
    /// Chances of trouble, per cent.
    pub refusals: u64,
    pub lost_replies: u64,
    pub crash_between: u64,
    pub slowest_us: u64,
    /// How long a plan takes.
    pub plan_us: u64,
    /// The planner's plans are refused by the checker.
    pub plans_refused: bool,
    pub topology: Option<Topology>,
    /// Hosts that the newest plan named for each guest: nothing else may become a seat.
    pub planned: BTreeMap<GuestId, BTreeSet<HostName>>,
    /// Plans asked for, and those of the manager's current run without an answer.
    pub plans: u64,
    open_plans: BTreeSet<u64>,
    /// Which orders trouble strikes.
    pub strikes: fn(&Order) -> bool,
    queue: BTreeMap<(u64, u64), What>,
    last_seq: u64,
    run: u64,
    last_request: u64,
    last_connection: u64,
    /// Orders without an outcome: whom they went to, and when they time out.
    open: BTreeMap<Token, (HostName, u64)>,
}

/// A failing run tells how it came to that.
impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let from = self.log.len().saturating_sub(500);
            eprintln!("{}", self.log[from..].join("\n"));
        }
    }
}

impl World {
    /// Hosts `h1`, `h2`, ... dealt out to `racks`.
    pub fn new(seed: u64, hosts: usize, racks: usize) -> Self {
        let mut world = Self {
            now_us: 1_000_000,
            rng: Rng::new(seed),
            hosts: BTreeMap::new(),
            guardian: None,
            saved_hosts: BTreeMap::new(),
            saved: BTreeMap::new(),
            forgotten: BTreeMap::new(),
            answers: BTreeMap::new(),
            promised: BTreeMap::new(),
            log: Vec::new(),
            refusals: 0,
            lost_replies: 0,
            crash_between: 0,
            slowest_us: 2_000,
            plan_us: 2_000,
            plans_refused: false,
            topology: None,
            planned: BTreeMap::new(),
            plans: 0,
            open_plans: BTreeSet::new(),
            strikes: |_| true,
            queue: BTreeMap::new(),
            last_seq: 0,
            run: 0,
            last_request: 0,
            last_connection: 0,
            open: BTreeMap::new(),
        };
        for index in 0..hosts {
            let intro = HostIntro {
                name: format!("h{}", index + 1).into(),
                rack: format!("r{}", index % racks),
                probe_addr: ([10, 0, 0, index as u8 + 1], 7710).into(),
                sync_addr: ([10, 0, 0, index as u8 + 1], 7710).into(),
            };
            let name = intro.name.clone();
            world.hosts.insert(name.clone(), SimHost::new(intro));
            world.at(10_000, What::Connect { host: name });
        }
        world.at(50_000, What::Epochs);
        world.start_manager();
        world
    }

    fn at(&mut self, in_us: u64, what: What) {
        self.last_seq += 1;
        self.queue.insert((self.now_us + in_us, self.last_seq), what);
    }

    fn delay(&mut self) -> u64 {
        100 + self.rng.below(self.slowest_us)
    }

    pub fn say(&mut self, text: String) {
        self.log.push(format!("{:>9.3} {text}", self.now_us as f64 / 1e6));
    }

    fn start_manager(&mut self) {
        self.run += 1;
        let (hosts, plans) = (self.saved_hosts.values().cloned().collect(), self.saved.values().cloned().collect());
        let now = Moment::from_us(self.now_us);
        let forgotten = self.forgotten.clone().into_iter().collect();
        let settings = Settings { plan_effort: 50, ..Settings::default() };
        let guardian = Guardian::resume(settings, now, hosts, plans, forgotten);
        self.guardian = Some(guardian.with_topology(self.topology.clone()));
        self.open_plans.clear();
        self.at(TICK_US, What::Tick { run: self.run });
        self.say("manager starts".into());
    }

    pub fn crash_manager(&mut self, back_in_us: u64) {
        if self.guardian.take().is_none() {
            return;
        }
        self.say("manager crashes".into());
        self.open.clear();
        for name in self.hosts.keys().cloned().collect::<Vec<_>>() {
            self.disconnect(&name);
        }
        self.at(back_in_us, What::ManagerStarts);
    }

    /// Breaks the control connection; the agent comes back by itself.
    pub fn disconnect(&mut self, name: &HostName) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        if host.connection.take().is_none() {
            return;
        }
        host.welcomed_us = None;
        let again = 50_000 + self.rng.below(500_000);
        self.at(again, What::Connect { host: name.clone() });
        let run = self.run;
        self.at(100, What::Tell { run, event: Event::Disconnected { host: name.clone() } });
        let lost: Vec<Token> = self.open.iter().filter(|(_, (to, _))| to == name).map(|(token, _)| *token).collect();
        for token in lost {
            self.end_order(token, Outcome::Unknown { why: "connection lost".into() });
        }
    }

    fn end_order(&mut self, token: Token, outcome: Outcome) {
        if self.open.remove(&token).is_some() {
            let (run, in_us) = (self.run, self.delay());
            self.at(in_us, What::Tell { run, event: Event::OrderDone { token, outcome } });
        }
    }

    pub fn power_cut(&mut self, name: &HostName) {
        self.say(format!("power cut of {name}"));
        self.disconnect(name);
        if let Some(host) = self.hosts.get_mut(name) {
            host.power_cut();
        }
    }

    pub fn power_on(&mut self, name: &HostName) {
        self.say(format!("{name} has power"));
        if let Some(host) = self.hosts.get_mut(name) {
            host.on = true;
            host.agent_runs = true;
        }
        self.at(300_000, What::Connect { host: name.clone() });
    }

    /// The agent ends; guests run on, and what it had not told is lost.
    pub fn crash_agent(&mut self, name: &HostName, back_in_us: u64) {
        self.say(format!("agent of {name} crashes"));
        self.disconnect(name);
        if let Some(host) = self.hosts.get_mut(name) {
            host.agent_ends();
            host.agent_away_until_us = self.now_us + back_in_us;
        }
        self.at(back_in_us, What::Connect { host: name.clone() });
    }

    /// QEMU is killed.
    pub fn kill_guest(&mut self, name: &HostName, guest: &GuestId) {
        self.say(format!("QEMU of {guest} on {name} is killed"));
        if let Some(host) = self.hosts.get_mut(name) {
            host.guest_dies(guest);
        }
        self.flush_events(name);
    }

    /// Shut down on purpose.
    pub fn stop_guest(&mut self, name: &HostName, guest: &GuestId) {
        self.say(format!("{guest} is shut down on {name}"));
        if let Some(host) = self.hosts.get_mut(name) {
            host.guest_stops(guest);
        }
        self.flush_events(name);
    }

    /// An operator starts it; the hook may say no. -> whether it runs
    pub fn start_guest(&mut self, name: &HostName, guest: &GuestId) -> bool {
        let now_us = self.now_us;
        let started = self.hosts.get_mut(name).is_some_and(|host| host.guest_starts(guest, now_us));
        self.say(format!("{guest} is started on {name}: {}", if started { "runs" } else { "refused" }));
        self.flush_events(name);
        started
    }

    /// As libvirt migrates: it starts there, then it ends here.
    pub fn migrate_guest(&mut self, from: &HostName, to: &HostName, guest: &GuestId) {
        self.say(format!("{guest} is migrated from {from} to {to}"));
        if let Some(host) = self.hosts.get_mut(from) {
            host.guest_goes(guest);
        }
        if let Some(host) = self.hosts.get_mut(to) {
            host.guest_comes(guest);
        }
        self.flush_events(to);
        self.flush_events(from);
    }

    /// What agents have told and is still on its way gets lost.
    pub fn forget_events(&mut self) {
        let told = |what: &What| matches!(what, What::Tell { event: Event::Started { .. }, .. });
        self.queue.retain(|_, what| !told(what));
    }

    fn flush_events(&mut self, name: &HostName) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        if host.connection.is_none() || self.guardian.is_none() {
            return;
        }
        let events = std::mem::take(&mut host.events);
        for event in events {
            let (run, in_us) = (self.run, self.slowest_us);
            self.at(in_us, What::Tell { run, event });
        }
    }

    pub fn request(&mut self, request: Request) -> RequestId {
        self.last_request += 1;
        let id = RequestId(self.last_request);
        self.say(format!("asked: {request:?}"));
        let run = self.run;
        self.at(1, What::Tell { run, event: Event::Requested { id, request } });
        id
    }

    pub fn enable(&mut self, guest: &str, host: &str, shadows: u32) -> RequestId {
        let now_us = self.now_us;
        if let Some(host) = self.hosts.get_mut(&host.into()) {
            host.guest_starts(&guest.into(), now_us);
        }
        self.request(Request::Enable(wish(guest, host, shadows)))
    }

    /// A manager with another topology file.
    pub fn restart_with(&mut self, topology: &str) {
        self.topology = Some(Topology::parse(topology).expect("a topology"));
        self.crash_manager(100_000);
    }

    fn plan_for(&mut self, number: u64, question: &Question) {
        self.plans += 1;
        self.open_plans.insert(number);
        assert_eq!(self.open_plans.len(), 1, "one plan at a time");
        let result = match question.answer(&OneByOne) {
            _ if self.plans_refused => Err(Arc::new(FleetError::Refused { examples: vec!["mem: pretended".into()] })),
            Ok(plan) => {
                for placement in &plan.placements {
                    let hosts = placement.hosts.iter().flatten().cloned().collect();
                    self.planned.insert(placement.guest.clone(), hosts);
                }
                Ok(Arc::new(plan))
            }
            Err(error) => panic!("no plan: {error}"),
        };
        let (run, in_us) = (self.run, self.plan_us);
        self.at(in_us, What::Tell { run, event: Event::Planned { number, result } });
    }

    /// Lets time pass.
    pub fn run_ms(&mut self, ms: u64) {
        let end = self.now_us + ms * 1_000;
        while let Some(entry) = self.queue.first_entry() {
            if entry.key().0 > end {
                break;
            }
            let ((at, _), what) = entry.remove_entry();
            self.now_us = at;
            self.happen(what);
            self.check();
        }
        self.now_us = end;
    }

    /// Lets time pass until `done`, at most `ms`. -> whether it came to that
    pub fn run_until(&mut self, ms: u64, done: impl Fn(&World) -> bool) -> bool {
        let end = self.now_us + ms * 1_000;
        while self.now_us < end {
            if done(self) {
                return true;
            }
            self.run_ms(5);
        }
        done(self)
    }

    fn happen(&mut self, what: What) {
        match what {
            What::ManagerStarts if self.guardian.is_none() => self.start_manager(),
            What::ManagerStarts => (),
            What::Tick { run } if run == self.run && self.guardian.is_some() => {
                self.at(TICK_US, What::Tick { run });
                self.time_out_orders();
                self.step(Event::Tick);
            }
            What::Tell { run, event } if run == self.run => self.step(event),
            What::Tick { .. } | What::Tell { .. } => (),
            What::Connect { host } => self.connect(&host),
            What::Heartbeat { host, connection } => self.heartbeat(&host, connection),
            What::Deliver { run, host, connection, token, order } if run == self.run => {
                self.deliver(&host, connection, token, &order);
            }
            What::Reply { run, host, connection, token, outcome } if run == self.run => {
                if self.hosts[&host].connection == Some(connection) {
                    self.end_order(token, outcome);
                }
            }
            What::Deliver { .. } | What::Reply { .. } => (),
            What::Epochs => {
                self.at(50_000, What::Epochs);
                host::epochs(&mut self.hosts, self.now_us);
            }
        }
    }

    fn time_out_orders(&mut self) {
        let late: Vec<Token> =
            self.open.iter().filter(|(_, (_, at))| *at < self.now_us).map(|(token, _)| *token).collect();
        for token in late {
            self.end_order(token, Outcome::Unknown { why: "no answer in time".into() });
        }
    }

    fn connect(&mut self, name: &HostName) {
        let up = self.guardian.is_some();
        self.last_connection += 1;
        let (connection, now_us) = (self.last_connection, self.now_us);
        let Some(host) = self.hosts.get_mut(name) else { return };
        if !host.on || host.connection.is_some() || now_us < host.agent_away_until_us {
            return;
        }
        host.agent_starts();
        if !up {
            self.at(200_000, What::Connect { host: name.clone() });
            return;
        }
        host.connection = Some(connection);
        host.welcomed_us = Some(now_us);
        let event = Event::Hello { intro: host.intro.clone(), records: host.hello() };
        self.step(event);
        self.flush_events(name);
        self.at(HEARTBEAT_US, What::Heartbeat { host: name.clone(), connection });
    }

    fn heartbeat(&mut self, name: &HostName, connection: u64) {
        let host = &self.hosts[name];
        if host.connection != Some(connection) {
            return;
        }
        let event = Event::Heartbeat { host: name.clone(), report: host.report() };
        let (run, in_us) = (self.run, self.delay());
        self.at(in_us, What::Tell { run, event });
        self.at(HEARTBEAT_US, What::Heartbeat { host: name.clone(), connection });
    }

    fn deliver(&mut self, name: &HostName, connection: u64, token: Token, order: &Order) {
        if self.hosts[name].connection != Some(connection) {
            return;
        }
        let struck = (self.strikes)(order);
        let refuse = struck && self.rng.percent(self.refusals);
        let outcome = host::carry_out(&mut self.hosts, name, order, refuse, self.now_us);
        self.say(format!("{name}: {order:?} -> {outcome:?}"));
        if struck && self.rng.percent(self.lost_replies) {
            self.say(format!("{name}: the answer is lost"));
            return match self.rng.percent(30) {
                true => self.crash_agent(name, 300_000),
                false => self.disconnect(name),
            };
        }
        let (run, in_us) = (self.run, self.delay());
        self.at(in_us, What::Reply { run, host: name.clone(), connection, token, outcome });
        self.flush_events(name);
    }

    /// A seat comes from a plan that the checker has accepted, and from nowhere else.
    fn check_seats(&self, plan: &GuestPlan) {
        let former = self.saved.get(&plan.id).map(|former| &former.seats);
        for host in plan.seats.iter().filter(|host| former.is_none_or(|former| !former.contains(*host))) {
            let planned = self.planned.get(&plan.id).is_some_and(|hosts| hosts.contains(host));
            assert!(planned, "{} got a seat on {host} that no plan named", plan.id);
        }
    }

    /// One step of the guardian: saved, then done, with a crash possible before, between and after.
    fn step(&mut self, event: Event) {
        let Some(guardian) = &mut self.guardian else { return };
        if let Event::Planned { number, .. } = &event {
            self.open_plans.remove(number);
            self.log.push(format!("{:>9.3} plan {number} is there", self.now_us as f64 / 1e6));
        } else if !matches!(event, Event::Tick | Event::Heartbeat { .. }) {
            self.log.push(format!("{:>9.3} -> {event:?}", self.now_us as f64 / 1e6));
        }
        let ready = guardian.step(Moment::from_us(self.now_us), event);
        let eventful = ready.save.iter().any(|save| matches!(save, Save::Guest(_)));
        if eventful && self.rng.percent(self.crash_between) {
            return self.crash_manager(500_000);
        }
        self.save(&ready);
        if eventful && self.rng.percent(self.crash_between) {
            return self.crash_manager(500_000);
        }
        for action in ready.then {
            self.act(action);
        }
    }

    fn save(&mut self, ready: &Ready) {
        for save in &ready.save {
            match save {
                Save::Host(intro) => drop(self.saved_hosts.insert(intro.name.clone(), intro.clone())),
                Save::ForgetGuest { guest, term } => {
                    self.saved.remove(guest);
                    self.forgotten.insert(guest.clone(), *term);
                }
                Save::Guest(plan) => {
                    let text = serde_json::to_string(plan).expect("plans can be written");
                    let read: GuestPlan = serde_json::from_str(&text).expect("plans can be read back");
                    assert_eq!(read, *plan, "a plan changes when it is saved");
                    self.check_seats(plan);
                    let former = self.saved.insert(plan.id.clone(), read);
                    assert!(former.is_none_or(|former| former.term <= plan.term), "a term went back");
                    self.say(format!("saved: {} term {} {} {:?}", plan.id, plan.term, plan.primary, plan.phase));
                }
                Save::Note(note) => self.say(format!("note: {} {}", note.kind, note.message)),
            }
        }
    }

    fn act(&mut self, action: Action) {
        let run = self.run;
        match action {
            Action::Answer { id, result } => {
                self.say(format!("answer: {result:?}"));
                assert!(self.answers.insert(id, result).is_none(), "a request was answered twice");
            }
            Action::Plan { number, question } => self.plan_for(number, &question),
            Action::Probe { host, timeout_ms, .. } => {
                let answered = self.hosts[&host].on;
                let in_us = if answered { self.delay() } else { timeout_ms * 1_000 };
                self.at(in_us, What::Tell { run, event: Event::Probed { host, answered } });
            }
            Action::Order { token, host, order, timeout_ms } => {
                if let Order::Promote { guest, term, .. } = &order {
                    self.check_promise(guest, *term, &host);
                }
                self.open.insert(token, (host.clone(), self.now_us + timeout_ms * 1_000));
                match self.hosts[&host].connection {
                    Some(connection) => {
                        let slow = matches!(order, Order::Witness { .. });
                        let in_us = if slow { 50_000 } else { self.delay() };
                        self.at(in_us, What::Deliver { run, host, connection, token, order });
                    }
                    None => self.end_order(token, Outcome::Unknown { why: "not connected".into() }),
                }
            }
        }
    }

    /// Durable before it is said, and each term for one host only.
    fn check_promise(&mut self, guest: &GuestId, term: Term, host: &HostName) {
        let plan = self.saved.get(guest).expect("a guest that is promoted is saved");
        let to = match &plan.phase {
            Phase::FailingOver(failover) => match &failover.step {
                FailoverStep::Promote { to, .. } => Some(to),
                _ => None,
            },
            Phase::SwitchingOver(switchover) => {
                matches!(switchover.step, SwitchoverStep::Promote { .. }).then_some(&switchover.to)
            }
            _ => None,
        };
        assert_eq!((plan.term, to), (term, Some(host)), "promotion of {guest} was not saved first");
        let first = self.promised.entry((guest.clone(), term)).or_insert_with(|| host.clone());
        assert_eq!(first, host, "term {term} of {guest} was given to two hosts");
    }

    /// What must hold after whatever happens.
    fn check(&self) {
        let mut runs: BTreeMap<&GuestId, Vec<&HostName>> = BTreeMap::new();
        for (name, host) in &self.hosts {
            for guest in host.running() {
                runs.entry(guest).or_default().push(name);
            }
        }
        for (guest, hosts) in runs {
            assert!(hosts.len() < 2, "guest {guest} runs on {hosts:?}");
        }
    }

    pub fn plan(&self, guest: &str) -> Option<&GuestPlan> {
        self.saved.get(&guest.into())
    }

    /// Where the guest runs.
    pub fn runs_on(&self, guest: &str) -> Option<&HostName> {
        let guest = guest.into();
        self.hosts.iter().find(|(_, host)| host.running().any(|running| *running == guest)).map(|(name, _)| name)
    }

    /// Steady, with the primary where the guest runs and all wanted shadows up to date.
    pub fn is_whole(&self, guest: &str) -> bool {
        let Some(plan) = self.plan(guest) else { return false };
        let follows = |host: &HostName| self.hosts[host].follows(&plan.id, plan.term);
        plan.phase == Phase::Steady
            && self.runs_on(guest) == Some(&plan.primary)
            && plan.seats.len() == plan.shadows_wanted as usize
            && plan.seats.iter().all(follows)
    }
}

/// `guest` runs on `host` and is to have so many shadows.
pub fn wish(guest: &str, host: &str, shadows: u32) -> Wish {
    Wish {
        guest: guest.into(),
        domain: guest.into(),
        host: host.into(),
        memory_mib: 256,
        needs: Default::default(),
        policy: Default::default(),
        shadows,
        interval_ms: 50,
        budget: Default::default(),
        mirror_mib: 256,
        keep: Default::default(),
        consistency: Default::default(),
        on: Vec::new(),
    }
}

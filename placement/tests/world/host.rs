//! A host of the simulated fleet: what its records say, what it runs, what it keeps.

use std::collections::BTreeMap;

use placement::guardian::{
    Abilities, Answer, Event, HostIntro, HostReport, Order, Outcome, PeerReport, PrimaryReport, Record, ShadowReport,
};
use placement::term::{self, Role};
use placement::{Epoch, GuestId, HostName, Term};

/// How long after a welcome an agent waits for the manager to say what must not run (as the real one does).
const SETTLE_US: u64 = 1_000_000;
/// How long an agent holds a guest for a switchover without a word (as the real one does).
const HELD_US: u64 = 20_000_000;

#[derive(Debug)]
pub struct SimHost {
    pub intro: HostIntro,
    pub abilities: Abilities,
    pub on: bool,
    pub agent_runs: bool,
    pub agent_away_until_us: u64,
    pub connection: Option<u64>,
    pub welcomed_us: Option<u64>,
    /// Events that the manager has not taken.
    pub events: Vec<Event>,
    /// Survive a power cut.
    records: BTreeMap<GuestId, (Role, Term)>,
    /// Guests that run; those suspended by a final cut with the time since and the host they are to move to.
    runs: BTreeMap<GuestId, Option<(u64, HostName)>>,
    shadows: BTreeMap<GuestId, Shadow>,
    primaries: BTreeMap<GuestId, Primary>,
    promoted: BTreeMap<GuestId, (Term, Epoch)>,
    /// Guests that died here as primaries of a term: not to be started before the manager has decided, which it does
    /// with a higher one.
    held: BTreeMap<GuestId, Term>,
}

#[derive(Debug, Default)]
struct Shadow {
    term: Term,
    committed: Epoch,
    heard_us: u64,
}

#[derive(Debug)]
struct Primary {
    term: Term,
    epoch: Epoch,
    shadows: Vec<HostName>,
    /// What shadows have said that they committed.
    acked: BTreeMap<HostName, Epoch>,
}

impl SimHost {
    pub fn new(intro: HostIntro) -> Self {
        Self {
            intro,
            abilities: Abilities::default(),
            on: true,
            agent_runs: true,
            agent_away_until_us: 0,
            connection: None,
            welcomed_us: None,
            events: Vec::new(),
            records: BTreeMap::new(),
            runs: BTreeMap::new(),
            shadows: BTreeMap::new(),
            primaries: BTreeMap::new(),
            promoted: BTreeMap::new(),
            held: BTreeMap::new(),
        }
    }

    pub fn power_cut(&mut self) {
        self.on = false;
        self.runs.clear();
        self.shadows.clear();
        self.agent_ends();
    }

    /// What it knew besides its records is gone. Shadows are files and domains; they stay.
    pub fn agent_ends(&mut self) {
        self.agent_runs = false;
        self.events.clear();
        self.primaries.clear();
        self.promoted.clear();
        self.held.clear();
    }

    /// It tells what it can find out about guests that ended meanwhile; not why.
    pub fn agent_starts(&mut self) {
        self.agent_runs = true;
    }

    pub fn guest_dies(&mut self, guest: &GuestId) {
        let term = self.records.get(guest).map_or(Term(0), |(_, term)| *term);
        self.held.insert(guest.clone(), term);
        self.ends(guest, |host, guest, term, epoch| Event::Died {
            host,
            guest,
            term,
            detail: "killed".into(),
            last_epoch: epoch,
        });
    }

    pub fn guest_stops(&mut self, guest: &GuestId) {
        self.ends(guest, |host, guest, term, _| Event::Stopped { host, guest, term, how: "shutdown".into() });
    }

    fn ends(&mut self, guest: &GuestId, event: impl FnOnce(HostName, GuestId, Term, Epoch) -> Event) {
        if self.runs.remove(guest).is_none() {
            return;
        }
        let primary = self.primaries.remove(guest);
        if let Some(primary) = primary.filter(|_| self.agent_runs) {
            self.events.push(event(self.intro.name.clone(), guest.clone(), primary.term, primary.epoch));
        }
    }

    pub fn guest_starts(&mut self, guest: &GuestId, now_us: u64) -> bool {
        let newer = |died: &Term| self.role(guest).is_some_and(|(_, term)| term > *died);
        let settled = self.held.get(guest).is_none_or(newer)
            && self.welcomed_us.is_some_and(|at| now_us >= at + SETTLE_US)
            && self.connection.is_some();
        let allowed = match self.records.get(guest) {
            None => true,
            Some((role, term)) => settled && term::may_run(*role, *term, *term).is_ok(),
        };
        if !self.on || !allowed || self.runs.contains_key(guest) {
            return false;
        }
        self.runs.insert(guest.clone(), None);
        if self.agent_runs {
            self.events.push(Event::Started { host: self.intro.name.clone(), guest: guest.clone() });
        }
        true
    }

    /// Comes by migration: the hook lets it pass, whatever ran here before.
    pub fn guest_comes(&mut self, guest: &GuestId) {
        self.runs.insert(guest.clone(), None);
        self.events.push(Event::Started { host: self.intro.name.clone(), guest: guest.clone() });
    }

    pub fn guest_goes(&mut self, guest: &GuestId) {
        self.ends(guest, |host, guest, term, _| Event::Stopped { host, guest, term, how: "migrated".into() });
    }

    /// Guests whose vCPUs run.
    pub fn running(&self) -> impl Iterator<Item = &GuestId> {
        self.runs.iter().filter(|(_, suspended)| suspended.is_none()).map(|(guest, _)| guest)
    }

    pub fn follows(&self, guest: &GuestId, term: Term) -> bool {
        self.shadows.get(guest).is_some_and(|shadow| shadow.term == term && shadow.committed > Epoch(0))
    }

    pub fn role(&self, guest: &GuestId) -> Option<(Role, Term)> {
        self.records.get(guest).copied()
    }

    pub fn hello(&self) -> Vec<Record> {
        let record = |(guest, (role, term)): (&GuestId, &(Role, Term))| Record {
            guest: guest.clone(),
            domain: guest.to_string(),
            term: *term,
            role: *role,
            active: self.runs.contains_key(guest),
        };
        self.records.iter().map(record).collect()
    }

    pub fn report(&self) -> HostReport {
        let primary = |primary: &Primary| PrimaryReport {
            term: primary.term,
            memory_mib: 256,
            epoch: primary.epoch,
            problem: String::new(),
            peers: primary
                .shadows
                .iter()
                .map(|host| {
                    let committed = primary.acked.get(host).copied().unwrap_or_default();
                    (host.clone(), PeerReport { committed, following: committed > Epoch(0), kbit_per_s: 800 })
                })
                .collect(),
        };
        HostReport {
            memory_total_mib: 4096,
            abilities: Some(self.abilities.clone()),
            memory_free_mib: 4096 - 256 * (self.shadows.len() + self.runs.len()) as u64,
            primaries: self.primaries.iter().map(|(guest, own)| (guest.clone(), primary(own))).collect(),
            shadows: self.shadows.iter().map(|(guest, shadow)| (guest.clone(), shadow.report())).collect(),
        }
    }

    fn knows_newer(&self, guest: &GuestId, term: Term) -> Option<Outcome> {
        let (_, known) = self.records.get(guest)?;
        (!term::obeys(*known, term)).then(|| refused("conflict", &format!("knows term {known}")))
    }
}

impl Shadow {
    fn report(&self) -> ShadowReport {
        ShadowReport { term: self.term, committed: self.committed, connected: true, problem: String::new() }
    }
}

fn refused(code: &str, message: &str) -> Outcome {
    Outcome::Refused { code: code.into(), message: message.into() }
}

const NOTHING: Outcome = Outcome::Done(Answer::Nothing);

/// What the host makes of an order. `refuse`: it is in the mood to say no where it may.
pub fn carry_out(
    hosts: &mut BTreeMap<HostName, SimHost>,
    name: &HostName,
    order: &Order,
    refuse: bool,
    now_us: u64,
) -> Outcome {
    if let Order::Witness { suspect, guest, .. } = order {
        let answers = hosts[suspect].on;
        let shadow = guest.as_ref().and_then(|guest| hosts[name].shadows.get(guest));
        let stream_silent_ms = shadow.map(|shadow| (now_us - shadow.heard_us) / 1_000);
        return Outcome::Done(Answer::Witnessed { answers, stream_silent_ms });
    }
    if let Order::FinalCut { guest, to } = order {
        return final_cut(hosts, name, guest, to, refuse, now_us);
    }
    let Some(host) = hosts.get_mut(name) else { return refused("failed", "no such host") };
    match order {
        Order::AcceptShadow { guest, term, .. } => {
            if let Some(no) = host.knows_newer(guest, *term) {
                return no;
            }
            if refuse {
                return refused("failed", "no memory");
            }
            assert!(!host.runs.contains_key(guest), "{name} runs {guest} and is told to keep a shadow of it");
            host.records.insert(guest.clone(), (Role::Shadow, *term));
            host.held.remove(guest);
            host.shadows.entry(guest.clone()).or_default();
            NOTHING
        }
        Order::DropShadow { guest } => {
            host.shadows.remove(guest);
            if matches!(host.records.get(guest), Some((Role::Shadow, _))) {
                host.records.remove(guest);
            }
            NOTHING
        }
        Order::Protect { guest, term, shadows, .. } => {
            if let Some(no) = host.knows_newer(guest, *term) {
                return no;
            }
            host.records.insert(guest.clone(), (Role::Primary, *term));
            if !host.runs.contains_key(guest) {
                return refused("not-running", "does not run here");
            }
            let (epoch, acked) = match host.primaries.remove(guest) {
                Some(primary) => (primary.epoch, primary.acked),
                None => Default::default(),
            };
            let primary = Primary { term: *term, epoch, shadows: shadows.clone(), acked };
            host.primaries.insert(guest.clone(), primary);
            NOTHING
        }
        Order::Release { guest } => {
            host.held.remove(guest);
            host.records.remove(guest);
            host.primaries.remove(guest);
            NOTHING
        }
        Order::Promote { guest, term, after_epoch, .. } => promote(host, guest, *term, *after_epoch, refuse),
        Order::UndoFinalCut { guest, .. } if !host.primaries.contains_key(guest) => {
            refused("not-found", "no primary here")
        }
        Order::UndoFinalCut { guest, term } => {
            let Some(suspended) = host.runs.get_mut(guest) else { return refused("not-running", "it has ended") };
            *suspended = None;
            host.records.insert(guest.clone(), (Role::Primary, *term));
            NOTHING
        }
        Order::Retire { guest, term } => {
            if let Some(no) = host.knows_newer(guest, *term) {
                return no;
            }
            host.runs.remove(guest);
            host.primaries.remove(guest);
            host.records.insert(guest.clone(), (Role::Retired, *term));
            host.held.remove(guest);
            NOTHING
        }
        Order::ShadowStatus { guest } => Outcome::Done(Answer::Shadow(host.shadows.get(guest).map(Shadow::report))),
        Order::Describe { guest } => Outcome::Done(Answer::Described { running: host.runs.contains_key(guest) }),
        Order::Witness { .. } | Order::FinalCut { .. } => NOTHING,
    }
}

fn promote(host: &mut SimHost, guest: &GuestId, term: Term, after: Epoch, refuse: bool) -> Outcome {
    if let Some((_, epoch)) = host.promoted.get(guest).filter(|(done, _)| *done == term) {
        return Outcome::Done(Answer::Promoted { epoch: *epoch });
    }
    if let Some(no) = host.knows_newer(guest, term) {
        return no;
    }
    let committed = host.shadows.get(guest).map_or(Epoch(0), |shadow| shadow.committed);
    if committed == Epoch(0) || committed < after || refuse {
        return refused("failed", "cannot be promoted");
    }
    host.shadows.remove(guest);
    host.runs.insert(guest.clone(), None);
    host.records.insert(guest.clone(), (Role::Primary, term));
    host.promoted.insert(guest.clone(), (term, committed));
    Outcome::Done(Answer::Promoted { epoch: committed })
}

fn final_cut(
    hosts: &mut BTreeMap<HostName, SimHost>,
    name: &HostName,
    guest: &GuestId,
    to: &HostName,
    refuse: bool,
    now_us: u64,
) -> Outcome {
    let takes = hosts.get(to).is_some_and(|to| to.on && to.agent_runs && to.shadows.contains_key(guest));
    let Some(host) = hosts.get_mut(name) else { return refused("failed", "no such host") };
    let (Some(suspended), Some(primary)) = (host.runs.get_mut(guest), host.primaries.get_mut(guest)) else {
        return refused("not-running", "does not run here");
    };
    if refuse || !takes {
        return refused("failed", "the target does not commit");
    }
    *suspended = Some((now_us, to.clone()));
    primary.epoch.0 += 1;
    let (term, epoch) = (primary.term, primary.epoch);
    if let Some(shadow) = hosts.get_mut(to).and_then(|to| to.shadows.get_mut(guest)) {
        (shadow.term, shadow.committed) = (term, epoch);
    }
    Outcome::Done(Answer::Cut { epoch, paused_for_us: 1_000 })
}

/// One epoch of every primary that captures.
pub fn epochs(hosts: &mut BTreeMap<HostName, SimHost>, now_us: u64) {
    go_on_by_themselves(hosts, now_us);
    let mut cuts = Vec::new();
    for host in hosts.values_mut().filter(|host| host.agent_runs) {
        for (guest, primary) in &mut host.primaries {
            if host.runs.get(guest) == Some(&None) {
                primary.epoch.0 += 1;
                let cut = (guest.clone(), primary.term, primary.epoch);
                cuts.extend(primary.shadows.iter().map(|to| (host.intro.name.clone(), to.clone(), cut.clone())));
            }
        }
    }
    for (from, to, (guest, term, epoch)) in cuts {
        let Some(host) = hosts.get_mut(&to).filter(|host| host.on && host.agent_runs) else { continue };
        let Some(shadow) = host.shadows.get_mut(&guest).filter(|shadow| shadow.term <= term) else { continue };
        (shadow.term, shadow.committed, shadow.heard_us) = (term, epoch, now_us);
        if let Some(primary) = hosts.get_mut(&from).and_then(|from| from.primaries.get_mut(&guest)) {
            primary.acked.insert(to, epoch);
        }
    }
}

/// A guest that nobody decided about goes on, if the shadow it was to move to still is one.
fn go_on_by_themselves(hosts: &mut BTreeMap<HostName, SimHost>, now_us: u64) {
    let is_shadow = |to: &HostName, guest: &GuestId| {
        hosts.get(to).is_some_and(|to| to.on && to.agent_runs && to.shadows.contains_key(guest))
    };
    let overdue: Vec<_> = hosts
        .iter()
        .filter(|(_, host)| host.agent_runs)
        .flat_map(|(name, host)| host.runs.iter().map(move |(guest, held)| (name, guest, held)))
        .filter_map(|(name, guest, held)| Some((name, guest, held.as_ref()?)))
        .filter(|(_, guest, (since_us, to))| now_us > since_us + HELD_US && is_shadow(to, guest))
        .map(|(name, guest, _)| (name.clone(), guest.clone()))
        .collect();
    for (name, guest) in overdue {
        if let Some(held) = hosts.get_mut(&name).and_then(|host| host.runs.get_mut(&guest)) {
            *held = None;
        }
    }
}

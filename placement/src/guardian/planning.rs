//! Where shadows go: asks for a plan when one is needed, and takes over what comes back.
//!
//! ```text
//! a guest is to be enabled, lacks a shadow, or  --Action::Plan-->  planner, checker
//! one stands where it cannot stay                                       |
//! seats <-- guests that are as they were <---------Event::Planned-------+
//! ```
//! A plan is about all guests at once, as they share hosts and reserves, and is made elsewhere, as it may take long. One
//! is open at a time, so no room is given away twice. What is not at rest (failing over, moving, leaving) keeps what it
//! has and only counts as used. What stands and may stay is left there; what may not is moved, and given up where it
//! was only when its successor follows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::model::{Guest, Health, Host, Needs, Phase};
use super::requests::{Wish, kept_seats};
use super::{Action, Guardian, Level, Note, Ready, Reply, RequestError, RequestId, Save, upkeep};
use crate::fleet::{
    Capacity, FleetError, FleetPlan, GuestFacts, HostFacts, HostLabels, Policy, Question, SHADOW_OVERHEAD_MIB, Topology,
};
use crate::instance::{HostState, MAX_AMOUNT};
use crate::solver::{Options, Reason, Verdict};
use crate::units::{Budget, GuestId, HostName, Moment, Term};

/// A host that is silent, but not down, loses its shadows only after this many times `replace_after_ms`.
const SILENT_FACTOR: u64 = 6;
/// While nothing but free memory has changed since a plan that left something out, the next one waits: doubled each time.
const AGAIN_FIRST_MS: u64 = 5_000;
const AGAIN_LONGEST_MS: u64 = 60_000;
/// After a start, hosts have so long to report before what stands is looked at.
const LOOK_AFTER_START_MS: u64 = 10_000;
const MAX_PLAN_MOVES: u64 = 400_000;
/// Up to so many hosts are named in a refusal; of more, only counts.
const NAMED_HOSTS: usize = 12;

#[derive(Debug)]
pub(super) struct Planning {
    last: u64,
    open: Option<Asked>,
    /// Guests to be enabled that wait for the next plan.
    wishes: Vec<Waiting>,
    /// What the last plan was asked about, and when the same is asked again at the earliest.
    situation: Option<Situation>,
    wait_ms: u64,
    again: Moment,
    /// When all that stands is looked at, whether something is missing or not.
    look_at: Option<Moment>,
    /// The fault that was told last.
    told: String,
}

/// A guest that is to be enabled, who waits for that, and what was known of the guest when it was asked for.
#[derive(Debug)]
struct Waiting {
    id: RequestId,
    wish: Wish,
    known: Option<(Term, HostName)>,
}

/// A question that is not answered yet.
#[derive(Debug)]
struct Asked {
    number: u64,
    wishes: Vec<Waiting>,
    /// How the guests were that it was about.
    guests: BTreeMap<GuestId, (Term, HostName, u32)>,
}

/// All but amounts that a plan of these guests depends on.
#[derive(Debug, PartialEq, Eq)]
struct Situation {
    hosts: Vec<(HostName, HostState)>,
    guests: Vec<Short>,
}

/// A guest that lacks a shadow.
#[derive(Debug, PartialEq, Eq)]
struct Short {
    id: GuestId,
    primary: HostName,
    wanted: u32,
    seats: Vec<HostName>,
    excluded: BTreeSet<HostName>,
}

impl Planning {
    pub(super) fn begin(now: Moment) -> Self {
        Self {
            last: 0,
            open: None,
            wishes: Vec::new(),
            situation: None,
            wait_ms: AGAIN_FIRST_MS,
            again: now,
            look_at: Some(now.plus_ms(LOOK_AFTER_START_MS)),
            told: String::new(),
        }
    }

    /// What is asked of shadows has changed: they may stand where they must not.
    pub(super) fn look_at_all(&mut self) {
        self.look_at = Some(Moment::default());
    }
}

impl Guardian {
    /// A guest is to be enabled, as soon as a plan has hosts for its shadows.
    pub(super) fn plan_wish(&mut self, id: RequestId, wish: Wish) {
        let known = self.known(&wish.guest);
        self.planning.wishes.push(Waiting { id, wish, known });
    }

    fn known(&self, guest: &GuestId) -> Option<(Term, HostName)> {
        self.guest(guest).map(|guest| (guest.plan.term, guest.plan.primary.clone()))
    }

    /// Asks for a plan if one is needed and none is open.
    pub(super) fn plan_if_needed(&mut self, now: Moment, ready: &mut Ready) {
        if self.planning.open.is_some() {
            return;
        }
        let look = self.planning.look_at.is_some_and(|at| now >= at);
        let short: Vec<&Guest> = self.guests.values().filter(|guest| self.is_short(now, guest)).collect();
        if self.planning.wishes.is_empty() && !look {
            if short.is_empty() {
                self.planning.situation = None;
                return;
            }
            let same = self.planning.situation.as_ref().is_some_and(|known| self.is_still(known, now, &short));
            debug_assert_eq!(same, self.planning.situation.as_ref() == Some(&self.situation(now, &short)));
            if same && now < self.planning.again {
                return;
            }
            let wait_ms = if same { (2 * self.planning.wait_ms).min(AGAIN_LONGEST_MS) } else { AGAIN_FIRST_MS };
            if !same {
                self.planning.situation = Some(self.situation(now, &short));
            }
            (self.planning.wait_ms, self.planning.again) = (wait_ms, now.plus_ms(wait_ms));
        }
        if look {
            self.planning.look_at = None;
        }
        self.ask(now, ready);
    }

    fn ask(&mut self, now: Moment, ready: &mut Ready) {
        let mut wishes = std::mem::take(&mut self.planning.wishes);
        // Of two wishes for one guest the second waits for the plan after this one.
        let mut seen = BTreeSet::new();
        let (now_asked, later): (Vec<Waiting>, _) =
            wishes.drain(..).partition(|waiting| seen.insert(waiting.wish.guest.clone()));
        self.planning.wishes = later;
        let question = self.question(now, &now_asked.iter().map(|waiting| &waiting.wish).collect::<Vec<_>>());
        if question.guests.is_empty() && now_asked.is_empty() {
            return;
        }
        let as_they_are = |facts: &GuestFacts| {
            let plan = &self.guests.get(&facts.id)?.plan;
            Some((facts.id.clone(), (plan.term, plan.primary.clone(), plan.shadows_wanted)))
        };
        let guests = question.guests.iter().filter_map(as_they_are).collect();
        self.planning.last += 1;
        let number = self.planning.last;
        self.planning.open = Some(Asked { number, wishes: now_asked, guests });
        ready.then.push(Action::Plan { number, question: Box::new(question) });
    }

    /// It lacks a shadow, or has one on a host that stays away.
    fn is_short(&self, now: Moment, guest: &Guest) -> bool {
        let plan = &guest.plan;
        plan.phase == Phase::Steady
            && ((plan.staying().count() as u32) < plan.shadows_wanted
                || plan.staying().any(|host| self.planned_state(now, host) == HostState::Down))
    }

    /// A host that does not answer takes nothing new; what it keeps is made elsewhere when it has been away for long.
    fn planned_state(&self, now: Moment, name: &HostName) -> HostState {
        let Some(host) = self.hosts.get(name) else { return HostState::Down };
        let replace_after_ms = self.settings.replace_after_ms;
        let away = match host.health {
            Health::Down { since } => now.ms_since(since) >= replace_after_ms,
            _ if host.is_up() => return HostState::Up,
            _ => now.ms_since(host.last_seen) >= replace_after_ms.saturating_mul(SILENT_FACTOR),
        };
        if away { HostState::Down } else { HostState::Drain }
    }

    fn situation(&self, now: Moment, short: &[&Guest]) -> Situation {
        let guest = |guest: &&Guest| Short {
            id: guest.plan.id.clone(),
            primary: guest.plan.primary.clone(),
            wanted: guest.plan.shadows_wanted,
            seats: guest.plan.staying().cloned().collect(),
            excluded: self.excluded(now, guest),
        };
        Situation {
            hosts: self.hosts.keys().map(|name| (name.clone(), self.planned_state(now, name))).collect(),
            guests: short.iter().map(guest).collect(),
        }
    }

    /// Whether [`Guardian::situation`] would be `known`; asked at each event while a guest is short, so nothing is built.
    fn is_still(&self, known: &Situation, now: Moment, short: &[&Guest]) -> bool {
        let host = |((name, state), host): (&(HostName, HostState), &HostName)| {
            name == host && *state == self.planned_state(now, host)
        };
        let guest = |(known, guest): (&Short, &&Guest)| {
            let Short { id, primary, wanted, seats, excluded } = known;
            let plan = &guest.plan;
            *id == plan.id
                && *primary == plan.primary
                && *wanted == plan.shadows_wanted
                && seats.iter().eq(plan.staying())
                && self.excluded_hosts(now, guest).all(|host| excluded.contains(host))
                && excluded.iter().all(|host| self.excluded_hosts(now, guest).any(|other| other == host))
        };
        known.hosts.len() == self.hosts.len()
            && known.guests.len() == short.len()
            && known.hosts.iter().zip(self.hosts.keys()).all(host)
            && known.guests.iter().zip(short).all(guest)
    }

    /// What a plan for all guests depends on, as if `wish` were granted. Changes nothing.
    pub fn what_if(&self, now: Moment, wish: Option<Wish>) -> Question {
        self.question(now, &wish.iter().collect::<Vec<_>>())
    }

    fn question(&self, now: Moment, wishes: &[&Wish]) -> Question {
        let topology = self.topology.clone().unwrap_or_else(|| Topology::from_labels(self.hosts.values().map(labels)));
        let wished = |id: &GuestId| wishes.iter().any(|wish| wish.guest == *id);
        let planned = |guest: &&Guest| {
            guest.plan.phase == Phase::Steady && !wished(&guest.plan.id) && topology.knows(&guest.plan.primary)
        };
        let mut guests: Vec<GuestFacts> =
            self.guests.values().filter(planned).map(|guest| self.facts_of_guest(now, guest)).collect();
        let of_wish = |wish: &&Wish| self.facts_of_wish(now, wish);
        guests.extend(wishes.iter().map(of_wish).filter(|facts| topology.knows(&facts.primary)));
        let lacking = guests.iter().flat_map(|guest| &guest.shadows).filter(|host| host.is_none()).count() as u64;
        let effort = self.settings.plan_effort;
        let moves = Some(effort.saturating_mul(lacking.max(1)).min(MAX_PLAN_MOVES));
        let hosts = self.hosts.values().map(|host| self.facts_of_host(now, host, &guests)).collect();
        Question { topology, hosts, guests, options: Options { moves, keep: true, ..Options::default() } }
    }

    fn excluded(&self, now: Moment, guest: &Guest) -> BTreeSet<HostName> {
        self.excluded_hosts(now, guest).cloned().collect()
    }

    /// Hosts that have refused it a moment ago, or have not given up their former copy yet; some twice. Who is not up
    /// takes nothing anyway.
    fn excluded_hosts<'g>(&'g self, now: Moment, guest: &'g Guest) -> impl Iterator<Item = &'g HostName> {
        let plan = &guest.plan;
        let pending = plan.former.keys().filter(move |host| plan.is_left_behind(host));
        let refused = guest.live.excluded.iter().filter(move |(_, (until, _))| now < *until).map(|(host, _)| host);
        let refused = refused.filter(move |host| !plan.is_at_home(host));
        let is_up = move |host: &&'g HostName| self.hosts.get(*host).is_some_and(Host::is_up);
        pending.chain(refused).filter(is_up)
    }

    fn facts_of_guest(&self, now: Moment, guest: &Guest) -> GuestFacts {
        let plan = &guest.plan;
        let staying = |host: &HostName| plan.seats.contains(host) && !plan.going.contains(host);
        let mut shadows: Vec<Option<HostName>> =
            plan.order.iter().map(|host| staying(host).then(|| host.clone())).collect();
        shadows.resize(plan.shadows_wanted as usize, None);
        fill(&mut shadows, plan.staying().chain(&plan.on).chain(&plan.home));
        GuestFacts {
            stream_mbit: stream_mbit(plan.budget, guest.live.stream_kbit),
            shadows,
            excluded: self.excluded(now, guest),
            ..facts(&plan.id, &plan.primary, plan.shadow_mib(), &plan.needs, plan.wanted_policy())
        }
    }

    fn facts_of_wish(&self, now: Moment, wish: &Wish) -> GuestFacts {
        let known = self.guests.get(&wish.guest);
        let kept = known.map(|guest| kept_seats(guest, wish)).unwrap_or_default();
        let mut shadows = vec![None; wish.shadows as usize];
        fill(&mut shadows, kept.iter().chain(&wish.on));
        GuestFacts {
            stream_mbit: stream_mbit(wish.budget, known.map_or(0, |guest| guest.live.stream_kbit)),
            shadows,
            excluded: known.map(|guest| self.excluded(now, guest)).unwrap_or_default(),
            ..facts(
                &wish.guest,
                &wish.host,
                wish.memory_mib.saturating_add(wish.keep.mib),
                &wish.needs,
                wish.policy.resized(wish.shadows as usize),
            )
        }
    }

    fn facts_of_host(&self, now: Moment, host: &Host, planned: &[GuestFacts]) -> HostFacts {
        let name = &host.intro.name;
        // What stands here: there already, or about to fill its memory; of guests that are planned, or not.
        let (mut present, mut coming, mut fixed) = (0, 0, 0);
        for guest in self.guests.values().filter(|guest| guest.plan.seats.contains(name)) {
            let need_mib = (guest.plan.shadow_mib() as i64).saturating_add(SHADOW_OVERHEAD_MIB);
            let filled = host.report.shadows.get(&guest.plan.id).is_some_and(|shadow| shadow.committed.0 > 0);
            let counted = |facts: &GuestFacts| facts.shadows.iter().flatten().any(|seat| seat == name);
            let planned = planned.iter().find(|facts| facts.id == guest.plan.id).is_some_and(counted);
            match (planned, filled) {
                (true, true) => present += need_mib,
                (true, false) => coming += need_mib,
                (false, true) => (),
                (false, false) => fixed += need_mib,
            }
        }
        // Of a host that is down what stands there is kept for a while; to others it is what it is.
        let keeps = planned.iter().any(|facts| facts.shadows.iter().flatten().any(|seat| seat == name));
        let state = match host.is_down() && !keeps {
            true => HostState::Down,
            false => self.planned_state(now, name),
        };
        let free_mib = (host.report.memory_free_mib as i64 + present - fixed).max(present + coming);
        let primaries = || {
            let here = |guest: &&Guest| guest.plan.primary == *name && guest.plan.phase != Phase::Leaving;
            self.guests.values().filter(here).map(|guest| &guest.plan.needs)
        };
        let abilities = &host.abilities;
        let all_milli = i64::from(abilities.cpus) * 1000 * i64::from(self.settings.cpu_overcommit);
        let used_milli: i64 = primaries().map(|needs| i64::from(needs.vcpus) * 1000).sum();
        let used_vfs: i64 = primaries().map(|needs| i64::from(needs.vfs)).sum();
        HostFacts {
            name: name.clone(),
            state,
            cpu: match abilities.cpus {
                0 => Capacity::UNKNOWN,
                _ => Capacity { total: all_milli, free: all_milli - used_milli },
            },
            memory: Capacity { total: (host.report.memory_total_mib as i64).max(free_mib), free: free_mib },
            far_mib: MAX_AMOUNT,
            vfs: abilities.vfs.map_or(MAX_AMOUNT, |vfs| i64::from(vfs) - used_vfs),
            cpu_models: abilities.cpu_models.clone(),
            machine_types: abilities.machine_types.clone(),
            labels: abilities.labels.clone(),
        }
    }

    /// A plan has come back, or why there is none.
    pub(super) fn planned(
        &mut self,
        now: Moment,
        number: u64,
        result: Result<Arc<FleetPlan>, Arc<FleetError>>,
        ready: &mut Ready,
    ) {
        let Some(asked) = self.planning.open.take_if(|asked| asked.number == number) else { return };
        let plan = match result {
            Ok(plan) => plan,
            Err(error) => return self.no_plan(asked, &error, ready),
        };
        self.planning.told.clear();
        for (id, as_asked) in &asked.guests {
            let wished = asked.wishes.iter().any(|waiting| waiting.wish.guest == *id);
            let Some(hosts) = plan.hosts_of(id).filter(|_| !wished) else { continue };
            let is_down = |host: &HostName| self.planned_state(now, host) == HostState::Down;
            let away: BTreeSet<HostName> = match self.guests.get(id) {
                Some(guest) => guest.plan.seats.iter().filter(|host| is_down(host)).cloned().collect(),
                None => continue,
            };
            let note = why_not(&plan, id).unwrap_or_default();
            self.with_guest(now, id, ready, |guest, cx| {
                let as_is = (guest.plan.term, guest.plan.primary.clone(), guest.plan.shadows_wanted);
                if guest.plan.phase == Phase::Steady && as_is == *as_asked {
                    // What has become impossible since is left to the next plan.
                    let usable = |host: &&HostName| !cx.is_down(host) && !guest.plan.is_left_behind(host);
                    let hosts: Vec<HostName> = hosts.iter().flatten().filter(usable).cloned().collect();
                    take_over(guest, cx, hosts, &away, note);
                }
            });
        }
        for Waiting { id, wish, known } in asked.wishes {
            let result = match self.known(&wish.guest) == known {
                true => self.grant(now, wish, &plan, ready),
                false => {
                    let domain = &wish.domain;
                    Err(RequestError::Conflict(format!("guest {domain} was moved or disabled meanwhile; try again")))
                }
            };
            ready.then.push(Action::Answer { id, result: result.map(|()| Reply::Enabled) });
        }
        for id in self.guests.keys().cloned().collect::<Vec<_>>() {
            self.note_unknown_host(&id);
        }
    }

    /// Nothing is done without a plan that the checker has accepted.
    fn no_plan(&mut self, asked: Asked, error: &FleetError, ready: &mut Ready) {
        let message = format!("no shadow is placed: {error}");
        for Waiting { id, wish, .. } in asked.wishes {
            let result = Err(RequestError::Failed(format!("guest {}: {message}", wish.domain)));
            ready.then.push(Action::Answer { id, result });
        }
        let (level, kind) = match error {
            FleetError::Refused { .. } | FleetError::Broken { .. } => (Level::Alarm, "plan-refused"),
            _ => (Level::Warning, "plan-failed"),
        };
        if self.planning.told != message {
            self.planning.told.clone_from(&message);
            let note = Note { level, kind: kind.into(), domain: None, host: None, message, figures: Vec::new() };
            ready.save.push(Save::Note(note));
        }
    }

    fn grant(&mut self, now: Moment, wish: Wish, plan: &FleetPlan, ready: &mut Ready) -> Result<(), RequestError> {
        let hosts = plan.hosts_of(&wish.guest).unwrap_or_default();
        let refused = |why: String| Err(RequestError::Refused(format!("guest {}: {why}", wish.domain)));
        let placed: Vec<HostName> = hosts.iter().flatten().cloned().collect();
        if let Some(pin) = wish.on.iter().find(|pin| !placed.contains(pin)) {
            let why = (0..hosts.len()).filter_map(|shadow| plan.explain(&wish.guest, shadow)).flatten();
            let barred = |(host, verdict): (HostName, Verdict)| match verdict {
                Verdict::Barred(_) if host == *pin => Some(verdict.to_string()),
                _ => None,
            };
            let why = why.filter_map(barred).next_back().unwrap_or_else(|| "there is no room beside the others".into());
            return refused(format!(
                "of the hosts named, {pin} cannot keep a shadow: {why}; name other hosts with --on, or leave the choice \
                 to the manager"
            ));
        }
        if placed.len() < wish.shadows as usize {
            return refused(why_not(plan, &wish.guest).unwrap_or_else(|| "there is no plan for it".into()));
        }
        self.enable(now, wish, placed, ready)
    }

    /// What a plan leaves out altogether.
    fn note_unknown_host(&mut self, id: &GuestId) {
        let Some(topology) = &self.topology else { return };
        let Some(guest) = self.guests.get_mut(id).filter(|guest| !topology.knows(&guest.plan.primary)) else { return };
        guest.live.placement_note = format!(
            "runs on {}, which the manager's topology file does not know, so no shadow of it is placed",
            guest.plan.primary
        );
    }
}

/// Gives a guest that is at rest the seats of a plan. `away`: hosts whose seats are lost.
fn take_over(
    guest: &mut Guest,
    cx: &mut super::Context<'_>,
    hosts: Vec<HostName>,
    away: &BTreeSet<HostName>,
    note: String,
) {
    for host in &hosts {
        guest.plan.going.remove(host);
        if guest.plan.seats.insert(host.clone()) {
            guest.live.accepts.remove(host);
            cx.note(Level::Info, "shadow-placed", guest, Some(host), format!("a shadow goes to {host}"));
        }
    }
    let mut surplus = guest.plan.staying().count().saturating_sub(guest.plan.shadows_wanted as usize);
    let mut stale: Vec<HostName> = guest.plan.staying().filter(|host| !hosts.contains(host)).cloned().collect();
    stale.sort_by_key(|host| !away.contains(host));
    for host in stale {
        if surplus == 0 {
            break;
        }
        surplus -= 1;
        if away.contains(&host) {
            upkeep::give_up(guest, &host);
        } else {
            let message = format!("the shadow on {host} cannot stay there; it is given up when its successor follows");
            cx.note(Level::Info, "shadow-moves", guest, Some(&host), message);
            guest.plan.going.insert(host);
        }
    }
    if guest.plan.staying().count() >= guest.plan.shadows_wanted as usize {
        guest.plan.home = None;
    }
    guest.plan.order = hosts;
    guest.live.placement_note = note;
}

fn labels(host: &Host) -> HostLabels {
    let (power, switch) = (host.abilities.power.clone(), host.abilities.switch.clone());
    HostLabels { host: host.intro.name.clone(), rack: host.intro.rack.clone(), power, switch }
}

fn facts(id: &GuestId, primary: &HostName, memory_mib: u64, needs: &Needs, policy: Policy) -> GuestFacts {
    GuestFacts {
        cpu_milli: i64::from(needs.vcpus) * 1000,
        vfs: needs.vfs.into(),
        cpu_model: needs.cpu_model.clone(),
        machine_type: needs.machine_type.clone(),
        ..GuestFacts::with_memory(id.clone(), primary.clone(), memory_mib.min(MAX_AMOUNT as u64) as i64, policy)
    }
}

/// What stands, or is to stand if it can, in the order of preference, on shadows that have no host.
fn fill<'h>(shadows: &mut [Option<HostName>], hosts: impl Iterator<Item = &'h HostName>) {
    for host in hosts {
        if !shadows.iter().flatten().any(|taken| taken == host)
            && let Some(free) = shadows.iter_mut().find(|shadow| shadow.is_none())
        {
            *free = Some(host.clone());
        }
    }
}

/// What a stream may take where that is limited, else the most that it took lately.
fn stream_mbit(budget: Budget, seen_kbit: u64) -> i64 {
    let kbit = if budget.wire_kbit > 0 { budget.wire_kbit } else { seen_kbit };
    kbit.div_ceil(1000).min(MAX_AMOUNT as u64) as i64
}

/// Why a guest gets fewer shadows than it asks for: hosts counted by reason, and the nearest remedy. None: it gets all.
pub fn why_not(plan: &FleetPlan, guest: &GuestId) -> Option<String> {
    let refusal = plan.refusals.iter().find(|refusal| refusal.guest == *guest)?;
    let hosts = plan.hosts_of(guest).unwrap_or_default();
    let (wanted, possible) = (hosts.len(), hosts.iter().flatten().count());
    let mut names: BTreeMap<Reason, Vec<&str>> = BTreeMap::new();
    let verdicts = match plan.hosts().len() <= NAMED_HOSTS {
        true => plan.explain(guest, refusal.shadow).unwrap_or_default(),
        false => Vec::new(),
    };
    for (host, verdict) in &verdicts {
        if let Verdict::Barred(objections) = verdict
            && let Some(first) = objections.first()
        {
            names.entry(first.reason).or_default().push(host.as_str());
        }
    }
    let count = |(reason, count): (&Reason, &u64)| match names.get(reason) {
        Some(names) => format!("{count} {} ({})", reason.describe(), names.join(", ")),
        None => format!("{count} {}", reason.describe()),
    };
    let counts: Vec<String> = refusal.counts.iter().map(count).collect();
    let all: u64 = refusal.counts.values().sum();
    let plural = if wanted == 1 { "" } else { "s" };
    let mut text =
        format!("{wanted} shadow{plural} wanted, {possible} possible; of {all} hosts: {}", counts.join(", "));
    if let Some(remedy) = refusal.remedy() {
        text += &format!("; nearest remedy: {remedy}");
    }
    Some(text)
}

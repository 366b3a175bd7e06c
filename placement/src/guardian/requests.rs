//! What operators ask for: checked against the plan, then put into it.

use std::collections::{BTreeMap, BTreeSet};

use super::context::Context;
use super::failover::{self, Cause};
use super::model::{Guest, GuestPlan, Leave, Live, Needs, Phase, Record};
use super::{Action, Guardian, Level, Ready, Reply, Request, RequestError, RequestId, Save, switchover, upkeep};
use crate::consistency::{Consistency, Quorum};
use crate::fleet::{MAX_SHADOWS, Policy, Tier};
use crate::term::Role;
use crate::units::{Budget, Epoch, GuestId, HostName, Keep, Moment, Term};

/// Bounds of the time between cuts, milliseconds.
pub const INTERVAL_MS: std::ops::RangeInclusive<u64> = 10..=60_000;
/// Memory for previous contents of a guest's pages: at most as much as the largest guest has, which is "all of it".
pub const MIRROR_MIB: std::ops::RangeInclusive<u64> = 0..=16 << 20;
/// Enough for a guest that dirties 100 MB between two cuts.
pub const DEFAULT_MIRROR_MIB: u64 = 256;

/// Former epochs that a shadow may keep at most: as many as one answer can list.
pub const KEEP_EPOCHS: std::ops::RangeInclusive<u64> = 0..=20_000;
pub const KEEP_MIB: std::ops::RangeInclusive<u64> = 0..=1 << 20;
/// Memory for former epochs if only their number or age was given.
pub const DEFAULT_KEEP_MIB: u64 = 256;

/// A guest that runs on `host` now is to be protected so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    pub guest: GuestId,
    pub domain: String,
    pub host: HostName,
    pub memory_mib: u64,
    pub needs: Needs,
    pub policy: Policy,
    pub shadows: u32,
    pub interval_ms: u64,
    pub budget: Budget,
    pub mirror_mib: u64,
    pub consistency: Consistency,
    pub keep: Keep,
    /// Hosts that must keep a shadow.
    pub on: Vec<HostName>,
}

impl Guardian {
    pub(super) fn requested(&mut self, now: Moment, id: RequestId, request: Request, ready: &mut Ready) {
        let known = |guest: &GuestId| match self.guest(guest) {
            Some(_) => Ok(()),
            None => Err(RequestError::NotFound(format!("guest {guest} is not protected"))),
        };
        let result = match request {
            Request::Enable(wish) => {
                match self.check_wish(&wish) {
                    Ok(()) => self.plan_wish(id, wish),
                    Err(error) => ready.then.push(Action::Answer { id, result: Err(error) }),
                }
                return;
            }
            Request::SetPolicy { guest, policy } => known(&guest).and_then(|()| {
                check_policy(&policy)?;
                let consistency = self.guest(&guest).map(|guest| guest.plan.consistency).unwrap_or_default();
                check_quorum(consistency, policy.shadows.len() as u32)?;
                self.planning.look_at_all();
                self.with_guest(now, &guest, ready, |guest, cx| set_policy(guest, cx, policy));
                ready.then.push(Action::Answer { id, result: Ok(Reply::PolicySet) });
                Ok(())
            }),
            Request::Disable { guest } => {
                known(&guest).map(|()| self.with_guest(now, &guest, ready, |guest, cx| disable(guest, cx, id)))
            }
            Request::Promote { guest, to, force, back_to } => known(&guest).map(|()| {
                self.with_guest(now, &guest, ready, |guest, cx| {
                    if let Err(error) = promote(guest, cx, id, (to, back_to), force) {
                        cx.answer(Some(id), Err(error));
                    }
                });
            }),
            Request::Switchover { guest, to } => known(&guest).map(|()| {
                self.with_guest(now, &guest, ready, |guest, cx| {
                    if let Err(error) = switch_over(guest, cx, id, to) {
                        cx.answer(Some(id), Err(error));
                    }
                });
            }),
        };
        if let Err(error) = result {
            ready.then.push(Action::Answer { id, result: Err(error) });
        }
    }

    fn check_wish(&self, wish: &Wish) -> Result<(), RequestError> {
        check_wish(wish)?;
        if !self.hosts.get(&wish.host).is_some_and(|host| host.connected) {
            return Err(RequestError::Conflict(format!("host {} is not connected to the manager", wish.host)));
        }
        if let Some(unknown) = wish.on.iter().find(|host| !self.hosts.contains_key(*host)) {
            let domain = &wish.domain;
            return Err(RequestError::Refused(format!("guest {domain}: of the hosts named, 1 is unknown ({unknown})")));
        }
        if let Some(topology) = &self.topology
            && !topology.knows(&wish.host)
        {
            return Err(RequestError::Refused(format!(
                "guest {} runs on {}, which the manager's topology file does not know; add it there",
                wish.domain, wish.host
            )));
        }
        self.guests.get(&wish.guest).map_or(Ok(()), |guest| may_be_enabled(guest, wish))
    }

    /// Protects a guest with shadows on `hosts`, which a plan gave it.
    pub(super) fn enable(
        &mut self,
        now: Moment,
        wish: Wish,
        hosts: Vec<HostName>,
        ready: &mut Ready,
    ) -> Result<(), RequestError> {
        self.check_wish(&wish)?;
        let id = wish.guest.clone();
        if !self.guests.contains_key(&id) {
            let plan = plan_of_a_stranger(&id, &wish.domain, self.last_term(&id), &wish.host);
            self.guests.insert(id.clone(), Guest::new(plan, now));
        }
        self.with_guest(now, &id, ready, |guest, cx| apply(guest, cx, wish, hosts));
        Ok(())
    }
}

/// Of a guest that is not protected.
fn plan_of_a_stranger(id: &GuestId, domain: &str, term: Term, primary: &HostName) -> GuestPlan {
    GuestPlan {
        id: id.clone(),
        domain: domain.to_owned(),
        term,
        primary: primary.clone(),
        shadows_wanted: 0,
        interval_ms: *INTERVAL_MS.end(),
        budget: Budget::default(),
        mirror_mib: 0,
        keep: Keep::default(),
        consistency: Consistency::default(),
        memory_mib: 0,
        needs: Needs::default(),
        policy: Policy::default(),
        on: Vec::new(),
        seats: BTreeSet::new(),
        order: Vec::new(),
        going: BTreeSet::new(),
        home: None,
        former: BTreeMap::new(),
        phase: Phase::Leaving,
    }
}

impl Guardian {
    /// The highest term that was ever met for a guest that is not protected.
    fn last_term(&self, id: &GuestId) -> Term {
        let known = [self.forgotten.get(id), self.strangers.get(id)];
        known.into_iter().flatten().copied().max().unwrap_or(Term(0))
    }

    /// A host has a record of a guest that was disabled while it was away: it is told to forget it too.
    pub(super) fn forget_there(&mut self, now: Moment, host: &HostName, record: &Record, ready: &mut Ready) -> bool {
        let id = &record.guest;
        if self.forgotten.get(id).is_none_or(|term| *term < record.term) {
            return false;
        }
        let leave = if record.role == Role::Shadow { Leave::Drop } else { Leave::Release };
        let mut plan = plan_of_a_stranger(id, &record.domain, self.last_term(id), host);
        plan.former.insert(host.clone(), leave);
        ready.save.push(Save::Guest(plan.clone()));
        self.guests.insert(id.clone(), Guest::new(plan, now));
        self.with_guest(now, id, ready, |_, _| ());
        true
    }
}

fn check_wish(wish: &Wish) -> Result<(), RequestError> {
    let invalid = |message: String| Err(RequestError::Invalid(message));
    check_policy(&wish.policy)?;
    if wish.shadows == 0 || wish.shadows > MAX_SHADOWS {
        return invalid(format!("{} shadows: must be 1 to {MAX_SHADOWS}", wish.shadows));
    }
    if !INTERVAL_MS.contains(&wish.interval_ms) {
        let (min, max) = (INTERVAL_MS.start(), INTERVAL_MS.end());
        return invalid(format!("interval of {} ms: must be {min} to {max}", wish.interval_ms));
    }
    if !MIRROR_MIB.contains(&wish.mirror_mib) {
        return invalid(format!("mirror of {} MiB: must be at most {}", wish.mirror_mib, MIRROR_MIB.end()));
    }
    let Keep { epochs, age_ms, mib } = wish.keep;
    if !KEEP_EPOCHS.contains(&epochs) || !KEEP_MIB.contains(&mib) {
        let (epochs_max, mib_max) = (KEEP_EPOCHS.end(), KEEP_MIB.end());
        return invalid(format!("keep {epochs} epochs in {mib} MiB: must be at most {epochs_max} in {mib_max} MiB"));
    }
    if mib == 0 && (epochs > 0 || age_ms > 0) {
        return invalid("former epochs cannot be kept in no memory: say how many MiB, or keep none".into());
    }
    let Budget { pause_permille, cpu_percent, .. } = wish.budget;
    if pause_permille > 1_000 || cpu_percent > 100_000 {
        return invalid(format!("budget of {pause_permille} thousandths and {cpu_percent} % of a processor: too much"));
    }
    check_quorum(wish.consistency, wish.shadows)?;
    let distinct: BTreeSet<_> = wish.on.iter().collect();
    if distinct.len() != wish.on.len() {
        return invalid("a host is named twice".into());
    }
    if wish.on.len() > wish.shadows as usize {
        return invalid(format!("{} hosts named for {} shadows", wish.on.len(), wish.shadows));
    }
    Ok(())
}

fn check_quorum(consistency: Consistency, shadows: u32) -> Result<(), RequestError> {
    match consistency.quorum {
        Quorum::Count(count) if count > shadows => {
            Err(RequestError::Invalid(format!("quorum of {count} with {shadows} shadows: it could never be had")))
        }
        _ => Ok(()),
    }
}

fn check_policy(policy: &Policy) -> Result<(), RequestError> {
    match policy.shadows.iter().find(|shadow| shadow.tier != Tier::Hot) {
        None => Ok(()),
        Some(shadow) => {
            let tier = shadow.tier.name();
            Err(RequestError::Refused(format!("shadows of tier {tier} cannot be kept yet; ask for hot ones")))
        }
    }
}

/// Whether things are so that a guest can be enabled, or changed.
fn may_be_enabled(guest: &Guest, wish: &Wish) -> Result<(), RequestError> {
    let domain = &guest.plan.domain;
    match &guest.plan.phase {
        Phase::Leaving | Phase::Stopped { .. } | Phase::Lost { .. } => Ok(()),
        Phase::Steady if guest.plan.primary == wish.host => Ok(()),
        Phase::Steady => {
            let primary = &guest.plan.primary;
            Err(RequestError::Conflict(format!("guest {domain} is protected already, with {primary} as primary")))
        }
        Phase::FailingOver(_) | Phase::SwitchingOver(_) => {
            Err(RequestError::Conflict(format!("guest {domain} is being moved; try again when that has ended")))
        }
    }
}

/// Which of its seats a guest keeps if `wish` is granted, in their order.
pub(super) fn kept_seats(guest: &Guest, wish: &Wish) -> Vec<HostName> {
    if guest.plan.phase == Phase::Leaving || guest.plan.primary != wish.host {
        return Vec::new();
    }
    let keep = |host: &&HostName| wish.on.is_empty() || wish.on.contains(host);
    let mut kept: Vec<HostName> = guest.plan.staying().filter(keep).cloned().collect();
    kept.truncate(wish.shadows as usize);
    kept
}

/// Enables a guest, or changes what an enabled one wants.
fn apply(guest: &mut Guest, cx: &mut Context<'_>, wish: Wish, hosts: Vec<HostName>) {
    let new_guest = guest.plan.phase == Phase::Leaving;
    let old_primary = std::mem::replace(&mut guest.plan.primary, wish.host.clone());
    if !new_guest && old_primary != wish.host {
        guest.plan.former.insert(old_primary, Leave::Retire);
    }
    let seats: BTreeSet<HostName> = hosts.iter().cloned().collect();
    for host in guest.plan.seats.iter().filter(|host| !seats.contains(*host)) {
        guest.plan.former.insert(host.clone(), Leave::Drop);
    }
    let plan = &mut guest.plan;
    plan.former.remove(&plan.primary);
    plan.former.retain(|host, leave| !(seats.contains(host) && matches!(leave, Leave::Release | Leave::Drop)));
    if plan.phase != Phase::Steady {
        plan.term = plan.term.next();
        plan.phase = Phase::Steady;
        guest.live = Live::new(cx.now);
    }
    plan.seats = seats;
    plan.order = hosts;
    plan.going.clear();
    plan.home = None;
    plan.domain = wish.domain;
    plan.shadows_wanted = wish.shadows;
    plan.memory_mib = wish.memory_mib;
    plan.needs = wish.needs;
    plan.on = wish.on;
    if plan.policy != wish.policy {
        plan.policy = wish.policy;
        guest.live.protect = super::Seat::Needed;
    }
    let wanted = (wish.interval_ms, wish.budget, wish.mirror_mib, wish.consistency);
    if (plan.interval_ms, plan.budget, plan.mirror_mib, plan.consistency) != wanted {
        (plan.interval_ms, plan.budget, plan.mirror_mib, plan.consistency) = wanted;
        guest.live.protect = super::Seat::Needed;
    }
    if std::mem::replace(&mut guest.plan.keep, wish.keep) != wish.keep {
        guest.live.accepts.clear();
    }
    let names: Vec<_> = guest.plan.seats.iter().map(HostName::as_str).collect();
    let message = format!(
        "{} shadows on {} every {} ms, primary on {}",
        names.len(),
        names.join(", "),
        guest.plan.interval_ms,
        guest.plan.primary
    );
    cx.note(Level::Info, "enable", guest, Some(&guest.plan.primary), message);
}

fn set_policy(guest: &mut Guest, cx: &mut Context<'_>, policy: Policy) {
    let plan = &mut guest.plan;
    plan.shadows_wanted = policy.shadows.len() as u32;
    let bounds = (*INTERVAL_MS.start(), *INTERVAL_MS.end());
    if let Some(ms) = policy.interval_ms {
        plan.interval_ms = u64::from(ms).clamp(bounds.0, bounds.1);
    }
    plan.policy = policy;
    plan.on.truncate(plan.shadows_wanted as usize);
    guest.live.protect = super::Seat::Needed;
    let text = guest.plan.policy.to_string().trim().replace('\n', ", ");
    let text = if text.is_empty() { "the default" } else { &text };
    cx.note(Level::Info, "policy", guest, None, format!("asks of its shadows: {text}"));
}

fn disable(guest: &mut Guest, cx: &mut Context<'_>, id: RequestId) {
    if let Phase::SwitchingOver(_)
    | Phase::FailingOver(super::Failover { step: super::FailoverStep::Promote { .. }, .. }) = &guest.plan.phase
    {
        let message = format!("guest {} is being moved; try again when that has ended", guest.plan.domain);
        return cx.answer(Some(id), Err(RequestError::Conflict(message)));
    }
    cx.note(Level::Info, "disable", guest, Some(&guest.plan.primary), "no longer protected");
    let asker = guest.live.asker.take();
    cx.answer(asker, Err(RequestError::Conflict("the guest was disabled meanwhile".into())));
    for host in std::mem::take(&mut guest.plan.seats) {
        guest.plan.former.insert(host, Leave::Drop);
    }
    guest.plan.former.insert(guest.plan.primary.clone(), Leave::Release);
    guest.plan.phase = Phase::Leaving;
    guest.live = Live::new(cx.now);
    guest.live.asker = Some(id);
    upkeep::tell_disabled(guest, cx);
}

fn promote(
    guest: &mut Guest,
    cx: &mut Context<'_>,
    id: RequestId,
    (to, back_to): (Option<HostName>, Option<Epoch>),
    force: bool,
) -> Result<(), RequestError> {
    let domain = guest.plan.domain.clone();
    let primary = guest.plan.primary.clone();
    if let Some(to) = &to {
        check_target(guest, cx, to)?;
    }
    let (text, retire_first) = match &guest.plan.phase {
        // Its old host may have started it again a moment ago.
        Phase::Lost { .. } => ("ordered by an operator".to_owned(), !cx.is_down(&primary)),
        Phase::Steady if !force => {
            return Err(RequestError::Conflict(format!(
                "guest {domain} has a primary on {primary} that is not counted as gone; move it without loss with \
                 `virt-shadow switchover {domain}`, or stop it there first with --force"
            )));
        }
        Phase::Steady => ("stopped by an operator's forced promotion".to_owned(), true),
        Phase::FailingOver(_) => {
            return Err(RequestError::Conflict(format!("guest {domain} is failing over already: {}", guest.reason())));
        }
        Phase::SwitchingOver(_) => {
            return Err(RequestError::Conflict(format!("guest {domain} is being switched over")));
        }
        Phase::Stopped { how } => {
            return Err(RequestError::Conflict(format!(
                "guest {domain} was stopped on purpose ({how}) and has no shadows; start it on {primary}"
            )));
        }
        Phase::Leaving => return Err(RequestError::NotFound(format!("guest {domain} is not protected"))),
    };
    if guest.plan.seats.is_empty() {
        return Err(RequestError::Conflict(format!("guest {domain} has no shadow that could be promoted")));
    }
    if retire_first && !cx.is_connected(&primary) {
        return Err(RequestError::Conflict(format!(
            "guest {domain} may still run on {primary}, whose agent is silent and cannot stop it; cut its power, and \
             the guest fails over by itself"
        )));
    }
    let last_epoch = failover::newest_cut(guest, cx);
    failover::begin(guest, cx, Cause { text, last_epoch, only_to: to, back_to, retire_first });
    guest.live.asker = Some(id);
    Ok(())
}

fn switch_over(
    guest: &mut Guest,
    cx: &mut Context<'_>,
    id: RequestId,
    to: Option<HostName>,
) -> Result<(), RequestError> {
    let domain = guest.plan.domain.clone();
    let conflict = |message: String| Err(RequestError::Conflict(format!("guest {domain}: {message}")));
    if guest.plan.phase != Phase::Steady {
        return conflict(format!("only a steady guest can be switched over; {}", guest.reason()));
    }
    let primary = guest.plan.primary.clone();
    if !cx.is_up(&primary) {
        return conflict(format!("the agent of its primary {primary} is silent; look with `virt-shadow hosts`"));
    }
    let report = cx.hosts.get(&primary).and_then(|host| host.report.primaries.get(&guest.plan.id));
    let committed = |host: &HostName| {
        let peer = report.and_then(|report| report.peers.get(host));
        peer.filter(|peer| peer.follows()).map(|peer| peer.committed)
    };
    let to = match to {
        Some(to) => {
            check_target(guest, cx, &to)?;
            if committed(&to).is_none() {
                return conflict(format!(
                    "the shadow on {to} does not follow yet; wait until `info` shows it following"
                ));
            }
            to
        }
        None => {
            let ready = guest.plan.seats.iter().filter(|host| cx.is_up(host));
            let best = ready.filter_map(|host| Some((committed(host)?, std::cmp::Reverse(host)))).max();
            match best {
                Some((_, host)) => host.0.clone(),
                None => return conflict("no shadow follows its primary, so none could take over without loss".into()),
            }
        }
    };
    switchover::begin(guest, cx, to, id);
    Ok(())
}

fn check_target(guest: &Guest, cx: &Context<'_>, to: &HostName) -> Result<(), RequestError> {
    let domain = &guest.plan.domain;
    if *to == guest.plan.primary {
        return Err(RequestError::Invalid(format!("guest {domain} has its primary on {to} already")));
    }
    if !guest.plan.seats.contains(to) {
        let seats: Vec<_> = guest.plan.seats.iter().map(HostName::as_str).collect();
        return Err(RequestError::Invalid(format!(
            "guest {domain} has no shadow on {to}; it has: {}",
            seats.join(", ")
        )));
    }
    if !cx.is_up(to) {
        return Err(RequestError::Conflict(format!("host {to} is not up; look with `virt-shadow hosts`")));
    }
    Ok(())
}

//! A primary is gone: which shadow takes over, and how that happens once.

use std::collections::BTreeMap;

use super::context::{Context, DoneOrder};
use super::model::{Failover, FailoverStep, Guest, Leave, Live, Phase, ShadowReport};
use super::{Answer, Level, Order, Outcome, Reply, RequestError, switchover};
use crate::term;
use crate::units::{Epoch, GuestId, HostName, Term};

/// Loading a big guest's devices under load takes long; until then the outcome is open, not bad.
pub(super) const PROMOTE_TIMEOUT_MS: u64 = 10_000;
const ASK_TIMEOUT_MS: u64 = 300;
const RETIRE_TIMEOUT_MS: u64 = 10_000;
/// Before an order with an unknown outcome is given again.
pub(super) const AGAIN_MS: u64 = 200;

/// Why and how a failover begins.
pub(super) struct Cause {
    pub(super) text: String,
    pub(super) last_epoch: Epoch,
    pub(super) only_to: Option<HostName>,
    pub(super) back_to: Option<Epoch>,
    pub(super) retire_first: bool,
}

impl Cause {
    pub(super) fn gone(guest: &Guest, cx: &Context<'_>, text: String) -> Self {
        Self { text, last_epoch: newest_cut(guest, cx), only_to: None, back_to: None, retire_first: false }
    }
}

/// The newest epoch that the primary is known to have cut.
pub(super) fn newest_cut(guest: &Guest, cx: &Context<'_>) -> Epoch {
    let report = cx.hosts.get(&guest.plan.primary).and_then(|host| host.report.primaries.get(&guest.plan.id));
    report.filter(|report| report.term == guest.plan.term).map_or(Epoch(0), |report| report.epoch)
}

pub(super) fn begin(guest: &mut Guest, cx: &mut Context<'_>, cause: Cause) {
    let message = format!("primary on {} is gone: {}", guest.plan.primary, cause.text);
    cx.note(Level::Alarm, "guest-failing-over", guest, Some(&guest.plan.primary), message);
    let step = if cause.retire_first { FailoverStep::RetireFirst } else { FailoverStep::Choose };
    if cause.retire_first {
        guest.plan.term = guest.plan.term.next();
    }
    guest.plan.phase = Phase::FailingOver(Failover {
        cause: cause.text,
        only_to: cause.only_to,
        back_to: cause.back_to,
        last_epoch: cause.last_epoch,
        tried: BTreeMap::new(),
        step,
    });
    let asker = guest.live.asker.take();
    guest.live = Live { asker, excluded: std::mem::take(&mut guest.live.excluded), ..Live::new(cx.now) };
}

/// Does the next thing of a failover that can be done now.
pub(super) fn tend(guest: &mut Guest, cx: &mut Context<'_>) {
    let Phase::FailingOver(failover) = &mut guest.plan.phase else { return };
    match failover.step.clone() {
        FailoverStep::RetireFirst if cx.is_down(&guest.plan.primary) => {
            failover.step = FailoverStep::Choose;
            choose(guest, cx);
        }
        FailoverStep::RetireFirst => {
            let primary = guest.plan.primary.clone();
            let order = Order::Retire { guest: guest.plan.id.clone(), term: guest.plan.term };
            give_again(guest, cx, &primary, order, RETIRE_TIMEOUT_MS);
        }
        FailoverStep::Choose => choose(guest, cx),
        FailoverStep::Promote { to, .. } if cx.is_down(&to) => {
            // It may have been promoted before it went down: it is treated as a former primary.
            failover.tried.insert(to.clone(), "the host went down".into());
            failover.step = FailoverStep::Choose;
            guest.plan.seats.remove(&to);
            guest.plan.former.insert(to, Leave::Retire);
            guest.live.moving = None;
            choose(guest, cx);
        }
        FailoverStep::Promote { to, after_epoch } => {
            let back_to = failover.back_to;
            let order = Order::Promote { guest: guest.plan.id.clone(), term: guest.plan.term, after_epoch, back_to };
            give_again(guest, cx, &to, order, PROMOTE_TIMEOUT_MS);
        }
    }
}

/// Gives the order of the current step to its host, unless its outcome is still awaited.
pub(super) fn give_again(guest: &mut Guest, cx: &mut Context<'_>, host: &HostName, order: Order, timeout_ms: u64) {
    if guest.live.moving.is_some() || cx.now < guest.live.move_again {
        return;
    }
    if !cx.is_connected(host) {
        guest.live.waiting_note = format!("waiting for {host}");
        return;
    }
    guest.live.waiting_note.clear();
    guest.live.moving = Some(cx.order(guest, host, order, timeout_ms));
}

fn choose(guest: &mut Guest, cx: &mut Context<'_>) {
    if guest.live.asked.is_empty() {
        ask(guest, cx);
    } else if guest.live.asked.values().all(Option::is_some) {
        take_newest(guest, cx);
    }
}

/// Asks all shadow hosts within reach for their newest commit; if there is but one, it is the newest.
fn ask(guest: &mut Guest, cx: &mut Context<'_>) {
    let Phase::FailingOver(failover) = &guest.plan.phase else { return };
    if cx.now < guest.live.move_again {
        return;
    }
    let eligible = |host: &&HostName| {
        !failover.tried.contains_key(*host) && failover.only_to.as_ref().is_none_or(|only| only == *host)
    };
    let open: Vec<HostName> = guest.plan.seats.iter().filter(eligible).cloned().collect();
    let within_reach: Vec<HostName> = open.iter().filter(|host| cx.is_up(host)).cloned().collect();
    match within_reach.as_slice() {
        [] if open.iter().all(|host| cx.is_down(host)) => lost(guest, cx),
        [] => {
            let names: Vec<_> = open.iter().map(HostName::as_str).collect();
            guest.live.waiting_note = format!("waiting for a shadow's host: {}", names.join(", "));
        }
        [only] if open.iter().all(|host| host == only || cx.is_down(host)) => {
            let known = cx.hosts.get(only).and_then(|host| host.report.shadows.get(&guest.plan.id));
            let after_epoch = known.map_or(Epoch(0), |shadow| shadow.committed);
            promote(guest, cx, only, after_epoch);
        }
        several => {
            guest.live.waiting_note.clear();
            for host in several {
                guest.live.asked.insert(host.clone(), None);
                cx.order(guest, host, Order::ShadowStatus { guest: guest.plan.id.clone() }, ASK_TIMEOUT_MS);
            }
        }
    }
}

/// All asked hosts were heard: the newest commit wins, and of equals the first by name.
fn take_newest(guest: &mut Guest, cx: &mut Context<'_>) {
    let answers = std::mem::take(&mut guest.live.asked);
    let Phase::FailingOver(failover) = &mut guest.plan.phase else { return };
    let mut best: Option<(bool, Term, Epoch, HostName)> = None;
    let mut unheard = false;
    for (host, answer) in answers {
        // Who did not answer, but is up, is taken at the word of its last heartbeat.
        let last = cx.hosts.get(&host).filter(|host| host.is_up());
        let last = last.and_then(|host| host.report.shadows.get(&guest.plan.id)).cloned();
        match answer.flatten().or(last) {
            Some(shadow) if shadow.committed > Epoch(0) => {
                let candidate = (shadow.problem.is_empty(), shadow.term, shadow.committed, host);
                let newer = |best: &(bool, Term, Epoch, HostName)| {
                    (candidate.0, candidate.1, candidate.2) > (best.0, best.1, best.2)
                };
                if best.as_ref().is_none_or(newer) {
                    best = Some(candidate);
                }
            }
            Some(_) => {
                failover.tried.insert(host, "it has no committed epoch".into());
            }
            None => unheard = true,
        }
    }
    match best {
        Some((_, _, epoch, host)) => promote(guest, cx, &host, epoch),
        None => {
            if unheard {
                guest.live.move_again = cx.now.plus_ms(AGAIN_MS);
            }
            ask(guest, cx);
        }
    }
}

/// The one place where a failover's promotion is ordered: its term and host are saved in this step, before the order.
fn promote(guest: &mut Guest, cx: &mut Context<'_>, to: &HostName, after_epoch: Epoch) {
    let Phase::FailingOver(failover) = &mut guest.plan.phase else { return };
    let after_epoch = if failover.back_to.is_some() { Epoch(0) } else { after_epoch };
    failover.step = FailoverStep::Promote { to: to.clone(), after_epoch };
    guest.plan.term = guest.plan.term.next();
    guest.live.moving = None;
    guest.live.move_again = cx.now;
    tend(guest, cx);
}

fn lost(guest: &mut Guest, cx: &mut Context<'_>) {
    let Phase::FailingOver(failover) = &guest.plan.phase else { return };
    let mut why: Vec<_> = failover.tried.iter().map(|(host, why)| format!("{host}: {why}")).collect();
    let down = guest.plan.seats.iter().filter(|host| !failover.tried.contains_key(*host));
    why.extend(down.map(|host| format!("{host}: down")));
    let shadows = if why.is_empty() { "there was no shadow".to_owned() } else { why.join(", ") };
    let reason = format!(
        "{}; no shadow could take over ({shadows}). It goes on by itself when a host with a shadow or the guest on {} \
         comes back; or start it by hand",
        failover.cause, guest.plan.primary
    );
    cx.note(Level::Alarm, "guest-lost", guest, Some(&guest.plan.primary), reason.clone());
    guest.plan.phase = Phase::Lost { reason: reason.clone() };
    // Nobody took over, so nobody is in the way of its old host. The new term tells it that this was decided after all
    // that it knows of.
    guest.plan.term = guest.plan.term.next();
    guest.plan.former.remove(&guest.plan.primary);
    guest.live.leaves.remove(&guest.plan.primary);
    guest.live.protect = super::Seat::Needed;
    let asker = guest.live.asker.take();
    cx.answer(asker, Err(RequestError::Failed(reason)));
}

pub(super) fn order_done(guest: &mut Guest, cx: &mut Context<'_>, done: DoneOrder) {
    match done.order {
        Order::ShadowStatus { .. } if guest.live.moving == Some(done.token) => switchover::looked(guest, cx, done),
        Order::ShadowStatus { .. } => {
            if let Some(answer) = guest.live.asked.get_mut(&done.host) {
                *answer = Some(shadow_status(done.outcome));
            }
        }
        Order::Promote { term, .. } => promote_done(guest, cx, done.token, &done.host, term, done.outcome),
        _ => (),
    }
}

fn shadow_status(outcome: Outcome) -> Option<ShadowReport> {
    let nothing = ShadowReport { term: Term(0), committed: Epoch(0), connected: false, problem: String::new() };
    match outcome {
        Outcome::Done(Answer::Shadow(shadow)) => Some(shadow.unwrap_or(nothing)),
        Outcome::Refused { code, .. } if code != "unavailable" => Some(nothing),
        _ => None,
    }
}

fn promote_done(
    guest: &mut Guest,
    cx: &mut Context<'_>,
    token: super::Token,
    host: &HostName,
    term: Term,
    outcome: Outcome,
) {
    let current = term == guest.plan.term;
    match &guest.plan.phase {
        Phase::SwitchingOver(_) if current => return switchover::promote_done(guest, cx, token, host, outcome),
        Phase::FailingOver(Failover { step: FailoverStep::Promote { to, .. }, .. }) if current && to == host => (),
        // An outcome that comes after we went on without it, which we did only because the host counted as down.
        _ if matches!(outcome, Outcome::Done(_)) && guest.plan.primary != *host => {
            guest.plan.seats.remove(host);
            guest.plan.former.insert(host.clone(), Leave::Retire);
            return;
        }
        _ => return,
    }
    if guest.live.moving == Some(token) {
        guest.live.moving = None;
    }
    match outcome {
        Outcome::Done(Answer::Promoted { epoch }) => finish(guest, cx, host, epoch, None),
        Outcome::Refused { code, message } if code != "unavailable" => {
            let text = format!("{host} cannot take over: {message}");
            cx.note(Level::Warning, "promotion-refused", guest, Some(host), text);
            if let Phase::FailingOver(failover) = &mut guest.plan.phase {
                failover.tried.insert(host.clone(), message);
                failover.step = FailoverStep::Choose;
            }
        }
        Outcome::Done(_) | Outcome::Refused { .. } | Outcome::Unknown { .. } => {
            guest.live.move_again = cx.now.plus_ms(AGAIN_MS);
        }
    }
}

/// `to` runs the guest with the plan's term: it is the primary now.
pub(super) fn finish(guest: &mut Guest, cx: &mut Context<'_>, to: &HostName, epoch: Epoch, pause_us: Option<u64>) {
    let plan = &mut guest.plan;
    let from = std::mem::replace(&mut plan.primary, to.clone());
    plan.seats.remove(to);
    plan.former.remove(to);
    if from != *to {
        plan.former.insert(from.clone(), Leave::Retire);
    }
    let planned = matches!(plan.phase, Phase::SwitchingOver(_));
    let last_epoch = match &plan.phase {
        Phase::FailingOver(failover) => failover.last_epoch,
        _ => epoch,
    };
    // It is the natural home of the next shadow, once it has given up its own copy.
    plan.home = (planned && from != *to).then(|| from.clone());
    plan.phase = Phase::Steady;
    let epochs_lost = last_epoch.0.saturating_sub(epoch.0);
    let took_us = cx.now.us_since(guest.live.decided);
    let message = match pause_us {
        Some(us) => {
            let pause_ms = us as f64 / 1e3;
            format!("runs on {to} instead of {from}, term {}, epoch {epoch}, stood still {pause_ms:.1} ms", plan.term)
        }
        None => format!(
            "runs on {to} instead of {from}, term {}, epoch {epoch}, {epochs_lost} epochs lost, {:.1} ms after the \
             decision",
            plan.term,
            took_us as f64 / 1e3
        ),
    };
    let term = plan.term;
    let kind = if planned { "guest-switched-over" } else { "guest-promoted" };
    let figures = vec![
        ("term", term.0),
        ("epoch", epoch.0),
        ("epochs_lost", epochs_lost),
        ("took_us", took_us),
        ("pause_us", pause_us.unwrap_or(0)),
    ];
    cx.note_figures(Level::Info, kind, guest, Some(to), message, figures);
    let asker = guest.live.asker.take();
    guest.live = Live::new(cx.now);
    cx.answer(asker, Ok(Reply::Moved { from, to: to.clone(), term, epoch, epochs_lost, took_us, pause_us }));
}

/// Outcome of stopping the old primary's copy before a forced promotion.
pub(super) fn retired_first(guest: &mut Guest, cx: &mut Context<'_>, done: &DoneOrder) {
    guest.live.moving = None;
    match &done.outcome {
        Outcome::Done(_) => {
            if let Phase::FailingOver(failover) = &mut guest.plan.phase {
                failover.step = FailoverStep::Choose;
            }
        }
        Outcome::Refused { code, message } if code != "unavailable" => {
            let reason = format!("copy on {} cannot be stopped: {message}; nothing was promoted", done.host);
            cx.note(Level::Warning, "promotion-refused", guest, Some(&done.host), reason.clone());
            guest.plan.phase = Phase::Steady;
            let asker = guest.live.asker.take();
            guest.live = Live::new(cx.now);
            cx.answer(asker, Err(RequestError::Failed(reason)));
        }
        Outcome::Refused { .. } | Outcome::Unknown { .. } => guest.live.move_again = cx.now.plus_ms(AGAIN_MS),
    }
}

/// The primary was heard of again before anything was promoted: it stays.
pub(super) fn called_off(guest: &mut Guest, cx: &mut Context<'_>) {
    let host = guest.plan.primary.clone();
    cx.note(Level::Info, "failover-called-off", guest, Some(&host), format!("still runs on {host}"));
    guest.plan.phase = Phase::Steady;
    let asker = guest.live.asker.take();
    guest.live = Live::new(cx.now);
    cx.answer(asker, Err(RequestError::Conflict(format!("the primary on {host} came back; nothing was promoted"))));
}

/// Rule 2 of [`crate::term`], as far as the manager can see it: nobody may know a higher term than ours.
pub(super) fn raise_term(guest: &mut Guest, cx: &mut Context<'_>, host: &HostName, seen: Term) {
    if term::obeys(seen, guest.plan.term) {
        return;
    }
    let message =
        format!("{host} has term {seen}, the manager's newest is {}: was its state set back?", guest.plan.term);
    cx.note(Level::Alarm, "term-ahead", guest, Some(host), message);
    guest.plan.term = seen;
}

/// Used where a [`GuestId`] is all that is needed.
pub(super) fn id(guest: &Guest) -> GuestId {
    guest.plan.id.clone()
}

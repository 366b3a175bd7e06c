//! What hosts tell about a guest: it died, was stopped, was started, or stands in a record of a host that came back.

use super::context::{Context, DoneOrder};
use super::failover::{self, Cause};
use super::model::{Failover, FailoverStep, Guest, Leave, Live, Phase, Record, Seat, Switchover, SwitchoverStep};
use super::{Answer, Level, Order, Outcome, RequestError, switchover};
use crate::term::Role;
use crate::units::{Epoch, HostName, Term};

const DESCRIBE_TIMEOUT_MS: u64 = 5_000;
/// A copy that runs elsewhere for this long is no migration that is about to end.
const ELSEWHERE_MS: u64 = 60_000;
/// How often the old host of a lost guest is asked whether it runs again.
const LOST_LOOK_MS: u64 = 2_000;
/// Reports may be this much older than the answer to an order.
const REPORT_SETTLES_MS: u64 = 3_000;

pub(super) fn died(
    guest: &mut Guest,
    cx: &mut Context<'_>,
    host: &HostName,
    term: Term,
    detail: &str,
    last_epoch: Epoch,
) {
    if *host != guest.plan.primary || term < guest.plan.term && guest.plan.phase == Phase::Steady {
        return;
    }
    let text = format!("QEMU on {host} ended: {detail}");
    match &guest.plan.phase {
        Phase::Steady => (),
        // From the last cut on the target takes over anyway; before, or on the way back, there is nothing to undo.
        Phase::SwitchingOver(switchover) if matches!(switchover.step, SwitchoverStep::Promote { .. }) => return,
        Phase::SwitchingOver(_) => (),
        Phase::FailingOver(_) | Phase::Stopped { .. } | Phase::Lost { .. } | Phase::Leaving => return,
    }
    let mut cause = Cause::gone(guest, cx, text);
    cause.last_epoch = cause.last_epoch.max(last_epoch);
    failover::begin(guest, cx, cause);
}

pub(super) fn stopped(guest: &mut Guest, cx: &mut Context<'_>, host: &HostName, term: Term, how: &str) {
    if *host != guest.plan.primary || term > guest.plan.term {
        return;
    }
    match &guest.plan.phase {
        Phase::Steady => (),
        Phase::SwitchingOver(switchover) if !matches!(switchover.step, SwitchoverStep::Promote { .. }) => (),
        _ => return,
    }
    cx.note(Level::Info, "guest-stopped", guest, Some(host), format!("{how} on {host}; its shadows are dropped"));
    let asker = guest.live.asker.take();
    cx.answer(asker, Err(RequestError::Conflict(format!("the guest was stopped meanwhile ({how})"))));
    give_up_seats(guest);
    guest.plan.phase = Phase::Stopped { how: how.into() };
    let elsewhere = guest.live.elsewhere.take();
    guest.live = Live::new(cx.now);
    if let Some((to, _)) = elsewhere {
        started(guest, cx, &to);
    }
}

fn give_up_seats(guest: &mut Guest) {
    for host in std::mem::take(&mut guest.plan.seats) {
        guest.plan.former.insert(host, Leave::Drop);
    }
}

pub(super) fn started(guest: &mut Guest, cx: &mut Context<'_>, host: &HostName) {
    let at_home = *host == guest.plan.primary;
    match &guest.plan.phase {
        Phase::Stopped { .. } | Phase::Lost { .. } if at_home => starts_on(guest, cx, host),
        // A shadow's domain is started as well, paused: what keeps one is not believed without a look.
        _ if guest.plan.seats.contains(host) => (),
        Phase::Stopped { .. } | Phase::Lost { .. } => {
            cx.order(guest, host, Order::Describe { guest: guest.plan.id.clone() }, DESCRIBE_TIMEOUT_MS);
        }
        Phase::Steady if at_home => {
            guest.live.doubt = None;
            guest.live.protect = Seat::Needed;
        }
        Phase::FailingOver(failover) if at_home && failover.step == FailoverStep::Choose => {
            failover::called_off(guest, cx);
        }
        // Perhaps a migration that is about to end; if not, `tend` raises the alarm.
        Phase::Steady if guest.live.elsewhere.is_none() => {
            guest.live.elsewhere = Some((host.clone(), cx.now));
            guest.live.elsewhere_told = false;
        }
        Phase::Steady | Phase::FailingOver(_) | Phase::SwitchingOver(_) | Phase::Leaving => (),
    }
}

/// A guest that ran nowhere runs on `host`: that is its primary now.
fn starts_on(guest: &mut Guest, cx: &mut Context<'_>, host: &HostName) {
    give_up_seats(guest);
    if *host != guest.plan.primary {
        let from = std::mem::replace(&mut guest.plan.primary, host.clone());
        guest.plan.former.insert(from, Leave::Retire);
        guest.plan.term = guest.plan.term.next();
    }
    guest.plan.former.remove(host);
    guest.plan.phase = Phase::Steady;
    guest.live = Live::new(cx.now);
    cx.note(Level::Info, "guest-started", guest, Some(host), format!("started on {host}; protection resumes"));
}

pub(super) fn superseded(guest: &mut Guest, cx: &mut Context<'_>, host: &HostName, term: Term, newer: Term) {
    let message = format!("copy of term {term} on {host} met term {newer} and was stopped");
    cx.note(Level::Warning, "guest-superseded", guest, Some(host), message);
    failover::raise_term(guest, cx, host, newer);
}

/// The agent of `host` has connected; `record` is what it has about this guest.
pub(super) fn hello(guest: &mut Guest, cx: &mut Context<'_>, host: &HostName, record: Option<&Record>) {
    let is_primary = guest.plan.primary == *host;
    guest.live.accepts.remove(host);
    guest.live.leaves.remove(host);
    guest.live.excluded.remove(host);
    if is_primary {
        guest.live.protect = Seat::Needed;
    }
    let active_primary = record.is_some_and(|record| record.role == Role::Primary && record.active);
    if let Some(record) = record {
        failover::raise_term(guest, cx, host, record.term);
    }
    if guest.plan.phase == Phase::Leaving {
        if record.is_some() {
            guest.plan.former.entry(host.clone()).or_insert(Leave::Release);
        }
    } else if is_primary {
        primary_returns(guest, cx, active_primary);
    } else if let Some(record) = record {
        other_returns(guest, cx, host, record);
    }
    if matches!(guest.plan.phase, Phase::Lost { .. }) && guest.plan.seats.contains(host) {
        guest.live.revival = Some(false);
    }
}

fn primary_returns(guest: &mut Guest, cx: &mut Context<'_>, runs: bool) {
    match &guest.plan.phase {
        Phase::FailingOver(failover) if runs && failover.step == FailoverStep::Choose => {
            failover::called_off(guest, cx);
        }
        Phase::Lost { .. } if runs => failover::called_off(guest, cx),
        Phase::Stopped { .. } if runs => {
            let host = guest.plan.primary.clone();
            starts_on(guest, cx, &host);
        }
        // Another host may run it already, or is about to: it must not be started here again before that is known.
        Phase::FailingOver(failover) if !runs && failover.step != FailoverStep::RetireFirst => {
            guest.plan.former.insert(guest.plan.primary.clone(), Leave::Retire);
        }
        Phase::Steady => guest.live.doubt = (!runs).then_some((cx.now, false)),
        _ => (),
    }
}

fn other_returns(guest: &mut Guest, cx: &mut Context<'_>, host: &HostName, record: &Record) {
    let is_target = match &guest.plan.phase {
        Phase::FailingOver(failover) => {
            matches!(&failover.step, FailoverStep::Promote { to, .. } if to == host)
        }
        Phase::SwitchingOver(switchover) => switchover.to == *host,
        _ => false,
    };
    // A term is given to one host, so whoever runs the newest one was promoted, even if we never heard of it.
    let adrift = matches!(guest.plan.phase, Phase::FailingOver(_) | Phase::Lost { .. });
    match record.role {
        Role::Primary if record.term == guest.plan.term && (is_target || adrift && record.active) => {
            let at_least = match &guest.plan.phase {
                Phase::FailingOver(Failover { step: FailoverStep::Promote { after_epoch, .. }, .. }) => *after_epoch,
                Phase::SwitchingOver(Switchover { step: SwitchoverStep::Promote { epoch }, .. }) => *epoch,
                _ => Epoch(0),
            };
            failover::finish(guest, cx, host, at_least, None);
            guest.live.doubt = (!record.active).then_some((cx.now, false));
        }
        Role::Primary if is_target => (),
        Role::Primary => {
            guest.plan.seats.remove(host);
            guest.plan.former.insert(host.clone(), Leave::Retire);
        }
        Role::Shadow if guest.plan.seats.contains(host) || is_target => (),
        Role::Shadow => {
            guest.plan.former.entry(host.clone()).or_insert(Leave::Drop);
        }
        Role::Retired if guest.plan.seats.contains(host) => (),
        Role::Retired => {
            guest.plan.former.insert(host.clone(), Leave::Retired);
        }
    }
}

/// The heartbeat of a host that has to do with this guest has come.
pub(super) fn reported(guest: &mut Guest, cx: &mut Context<'_>, host: &HostName) {
    if guest.plan.phase != Phase::Steady {
        return;
    }
    let Some(report) = cx.hosts.get(host).map(|host| &host.report) else { return };
    let settled = |seat: &Seat| matches!(seat, Seat::Done { at } if cx.now.ms_since(*at) > REPORT_SETTLES_MS);
    if *host == guest.plan.primary {
        let own = report.primaries.get(&guest.plan.id);
        if let Some(own) = own.filter(|own| own.memory_mib > 0) {
            guest.plan.memory_mib = own.memory_mib;
        }
        if let Some(own) = own {
            let following = own.peers.values().filter(|peer| peer.following);
            let now_kbit = following.map(|peer| peer.kbit_per_s).max().unwrap_or(0);
            // At five reports a second it is halved in an hour.
            let kept_kbit = guest.live.stream_kbit - guest.live.stream_kbit.div_ceil(26_000);
            guest.live.stream_kbit = now_kbit.max(kept_kbit);
        }
        let as_told = own.is_some_and(|own| own.term == guest.plan.term);
        if settled(&guest.live.protect) && !as_told {
            guest.live.protect = Seat::Needed;
        }
    } else if guest.plan.seats.contains(host) {
        let has_it = report.shadows.contains_key(&guest.plan.id);
        if !has_it && guest.live.accepts.get(host).is_some_and(settled) {
            guest.live.accepts.insert(host.clone(), Seat::Needed);
        }
    } else if report.shadows.contains_key(&guest.plan.id)
        && !guest.live.leaves.contains_key(host)
        && guest.plan.former.get(host).is_none_or(|leave| *leave == Leave::Retired)
    {
        guest.plan.former.insert(host.clone(), Leave::Drop);
    }
}

/// What time brings about for a steady guest.
pub(super) fn tend(guest: &mut Guest, cx: &mut Context<'_>) {
    let primary = guest.plan.primary.clone();
    if cx.is_down(&primary) {
        let cause = Cause::gone(guest, cx, format!("{primary} is down"));
        return failover::begin(guest, cx, cause);
    }
    if let Some((since, false)) = guest.live.doubt
        && cx.now.ms_since(since) >= cx.settings.explain_ms
        && cx.is_connected(&primary)
    {
        guest.live.doubt = Some((since, true));
        cx.order(guest, &primary, Order::Describe { guest: guest.plan.id.clone() }, DESCRIBE_TIMEOUT_MS);
    }
    // What was started there was its shadow, or a copy that is about to be ended.
    let ending = |host| guest.plan.former.get(host).is_some_and(|leave| *leave != Leave::Retired);
    if let Some((host, _)) = &guest.live.elsewhere
        && (guest.plan.seats.contains(host) || ending(host))
    {
        guest.live.elsewhere = None;
    }
    if let Some((host, since)) = guest.live.elsewhere.clone()
        && cx.now.ms_since(since) >= ELSEWHERE_MS
        && !guest.live.elsewhere_told
    {
        guest.live.elsewhere_told = true;
        let message = format!(
            "runs on {primary} and was started on {host} as well: destroy one of them, on {host} unless you know better"
        );
        cx.note(Level::Alarm, "guest-runs-twice", guest, Some(&host), message);
    }
}

/// Outcome of asking a host whether it runs a guest of which it says nothing.
pub(super) fn order_done(guest: &mut Guest, cx: &mut Context<'_>, done: DoneOrder) {
    if guest.live.moving == Some(done.token) {
        return switchover::described(guest, cx, &done);
    }
    if guest.live.revival == Some(true) && done.host == guest.plan.primary {
        return revive(guest, cx, &done.outcome);
    }
    if matches!(guest.plan.phase, Phase::Stopped { .. } | Phase::Lost { .. }) {
        let keeps_one = matches!(guest.plan.former.get(&done.host), Some(Leave::Drop));
        if done.outcome == Outcome::Done(Answer::Described { running: true }) && !keeps_one {
            starts_on(guest, cx, &done.host);
        }
        return;
    }
    let Some((since, true)) = guest.live.doubt else { return };
    if guest.plan.phase != Phase::Steady || done.host != guest.plan.primary {
        return;
    }
    match done.outcome {
        Outcome::Done(Answer::Described { running: true }) => {
            guest.live.doubt = None;
            guest.live.protect = Seat::Needed;
        }
        Outcome::Done(Answer::Described { running: false }) => gone_unexplained(guest, cx),
        Outcome::Refused { code, .. } if code == "not-found" || code == "not-running" => gone_unexplained(guest, cx),
        _ => guest.live.doubt = Some((since, false)),
    }
}

/// A lost guest may be started on its old host at any time, so a shadow that came back takes over only when that host is
/// down, or has said that it does not run the guest and then that it will not.
pub(super) fn tend_lost(guest: &mut Guest, cx: &mut Context<'_>) {
    let primary = guest.plan.primary.clone();
    if guest.live.revival.is_none() && cx.now >= guest.live.move_again && cx.is_connected(&primary) {
        // Its host may not tell by itself that it was started again.
        guest.live.move_again = cx.now.plus_ms(LOST_LOOK_MS);
        cx.order(guest, &primary, Order::Describe { guest: guest.plan.id.clone() }, DESCRIBE_TIMEOUT_MS);
    }
    if guest.live.revival != Some(false) {
        return;
    }
    if cx.is_down(&primary) {
        let text = "a shadow came back".to_owned();
        failover::begin(
            guest,
            cx,
            Cause { text, last_epoch: Epoch(0), only_to: None, back_to: None, retire_first: false },
        );
    } else if cx.is_connected(&primary) {
        guest.live.revival = Some(true);
        cx.order(guest, &primary, Order::Describe { guest: guest.plan.id.clone() }, DESCRIBE_TIMEOUT_MS);
    }
}

fn revive(guest: &mut Guest, cx: &mut Context<'_>, outcome: &Outcome) {
    let runs = match outcome {
        Outcome::Done(Answer::Described { running }) => *running,
        Outcome::Refused { code, .. } if code == "not-found" || code == "not-running" => false,
        _ => {
            guest.live.revival = Some(false);
            return;
        }
    };
    guest.live.revival = None;
    if !matches!(guest.plan.phase, Phase::Lost { .. }) {
        return;
    }
    if runs {
        let host = guest.plan.primary.clone();
        return starts_on(guest, cx, &host);
    }
    let text = "a shadow came back".to_owned();
    failover::begin(guest, cx, Cause { text, last_epoch: Epoch(0), only_to: None, back_to: None, retire_first: true });
}

fn gone_unexplained(guest: &mut Guest, cx: &mut Context<'_>) {
    let text = format!("{} runs it no more, and does not know why", guest.plan.primary);
    // It might be started there right now, by hand or by itself, so that is put an end to first.
    let cause = Cause { retire_first: true, ..Cause::gone(guest, cx, text) };
    failover::begin(guest, cx, cause);
}

//! Brings hosts to what the plan says: shadows accepted, the primary told of them, former copies given up.
//!
//! Nothing here remembers what it did beyond "told, and it said yes": after a restart of ours or of an agent every order
//! is given again, which is harmless.

use super::context::{Context, DoneOrder};
use super::model::{Guest, GuestPlan, Leave, PeerReport, Phase, Seat};
use super::{Level, Order, Outcome, Reply, failover, lifecycle, switchover};
use crate::units::HostName;

const ACCEPT_TIMEOUT_MS: u64 = 10_000;
const PROTECT_TIMEOUT_MS: u64 = 20_000;
const LEAVE_TIMEOUT_MS: u64 = 20_000;
/// How long a host that refused a shadow is left alone: doubled each time, up to a limit.
const EXCLUDED_FIRST_MS: u64 = 4_000;
const EXCLUDED_LONGEST_MS: u64 = 60_000;

/// Does everything for a guest that can be done now.
pub(super) fn tend(guest: &mut Guest, cx: &mut Context<'_>) {
    match &guest.plan.phase {
        Phase::Steady => lifecycle::tend(guest, cx),
        Phase::Lost { .. } => lifecycle::tend_lost(guest, cx),
        _ => (),
    }
    failover::tend(guest, cx);
    switchover::tend(guest, cx);
    if guest.plan.phase == Phase::Steady {
        drop_surplus(guest, cx);
        accept(guest, cx);
        protect(guest, cx);
        tell_redundancy(guest, cx);
    }
    if matches!(guest.plan.phase, Phase::Lost { .. }) {
        allow_start(guest, cx);
    }
    leave(guest, cx);
}

/// Seats beyond what is wanted, and those that others have taken the place of.
fn drop_surplus(guest: &mut Guest, cx: &Context<'_>) {
    while guest.plan.staying().count() > guest.plan.shadows_wanted as usize {
        let named = |host: &&HostName| guest.plan.on.contains(host);
        let staying: Vec<&HostName> = guest.plan.staying().collect();
        let not_named = staying.iter().rev().find(|host| !named(host));
        let Some(host) = not_named.or_else(|| staying.last()).copied().cloned() else { return };
        give_up(guest, &host);
    }
    if guest.plan.going.is_empty() {
        return;
    }
    let report = cx.hosts.get(&guest.plan.primary).and_then(|host| host.report.primaries.get(&guest.plan.id));
    let follows = |host: &HostName| report.and_then(|report| report.peers.get(host)).is_some_and(PeerReport::follows);
    let replaced = guest.plan.staying().filter(|host| follows(host)).count() >= guest.plan.shadows_wanted as usize;
    for host in guest.plan.going.clone() {
        if replaced || cx.is_down(&host) {
            give_up(guest, &host);
        }
    }
}

/// The seat is no more; its host is told when it can be.
pub(super) fn give_up(guest: &mut Guest, host: &HostName) {
    guest.plan.seats.remove(host);
    guest.plan.going.remove(host);
    guest.live.accepts.remove(host);
    guest.plan.former.insert(host.clone(), Leave::Drop);
}

/// A former copy on that host is not yet given up.
fn must_leave_first(guest: &Guest, host: &HostName) -> bool {
    guest.plan.former.get(host).is_some_and(|leave| *leave != Leave::Retired)
}

fn accept(guest: &mut Guest, cx: &mut Context<'_>) {
    for host in guest.plan.seats.clone() {
        let state = guest.live.accepts.entry(host.clone()).or_default();
        if !state.due(cx.now) || !cx.is_connected(&host) || must_leave_first(guest, &host) {
            continue;
        }
        let order = Order::AcceptShadow {
            guest: guest.plan.id.clone(),
            domain: guest.plan.domain.clone(),
            term: guest.plan.term,
            primary: guest.plan.primary.clone(),
            keep: guest.plan.keep,
        };
        let token = cx.order(guest, &host, order, ACCEPT_TIMEOUT_MS);
        guest.live.accepts.insert(host, Seat::Sent(token));
    }
}

fn protect(guest: &mut Guest, cx: &mut Context<'_>) {
    let accepts = &guest.live.accepts;
    // A shadow that is told anew how much to keep goes on meanwhile.
    let told_again = |host: &HostName| {
        guest.live.protected_with.contains(host)
            && matches!(accepts.get(host), None | Some(Seat::Needed | Seat::Sent(_)))
    };
    let is_ready = |host: &&HostName| matches!(accepts.get(*host), Some(Seat::Done { .. })) || told_again(host);
    let ready: Vec<HostName> = guest.plan.seats.iter().filter(is_ready).cloned().collect();
    let changed = matches!(guest.live.protect, Seat::Done { .. }) && guest.live.protected_with != ready;
    if !(changed || guest.live.protect.due(cx.now)) || !cx.is_connected(&guest.plan.primary) {
        return;
    }
    // With no shadow ready there is no hurry: wait for those that are about to be.
    let soon = |host: &&HostName| matches!(accepts.get(*host), Some(Seat::Sent(_)) | None | Some(Seat::Needed));
    if ready.is_empty() && guest.plan.seats.iter().filter(|host| cx.is_connected(host)).any(|host| soon(&host)) {
        return;
    }
    let order = order_to_protect(&guest.plan, ready.clone());
    let primary = guest.plan.primary.clone();
    guest.live.protected_with = ready;
    guest.live.protect = Seat::Sent(cx.order(guest, &primary, order, PROTECT_TIMEOUT_MS));
}

fn order_to_protect(plan: &GuestPlan, shadows: Vec<HostName>) -> Order {
    Order::Protect {
        guest: plan.id.clone(),
        domain: plan.domain.clone(),
        term: plan.term,
        interval_ms: plan.interval_ms,
        budget: plan.budget,
        mirror_mib: plan.mirror_mib,
        consistency: plan.consistency,
        policy: plan.policy.to_string(),
        shadows,
    }
}

/// The host that lost a guest may start it again, with the newest term: that is what it is told by being told to protect
/// it, with no shadows yet.
fn allow_start(guest: &mut Guest, cx: &mut Context<'_>) {
    if !guest.live.protect.due(cx.now) || !cx.is_connected(&guest.plan.primary) {
        return;
    }
    let order = order_to_protect(&guest.plan, Vec::new());
    let primary = guest.plan.primary.clone();
    guest.live.protect = Seat::Sent(cx.order(guest, &primary, order, PROTECT_TIMEOUT_MS));
}

fn leave(guest: &mut Guest, cx: &mut Context<'_>) {
    let leaving = guest.plan.phase == Phase::Leaving;
    for (host, what) in guest.plan.former.clone() {
        let what = if leaving && what == Leave::Retired { Leave::Release } else { what };
        let state = guest.live.leaves.entry(host.clone()).or_default();
        if what == Leave::Retired || !state.due(cx.now) || !cx.is_connected(&host) {
            continue;
        }
        let id = guest.plan.id.clone();
        let order = match what {
            Leave::Retire | Leave::Retired => Order::Retire { guest: id, term: guest.plan.term },
            Leave::Drop => Order::DropShadow { guest: id },
            Leave::Release => Order::Release { guest: id },
        };
        guest.plan.former.insert(host.clone(), what);
        let token = cx.order(guest, &host, order, LEAVE_TIMEOUT_MS);
        guest.live.leaves.insert(host, Seat::Sent(token));
    }
}

/// Tells when the wanted number of shadows follows, and when it no longer does.
fn tell_redundancy(guest: &mut Guest, cx: &mut Context<'_>) {
    let Some(report) = cx.hosts.get(&guest.plan.primary).and_then(|host| host.report.primaries.get(&guest.plan.id))
    else {
        return;
    };
    let follows = |host: &&HostName| report.peers.get(*host).is_some_and(PeerReport::follows);
    let following = guest.plan.staying().filter(follows).count() as u32;
    let wanted = guest.plan.shadows_wanted;
    let whole = following >= wanted;
    if guest.live.told_whole == Some(whole) || (guest.live.told_whole.is_none() && !whole) {
        guest.live.change_seen = None;
        return;
    }
    // A loss is told once it has lasted: a shadow that is late for one epoch is no news.
    let since = *guest.live.change_seen.get_or_insert(cx.now);
    if whole || cx.now.ms_since(since) >= 1_000 {
        guest.live.told_whole = Some(whole);
        guest.live.change_seen = None;
        let message = format!("{following} of {wanted} shadows follow");
        if whole {
            cx.note(Level::Info, "guest-protected", guest, None, message);
        } else {
            cx.note(Level::Warning, "guest-degraded", guest, None, message);
        }
    }
}

pub(super) fn order_done(guest: &mut Guest, cx: &mut Context<'_>, done: DoneOrder) {
    match &done.order {
        Order::AcceptShadow { .. } => accept_done(guest, cx, done),
        Order::Protect { .. } => protect_done(guest, cx, done),
        Order::Retire { .. } if guest.live.moving == Some(done.token) => failover::retired_first(guest, cx, &done),
        Order::Retire { .. } | Order::DropShadow { .. } | Order::Release { .. } => leave_done(guest, cx, done),
        _ => (),
    }
}

fn accept_done(guest: &mut Guest, cx: &mut Context<'_>, done: DoneOrder) {
    let host = done.host;
    if guest.live.accepts.get(&host) != Some(&Seat::Sent(done.token)) {
        return;
    }
    let named = guest.plan.on.contains(&host);
    match done.outcome {
        Outcome::Done(_) => {
            guest.plan.former.remove(&host);
            guest.live.attempts.remove(&host);
            guest.live.accepts.insert(host, Seat::Done { at: cx.now });
        }
        Outcome::Refused { code, message } if code != "unavailable" && !named => {
            cx.note(Level::Warning, "shadow-refused", guest, Some(&host), format!("{host}: {message}"));
            guest.plan.seats.remove(&host);
            guest.live.accepts.remove(&host);
            let attempts = guest.live.attempts.entry(host.clone()).or_default();
            let excluded_ms = (EXCLUDED_FIRST_MS << (*attempts).min(8)).min(EXCLUDED_LONGEST_MS);
            *attempts += 1;
            guest.live.excluded.insert(host, (cx.now.plus_ms(excluded_ms), message));
        }
        Outcome::Refused { message: reason, .. } | Outcome::Unknown { why: reason } => {
            let attempts = guest.live.attempts.entry(host.clone()).or_default();
            *attempts += 1;
            let failed = Seat::failed(reason, *attempts, cx.now);
            guest.live.accepts.insert(host, failed);
        }
    }
}

fn protect_done(guest: &mut Guest, cx: &mut Context<'_>, done: DoneOrder) {
    if guest.live.protect != Seat::Sent(done.token) {
        return;
    }
    match done.outcome {
        Outcome::Done(_) => {
            guest.live.attempts.remove(&done.host);
            guest.live.protect = Seat::Done { at: cx.now };
        }
        Outcome::Refused { .. } if matches!(guest.plan.phase, Phase::Lost { .. }) => {
            guest.live.protect = Seat::Done { at: cx.now };
        }
        // It ended while nobody watched it, such as right after a promotion. Its host may still say why.
        Outcome::Refused { code, .. } if code == "not-running" || code == "not-found" => {
            guest.live.doubt.get_or_insert((cx.now, false));
            guest.live.protect = Seat::failed("the guest does not run there".into(), 1, cx.now);
        }
        Outcome::Refused { message: reason, .. } | Outcome::Unknown { why: reason } => {
            let attempts = guest.live.attempts.entry(done.host.clone()).or_default();
            *attempts += 1;
            let attempts = *attempts;
            if attempts == 1 {
                let message = format!("{} does not protect it: {reason}", done.host);
                cx.note(Level::Warning, "protect-failed", guest, Some(&done.host), message);
            }
            guest.live.protect = Seat::failed(reason, attempts, cx.now);
        }
    }
}

fn leave_done(guest: &mut Guest, cx: &mut Context<'_>, done: DoneOrder) {
    let host = done.host;
    if guest.live.leaves.get(&host) != Some(&Seat::Sent(done.token)) {
        return;
    }
    match done.outcome {
        Outcome::Done(_) => {
            guest.live.leaves.remove(&host);
            guest.live.attempts.remove(&host);
            match guest.plan.former.get(&host) {
                Some(Leave::Retire) => guest.plan.former.insert(host.clone(), Leave::Retired),
                _ => guest.plan.former.remove(&host),
            };
        }
        Outcome::Refused { message: reason, .. } | Outcome::Unknown { why: reason } => {
            let attempts = guest.live.attempts.entry(host.clone()).or_default();
            *attempts += 1;
            let attempts = *attempts;
            if attempts == 1 {
                cx.note(Level::Warning, "former-copy", guest, Some(&host), format!("still on {host}: {reason}"));
            }
            guest.live.leaves.insert(host.clone(), Seat::failed(reason, attempts, cx.now));
        }
    }
    if guest.plan.phase == Phase::Leaving {
        tell_disabled(guest, cx);
    }
}

/// Answers who asked for it, once every host within reach was told.
pub(super) fn tell_disabled(guest: &mut Guest, cx: &mut Context<'_>) {
    let open =
        |host: &&HostName| cx.is_connected(host) && !matches!(guest.live.leaves.get(*host), Some(Seat::Failed { .. }));
    if guest.plan.former.keys().any(|host| open(&host)) {
        return;
    }
    let names: Vec<_> = guest.plan.former.keys().map(HostName::as_str).collect();
    let message = match names.as_slice() {
        [] => String::new(),
        names => format!("{} could not be told yet and will be when possible", names.join(", ")),
    };
    let asker = guest.live.asker.take();
    cx.answer(asker, Ok(Reply::Disabled { message }));
}

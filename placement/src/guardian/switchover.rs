//! A planned move: last cut on the primary, promotion of the target, and the way back if that fails.
//!
//! ```text
//! Cut --committed on the target--> Promote --runs--> done: the old primary is retired
//!  | no / unknown                   | definite no, or the target is down (then with a higher term)
//!  +------------> Undo <------------+
//!                  | goes on on the primary
//!                  +--> Steady
//! ```
//! While the guest stands still, an unknown outcome of the promotion is not a reason to undo: two copies would run. But
//! an agent that hears nothing for long lets its guest go on, so a promotion is repeated only after a look at the shadow:
//! if that has got further epochs, the primary went on.

use super::context::{Context, DoneOrder};
use super::failover::{self, AGAIN_MS, Cause, PROMOTE_TIMEOUT_MS, give_again};
use super::model::{Guest, Leave, Live, Phase, Switchover, SwitchoverStep};
use super::{Answer, Level, Order, Outcome, RequestError, RequestId, Token};
use crate::units::HostName;

/// The guest stands still meanwhile.
const CUT_TIMEOUT_MS: u64 = 5_000;
const UNDO_TIMEOUT_MS: u64 = 5_000;
const LOOK_TIMEOUT_MS: u64 = 2_000;
/// An agent holds a guest at least that long without a word from us.
const SURELY_HELD_MS: u64 = 10_000;

pub(super) fn begin(guest: &mut Guest, cx: &mut Context<'_>, to: HostName, asker: RequestId) {
    let from = &guest.plan.primary;
    cx.note(Level::Info, "switchover", guest, Some(&to), format!("moves from {from} to {to} on request"));
    guest.plan.phase = Phase::SwitchingOver(Switchover { to: to.clone(), step: SwitchoverStep::Cut });
    guest.live.asker = Some(asker);
    guest.live.decided = cx.now;
    guest.live.move_again = cx.now;
    guest.live.cut = None;
    guest.live.waiting_note.clear();
    // Only once: what an unknown outcome asks for is the way back.
    let order = Order::FinalCut { guest: guest.plan.id.clone(), to };
    let primary = guest.plan.primary.clone();
    guest.live.moving = Some(cx.order(guest, &primary, order, CUT_TIMEOUT_MS));
}

pub(super) fn tend(guest: &mut Guest, cx: &mut Context<'_>) {
    let Phase::SwitchingOver(switchover) = &guest.plan.phase else { return };
    let primary = guest.plan.primary.clone();
    let to = switchover.to.clone();
    match switchover.step.clone() {
        SwitchoverStep::Cut | SwitchoverStep::Undo { .. } if cx.is_down(&primary) => {
            let cause = Cause::gone(guest, cx, "its host went down during a switchover".into());
            failover::begin(guest, cx, cause);
            failover::tend(guest, cx);
        }
        // After a restart of ours nobody knows how far the cut came.
        SwitchoverStep::Cut if guest.live.moving.is_none() => {
            undo(guest, cx, "the manager was restarted during the last cut".into());
        }
        SwitchoverStep::Cut => (),
        SwitchoverStep::Promote { .. } if cx.is_down(&to) => {
            guest.plan.seats.remove(&to);
            guest.plan.former.insert(to.clone(), Leave::Retire);
            undo(guest, cx, format!("{to} went down while it took over"));
        }
        SwitchoverStep::Promote { epoch } => {
            let held = guest.live.cut.is_some_and(|(at, _)| cx.now.ms_since(at) < SURELY_HELD_MS);
            if held || guest.live.looked {
                guest.live.looked = false;
                let order = Order::Promote {
                    guest: failover::id(guest),
                    term: guest.plan.term,
                    after_epoch: epoch,
                    back_to: None,
                };
                give_again(guest, cx, &to, order, PROMOTE_TIMEOUT_MS);
            } else {
                give_again(guest, cx, &to, Order::ShadowStatus { guest: failover::id(guest) }, LOOK_TIMEOUT_MS);
            }
        }
        SwitchoverStep::Undo { .. } => {
            let order = Order::UndoFinalCut { guest: failover::id(guest), term: guest.plan.term };
            give_again(guest, cx, &primary, order, UNDO_TIMEOUT_MS);
        }
    }
}

/// The primary goes on, with a term above all that was given out for the move.
fn undo(guest: &mut Guest, cx: &mut Context<'_>, reason: String) {
    let Phase::SwitchingOver(switchover) = &mut guest.plan.phase else { return };
    if matches!(switchover.step, SwitchoverStep::Promote { .. }) {
        guest.plan.term = guest.plan.term.next();
    }
    switchover.step = SwitchoverStep::Undo { reason };
    guest.live.moving = None;
    guest.live.move_again = cx.now;
    tend(guest, cx);
}

pub(super) fn order_done(guest: &mut Guest, cx: &mut Context<'_>, done: DoneOrder) {
    if guest.live.moving != Some(done.token) {
        return;
    }
    guest.live.moving = None;
    let Phase::SwitchingOver(switchover) = &guest.plan.phase else { return };
    match (&switchover.step, done.order, done.outcome) {
        (SwitchoverStep::Cut, Order::FinalCut { .. }, Outcome::Done(Answer::Cut { epoch, paused_for_us })) => {
            let to = switchover.to.clone();
            guest.live.cut = Some((cx.now, paused_for_us));
            guest.plan.phase = Phase::SwitchingOver(Switchover { to, step: SwitchoverStep::Promote { epoch } });
            guest.plan.term = guest.plan.term.next();
        }
        (SwitchoverStep::Cut, Order::FinalCut { .. }, outcome) => {
            undo(guest, cx, format!("the last cut failed: {}", why(&outcome)));
        }
        (SwitchoverStep::Undo { reason }, Order::UndoFinalCut { .. }, Outcome::Done(_)) => {
            let reason = format!("{reason}; the guest goes on on {}", guest.plan.primary);
            cx.note(Level::Warning, "switchover-undone", guest, Some(&guest.plan.primary), reason.clone());
            let term_is_new = guest.live.cut.is_some();
            back_to_steady(guest, cx, term_is_new, reason);
        }
        (SwitchoverStep::Undo { .. }, Order::UndoFinalCut { .. }, Outcome::Refused { code, message })
            if code == "not-running" || code == "not-found" =>
        {
            // It has ended; or its agent was restarted and has not taken it up again, which the host itself can tell.
            guest.live.waiting_note = message;
            let primary = guest.plan.primary.clone();
            let order = Order::Describe { guest: failover::id(guest) };
            guest.live.moving = Some(cx.order(guest, &primary, order, LOOK_TIMEOUT_MS));
        }
        (SwitchoverStep::Undo { .. }, Order::UndoFinalCut { .. }, outcome) => {
            guest.live.waiting_note = format!("cannot yet be resumed on {}: {}", guest.plan.primary, why(&outcome));
            guest.live.move_again = cx.now.plus_ms(AGAIN_MS);
        }
        _ => (),
    }
}

/// Whether the primary's host, which knew nothing of a held guest, runs it.
pub(super) fn described(guest: &mut Guest, cx: &mut Context<'_>, done: &DoneOrder) {
    guest.live.moving = None;
    let Phase::SwitchingOver(Switchover { step: SwitchoverStep::Undo { reason }, .. }) = &guest.plan.phase else {
        return;
    };
    match &done.outcome {
        // Protected anew, its agent lets it go on.
        Outcome::Done(Answer::Described { running: true }) => {
            let reason = format!("{reason}; the guest is taken up again on {}", guest.plan.primary);
            back_to_steady(guest, cx, true, reason);
        }
        Outcome::Unknown { .. } => guest.live.move_again = cx.now.plus_ms(AGAIN_MS),
        Outcome::Done(_) | Outcome::Refused { .. } => {
            let cause = Cause::gone(guest, cx, format!("it ended during a switchover ({reason})"));
            failover::begin(guest, cx, cause);
        }
    }
}

/// What the shadow has, before its promotion is ordered again.
pub(super) fn looked(guest: &mut Guest, cx: &mut Context<'_>, done: DoneOrder) {
    guest.live.moving = None;
    let Phase::SwitchingOver(Switchover { to, step: SwitchoverStep::Promote { epoch } }) = &guest.plan.phase else {
        return;
    };
    match done.outcome {
        Outcome::Done(Answer::Shadow(Some(shadow))) if shadow.committed > *epoch => {
            let reason = format!("{to} has epochs after the last cut: the guest went on by itself");
            undo(guest, cx, reason);
        }
        // No shadow: it may have been promoted, which the order itself will tell.
        Outcome::Done(_) => guest.live.looked = true,
        Outcome::Refused { .. } | Outcome::Unknown { .. } => guest.live.move_again = cx.now.plus_ms(AGAIN_MS),
    }
}

fn back_to_steady(guest: &mut Guest, cx: &mut Context<'_>, term_is_new: bool, reason: String) {
    guest.plan.phase = Phase::Steady;
    let asker = guest.live.asker.take();
    // Shadows that were accepted with this very term are still what they were.
    let accepts = if term_is_new { Default::default() } else { std::mem::take(&mut guest.live.accepts) };
    guest.live = Live { accepts, ..Live::new(cx.now) };
    cx.answer(asker, Err(RequestError::Failed(reason)));
}

pub(super) fn promote_done(guest: &mut Guest, cx: &mut Context<'_>, token: Token, host: &HostName, outcome: Outcome) {
    let Phase::SwitchingOver(Switchover { to, step: SwitchoverStep::Promote { .. } }) = &guest.plan.phase else {
        return;
    };
    if to != host {
        return;
    }
    if guest.live.moving == Some(token) {
        guest.live.moving = None;
    }
    match outcome {
        Outcome::Done(Answer::Promoted { epoch }) => {
            // An upper bound: it counts the way of both answers to us and of the order in between.
            let pause_us = guest.live.cut.map(|(at, before_us)| cx.now.us_since(at).saturating_add(before_us));
            failover::finish(guest, cx, &host.clone(), epoch, pause_us);
        }
        Outcome::Refused { code, message } if code != "unavailable" => {
            undo(guest, cx, format!("{host} could not take over: {message}"));
        }
        Outcome::Done(_) | Outcome::Refused { .. } | Outcome::Unknown { .. } => {
            guest.live.move_again = cx.now.plus_ms(AGAIN_MS);
        }
    }
}

fn why(outcome: &Outcome) -> &str {
    match outcome {
        Outcome::Refused { message, .. } => message,
        Outcome::Unknown { why } => why,
        Outcome::Done(_) => "an answer that does not belong to the question",
    }
}

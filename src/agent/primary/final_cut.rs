//! The last epoch before a switchover: suspend, cut, wait for one shadow to commit it, and hold the guest still.
//!
//! ```text
//! Waiting (the shadow has committed all that was sent) -> suspended, cutting -> Sent -> committed: Held
//!                                                                                |
//!                                  anything fails or takes too long: the guest goes on here
//! ```
//! Held, the guest waits for the manager's word. If none comes it goes on here after a while, but only while the
//! shadow's host answers and has not said that the guest runs there: it refuses the stream of a former primary. A
//! file tells a restarted agent that the guest stands still for our sake and not for an operator's.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmsync::source::PeerState;

use super::Reply;
use super::capturing::Capturing;
use crate::api::types::ApiError;

/// How long the shadow may take to be level before the guest is suspended, and to commit the last epoch after.
const LEVEL_WITHIN: Duration = Duration::from_millis(2_500);
const COMMIT_WITHIN: Duration = Duration::from_secs(2);
/// How long a held guest waits for the manager's word: longer than the manager gives a promotion.
const DECIDED_WITHIN: Duration = Duration::from_secs(20);

pub(super) struct FinalCut {
    to: String,
    reply: Option<Reply<(u64, u64)>>,
    asked: Instant,
    suspended: Option<Instant>,
    guest_ran: bool,
    epoch: Option<u64>,
    marker: PathBuf,
}

fn marker_path(run_dir: &Path, uuid: &str) -> PathBuf {
    run_dir.join("held").join(uuid)
}

/// Whether an agent of this host has suspended the guest for a switchover and not resumed it.
pub fn is_held(run_dir: &Path, uuid: &str) -> bool {
    marker_path(run_dir, uuid).exists()
}

/// The guest was destroyed, or goes on: the next agent must not take it for held.
pub fn forget_held(run_dir: &Path, uuid: &str) {
    let _ = fs::remove_file(marker_path(run_dir, uuid));
}

impl FinalCut {
    /// What an agent that ended meanwhile left: a guest that it had suspended for a switchover to a host.
    pub(super) fn left_behind(run_dir: &Path, uuid: &str) -> Option<Self> {
        let marker = marker_path(run_dir, uuid);
        let to = fs::read_to_string(&marker).ok()?;
        let now = Instant::now();
        Some(Self { to, reply: None, asked: now, suspended: Some(now), guest_ran: true, epoch: Some(0), marker })
    }

    /// Whether the guest shall run where it is promoted.
    pub(super) fn guest_ran(&self) -> bool {
        self.guest_ran
    }

    pub(super) fn was_cut(&mut self, epoch: u64) {
        if self.suspended.is_some() {
            self.epoch = Some(epoch);
        }
    }
}

impl Capturing {
    pub(super) fn begin_final_cut(&mut self, to: &str, reply: Reply<(u64, u64)>) {
        let refusal = match self.view_of(to) {
            _ if self.final_cut.is_some() => Some("another switchover of this guest is under way".to_owned()),
            None => Some(format!("{to} keeps no shadow of {}", self.guest())),
            Some(view) if view.state != PeerState::Following => {
                Some(format!("the shadow on {to} does not follow yet (it lacks {} pages)", view.pending_pages))
            }
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            let _ = reply.send(Err(ApiError::new("refused", refusal)));
            return;
        }
        self.final_cut = Some(FinalCut {
            to: to.into(),
            reply: Some(reply),
            asked: Instant::now(),
            suspended: None,
            guest_ran: !self.paused,
            epoch: None,
            marker: marker_path(self.run_dir(), self.uuid()),
        });
        self.advance_final_cut(Instant::now());
    }

    /// Does the next part of a switchover that is under way. Called between cuts.
    pub(super) fn advance_final_cut(&mut self, now: Instant) {
        let Some(final_cut) = &self.final_cut else { return };
        if self.cutting_since.is_some() {
            return;
        }
        if final_cut.reply.is_none() {
            return self.wait_for_decision(now);
        }
        let (to, suspended, epoch) = (final_cut.to.clone(), final_cut.suspended, final_cut.epoch);
        let asked = final_cut.asked;
        let Some(view) = self.view_of(&to) else { return self.give_up_final_cut("the shadow is no longer wanted") };
        match (suspended, epoch) {
            (None, _) if view.state == PeerState::Following && view.in_flight_epochs == 0 => {
                self.suspend_and_cut(now);
            }
            (None, _) if now > asked + LEVEL_WITHIN => {
                self.give_up_final_cut("the shadow does not keep up with the guest");
            }
            (None, _) => {}
            (Some(at), None) if now > at + COMMIT_WITHIN => self.give_up_final_cut("the last cut failed"),
            (Some(_), None) => drop(self.cut_at_once()),
            (Some(at), Some(epoch)) if view.committed.is_some_and(|committed| committed.get() >= epoch) => {
                let still_us = (now - at).as_micros() as u64;
                if let Some(reply) = self.final_cut.as_mut().and_then(|f| f.reply.take())
                    && reply.send(Ok((epoch, still_us))).is_err()
                {
                    // Whoever asked is gone: nobody will promote that epoch.
                    self.resume_after_final_cut("nobody waits for the switchover any more");
                }
            }
            (Some(at), Some(_)) if now > at + COMMIT_WITHIN => {
                self.give_up_final_cut("the shadow did not commit the last epoch in time");
            }
            (Some(_), Some(_)) => {}
        }
    }

    /// The manager may have died between the last epoch and the promotion.
    fn wait_for_decision(&mut self, now: Instant) {
        let Some(final_cut) = &self.final_cut else { return };
        let overdue = final_cut.suspended.is_none_or(|at| now > at + DECIDED_WITHIN);
        let to = final_cut.to.clone();
        // A shadow that was promoted refuses this stream and is not level with it.
        let still_shadow = self.view_of(&to).is_some_and(|view| view.state == PeerState::Following);
        if overdue && still_shadow {
            self.resume_after_final_cut("the manager did not decide in time, and the shadow still waits");
        }
    }

    fn suspend_and_cut(&mut self, now: Instant) {
        if let Some(final_cut) = self.final_cut.as_ref().filter(|final_cut| final_cut.guest_ran) {
            let (marker, to) = (final_cut.marker.clone(), final_cut.to.clone());
            let dir = marker.parent().map_or(Ok(()), fs::create_dir_all);
            if let Err(error) = dir.and_then(|()| fs::write(&marker, to)) {
                return self.give_up_final_cut(&format!("cannot write {}: {error}", marker.display()));
            }
        }
        if let Err(error) = self.domain.get().and_then(|domain| domain.suspend()) {
            return self.give_up_final_cut(&error.to_string());
        }
        if let Some(final_cut) = &mut self.final_cut {
            final_cut.suspended = Some(now);
        }
        self.cut_at_once();
    }

    fn give_up_final_cut(&mut self, reason: &str) {
        let reply = self.final_cut.as_mut().and_then(|f| f.reply.take());
        self.resume_after_final_cut(reason);
        if let Some(reply) = reply {
            let text = format!("guest {} stays on {}: {reason}", self.guest(), self.host());
            let _ = reply.send(Err(ApiError::new("failed", text)));
        }
    }

    pub(super) fn undo_final_cut(&mut self) -> Result<(), ApiError> {
        self.resume_after_final_cut("the manager took the switchover back");
        Ok(())
    }

    fn resume_after_final_cut(&mut self, reason: &str) {
        let Some(final_cut) = self.final_cut.take() else { return };
        let _ = fs::remove_file(&final_cut.marker);
        if final_cut.suspended.is_some() && final_cut.guest_ran {
            tracing::warn!(guest = self.guest(), reason, "switchover given up; the guest goes on here");
            if let Err(error) = self.domain.get().and_then(|domain| domain.resume()) {
                tracing::error!(guest = self.guest(), %error, "cannot resume the guest; do it with virsh resume");
            }
        }
    }
}

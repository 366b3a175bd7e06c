//! What others do to a guest that is captured: its devices change, it is paused and resumed, or found paused with nobody to
//! start it again.

use std::time::{Duration, Instant};

use super::Capturing;
use crate::agent::primary::describe::{definition_of, description_of};
use crate::agent::primary::watch::STUCK_AFTER;
use crate::capture::attach::ram_layout;
use crate::hypervisor::{DomainState, PAUSED_UNKNOWN};

impl Capturing {
    pub(in crate::agent::primary) fn look_at_devices(&mut self) {
        self.devices_changed_at = Some(Instant::now());
    }

    /// Attaches anew when the guest has other RAM blocks or another definition than the shadows were made from.
    pub(super) fn compare_devices(&mut self) {
        let domain = match self.domain.get() {
            Ok(domain) => domain,
            Err(error) => return self.look_again_later(&error.to_string()),
        };
        let described = definition_of(&domain).and_then(|definition| description_of(&domain, &definition));
        let (layout, description) = match (ram_layout(&domain), described) {
            (Ok((layout, _)), Ok(description)) => (self.disks.set.layout(&layout), description),
            (Err(error), _) => return self.look_again_later(&error.to_string()),
            (_, Err(error)) => return self.look_again_later(&error),
        };
        let known = self.source.config();
        if layout.as_ref() != Ok(&known.layout) || description != known.description {
            self.out.trouble = Some("its devices or its definition changed; the shadows are told".into());
        }
    }

    fn look_again_later(&mut self, error: &str) {
        tracing::debug!(guest = self.guest, error, "cannot compare devices now");
        self.devices_changed_at = Some(Instant::now());
    }

    pub(in crate::agent::primary) fn guest_stopped(&mut self, at_us: u64) {
        if self.is_about_a_cut() {
            self.totals.pauses.stopped(at_us);
        } else {
            self.totals.pauses.ignore_current();
        }
    }

    /// Whether an event of this moment can stem from a cut; others stop and start the guest as well.
    fn is_about_a_cut(&self) -> bool {
        let just_cut = self.cutting_since.is_some() || self.last_cut_ended.elapsed() < Duration::from_millis(100);
        just_cut && self.final_cut.is_none()
    }

    pub(in crate::agent::primary) fn guest_resumed(&mut self, at_us: u64) {
        self.paused = false;
        if !self.is_about_a_cut() {
            self.totals.pauses.ignore_current();
        }
        self.totals.pauses.resumed(at_us);
    }

    /// A save or snapshot that began during a cut leaves the guest paused with no one to start it again.
    pub(super) fn free_stuck_guest(&mut self, now: Instant, stopped_since: Option<Instant>) {
        let stopped_long = stopped_since.is_some_and(|since| now >= since + STUCK_AFTER);
        if !stopped_long || self.paused || self.final_cut.is_some() || now < self.last_cut_ended + STUCK_AFTER / 3 {
            return;
        }
        let Ok(domain) = self.domain.get() else { return };
        match (domain.state(), domain.job_running()) {
            (Ok((DomainState::Paused, PAUSED_UNKNOWN)), Ok(false)) => {
                if now < self.last_cut_ended + STUCK_AFTER {
                    self.next_cut_at = now + STUCK_AFTER;
                    return;
                }
                tracing::warn!(guest = self.guest, "found paused without a reason; resuming it");
                if let Err(error) = domain.resume() {
                    tracing::error!(guest = self.guest, %error, "cannot resume it");
                }
            }
            (Ok((DomainState::Paused, _)), Ok(false)) => {
                self.totals.pauses.ignore_current();
                self.paused = true;
            }
            _ => {}
        }
    }
}

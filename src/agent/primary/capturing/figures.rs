//! What is told of a guest that is captured: counters that outlive an attachment, and the status that heartbeats carry.

use vmsync::source::PeerView;
use vmsync::units::PeerId;

use super::Capturing;
use crate::agent::primary::report::peer_status;
use crate::agent::stats::{Dirty, Pauses, Recent};
use crate::api::control::PrimaryStatus;
use crate::api::types::CaptureStats;

/// Cuts that fail in a row before that is shown as a problem.
const FAILURES_SHOWN: u32 = 3;

/// What is carried over when a guest is attached anew.
#[derive(Debug, Default)]
pub(in crate::agent::primary) struct Totals {
    pub(super) raw_bytes: u64,
    pub(super) wire_bytes: u64,
    pub(super) epochs: u64,
    pub(super) watchdog_fired: u64,
    pub(super) pauses: Pauses,
    /// Of the pauses, microseconds.
    pub(super) searches: Recent,
    pub(super) copies: Recent,
    pub(super) dirty: Dirty,
}

impl Capturing {
    pub(in crate::agent::primary) fn totals(&self) -> Totals {
        let own = self.source.totals();
        Totals {
            raw_bytes: self.before.0 + own.raw_bytes,
            wire_bytes: self.before.1 + own.wire_bytes,
            epochs: self.before.2 + own.epochs,
            watchdog_fired: self.totals.watchdog_fired,
            ..Totals::default()
        }
    }

    pub(in crate::agent::primary) fn view_of(&self, host: &str) -> Option<PeerView> {
        self.source.peer_view(self.now(), &PeerId::new(host))
    }

    /// Leaves everything for the next heartbeat.
    pub(in crate::agent::primary) fn fill(&mut self, status: &mut PrimaryStatus, epoch: u64) {
        let own = self.source.totals();
        status.running = !self.paused && self.final_cut.is_none();
        status.memory_bytes = self.memory_bytes;
        status.problem = if self.failures >= FAILURES_SHOWN { self.problem.clone() } else { self.disks.text.clone() };
        status.stats = CaptureStats {
            epoch,
            pause_us: self.totals.pauses.percentiles(),
            search_us: self.totals.searches.percentiles(),
            copy_us: self.totals.copies.percentiles(),
            dirty_pages: self.totals.dirty.view(),
            raw_bytes_total: self.before.0 + own.raw_bytes,
            wire_bytes_total: self.before.1 + own.wire_bytes,
            tracker: self.tracker.into(),
            tracker_reason: self.tracker_reason.clone(),
            epochs_total: self.before.2 + own.epochs,
            interval_now_us: self.pacing.interval().as_micros() as u64,
            paced_by: self.pacing.paced_by().into(),
            watchdog_fired_total: self.totals.watchdog_fired,
            output: Default::default(),
        };
        let now = self.now();
        let (rates, lags) = (&mut self.rates, &mut self.lags);
        let (refusals, lost) = (&self.out.refusals, &self.lost);
        let peers = self.source.peer_views(now).into_iter().map(|view| {
            let host = view.peer.as_str().to_owned();
            let rate = rates.entry(host.clone()).or_default().update(now.get(), view.wire_bytes_total);
            let committed = view.committed.zip(view.lag).map(|(epoch, lag)| (epoch.get(), lag.get()));
            let lag_peak = lags.entry(host.clone()).or_default().observe(now.get(), committed);
            peer_status(host, view, rate, lag_peak, refusals, lost)
        });
        status.peers = peers.collect();
    }
}

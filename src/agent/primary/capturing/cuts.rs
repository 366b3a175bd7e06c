//! Cuts: when one is made, what becomes of its answer, and what follows from one that failed.
//!
//! ```text
//! due --> tracker not ready: prepare, a little of it at a time
//!     --> Source::cut_plan: Skip | Collect (which pages were written) | Cut
//! cut thread: prepared | collected | captured --> an epoch's number --> Source --> pace
//!                                   or an error --> later and later; after many in a row the guest is attached anew
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vmsync::source::{Cut, CutPlan, SourceEvent};
use vmsync::units::Epoch;

use super::Capturing;
use crate::agent::primary::cut_thread::CutAnswer;
use crate::agent::primary::epochs::EpochNumbers;
use crate::agent::primary::final_cut::FinalCut;
use crate::agent::primary::output::CutMark;
use crate::capture::cutter::{Captured, CutError};

/// A paused guest changes nothing; it is still looked at this often.
const INTERVAL_WHILE_PAUSED: Duration = Duration::from_millis(1000);
/// The tracker gets ready in many short pauses, this far apart.
const PREPARE_EVERY: Duration = Duration::from_millis(10);
/// Cuts that fail in a row before the guest is attached anew.
const FAILURES_IN_A_ROW: u32 = 20;

impl Capturing {
    pub(super) fn cut_if_wanted(&mut self, now: Instant) {
        let interval = if self.paused { INTERVAL_WHILE_PAUSED } else { Duration::ZERO }.max(self.pacing.interval());
        self.next_cut_at = (self.next_cut_at + interval).max(now);
        if !self.ready {
            self.cutting_since = Some(now);
            self.cuts.prepare();
            return;
        }
        if !self.disks.is_ready() {
            return;
        }
        match self.source.cut_plan() {
            CutPlan::Skip => {}
            CutPlan::Collect => {
                self.cutting_since = Some(now);
                self.cuts.collect();
            }
            CutPlan::Cut { extras } => {
                self.cutting_since = Some(now);
                self.cuts.cut(extras, self.cut_bound, self.source.take_spent());
            }
        }
    }

    /// Pages may be read: whoever writes them is seen.
    pub(super) fn is_ready(&self) -> bool {
        self.ready && self.disks.is_ready()
    }

    pub(super) fn look_at_disks(&mut self, now: Instant) {
        match self.disks.look(now, &self.domain) {
            Ok(false) => {}
            Ok(true) => {
                let deferred = std::mem::take(&mut self.deferred);
                self.carry_out(deferred, VecDeque::new());
            }
            Err(reason) => drop(self.out.trouble.get_or_insert(reason)),
        }
    }

    /// Cuts now, whatever the interval says; false: the source cannot use one yet.
    pub(in crate::agent::primary) fn cut_at_once(&mut self) -> bool {
        match self.source.cut_plan() {
            CutPlan::Cut { extras } if self.cutting_since.is_none() && self.is_ready() => {
                self.cutting_since = Some(Instant::now());
                self.cuts.cut(extras, self.context.watchdog, self.source.take_spent());
                true
            }
            _ => false,
        }
    }

    pub(in crate::agent::primary) fn cut_answered(&mut self, answer: CutAnswer, epochs: &mut EpochNumbers) {
        self.cutting_since = None;
        self.last_cut_ended = Instant::now();
        let outcome = match answer {
            CutAnswer::Prepared(Ok(ready)) => {
                self.ready = ready;
                if !ready {
                    self.next_cut_at = Instant::now() + self.pacing.interval().min(PREPARE_EVERY);
                }
                Ok(())
            }
            CutAnswer::Collected(Ok((dirty, at))) => {
                self.totals.dirty.record(dirty.len());
                let at = self.millis_of(at);
                self.step(SourceEvent::Collected { at, dirty });
                Ok(())
            }
            CutAnswer::Cut(captured) => match *captured {
                Ok(captured) => {
                    self.take_cut(captured, epochs);
                    Ok(())
                }
                Err(error) => Err(error),
            },
            CutAnswer::Prepared(Err(error)) | CutAnswer::Collected(Err(error)) => Err(error),
        };
        match outcome {
            Ok(()) => self.failures = 0,
            Err(error) => self.cut_failed(&error),
        }
        let deferred = std::mem::take(&mut self.deferred);
        self.carry_out(deferred, VecDeque::new());
    }

    fn take_cut(&mut self, captured: Captured, epochs: &mut EpochNumbers) {
        let Captured { dirty, pages, extras, device_state, at, held, scan, copy, worked, mappings, mark } = captured;
        tracing::trace!(guest = self.guest, pages = pages.len(), ?scan, ?copy, ?held, "cut");
        self.totals.dirty.record(dirty.len());
        self.totals.searches.record(scan.as_micros() as u64);
        self.totals.copies.record(copy.as_micros() as u64);
        // A block that was plugged since the cut before is not in this epoch: it must not be committed.
        if mappings != self.mappings {
            self.mappings = mappings;
            self.compare_devices();
            if self.out.trouble.is_some() {
                return;
            }
        }
        let epoch = epochs.next();
        self.cut_marks.push(CutMark { epoch, mark, pause: held });
        if let Some(recorder) = &mut self.recorder {
            recorder.cut(epoch, at.saturating_duration_since(self.started), &pages, &device_state);
        }
        let running = self.final_cut.as_ref().map_or(!self.paused, FinalCut::guest_ran);
        let cut = Cut {
            epoch: Epoch::new(epoch),
            at: self.millis_of(at),
            dirty,
            pages,
            extras,
            device_state: device_state.into(),
            running,
        };
        let began = Instant::now();
        self.step(SourceEvent::Cut(cut));
        let coding_us = began.elapsed().as_micros() as u64;
        self.step(SourceEvent::Paced { coding_us, interval_us: self.pacing.interval().as_micros() as u64 });
        let peers = self.source.peer_views(self.now()).len();
        self.pacing.cut(held, worked, self.source.totals().wire_bytes, peers);
        if let Some(final_cut) = &mut self.final_cut {
            final_cut.was_cut(epoch);
        }
    }

    fn cut_failed(&mut self, error: &CutError) {
        self.failures += 1;
        match error {
            CutError::WatchdogFired(_) => {
                self.totals.watchdog_fired += 1;
                tracing::warn!(guest = self.guest, %error, "a cut was given up; the guest runs on");
            }
            CutError::Guard(guard) => {
                tracing::warn!(guest = self.guest, error = %guard, "replacing the guard");
                match self.context.guards.get() {
                    Ok(guard) => {
                        self.disks.set.set_guard(&guard);
                        self.cuts.set_guard(guard);
                    }
                    Err(error) => self.out.trouble = Some(error.to_string()),
                }
            }
            // libvirtd may be away for long; what the tracker knows is kept until it is back.
            CutError::Monitor(reason) => tracing::debug!(guest = self.guest, reason, "cut refused"),
            CutError::DeviceState(_) => tracing::warn!(guest = self.guest, %error, "a cut brought no usable state"),
            CutError::Tracker(_) | CutError::Memory(_) | CutError::Crew(_) | CutError::Disk(_) | CutError::Pipe(_) => {
                self.out.trouble = Some(error.to_string())
            }
        }
        // Not again at once: whatever is wrong, the guest shall not be stopped for nothing 20 times a second.
        let pause = self.pacing.interval().max(Duration::from_millis(50)) * self.failures.min(20);
        self.next_cut_at = Instant::now() + pause;
        self.problem = error.to_string();
        if self.failures >= FAILURES_IN_A_ROW && !matches!(error, CutError::Monitor(_)) {
            self.failures = 0;
            self.out.trouble = Some(error.to_string());
        }
    }

    pub(in crate::agent::primary) fn take_cut_marks(&mut self) -> Vec<CutMark> {
        std::mem::take(&mut self.cut_marks)
    }

    /// The next cut is wanted by then, unless cuts fail. The one under way serves what waits already.
    pub(in crate::agent::primary) fn cut_by(&mut self, at: Instant) {
        if self.failures == 0 && !self.paused && self.cutting_since.is_none() {
            self.next_cut_at = self.next_cut_at.min(at);
        }
    }
}

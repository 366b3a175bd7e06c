//! A guest that is attached: what happens becomes events of its `vmsync::Source`, and what that asks for is carried out.
//!
//! ```text
//! session --> attaching --> Capturing --> timers --> cuts (cut thread) --+
//!                                         changes (devices, pauses)      +--> step --> Source --> outbox
//!                                         peers, inbound frames ---------+
//! figures: what of it is told
//! ```

mod attaching;
mod changes;
mod cuts;
mod figures;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmsync::source::{Source, SourceAlarm, SourceEffect, SourceEvent};
use vmsync::units::{Millis, PeerId};

use super::cut_thread::CutThread;
use super::disks::DiskWatch;
use super::exit_watch::ExitWatch;
use super::final_cut::FinalCut;
use super::outbox::Outbox;
use super::output::CutMark;
use super::pacing::Pacing;
use super::peers::PeerEvent;
use super::recorder::Recorder;
use super::session::TICK;
use super::{PrimaryContext, Reply};
use crate::agent::libvirt::LiveDomain;
use crate::agent::stats::{PeakLags, Rate};
use crate::api::types::{Budget, VerifyReport};
use crate::capture::memory::GuestMemory;
use crate::capture::tracker::LiveReads;
use crate::hypervisor::process::QemuProcess;
pub(super) use attaching::mirror_budget;
pub(super) use figures::Totals;

/// Devices that come or go are looked at this long after the last event about them: libvirt first finishes.
const DEVICES_SETTLE: Duration = Duration::from_millis(150);
/// An answer of the cut thread that takes this long will not come: libvirt itself gives up after 30 s.
const CUT_ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How often the clock is looked at while a cut that is due waits for something else.
const WAITING_LOOK_EVERY: Duration = Duration::from_micros(500);

pub(super) struct Capturing {
    guest: String,
    uuid: String,
    host: String,
    started: Instant,
    pub(super) domain: LiveDomain,
    process: QemuProcess,
    memory: GuestMemory,
    live_reads: Option<LiveReads>,
    disks: DiskWatch,
    mappings: u64,
    pub(super) source: Source,
    cuts: CutThread,
    _exit: ExitWatch,
    tracker: &'static str,
    tracker_reason: String,
    pacing: Pacing,
    next_cut_at: Instant,
    /// The longest a cut may take; less than the operator allows while output waits.
    pub(super) cut_bound: Duration,
    /// A cut is due and must wait.
    held_up: bool,
    /// The tracker's preparation is done.
    ready: bool,
    recorder: Option<Recorder>,
    /// Since when the cut thread is at work.
    pub(super) cutting_since: Option<Instant>,
    last_cut_ended: Instant,
    failures: u32,
    /// Why the last cut failed.
    problem: String,
    /// An operator (or an error) paused the guest.
    pub(super) paused: bool,
    devices_changed_at: Option<Instant>,
    pub(super) final_cut: Option<FinalCut>,
    /// Why there is no connection to a shadow's host.
    lost: BTreeMap<String, String>,
    rates: BTreeMap<String, Rate>,
    lags: BTreeMap<String, PeakLags>,
    totals: Totals,
    /// Totals of earlier attachments, which the source's own are added to.
    before: (u64, u64, u64),
    /// Reads of the running guest's memory that must wait. The cut under way has stopped the guest already or not yet,
    /// nobody knows, and a page read after it must not be taken for one from before. And before the tracker is ready
    /// a page may be written after it was read without anybody noticing.
    deferred: Vec<SourceEffect>,
    pub(super) out: Outbox,
    context: Arc<PrimaryContext>,
    memory_bytes: u64,
    cut_marks: Vec<CutMark>,
}

impl Capturing {
    /// When [`Self::timers`] have something to do, if nothing happens before.
    pub(super) fn next_look_at(&self, now: Instant) -> Instant {
        match self.cutting_since {
            // The next cut may be due by now, and will be made when this one has ended.
            Some(_) => now + TICK,
            None if self.held_up => now + WAITING_LOOK_EVERY,
            None => self.next_cut_at,
        }
    }

    pub(super) fn set_pace(&mut self, shortest: Duration, budget: Budget) {
        self.pacing.set(shortest, budget);
    }

    /// A source has one term for its life.
    pub(super) fn set_term(&mut self, term: u64) {
        self.out.trouble = Some(format!("this host is primary with the new term {term}"));
    }

    pub(super) fn now(&self) -> Millis {
        Millis::new(self.started.elapsed().as_millis() as u64)
    }

    /// Everything that is due by the clock.
    pub(super) fn timers(&mut self, now: Instant, on_hold: bool, stopped_since: Option<Instant>) {
        self.step(SourceEvent::Tick);
        self.look_at_disks(now);
        if let Some(since) = self.cutting_since {
            if now > since + CUT_ANSWER_WITHIN {
                self.out.trouble = Some(format!("no answer to a cut within {} s", CUT_ANSWER_WITHIN.as_secs()));
            }
            return;
        }
        if self.devices_changed_at.is_some_and(|at| now >= at + DEVICES_SETTLE) {
            self.devices_changed_at = None;
            self.compare_devices();
        }
        self.free_stuck_guest(now, stopped_since);
        self.advance_final_cut(now);
        let wait =
            self.devices_changed_at.is_some() || on_hold || self.final_cut.is_some() || self.out.trouble.is_some();
        self.held_up = wait && now >= self.next_cut_at;
        if now >= self.next_cut_at && !wait {
            self.cut_if_wanted(now);
        }
    }

    /// Frames on their way to the guest.
    pub(super) fn inbound(&mut self, frames: Vec<Vec<u8>>) {
        self.step(SourceEvent::Inbound { frames });
    }

    pub(super) fn add_peer(&mut self, host: &str) {
        self.step(SourceEvent::PeerAdded { peer: PeerId::new(host) });
    }

    pub(super) fn remove_peer(&mut self, host: &str) {
        self.out.refusals.remove(host);
        self.rates.remove(host);
        self.lags.remove(host);
        self.step(SourceEvent::PeerRemoved { peer: PeerId::new(host) });
    }

    pub(super) fn peer(&mut self, host: &str, event: PeerEvent) {
        let peer = PeerId::new(host);
        let event = match event {
            PeerEvent::Connected => {
                self.out.refusals.remove(host);
                self.lost.remove(host);
                SourceEvent::Connected { peer }
            }
            PeerEvent::Received(message) => SourceEvent::Received { peer, message },
            PeerEvent::Unreadable(error) => SourceEvent::Unreadable { peer, error },
            PeerEvent::Written(bytes) => SourceEvent::Written { peer, bytes },
            PeerEvent::Lost(reason) => {
                self.lost.insert(host.to_owned(), reason);
                SourceEvent::Disconnected { peer }
            }
        };
        self.step(event);
    }

    pub(super) fn begin_verify(&mut self, reply: Reply<VerifyReport>) {
        self.out.verify.push(reply);
        self.step(SourceEvent::VerifyStart);
    }

    /// One step of the core, and everything that follows from it by itself.
    pub(super) fn step(&mut self, event: SourceEvent) {
        self.carry_out(Vec::new(), VecDeque::from([event]));
    }

    fn carry_out(&mut self, mut effects: Vec<SourceEffect>, mut events: VecDeque<SourceEvent>) {
        loop {
            for effect in effects.drain(..) {
                let reads = matches!(effect, SourceEffect::ReadLive { .. } | SourceEffect::ReadVerify { .. });
                if reads && (self.cutting_since.is_some() || !self.is_ready()) {
                    self.deferred.push(effect);
                    continue;
                }
                let event = self.out.perform(effect, &self.memory, &self.guest);
                if let (
                    Some(SourceEvent::LiveRead { pages, .. } | SourceEvent::VerifyRead { pages, .. }),
                    Some(live_reads),
                ) = (&event, &self.live_reads)
                {
                    live_reads.note(pages);
                }
                events.extend(event);
            }
            let Some(event) = events.pop_front() else { return };
            if let Err(alarm) = self.source.step(self.now(), event, &mut effects) {
                return self.alarm(&alarm);
            }
        }
    }

    fn alarm(&mut self, alarm: &SourceAlarm) {
        tracing::error!(guest = self.guest, %alarm, "alarm of the sync engine");
        self.out.trouble = Some(alarm.to_string());
    }

    fn millis_of(&self, at: Instant) -> Millis {
        Millis::new(at.saturating_duration_since(self.started).as_millis() as u64)
    }

    pub(super) fn uuid(&self) -> &str {
        &self.uuid
    }

    pub(super) fn run_dir(&self) -> &std::path::Path {
        &self.context.run_dir
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn guest(&self) -> &str {
        &self.guest
    }
}

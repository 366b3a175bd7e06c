//! A guest that is attached: cuts when `vmsync::Source` wants one, feeds it, and carries out what it asks for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmsync::codec::MirrorBudget;
use vmsync::source::{
    Cut, CutPlan, PeerView, Source, SourceAlarm, SourceConfig, SourceEffect, SourceEvent, SourceLimits,
};
use vmsync::units::{Epoch, GuestUuid, Lineage, Millis, PeerId, Term};

use super::cut_thread::{CutAnswer, CutThread};
use super::describe::{definition_of, description_of, monitor_call, random_u64, refuse_what_cannot_be_captured};
use super::disks::DiskWatch;
use super::epochs::EpochNumbers;
use super::exit_watch::ExitWatch;
use super::final_cut::{FinalCut, forget_held};
use super::outbox::Outbox;
use super::output::CutMark;
use super::pacing::Pacing;
use super::peers::PeerEvent;
use super::recorder::Recorder;
use super::report::peer_status;
use super::session::{Input, Session, TICK};
use super::watch::STUCK_AFTER;
use super::{PrimaryContext, Reply};
use crate::agent::libvirt::LiveDomain;
use crate::agent::stats::{Dirty, Pauses, PeakLags, Rate, Recent};
use crate::api::control::PrimaryStatus;
use crate::api::types::{ApiError, Budget, CaptureStats, VerifyReport};
use crate::capture::advice::huge_pages;
use crate::capture::attach::{AttachOptions, Attached, attach, detach, ram_layout};
use crate::capture::cutter::{Captured, CutError};
use crate::capture::memory::GuestMemory;
use crate::capture::tracker::LiveReads;
use crate::hypervisor::process::QemuProcess;
use crate::hypervisor::{DomainState, PAUSED_UNKNOWN};

/// Level of the pages' compression; the fastest that still shrinks well.
const ZSTD_LEVEL: i32 = -1;
/// A paused guest changes nothing; it is still looked at this often.
const INTERVAL_WHILE_PAUSED: Duration = Duration::from_millis(1000);
/// The tracker gets ready in many short pauses, this far apart.
const PREPARE_EVERY: Duration = Duration::from_millis(10);
/// Devices that come or go are looked at this long after the last event about them: libvirt first finishes.
const DEVICES_SETTLE: Duration = Duration::from_millis(150);
/// An answer of the cut thread that takes this long will not come: libvirt itself gives up after 30 s.
const CUT_ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How often the clock is looked at while a cut that is due waits for something else.
const WAITING_LOOK_EVERY: Duration = Duration::from_micros(500);
/// Cuts that fail in a row before that is shown as a problem, and before the guest is attached anew.
const FAILURES_SHOWN: u32 = 3;
const FAILURES_IN_A_ROW: u32 = 20;

/// What is carried over when a guest is attached anew.
#[derive(Debug, Default)]
pub(super) struct Totals {
    raw_bytes: u64,
    wire_bytes: u64,
    epochs: u64,
    watchdog_fired: u64,
    pauses: Pauses,
    /// Of the pauses, microseconds.
    searches: Recent,
    copies: Recent,
    dirty: Dirty,
}

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
    pub(super) fn attach(session: &mut Session, attachment: u64) -> Result<Self, String> {
        let (context, spec) = (Arc::clone(&session.context), session.spec.clone());
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let domain = context.libvirt.lookup(&spec.uuid).map_err(|e| text(&e))?;
        let (state, _) = domain.state().map_err(|e| text(&e))?;
        if !matches!(state, DomainState::Running | DomainState::Paused) {
            return Err(format!("domain {} is {state:?}, not running", spec.domain));
        }
        let definition = definition_of(&domain)?;
        refuse_what_cannot_be_captured(&definition)?;
        let description = description_of(&domain, &definition)?;
        let guard = context.guards.get().map_err(|e| text(&e))?;
        let disks = session.disks.of(&context, &domain, &definition)?;
        let options =
            AttachOptions { tracker: context.tracker, bound: context.watchdog, run_dir: context.run_dir.clone() };
        let call = monitor_call(LiveDomain::new(Arc::clone(&context.libvirt), &spec.uuid));
        let Attached { mut cutter, process, layout, tracker_reason } =
            attach(&domain, &guard, call, Arc::clone(&disks), &options).map_err(|e| text(&e))?;
        let guest = GuestUuid::parse(&spec.uuid).ok_or_else(|| format!("{} is no UUID", spec.uuid))?;
        let mut source = Source::new(SourceConfig {
            term: Term::new(spec.term),
            lineage: Lineage::new(random_u64()?),
            guest,
            domain: spec.domain.clone(),
            host: context.host.clone(),
            layout: (*layout).clone(),
            description,
            zstd_level: ZSTD_LEVEL,
            mirror: mirror_budget(spec.mirror_mib),
            limits: SourceLimits::default(),
        })
        .map_err(|e| text(&e))?;
        source.set_mirror_advice(huge_pages);
        cutter.set_at_stop(session.output.at_stop());
        let memory = cutter.memory().clone();
        let mappings = memory.mappings_digest().map_err(|e| text(&e))?;
        let memory_bytes = memory.ranges().map(|(_, _, len)| len).sum();
        let (tracker, live_reads) = (cutter.tracker_name(), cutter.live_reads());
        let inputs = Mutex::new(session.inputs.clone());
        let cuts = CutThread::start(cutter, move |answer| {
            let input = Input::Cut { attachment, answer };
            let _ = inputs.lock().unwrap_or_else(|p| p.into_inner()).send(input);
        })
        .map_err(|e| text(&e))?;
        let inputs = session.inputs.clone();
        let exit = ExitWatch::start(process.pid, move |exit| drop(inputs.send(Input::Exited { attachment, exit })))
            .map_err(|e| text(&e))?;
        if !process.is_alive() {
            return Err("QEMU ended while it was being attached".into());
        }
        let interval_ms = spec.interval.as_millis();
        let recorder =
            context.record_dir.as_ref().and_then(|dir| Recorder::start(dir, &spec.domain, interval_ms, &memory));
        let totals = std::mem::take(&mut session.totals);
        tracing::info!(guest = spec.domain, pid = process.pid, tracker, tracker_reason, "attached");
        let now = Instant::now();
        Ok(Self {
            guest: spec.domain,
            uuid: spec.uuid.clone(),
            host: context.host.clone(),
            started: now,
            domain: LiveDomain::new(Arc::clone(&context.libvirt), &session.spec.uuid),
            process,
            memory,
            live_reads,
            disks: DiskWatch::new(disks),
            mappings,
            source,
            cuts,
            _exit: exit,
            tracker,
            tracker_reason,
            pacing: Pacing::new(spec.interval, spec.budget),
            next_cut_at: now,
            cut_bound: context.watchdog,
            held_up: false,
            ready: false,
            recorder,
            cutting_since: None,
            last_cut_ended: now,
            failures: 0,
            problem: String::new(),
            paused: state == DomainState::Paused,
            devices_changed_at: None,
            final_cut: FinalCut::left_behind(&session.context.run_dir, &session.spec.uuid),
            lost: BTreeMap::new(),
            rates: BTreeMap::new(),
            lags: BTreeMap::new(),
            before: (totals.raw_bytes, totals.wire_bytes, totals.epochs),
            totals,
            deferred: Vec::new(),
            out: Outbox::default(),
            context,
            cut_marks: Vec::new(),
            memory_bytes,
        })
    }

    /// Leaves the guest. `for_good`: also takes back what would serve a later attachment.
    pub(super) fn detach(self, context: &PrimaryContext, uuid: &str, for_good: bool) {
        for reply in self.out.verify {
            let _ = reply.send(Err(ApiError::new("unavailable", "the guest is no longer captured; try again")));
        }
        if for_good {
            forget_held(&context.run_dir, uuid);
        }
        if for_good && let Ok(guard) = context.guards.get() {
            // A cut under way ends first: its pipe must not vanish under QEMU.
            let give_up_at = Instant::now() + Duration::from_secs(2);
            drop(self.cuts);
            while self.cutting_since.is_some() && self.process.is_alive() && Instant::now() < give_up_at {
                std::thread::sleep(Duration::from_millis(5));
                if self.last_cut_ended.elapsed() > context.watchdog * 2 {
                    break;
                }
            }
            detach(&guard, self.process, uuid, &context.run_dir);
        }
    }

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

    fn cut_if_wanted(&mut self, now: Instant) {
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
                self.cuts.cut(extras, self.cut_bound);
            }
        }
    }

    /// Pages may be read: whoever writes them is seen.
    fn is_ready(&self) -> bool {
        self.ready && self.disks.is_ready()
    }

    fn look_at_disks(&mut self, now: Instant) {
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
    pub(super) fn cut_at_once(&mut self) -> bool {
        match self.source.cut_plan() {
            CutPlan::Cut { extras } if self.cutting_since.is_none() && self.is_ready() => {
                self.cutting_since = Some(Instant::now());
                self.cuts.cut(extras, self.context.watchdog);
                true
            }
            _ => false,
        }
    }

    /// Frames on their way to the guest.
    pub(super) fn inbound(&mut self, frames: Vec<Vec<u8>>) {
        self.step(SourceEvent::Inbound { frames });
    }

    pub(super) fn cut_answered(&mut self, answer: CutAnswer, epochs: &mut EpochNumbers) {
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
        let Captured { dirty, pages, extras, device_state, at, held, scan, copy, mappings, mark } = captured;
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
        self.pacing.cut(held, scan + copy, self.source.totals().wire_bytes, peers);
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

    pub(super) fn look_at_devices(&mut self) {
        self.devices_changed_at = Some(Instant::now());
    }

    /// Attaches anew when the guest has other RAM blocks or another definition than the shadows were made from.
    fn compare_devices(&mut self) {
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

    pub(super) fn guest_stopped(&mut self, at_us: u64) {
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

    pub(super) fn guest_resumed(&mut self, at_us: u64) {
        self.paused = false;
        if !self.is_about_a_cut() {
            self.totals.pauses.ignore_current();
        }
        self.totals.pauses.resumed(at_us);
    }

    /// A save or snapshot that began during a cut leaves the guest paused with no one to start it again.
    fn free_stuck_guest(&mut self, now: Instant, stopped_since: Option<Instant>) {
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

    pub(super) fn take_cut_marks(&mut self) -> Vec<CutMark> {
        std::mem::take(&mut self.cut_marks)
    }

    /// The next cut is wanted by then, unless cuts fail. The one under way serves what waits already.
    pub(super) fn cut_by(&mut self, at: Instant) {
        if self.failures == 0 && !self.paused && self.cutting_since.is_none() {
            self.next_cut_at = self.next_cut_at.min(at);
        }
    }

    pub(super) fn totals(&self) -> Totals {
        let own = self.source.totals();
        Totals {
            raw_bytes: self.before.0 + own.raw_bytes,
            wire_bytes: self.before.1 + own.wire_bytes,
            epochs: self.before.2 + own.epochs,
            watchdog_fired: self.totals.watchdog_fired,
            ..Totals::default()
        }
    }

    pub(super) fn view_of(&self, host: &str) -> Option<PeerView> {
        self.source.peer_view(self.now(), &PeerId::new(host))
    }

    /// Leaves everything for the next heartbeat.
    pub(super) fn fill(&mut self, status: &mut PrimaryStatus, epoch: u64) {
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

/// As much as the guest has, or more, is all of it: the source takes no more than that.
pub(super) fn mirror_budget(mib: u64) -> MirrorBudget {
    MirrorBudget::Bytes(mib.saturating_mul(1 << 20))
}

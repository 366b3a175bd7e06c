//! One shadow: the target's state machine, and what its effects do to files, memory and the waiting domain.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use vmsync::hashes::HashSeed;
use vmsync::history::{Undo, UndoRecord, read_back};
use vmsync::message::{Hello, SourceMessage};
use vmsync::state_record::StateError;
use vmsync::target::{ConnId, HashId, Left, PreparedImage, Promotion, Target, TargetConfig, TargetEffect, TargetEvent};
use vmsync::units::{Epoch, GuestUuid, Millis, Term};
use vmsync::wire::WireError;

use super::connection::Answers;
use super::{Promoted, Shared};
use crate::agent::libvirt::Libvirt;
use crate::api::control::{GuestEvent, ShadowStatus};
use crate::api::types::{ApiError, Keep, KeptEpoch};
use crate::disk::images;
use crate::hypervisor::xml::GuestDefinition;
use crate::hypervisor::{HypervisorError, HypervisorEvent, Lifecycle, XmlKind};
use crate::standby::{Adopted, JournalFile, Shadow, ShadowDescription, UndoFiles, replace_file};

/// Memory for epochs that are not applied yet: a quarter of the guest would do for most, this much for all.
const STAGING_LIMIT_BYTES: u64 = 512 << 20;
/// Pages hashed while the lock is held.
const HASH_PAGES_AT_ONCE: usize = 2048;
/// How long an epoch is kept at most because somebody is about to go back to it.
const LONGEST_HOLD_MS: u64 = 120_000;

pub(super) struct Slot {
    shared: Arc<Shared>,
    uuid: String,
    guest: GuestUuid,
    domain: String,
    started: Instant,
    /// When that was, by the host's clock: ages of epochs outlast this agent.
    started_ms: u64,
    inner: Mutex<Inner>,
    /// What a heartbeat shows; readable while a step is under way.
    status: Mutex<(ShadowStatus, Option<Instant>)>,
}

struct Inner {
    target: Target,
    shadow: Option<Shadow>,
    keep: Keep,
    journal: JournalFile,
    undo: UndoFiles,
    /// Former epochs cannot be kept: said once.
    keeping_fails: bool,
    connections: BTreeMap<ConnId, Answers>,
    /// The hashing that is wanted; another one or none ends the thread that works on it.
    hashing: Option<HashId>,
    /// Why the shadow could not be promoted.
    problem: String,
    promotion: Option<Result<Promoted, String>>,
    /// Promoted already.
    done: Option<Promoted>,
    /// Given up: threads of it stop.
    ended: bool,
    /// And nothing of it is left.
    destroyed: bool,
}

impl Slot {
    pub(super) fn new(
        shared: Arc<Shared>,
        uuid: &str,
        domain: &str,
        term: u64,
        keep: Keep,
    ) -> Result<Arc<Self>, ApiError> {
        let guest =
            GuestUuid::parse(uuid).ok_or_else(|| ApiError::new("invalid", format!("{uuid:?} is not a UUID")))?;
        let failed = |error: &dyn std::fmt::Display| {
            ApiError::new("failed", format!("shadow of {domain} on {}: {error}", shared.host))
        };
        let dir = dir_of(&shared.run_dir, uuid);
        fs::create_dir_all(&dir).map_err(|error| failed(&format!("{}: {error}", dir.display())))?;
        // Twice what may be staged, as the target promises, and room for device states.
        let journal =
            JournalFile::open(&dir.join("journal"), 2 * STAGING_LIMIT_BYTES + (64 << 20)).map_err(|e| failed(&e))?;
        let config = TargetConfig {
            guest,
            host: shared.host.clone(),
            term: Term::new(term),
            staging_limit_bytes: STAGING_LIMIT_BYTES,
            keep: limits(keep),
        };
        let undo = UndoFiles::open(&dir.join("undo"));
        let libvirt = Arc::clone(&shared.libvirt);
        let status = ShadowStatus {
            uuid: uuid.into(),
            term,
            committed_epoch: 0,
            committed_term: 0,
            connected: false,
            problem: "nothing committed yet".into(),
        };
        let slot = Arc::new(Self {
            shared,
            uuid: uuid.into(),
            guest,
            domain: domain.into(),
            started: Instant::now(),
            started_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |span| span.as_millis() as u64),
            inner: Mutex::new(Inner {
                target: Target::new(config),
                shadow: None,
                journal,
                undo,
                keeping_fails: false,
                keep,
                connections: BTreeMap::new(),
                hashing: None,
                problem: "nothing committed yet".into(),
                promotion: None,
                done: None,
                ended: false,
                destroyed: false,
            }),
            status: Mutex::new((status, None)),
        });
        let weak = Arc::downgrade(&slot);
        let listener = move |event: &HypervisorEvent| {
            if let HypervisorEvent::Lifecycle { event: Lifecycle::Stopped(_), .. } = event
                && let Some(slot) = weak.upgrade()
            {
                // Not here: this thread passes on everybody's events.
                let _ = std::thread::Builder::new().name("shadow-ended".into()).spawn(move || slot.image_ended());
            }
        };
        libvirt.listen(uuid, Arc::new(listener));
        Ok(slot)
    }

    /// Goes on with what a former agent left: its waiting domain, its state record, its journal.
    pub(super) fn take_up(slot: &Arc<Self>) {
        let slot = Arc::clone(slot);
        let spawned = std::thread::Builder::new().name("shadow-take-up".into()).spawn(move || slot.take_up_now());
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot take up a shadow");
        }
    }

    fn take_up_now(self: &Arc<Self>) {
        let dir = dir_of(&self.shared.run_dir, &self.uuid);
        let Ok(state) = fs::read(dir.join("target")) else { return };
        // libvirtd may still be starting, as after a reboot.
        let hypervisor = match self.shared.libvirt.wait(Duration::from_secs(20)) {
            Ok(hypervisor) => hypervisor,
            Err(error) => return tracing::warn!(guest = self.domain, %error, "shadow not taken up"),
        };
        let mut inner = self.lock();
        if inner.shadow.is_some() {
            return;
        }
        let adopted = match Shadow::adopt(&hypervisor, &self.uuid, &self.shared.run_dir) {
            Ok(adopted) => adopted,
            Err(error) => return tracing::warn!(guest = self.domain, %error, "the shadow cannot be taken up"),
        };
        if matches!(adopted, Adopted::None) {
            return tracing::info!(guest = self.domain, "the shadow's domain is gone; waiting for its primary");
        }
        let journal = inner.journal.read_all().unwrap_or_default();
        let undo = match &adopted {
            Adopted::Waiting(shadow) => inner.undo.found(self.guest, shadow.layout()),
            _ => Vec::new(),
        };
        // Its QEMU has lived on: this host was not started anew.
        let left = Left { state: &state, journal: &journal, undo: &undo, rebooted: false };
        let config = self.config(inner.target.view().term, inner.keep);
        let resumed = match Target::resume(config, self.now(), left) {
            Ok(resumed) => resumed,
            Err(error @ StateError::Damaged) => return self.found_damaged(&mut inner, &error.to_string()),
            Err(error) => return tracing::warn!(guest = self.domain, %error, "a shadow's state record is of no use"),
        };
        if let Some(damage) = &resumed.damage {
            self.found_damaged(&mut inner, damage);
        }
        for note in resumed.notes {
            tracing::info!(guest = self.domain, note, "taking up a shadow");
        }
        inner.target = resumed.target;
        let mut effects = resumed.effects;
        match adopted {
            Adopted::Waiting(shadow) => inner.shadow = Some(*shadow),
            Adopted::Promoted(done) => {
                inner.done = inner.target.promotion().map(|promotion| Promoted {
                    term: promotion.term.get(),
                    epoch: promotion.commit.epoch.get(),
                    numbers_after: promotion.numbers_after().get(),
                    took_us: done.timings.running_us,
                });
                effects.clear();
                inner.ended = true;
            }
            Adopted::None => {}
        }
        self.settle(&mut inner, effects, VecDeque::new());
        let epoch = inner.target.committed().map_or(0, |commit| commit.epoch.get());
        tracing::info!(guest = self.domain, epoch, "shadow taken up where it was");
        self.publish(&inner);
    }

    /// Nothing that a former agent left here is promoted: the primary, which finds no commit, compares all of it.
    fn found_damaged(&self, inner: &mut Inner, damage: &str) {
        inner.problem = format!("what was kept here was found damaged ({damage}) and is compared with its guest");
        self.publish(inner);
        let message = format!("shadow of {} on {}: {}", self.domain, self.shared.host, inner.problem);
        tracing::error!(message);
        let (level, name) = ("alarm".into(), "shadow-damaged".into());
        (self.shared.report)(GuestEvent::Notice { uuid: Some(self.uuid.clone()), level, name, message });
    }

    /// Milliseconds by the host's clock when this began, steadily from there on.
    fn now(&self) -> Millis {
        Millis::new(self.started_ms.saturating_add(self.started.elapsed().as_millis() as u64))
    }

    fn config(&self, term: Term, keep: Keep) -> TargetConfig {
        TargetConfig {
            guest: self.guest,
            host: self.shared.host.clone(),
            term,
            staging_limit_bytes: STAGING_LIMIT_BYTES,
            keep: limits(keep),
        }
    }

    /// The waiting QEMU ended: somebody destroyed it, or the host ran out of memory.
    fn image_ended(self: &Arc<Self>) {
        let mut inner = self.lock();
        if inner.ended || inner.shadow.as_ref().is_none_or(|shadow| shadow.problem().is_none()) {
            return;
        }
        tracing::warn!(guest = self.domain, "the shadow's QEMU ended; it is made anew");
        inner.problem = "its waiting QEMU ended; it is being made anew".into();
        self.step_locked(&mut inner, TargetEvent::ImageLost);
        self.destroy_image(&mut inner);
        self.publish(&inner);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn status(&self) -> ShadowStatus {
        super::lock(&self.status).0.clone()
    }

    pub(super) fn silent_ms(&self) -> Option<u64> {
        super::lock(&self.status).1.map(|heard| heard.elapsed().as_millis() as u64)
    }

    pub(super) fn connected(&self, conn: ConnId, answers: Answers) {
        self.lock().connections.insert(conn, answers);
    }

    pub(super) fn disconnected(self: &Arc<Self>, conn: ConnId) {
        self.step(TargetEvent::Disconnected { conn });
        self.lock().connections.remove(&conn);
    }

    pub(super) fn received(self: &Arc<Self>, conn: ConnId, message: SourceMessage) {
        super::lock(&self.status).1 = Some(Instant::now());
        self.step(TargetEvent::Received { conn, message });
    }

    pub(super) fn unreadable(self: &Arc<Self>, conn: ConnId, error: WireError) {
        self.step(TargetEvent::Unreadable { conn, error });
    }

    /// One step of the core with all that follows from it.
    fn step(self: &Arc<Self>, event: TargetEvent) {
        let mut inner = self.lock();
        self.step_locked(&mut inner, event);
    }

    fn step_locked(self: &Arc<Self>, inner: &mut Inner, event: TargetEvent) {
        if inner.ended {
            return;
        }
        self.settle(inner, Vec::new(), VecDeque::from([event]));
        self.publish(inner);
    }

    /// Carries out effects, then tells events, those too that effects lead to, until there are none.
    fn settle(self: &Arc<Self>, inner: &mut Inner, mut effects: Vec<TargetEffect>, mut events: VecDeque<TargetEvent>) {
        loop {
            self.perform(inner, &mut effects, &mut events);
            let Some(event) = events.pop_front() else { return };
            inner.target.step(self.now(), event, &mut effects);
        }
    }

    /// Carries out effects in order. A failure of the image or the files ends what the shadow has: it says so and
    /// starts over, it never lies.
    fn perform(
        self: &Arc<Self>,
        inner: &mut Inner,
        effects: &mut Vec<TargetEffect>,
        events: &mut VecDeque<TargetEvent>,
    ) {
        let mut due = std::mem::take(effects).into_iter();
        while let Some(effect) = due.next() {
            if let Err(error) = self.perform_one(inner, effect, events) {
                tracing::error!(guest = self.domain, error, "the shadow's image is given up");
                inner.problem = error;
                self.destroy_image(inner);
                events.clear();
                events.push_back(TargetEvent::ImageLost);
                // What was to follow relied on what failed; but who waits for an image is told that none comes.
                if due.any(|effect| matches!(effect, TargetEffect::Prepare { .. })) {
                    events.push_back(TargetEvent::PrepareDone { result: Err(inner.problem.clone()) });
                }
                return;
            }
        }
    }

    fn perform_one(
        self: &Arc<Self>,
        inner: &mut Inner,
        effect: TargetEffect,
        events: &mut VecDeque<TargetEvent>,
    ) -> Result<(), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        match effect {
            TargetEffect::Prepare { hello, keep: _ } => self.begin_prepare(hello),
            TargetEffect::SaveState(bytes) => {
                let path = dir_of(&self.shared.run_dir, &self.uuid).join("target");
                replace_file(&path, &bytes).map_err(|error| {
                    // The old one must not vouch for what comes in place of the image that is given up now.
                    let _ = fs::remove_file(&path);
                    format!("state record: {error}")
                })?;
            }
            TargetEffect::AppendJournal { bytes, durable } => {
                inner.journal.append(&bytes).map_err(|e| text(&e))?;
                if durable {
                    inner.journal.seal().map_err(|e| text(&e))?;
                }
            }
            TargetEffect::TruncateJournal { len_bytes } => inner.journal.truncate(len_bytes).map_err(|e| text(&e))?,
            TargetEffect::Apply(frame) => {
                let shadow = inner.shadow.as_mut().ok_or("its domain is gone")?;
                shadow.image_mut().apply(&frame).map_err(|e| text(&e))?;
                inner.target.reuse(frame);
            }
            TargetEffect::Keep(undo) => {
                let bytes = self.keep_epoch(inner, &undo)?;
                events.push_back(TargetEvent::Kept { seq: undo.head.seq, bytes });
            }
            TargetEffect::DropKept { first, last } => inner.undo.remove(first, last).map_err(|e| text(&e))?,
            TargetEffect::ReadBack { seqs, state } => {
                let shadow = inner.shadow.as_ref().ok_or("its domain is gone")?;
                let result = read_back(&seqs, state, self.guest, shadow.layout(), |seq| inner.undo.read(seq));
                events.push_back(TargetEvent::BackRead { result });
            }
            TargetEffect::StepBack { seq } => self.step_back(inner, seq)?,
            TargetEffect::Hash { id, seed } => {
                inner.hashing = Some(id);
                self.begin_hashing(id, seed);
            }
            TargetEffect::StopHash { id } => {
                if inner.hashing == Some(id) {
                    inner.hashing = None;
                }
            }
            TargetEffect::Send { conn, bytes } => {
                if let Some(answers) = inner.connections.get(&conn) {
                    answers.send(bytes);
                }
            }
            TargetEffect::Close { conn, reason } => {
                tracing::info!(guest = self.domain, %reason, "closing a primary's connection");
                if let Some(answers) = inner.connections.remove(&conn) {
                    answers.close();
                }
            }
            TargetEffect::Committed(_) => inner.problem.clear(),
            TargetEffect::CommitLost => inner.problem = "its last commit was given up; a new copy is coming".into(),
            TargetEffect::Promote(promotion) => {
                inner.promotion = Some(self.start_guest(inner, &promotion));
            }
            TargetEffect::PromoteRefused(refusal) => inner.promotion = Some(Err(refusal.to_string())),
        }
        Ok(())
    }

    /// Makes the undo record of an epoch that is about to be applied; none: there are no more records.
    fn keep_epoch(&self, inner: &mut Inner, undo: &Undo) -> Result<Option<u64>, String> {
        let shadow = inner.shadow.as_ref().ok_or("its domain is gone")?;
        match inner.undo.make(undo, shadow.image()) {
            Ok(bytes) => {
                inner.keeping_fails = false;
                Ok(Some(bytes))
            }
            // The shadow is worth more than its past.
            Err(error) => {
                if !std::mem::replace(&mut inner.keeping_fails, true) {
                    tracing::warn!(guest = self.domain, %error, "former epochs are given up");
                }
                inner.undo.clear().map_err(|error| error.to_string())?;
                Ok(None)
            }
        }
    }

    fn step_back(&self, inner: &mut Inner, seq: u64) -> Result<(), String> {
        let shadow = inner.shadow.as_mut().ok_or("its domain is gone")?;
        let bytes = inner.undo.read(seq).map_err(|error| error.to_string())?;
        let layout = shadow.layout().clone();
        let record = UndoRecord::read(&bytes, self.guest, &layout).map_err(|error| error.to_string())?;
        record.frames(&layout).try_for_each(|frame| {
            let frame = frame.map_err(|error| error.to_string())?;
            shadow.image_mut().apply(&frame).map_err(|error| error.to_string())
        })
    }

    /// Makes the waiting domain, on a thread of its own: it takes half a second.
    fn begin_prepare(self: &Arc<Self>, hello: Box<Hello>) {
        let slot = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("shadow-prepare".into()).spawn(move || {
            let result = slot.prepare(&hello);
            if let Err(error) = &result {
                tracing::warn!(guest = slot.domain, error, "cannot make the shadow");
                slot.lock().problem.clone_from(error);
            }
            slot.step(TargetEvent::PrepareDone { result });
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot make a shadow");
        }
    }

    fn prepare(self: &Arc<Self>, hello: &Hello) -> Result<PreparedImage, String> {
        let description: ShadowDescription = serde_json::from_slice(&hello.description)
            .map_err(|error| format!("the primary's description cannot be read: {error}"))?;
        if description.uuid != self.uuid {
            return Err(format!("the primary describes guest {}, not {}", description.uuid, self.uuid));
        }
        let hypervisor = self.shared.libvirt.get().map_err(|e| e.to_string())?;
        let mut inner = self.lock();
        if inner.ended {
            return Err("the shadow is no longer wanted".into());
        }
        inner.shadow = None;
        let run_dir = &self.shared.run_dir;
        let kept = Shadow::keep(&hypervisor, &description, &hello.layout, run_dir).map_err(|e| e.to_string())?;
        if let Some(shadow) = kept {
            // Also when the target knows of no image: then it looks at what this one holds.
            inner.shadow = Some(shadow);
            return Ok(PreparedImage::Kept);
        }
        self.step_locked(&mut inner, TargetEvent::ImageLost);
        let made = Shadow::create(&hypervisor, &description, &hello.layout, run_dir, &self.shared.disk_dir);
        let (shadow, has_contents) = made.map_err(|e| e.to_string())?;
        inner.shadow = Some(shadow);
        Ok(if has_contents { PreparedImage::Kept } else { PreparedImage::Fresh })
    }

    /// Hashes all pages on a thread of its own, a bit at a time.
    fn begin_hashing(self: &Arc<Self>, id: HashId, seed: HashSeed) {
        let slot = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("shadow-hash".into()).spawn(move || slot.hash_all(id, seed));
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot hash a shadow");
        }
    }

    fn hash_all(self: &Arc<Self>, id: HashId, seed: HashSeed) {
        let mut linear = 0u64;
        loop {
            let mut inner = self.lock();
            if inner.hashing != Some(id) || inner.ended {
                return;
            }
            if inner.connections.values().any(Answers::is_busy) {
                drop(inner);
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            let Some(shadow) = &inner.shadow else { return };
            let layout = shadow.image().layout().clone();
            let Some(start) = layout.addr(linear) else {
                inner.hashing = None;
                return self.step_locked(&mut inner, TargetEvent::HashingDone { id });
            };
            let hashes = match shadow.image().hashes(seed, start, HASH_PAGES_AT_ONCE) {
                Ok(hashes) => hashes,
                Err(error) => {
                    tracing::error!(guest = self.domain, %error, "cannot read the shadow's memory");
                    return;
                }
            };
            linear += hashes.len() as u64;
            self.step_locked(&mut inner, TargetEvent::Hashed { id, start, hashes });
        }
    }

    /// The manager says that the guest's primaryship has this term now.
    pub(super) fn term_known(self: &Arc<Self>, term: u64) {
        self.step(TargetEvent::TermKnown { term: Term::new(term) });
    }

    /// So many former epochs are to be kept from now on.
    pub(super) fn keep_changed(self: &Arc<Self>, keep: Keep) {
        let mut inner = self.lock();
        if inner.keep != keep {
            inner.keep = keep;
            self.step_locked(&mut inner, TargetEvent::KeepChanged { keep: limits(keep) });
        }
    }

    pub(super) fn epochs(&self) -> Vec<KeptEpoch> {
        let kept = self.lock().target.kept();
        let now = self.now();
        let view = |kept: vmsync::history::Kept| KeptEpoch {
            epoch: kept.stamp.commit.epoch.get(),
            term: kept.stamp.commit.term.get(),
            age_ms: now.since(kept.stamp.at).get(),
            bytes: kept.bytes.unwrap_or(0),
        };
        kept.into_iter().map(view).collect()
    }

    pub(super) fn hold_epoch(&self, epoch: u64, hold_ms: u64) -> Result<(), ApiError> {
        let until = self.now().plus(Millis::new(hold_ms.min(LONGEST_HOLD_MS)));
        let subject = || format!("shadow of {} on {}", self.domain, self.shared.host);
        let mut inner = self.lock();
        let held = inner.target.hold(Epoch::new(epoch), until);
        held.map_err(|error| ApiError::new("not-found", format!("{}: {error}", subject())))?;
        // A primary is about to be stopped for it: what leads there is read before, not only then. Epochs go on meanwhile.
        let (way, shadow) = (inner.target.way_back(Epoch::new(epoch)), inner.shadow.as_ref());
        let (Some((seqs, state)), Some(shadow)) = (way, shadow) else { return Ok(()) };
        let layout = shadow.layout().clone();
        drop(inner);
        let records = UndoFiles::open(&dir_of(&self.shared.run_dir, &self.uuid).join("undo"));
        let read = read_back(&seqs, state, self.guest, &layout, |seq| records.read(seq));
        let cannot = |reason| format!("{} cannot go back to epoch {epoch}: {reason}", subject());
        read.map(drop).map_err(|reason| ApiError::new("failed", cannot(reason)))
    }

    /// Memory or disks were found different from the guest's, as after a fault of this host's memory or disk: no epoch of
    /// it is promoted. The image stays, and the primary, which finds its connection closed, compares all of it.
    pub(super) fn distrust(self: &Arc<Self>, difference: &str) -> Result<String, ApiError> {
        let mut inner = self.lock();
        let subject = format!("shadow of {} on {}", self.domain, self.shared.host);
        if inner.ended {
            return Err(ApiError::new("conflict", format!("{subject}: it is no shadow any more")));
        }
        self.step_locked(&mut inner, TargetEvent::ImageLost);
        inner.problem = format!("it was found damaged ({difference}) and is compared with its guest");
        self.publish(&inner);
        Ok(format!("{subject} {}", inner.problem.trim_start_matches("it ")))
    }

    pub(super) fn promote(
        self: &Arc<Self>,
        term: u64,
        after_epoch: u64,
        back_to: Option<u64>,
    ) -> Result<Promoted, ApiError> {
        let mut inner = self.lock();
        if let Some(done) = inner.done.filter(|done| done.term == term) {
            return Ok(done);
        }
        inner.promotion = None;
        let back_to = back_to.map(Epoch::new);
        let event = TargetEvent::Promote { term: Term::new(term), after_epoch: Epoch::new(after_epoch), back_to };
        self.step_locked(&mut inner, event);
        let subject = format!("shadow of {} on {}", self.domain, self.shared.host);
        match inner.promotion.take() {
            Some(Ok(promoted)) => {
                inner.ended = true;
                inner.done = Some(promoted);
                self.shared.libvirt.forget(&self.uuid);
                remove_files(&dir_of(&self.shared.run_dir, &self.uuid));
                Ok(promoted)
            }
            Some(Err(reason)) => Err(ApiError::new("refused", format!("{subject} was not promoted: {reason}"))),
            None => Err(ApiError::new("failed", format!("{subject} was not promoted: {}", inner.problem))),
        }
    }

    fn start_guest(&self, inner: &mut Inner, promotion: &Promotion) -> Result<Promoted, String> {
        let began = Instant::now();
        // First, so that the shadow goes on waiting if libvirt does not answer.
        let hypervisor = self.shared.libvirt.get().map_err(|error| error.to_string())?;
        let shadow = inner.shadow.take().ok_or("its domain is gone")?;
        let inbound = inner.target.take_inbound();
        let state = &promotion.device_state;
        let started = match shadow.promote(&hypervisor, &state.bytes, state.running) {
            Ok(started) => started,
            Err(error) => {
                // If nothing was written to it yet, it waits on and the order may be repeated.
                if let Ok(Adopted::Waiting(shadow)) = Shadow::adopt(&hypervisor, &self.uuid, &self.shared.run_dir) {
                    inner.shadow = Some(*shadow);
                }
                return Err(error.to_string());
            }
        };
        let took_us = began.elapsed().as_micros() as u64;
        let (term, epoch) = (promotion.term.get(), promotion.commit.epoch.get());
        tracing::warn!(guest = self.domain, term, epoch, took_us, "promoted: the guest runs here now");
        let (guest, uuid, shared) = (self.domain.clone(), self.uuid.clone(), Arc::clone(&self.shared));
        let finish = move || {
            let done = started.finish(&inbound);
            if done.replayed > 0 {
                let message = format!("{guest} was given {} frames that had reached its former host", done.replayed);
                tracing::info!(message);
                let (level, name) = ("info".into(), "inbound-replayed".into());
                (shared.report)(GuestEvent::Notice { uuid: Some(uuid), level, name, message });
            }
            for warning in done.warnings {
                tracing::warn!(guest, warning, "after the promotion");
            }
            tracing::info!(guest, timings = ?done.timings, "promotion complete");
        };
        // Announced and defined beside the answer: the manager need not wait for it.
        match std::thread::Builder::new().name("promotion-rest".into()).spawn(finish) {
            Ok(thread) => drop(super::lock(&self.shared.finishing).insert(self.uuid.clone(), thread)),
            Err(error) => tracing::error!(guest = self.domain, %error, "cannot announce the guest"),
        }
        Ok(Promoted { term, epoch, numbers_after: promotion.numbers_after().get(), took_us })
    }

    /// Given up, completely; waits if that is under way.
    pub(super) fn has_ended(&self) -> bool {
        self.lock().destroyed
    }

    /// Gives the shadow up for good.
    pub(super) fn destroy(self: &Arc<Self>) -> Result<(), ApiError> {
        let mut inner = self.lock();
        if inner.destroyed {
            return Ok(());
        }
        self.step_locked(&mut inner, TargetEvent::ImageLost);
        (inner.ended, inner.destroyed) = (true, true);
        inner.connections.values().for_each(Answers::close);
        inner.connections.clear();
        self.destroy_image(&mut inner);
        self.shared.libvirt.forget(&self.uuid);
        remove_files(&dir_of(&self.shared.run_dir, &self.uuid));
        remove_images(&self.shared.libvirt, &self.shared.disk_dir, &self.uuid);
        tracing::info!(guest = self.domain, "shadow dropped");
        Ok(())
    }

    fn destroy_image(&self, inner: &mut Inner) {
        inner.shadow = None;
        let removed = self.shared.libvirt.get().map_err(|error| error.to_string()).and_then(|hypervisor| {
            Shadow::remove(&hypervisor, &self.uuid, &self.shared.run_dir).map_err(|error| error.to_string())
        });
        if let Err(error) = removed {
            tracing::error!(guest = self.domain, error, "cannot remove the shadow's domain");
        }
    }

    fn publish(&self, inner: &Inner) {
        let view = inner.target.view();
        let mut status = super::lock(&self.status);
        status.0.term = view.term.get();
        status.0.committed_term = view.commit.map_or(0, |commit| commit.term.get());
        status.0.committed_epoch = view.commit.map_or(0, |commit| commit.epoch.get());
        status.0.connected = view.source_host.is_some();
        status.0.problem = match (&inner.shadow, view.commit) {
            (Some(_), Some(_)) => String::new(),
            _ if inner.problem.is_empty() => "nothing committed yet".into(),
            _ => inner.problem.clone(),
        };
    }
}

/// Removes the images of a guest's disks, but for those that it runs from here.
pub(in crate::agent) fn remove_images(libvirt: &Libvirt, disk_dir: &Path, uuid: &str) {
    let in_use = match libvirt.lookup(uuid) {
        Err(HypervisorError::NotFound { .. }) => Ok(Vec::new()),
        Err(error) => Err(error.to_string()),
        Ok(domain) => domain.xml(XmlKind::Live).map_err(|error| error.to_string()).and_then(|xml| {
            let definition = GuestDefinition::parse(&xml).map_err(|error| error.to_string())?;
            Ok(definition.disks.into_iter().filter_map(|disk| disk.source).collect())
        }),
    };
    // Without libvirt's word nothing is removed: a guest's only disk may be among them.
    let removed = in_use
        .and_then(|in_use: Vec<String>| images::remove(disk_dir, uuid, &in_use).map_err(|error| error.to_string()));
    if let Err(error) = removed {
        tracing::warn!(uuid, dir = %disk_dir.display(), error, "images of a guest's disks stay");
    }
}

fn limits(keep: Keep) -> vmsync::Keep {
    let Keep { epochs, age_ms, mib } = keep;
    vmsync::Keep { epochs, age: Millis::new(age_ms), bytes: mib.saturating_mul(1 << 20) }
}

fn dir_of(run_dir: &Path, uuid: &str) -> PathBuf {
    run_dir.join("targets").join(uuid)
}

fn remove_files(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(dir = %dir.display(), %error, "cannot remove a shadow's files");
    }
}

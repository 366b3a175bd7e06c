//! What a target's effects do to files, memory and the waiting domain.

use std::collections::VecDeque;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use vmsync::hashes::HashSeed;
use vmsync::history::{Undo, UndoRecord, read_back};
use vmsync::message::Hello;
use vmsync::target::{HashId, PreparedImage, TargetEffect, TargetEvent};

use super::super::connection::Answers;
use super::{Inner, Slot, dir_of};
use crate::standby::{Shadow, ShadowDescription, replace_file};

/// Pages hashed while the lock is held.
const HASH_PAGES_AT_ONCE: usize = 2048;

impl Slot {
    /// Carries out effects in order. A failure of the image or the files ends what the shadow has: it says so and
    /// starts over, it never lies.
    pub(super) fn perform(
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
}

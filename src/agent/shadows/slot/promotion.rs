//! A shadow becomes primary: from its newest epoch, or from a former one.

use std::sync::Arc;
use std::time::Instant;

use vmsync::history::read_back;
use vmsync::target::{Promotion, TargetEvent};
use vmsync::units::{Epoch, Millis, Term};

use super::{Inner, Slot, dir_of, remove_files};
use crate::agent::lock;
use crate::agent::shadows::Promoted;
use crate::api::types::{ApiError, KeptEpoch};
use crate::standby::{Adopted, Shadow, UndoFiles};

/// How long an epoch is kept at most because somebody is about to go back to it.
const LONGEST_HOLD_MS: u64 = 120_000;

impl Slot {
    pub(in crate::agent::shadows) fn epochs(&self) -> Vec<KeptEpoch> {
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

    pub(in crate::agent::shadows) fn hold_epoch(&self, epoch: u64, hold_ms: u64) -> Result<(), ApiError> {
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

    pub(in crate::agent::shadows) fn promote(
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

    pub(super) fn start_guest(&self, inner: &mut Inner, promotion: &Promotion) -> Result<Promoted, String> {
        let began = Instant::now();
        // First, so that the shadow goes on waiting if libvirt does not answer.
        let hypervisor = self.shared.libvirt.get().map_err(|error| error.to_string())?;
        let shadow = inner.shadow.take().ok_or("its domain is gone")?;
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
        // Not before: a repeated order finds them still.
        let inbound = inner.target.take_inbound();
        let took_us = began.elapsed().as_micros() as u64;
        let (term, epoch) = (promotion.term.get(), promotion.commit.epoch.get());
        tracing::warn!(guest = self.domain, term, epoch, took_us, "promoted: the guest runs here now");
        let (guest, uuid, shared) = (self.domain.clone(), self.uuid.clone(), Arc::clone(&self.shared));
        let finish = move || {
            let done = started.finish(&inbound);
            if done.replayed > 0 {
                let message = format!("{guest} was given {} frames that had reached its former host", done.replayed);
                tracing::info!(message);
                shared.notice(&uuid, "info", "inbound-replayed", message);
            }
            for warning in done.warnings {
                tracing::warn!(guest, warning, "after the promotion");
            }
            tracing::info!(guest, timings = ?done.timings, "promotion complete");
        };
        // Announced and defined beside the answer: the manager need not wait for it.
        match std::thread::Builder::new().name("promotion-rest".into()).spawn(finish) {
            Ok(thread) => drop(lock(&self.shared.finishing).insert(self.uuid.clone(), thread)),
            Err(error) => tracing::error!(guest = self.domain, %error, "cannot announce the guest"),
        }
        Ok(Promoted { term, epoch, numbers_after: promotion.numbers_after().get(), took_us })
    }
}

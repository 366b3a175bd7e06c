//! Former epochs: kept as epochs are applied, dropped, and gone back to.
//!
//! ```text
//! Promote { back_to } --> what is staged is dropped, what is sealed applied
//!                     --> ReadBack: can all records be read? which device state is it?     BackRead: no -> refused,
//!                                                                                          nothing has changed
//!                     --> state record: promoted, from the older epoch
//!                     --> StepBack, newest record first --> Promote
//! ```
//! After a crash behind the state record the order is repeated, and so are the steps: each record leads to the same
//! memory from wherever the image is.

use std::sync::Arc;

use super::{Applied, ConnId, PromoteRefusal, Promotion, Target, TargetCloseReason, TargetEffect};
use crate::device_state::DeviceState;
use crate::history::{Keep, Kept, Stamp, Undo, UndoHead};
use crate::journal::SealedEpoch;
use crate::message::RefuseCode;
use crate::units::{Epoch, Millis, Term};

/// A promotion that waits for its undo records to be read.
#[derive(Debug)]
pub(super) struct GoingBack {
    pub(super) term: Term,
    pub(super) to: Kept,
    pub(super) conn: Option<ConnId>,
}

/// An epoch is not kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("epoch {asked} is not kept; there is {kept}")]
pub struct NotKept {
    pub asked: Epoch,
    pub kept: String,
}

impl Target {
    /// The epochs that this shadow can be promoted from, oldest first; the last one is the newest, which needs no record.
    pub fn kept(&self) -> Vec<Kept> {
        let newest = self.image.as_ref().and_then(|image| image.applied.as_ref());
        let newest = newest.map(|applied| Kept { seq: 0, stamp: applied.stamp, bytes: Some(0) });
        self.history.kept().filter(|kept| kept.bytes.is_some()).copied().chain(newest).collect()
    }

    /// Keeps that epoch until then, whatever the limits say, if it is there now.
    pub fn hold(&mut self, epoch: Epoch, until: Millis) -> Result<(), NotKept> {
        if self.committed().is_some_and(|commit| commit.epoch == epoch) {
            return Ok(());
        }
        match self.history.find(epoch) {
            Some(kept) => {
                self.history.hold(kept, until);
                Ok(())
            }
            None => Err(NotKept { asked: epoch, kept: self.kept_in_words() }),
        }
    }

    /// Numbers of the records that lead back to that epoch, newest first, and the device state that they begin at; none, if
    /// it is the newest, or not kept.
    pub fn way_back(&self, epoch: Epoch) -> Option<(Vec<u64>, DeviceState)> {
        let applied = self.image.as_ref()?.applied.as_ref()?;
        let kept = self.history.find(epoch)?;
        Some((self.history.back_to(kept.seq), applied.device_state.clone()))
    }

    pub(super) fn kept_in_words(&self) -> String {
        let kept = self.kept();
        match (kept.first(), kept.last()) {
            (Some(first), Some(last)) if kept.len() > 1 => {
                format!("{} from {} to {}", kept.len(), first.stamp.commit.epoch, last.stamp.commit.epoch)
            }
            (Some(only), _) => format!("{} only", only.stamp.commit.epoch),
            _ => "none".into(),
        }
    }

    /// Applies a sealed epoch; what it overwrites is kept first, if `keep` and it shall be.
    pub(super) fn apply_epoch(&mut self, epoch: SealedEpoch, keep: bool, effects: &mut Vec<TargetEffect>) {
        let Some(image) = &mut self.image else { return };
        let frames: Vec<_> = epoch.frames.into_iter().map(Arc::new).collect();
        let newer = Applied { stamp: Stamp { commit: epoch.commit, at: self.now }, device_state: epoch.device_state };
        let limits = self.history.keep();
        if let Some(older) = image.applied.replace(newer.clone())
            && keep
            && !limits.is_off()
        {
            let head = UndoHead { seq: self.history.push(older.stamp), older: older.stamp, newer: newer.stamp };
            effects.push(TargetEffect::Keep(Box::new(Undo {
                head,
                limit_bytes: limits.bytes,
                guest: self.config.guest,
                layout: image.layout.clone(),
                frames: frames.clone(),
                older_state: older.device_state,
                newer_state: newer.device_state,
            })));
        }
        effects.extend(frames.into_iter().map(TargetEffect::Apply));
    }

    pub(super) fn keep_changed(&mut self, keep: Keep, effects: &mut Vec<TargetEffect>) {
        self.history.set_keep(keep);
        self.trim_history(effects);
    }

    pub(super) fn trim_history(&mut self, effects: &mut Vec<TargetEffect>) {
        // What a promotion is about to need stays, and nothing is added any more.
        if self.going_back.is_some() || self.promotion.is_some() {
            return;
        }
        if let Some(last) = self.history.trim(self.now) {
            effects.push(TargetEffect::DropKept { first: 0, last });
        }
    }

    pub(super) fn drop_history(&mut self, effects: &mut Vec<TargetEffect>) {
        if let Some(last) = self.history.clear() {
            effects.push(TargetEffect::DropKept { first: 0, last });
        }
    }

    /// Begins to go back; the epoch is kept, and the promotion allowed.
    pub(super) fn go_back(&mut self, term: Term, to: Kept, effects: &mut Vec<TargetEffect>) {
        let conn = self.session.as_ref().map(|s| s.conn);
        self.going_back = Some(GoingBack { term, to, conn });
        self.end_session(effects);
        let applied = self.image.as_ref().and_then(|image| image.applied.clone());
        if let Some(applied) = applied {
            effects.push(TargetEffect::ReadBack { seqs: self.history.back_to(to.seq), state: applied.device_state });
        }
    }

    pub(super) fn back_read(&mut self, result: Result<DeviceState, String>, effects: &mut Vec<TargetEffect>) {
        let Some(GoingBack { term, to, conn }) = self.going_back.take() else { return };
        let commit = to.stamp.commit;
        let newest = self.committed().map_or(commit.epoch, |newest| newest.epoch);
        let (Ok(device_state), Some(image)) = (&result, &mut self.image) else {
            let reason = result.err().unwrap_or_else(|| "its image is gone".into());
            effects.push(TargetEffect::PromoteRefused(PromoteRefusal::CannotGoBack { asked: commit.epoch, reason }));
            // Nobody will go back there: what was kept for it alone is dropped.
            self.history.release();
            self.trim_history(effects);
            return;
        };
        image.committed = Some((commit, device_state.clone()));
        // They belong to what is given up.
        self.inbound.clear();
        let promotion = Promotion { term, commit, newest, device_state: device_state.clone() };
        self.become_primary(promotion, conn, effects);
    }

    /// The steps that lead to what was promoted; none if that is the newest epoch.
    pub(super) fn steps_back(&self, promotion: &Promotion) -> Vec<TargetEffect> {
        let seqs = self.history.find_commit(promotion.commit).map(|kept| self.history.back_to(kept.seq));
        seqs.unwrap_or_default().into_iter().map(|seq| TargetEffect::StepBack { seq }).collect()
    }

    /// The promotion is decided: it is saved, carried out, and told to whom it may concern.
    pub(super) fn become_primary(
        &mut self,
        promotion: Promotion,
        conn: Option<ConnId>,
        effects: &mut Vec<TargetEffect>,
    ) {
        let term = promotion.term;
        // Not before: what ending the session saves must not have the new term without the promotion, or an order that
        // is repeated after a crash in between would be refused.
        self.term = term;
        self.promotion = Some(promotion.clone());
        // Before the guest runs: a restarted agent must not take the image for a shadow's.
        self.save_state(effects);
        effects.extend(self.steps_back(&promotion));
        effects.push(TargetEffect::Promote(promotion));
        // The old primary may still be there: tell it. After the promotion, which nothing should delay.
        if let Some(conn) = conn {
            let text = format!("host {} runs this guest as its primary with term {term}", self.config.host);
            self.refuse(conn, RefuseCode::Promoted, text, effects);
            self.close(conn, TargetCloseReason::Promoted(term), effects);
        }
    }
}

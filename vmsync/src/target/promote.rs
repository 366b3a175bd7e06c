//! A shadow becomes primary.

use super::{PromoteRefusal, Promotion, Target, TargetCloseReason, TargetEffect};
use crate::message::RefuseCode;
use crate::units::{Epoch, Term};

impl Target {
    pub(super) fn promote(&mut self, term: Term, after_epoch: Epoch, effects: &mut Vec<TargetEffect>) {
        match self.may_promote(term, after_epoch) {
            Err(refusal) => effects.push(TargetEffect::PromoteRefused(refusal)),
            Ok(promotion) => {
                let conn = self.session.as_ref().map(|s| s.conn);
                // Drops what is staged and applies what is sealed.
                self.end_session(effects);
                // Not before: what that saves must not have the new term without the promotion, or an order that
                // is repeated after a crash in between would be refused.
                self.term = term;
                self.promotion = Some(promotion.clone());
                // Before the guest runs: a restarted agent must not take the image for a shadow's.
                self.save_state(effects);
                effects.push(TargetEffect::Promote(promotion));
                // The old primary may still be there: tell it. After the promotion, which nothing should delay.
                if let Some(conn) = conn {
                    let text = format!("host {} runs this guest as its primary with term {term}", self.config.host);
                    self.refuse(conn, RefuseCode::Promoted, text, effects);
                    self.close(conn, TargetCloseReason::Promoted(term), effects);
                }
            }
        }
    }

    fn may_promote(&self, term: Term, after_epoch: Epoch) -> Result<Promotion, PromoteRefusal> {
        if let Some(promotion) = &self.promotion {
            return Err(PromoteRefusal::AlreadyPromoted(promotion.term));
        }
        if term <= self.term {
            return Err(PromoteRefusal::Term { asked: term, known: self.term });
        }
        let committed = self.image.as_ref().and_then(|image| image.committed.clone());
        let (commit, device_state) = committed.ok_or(PromoteRefusal::NoCommit)?;
        if commit.epoch < after_epoch {
            return Err(PromoteRefusal::TooOld { committed: commit.epoch, wanted: after_epoch });
        }
        Ok(Promotion { term, commit, device_state })
    }
}

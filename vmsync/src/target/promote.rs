//! A shadow becomes primary.

use super::{PromoteRefusal, Promotion, Target, TargetEffect};
use crate::history::Kept;
use crate::units::{Epoch, Term};

/// What an order to promote comes to.
enum Way {
    /// From the newest epoch.
    On(Promotion),
    Back(Kept),
    /// It was decided already, and is carried out once more: whoever repeats the order does not know that it was done.
    Again(Promotion),
}

impl Target {
    pub(super) fn promote(
        &mut self,
        term: Term,
        after_epoch: Epoch,
        back_to: Option<Epoch>,
        effects: &mut Vec<TargetEffect>,
    ) {
        match self.may_promote(term, after_epoch, back_to) {
            Err(refusal) => effects.push(TargetEffect::PromoteRefused(refusal)),
            Ok(Way::On(promotion)) => {
                if back_to.is_some() {
                    // Asked for by its number: what came since is given up, also if that is nothing but frames.
                    self.inbound.clear();
                }
                let conn = self.session.as_ref().map(|s| s.conn);
                // Drops what is staged and applies what is sealed.
                self.end_session(effects);
                self.become_primary(promotion, conn, effects);
            }
            Ok(Way::Back(kept)) => self.go_back(term, kept, effects),
            Ok(Way::Again(promotion)) => {
                effects.extend(self.steps_back(&promotion));
                effects.push(TargetEffect::Promote(promotion));
            }
        }
    }

    fn may_promote(&self, term: Term, after_epoch: Epoch, back_to: Option<Epoch>) -> Result<Way, PromoteRefusal> {
        if let Some(promotion) = &self.promotion {
            return match promotion.term == term {
                true => Ok(Way::Again(promotion.clone())),
                false => Err(PromoteRefusal::AlreadyPromoted(promotion.term)),
            };
        }
        if term <= self.term {
            return Err(PromoteRefusal::Term { asked: term, known: self.term });
        }
        let committed = self.image.as_ref().and_then(|image| image.committed.clone());
        let (commit, device_state) = committed.ok_or(PromoteRefusal::NoCommit)?;
        if let Some(asked) = back_to.filter(|epoch| *epoch != commit.epoch) {
            let kept = self.history.find(asked).map(Way::Back);
            return kept.ok_or_else(|| PromoteRefusal::NotKept { asked, kept: self.kept_in_words() });
        }
        if commit.epoch < after_epoch {
            return Err(PromoteRefusal::TooOld { committed: commit.epoch, wanted: after_epoch });
        }
        Ok(Way::On(Promotion { term, commit, newest: commit.epoch, device_state }))
    }
}

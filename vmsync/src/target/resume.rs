//! A restarted agent takes up its shadow where the last one left it.

use super::{Applied, Image, Promotion, Target, TargetConfig, TargetEffect};
use crate::codec::KnownPages;
use crate::history::{FoundUndo, History, Keep, Stamp};
use crate::journal::{Commit, JOURNAL_HEADER_BYTES, JournalError, SealedEpoch, encode_header, scan};
use crate::state_record::{StateError, StateRecord};
use crate::units::Millis;

/// What a former agent left, besides the image.
#[derive(Debug, Clone, Copy)]
pub struct Left<'a> {
    pub state: &'a [u8],
    pub journal: &'a [u8],
    pub undo: &'a [FoundUndo],
    /// The host itself went down since: of what was not synced, any part may be there. If only the agent ended, all that it
    /// wrote is there, and bytes that it did not write were changed where they lay.
    pub rebooted: bool,
}

/// A target made from what a former agent left.
#[derive(Debug)]
pub struct Resumed {
    pub target: Target,
    /// To be done before the first event.
    pub effects: Vec<TargetEffect>,
    /// What was found amiss; for the log.
    pub notes: Vec<String>,
    /// Why the commit was given up: the journal may have held epochs of it that are lost, or applied in part. The image is
    /// compared with its primary.
    pub damage: Option<String>,
}

impl Target {
    /// Makes a target from the state record and the journal that a former agent left, for an image that is still
    /// there. (If it is not, use [`Target::new`] with the term the record has, and remove both files.)
    ///
    /// If the target was promoted ([`Target::promotion`] is set), the driver has to find out whether the guest runs
    /// already, and goes on with the promotion if not; nothing is replayed.
    ///
    /// The record tells the commit; epochs that are sealed in the journal are replayed onto the image. A record or
    /// a journal that cannot be read means that there is no commit: the image is taken for unknown contents.
    pub fn resume(config: TargetConfig, now: Millis, left: Left<'_>) -> Result<Resumed, StateError> {
        let record = StateRecord::decode(left.state, config.guest)?;
        let mut target = Self::new(config);
        target.now = now;
        target.term = target.term.max(record.term);
        let mut resumed = Resumed { target, effects: Vec::new(), notes: Vec::new(), damage: None };
        let Some(image) = record.image else { return Ok(resumed) };
        resumed.target.image = Some(Image {
            known: KnownPages::unknown(&image.layout),
            layout: image.layout,
            zero: false,
            applied: image
                .committed
                .clone()
                .map(|(commit, device_state)| Applied { stamp: Stamp { commit, at: now }, device_state }),
            committed: image.committed,
        });
        if record.promoted {
            resumed.target.take_up_promotion(left.undo);
        } else {
            resumed.replay(left);
        }
        Ok(resumed)
    }

    fn take_up_promotion(&mut self, undo: &[FoundUndo]) {
        let Some((commit, device_state)) = self.image.as_ref().and_then(|image| image.committed.clone()) else {
            return;
        };
        // If it went back, records lead from what the image held to the epoch that was promoted: they are all needed.
        let newest =
            undo.iter().filter_map(|found| found.head).max_by_key(|head| head.seq).map(|head| head.newer.commit);
        let all = Keep { bytes: u64::MAX, ..Keep::default() };
        let resumption = History::resume(all, undo, newest.as_slice());
        self.history = resumption.history;
        let newest = newest.map_or(commit.epoch, |newest| newest.epoch.max(commit.epoch));
        self.promotion = Some(Promotion { term: self.term, commit, newest, device_state });
    }
}

impl Resumed {
    fn replay(&mut self, left: Left<'_>) {
        let target = &mut self.target;
        let Some(image) = &mut target.image else { return };
        let found = scan(left.journal, target.config.guest, &image.layout);
        // Whatever is there is longer than nothing and is cut off below.
        target.journal.len_bytes = (left.journal.len() as u64).max(1);
        let mut sealed = Vec::new();
        match found {
            Ok(scan) if scan.damaged && !left.rebooted && image.committed.is_some() => {
                (image.committed, image.applied) = (None, None);
                self.damage = Some(format!("its journal was changed where it lay: {}", scan.tail.unwrap_or_default()));
            }
            Ok(scan) => {
                if let Some(tail) = scan.tail {
                    self.notes.push(format!("dropped an epoch that was never acknowledged: {tail}"));
                }
                // Without a commit in the record nothing was staged: the journal is older than the record.
                if let Some((committed, _)) = &image.committed {
                    sealed = scan.epochs;
                    // What was sealed up to the record's epoch is in place. That itself may be missing: a journal that was
                    // emptied behind the record may come back after a power cut, half overwritten.
                    let in_place = sealed.iter().position(|epoch| epoch.commit == *committed).map_or(0, |at| at + 1);
                    sealed.drain(..in_place);
                    let newer = |commit: &Commit| commit.lineage != committed.lineage || commit.epoch > committed.epoch;
                    sealed.retain(|epoch| newer(&epoch.commit));
                }
            }
            Err(error) => {
                // A header damaged while it was written, before anything was staged, is no loss; a longer file
                // may have held sealed epochs that are half applied.
                if left.journal.len() as u64 > JOURNAL_HEADER_BYTES && image.committed.take().is_some() {
                    image.applied = None;
                    match error {
                        JournalError::Header => self.damage = Some(error.to_string()),
                        other => self.notes.push(format!("gave up the commit: {other}")),
                    }
                } else {
                    self.notes.push(error.to_string());
                }
            }
        }
        let header = encode_header(target.config.guest, &image.layout);
        let mut recorded = self.take_up_history(left.undo, &sealed);
        let target = &mut self.target;
        for epoch in sealed {
            let commit = epoch.commit;
            let device_state = epoch.device_state.clone();
            target.apply_epoch(epoch, recorded == Recorded::Before, &mut self.effects);
            if let Some(image) = &mut target.image {
                image.committed = Some((commit, device_state));
            }
            if recorded == Recorded::UpTo(commit) {
                recorded = Recorded::Before;
            }
        }
        target.trim_history(&mut self.effects);
        target.save_state(&mut self.effects);
        target.truncate_journal(0, &mut self.effects);
        target.append_journal(header, true, &mut self.effects);
    }

    /// Goes on with the undo records that fit; what is known about epochs that are about to be replayed.
    fn take_up_history(&mut self, undo: &[FoundUndo], sealed: &[SealedEpoch]) -> Recorded {
        let target = &mut self.target;
        let Some(image) = &mut target.image else { return Recorded::Unknown };
        let mut known: Vec<Commit> = image.committed.iter().map(|(commit, _)| *commit).collect();
        known.extend(sealed.iter().map(|epoch| epoch.commit));
        let resumption = History::resume(target.config.keep, undo, &known);
        target.history = resumption.history;
        let dropped = resumption
            .drop
            .into_iter()
            .map(|range| TargetEffect::DropKept { first: *range.start(), last: *range.end() });
        self.effects.extend(dropped);
        let Some(recorded) = resumption.recorded_to else { return Recorded::Unknown };
        if let Some(applied) = &mut image.applied
            && applied.stamp.commit == recorded.commit
        {
            applied.stamp.at = recorded.at;
        }
        let is_replayed = sealed.iter().any(|epoch| epoch.commit == recorded.commit);
        if is_replayed { Recorded::UpTo(recorded.commit) } else { Recorded::Before }
    }
}

/// Which of the epochs that are replayed have undo records already.
#[derive(Debug, PartialEq, Eq)]
enum Recorded {
    /// Nobody knows whether the image is still what a record would have to lead to.
    Unknown,
    UpTo(Commit),
    /// None of those that come now, and the image is what a record has to lead to.
    Before,
}

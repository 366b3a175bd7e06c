//! The epochs that a shadow could go back to.
//!
//! ```text
//! image: newest epoch --undo record--> the one before --undo record--> ... --> oldest that is kept
//! ```
//! The image is always at the newest epoch, so that keeping others costs a promotion nothing. Before an epoch is applied
//! to it, an [undo record](record) is made of what it overwrites; going back applies records, newest first. They are
//! dropped from the oldest on, by number, age and bytes.
//!
//! **After a crash** a record that is whole tells that its epoch may have been applied in part, and need not be made
//! again; one that is not whole, or missing behind others, tells that nothing of its epoch was applied. So the chain goes
//! on without a gap. If a record could not be made, all are given up before anything is applied: none is better than one
//! that does not lead where it says.

pub mod record;

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use crate::journal::Commit;
use crate::units::{Epoch, Millis};
pub use record::{RecordError, Undo, UndoError, UndoHead, UndoRecord, read_back};

/// Most epochs that are kept, whatever is asked for: so many can be listed in one answer.
pub const MAX_KEPT_EPOCHS: u64 = 20_000;
/// What a record takes at least where it is kept.
const RECORD_GRAIN_BYTES: u64 = 4096;
/// What is asked for may grow to so many times the limit while an epoch is held.
const HELD_FACTOR: u64 = 2;

/// How much of the past is kept; all limits hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keep {
    /// Most epochs besides the newest one; 0: as many as there may be.
    pub epochs: u64,
    /// Age of the oldest one; 0: any.
    pub age: Millis,
    /// Most bytes of undo records; 0: nothing is kept. The newest record may come on top for a moment.
    pub bytes: u64,
}

impl Keep {
    pub fn is_off(&self) -> bool {
        self.bytes == 0
    }
}

/// An epoch, and when it was committed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub commit: Commit,
    /// By the clock that the driver's events have.
    pub at: Millis,
}

/// An epoch that the shadow could go back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Number of the undo record that leads to it.
    pub seq: u64,
    pub stamp: Stamp,
    /// Length of that record; none: it is being made.
    pub bytes: Option<u64>,
}

/// An undo record that a restarted agent found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundUndo {
    pub seq: u64,
    pub bytes: u64,
    /// None: it is not whole, or not of this image.
    pub head: Option<UndoHead>,
}

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct History {
    keep: Keep,
    /// Oldest first. Each leads from the next one, the last one from what the image holds.
    kept: VecDeque<Kept>,
    next_seq: u64,
    held: Option<(u64, Millis)>,
}

/// What a restarted agent does with what it found.
#[derive(Debug)]
pub(crate) struct Resumption {
    pub(crate) history: History,
    /// Numbers of records that are of no use.
    pub(crate) drop: Vec<RangeInclusive<u64>>,
    /// The last epoch of which something may have been applied already: there is a record of it. None: that is unknown,
    /// and no record is made of any that is replayed.
    pub(crate) recorded_to: Option<Stamp>,
}

impl History {
    pub(crate) fn new(keep: Keep) -> Self {
        Self { keep, next_seq: 1, ..Self::default() }
    }

    /// `known`: the epoch that the state record has, and those that are sealed in the journal, in order.
    pub(crate) fn resume(keep: Keep, found: &[FoundUndo], known: &[Commit]) -> Resumption {
        let mut found = found.to_vec();
        found.sort_by_key(|found| found.seq);
        let last_seq = found.last().map_or(0, |found| found.seq);
        let mut history = Self::new(keep);
        history.next_seq = last_seq + 1;
        let mut resumption = Resumption { history, drop: Vec::new(), recorded_to: None };
        // A record that was being made when the agent ended comes last.
        let whole = found.iter().rposition(|found| found.head.is_some());
        let newest = whole.and_then(|at| found[at].head).filter(|head| known.contains(&head.newer.commit));
        let (Some(whole), Some(newest), false) = (whole, newest, keep.is_off()) else {
            resumption.drop.extend((last_seq > 0).then_some(0..=last_seq));
            return resumption;
        };
        if found.len() > whole + 1 {
            resumption.drop.push(found[whole].seq + 1..=last_seq);
        }
        let mut leads_to = newest.newer.commit;
        for record in found[..=whole].iter().rev() {
            match record.head {
                Some(head) if head.newer.commit == leads_to => {
                    leads_to = head.older.commit;
                    let kept = Kept { seq: record.seq, stamp: head.older, bytes: Some(record.bytes) };
                    resumption.history.kept.push_front(kept);
                }
                _ => {
                    resumption.drop.push(0..=record.seq);
                    break;
                }
            }
        }
        resumption.recorded_to = Some(newest.newer);
        resumption
    }

    pub(crate) fn keep(&self) -> Keep {
        self.keep
    }

    pub(crate) fn set_keep(&mut self, keep: Keep) {
        self.keep = keep;
    }

    pub(crate) fn kept(&self) -> impl Iterator<Item = &Kept> {
        self.kept.iter()
    }

    /// A record that leads back to `older` is about to be made: its number.
    pub(crate) fn push(&mut self, older: Stamp) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.kept.push_back(Kept { seq, stamp: older, bytes: None });
        seq
    }

    /// The record was made, or could not be: then all up to it are gone.
    pub(crate) fn made(&mut self, seq: u64, bytes: Option<u64>) {
        match bytes {
            Some(bytes) => self.kept.iter_mut().filter(|k| k.seq == seq).for_each(|k| k.bytes = Some(bytes)),
            None => self.kept.retain(|kept| kept.seq > seq),
        }
    }

    /// Forgets all; the number up to which records are to be removed.
    pub(crate) fn clear(&mut self) -> Option<u64> {
        let last = self.kept.back().map(|kept| kept.seq);
        self.kept.clear();
        self.held = None;
        last
    }

    /// Forgets what the limits do not allow; the number up to which records are to be removed.
    pub(crate) fn trim(&mut self, now: Millis) -> Option<u64> {
        if self.held.is_some_and(|(_, until)| now > until) {
            self.held = None;
        }
        let Keep { epochs, age, bytes } = self.keep;
        let most = if epochs == 0 { MAX_KEPT_EPOCHS } else { epochs.min(MAX_KEPT_EPOCHS) };
        let mut total: u64 = self.kept.iter().map(Kept::memory_bytes).sum();
        let mut dropped = None;
        while let Some(oldest) = self.kept.front().copied() {
            let old = age.get() > 0 && now.since(oldest.stamp.at) > age;
            let over = self.kept.len() as u64 > most || old || total > bytes;
            let held =
                self.held.is_some_and(|(seq, _)| oldest.seq >= seq) && total <= bytes.saturating_mul(HELD_FACTOR);
            if !over || held {
                break;
            }
            total -= oldest.memory_bytes();
            dropped = Some(oldest.seq);
            self.kept.pop_front();
        }
        dropped
    }

    /// The newest epoch of that number that can be gone back to.
    pub(crate) fn find(&self, epoch: Epoch) -> Option<Kept> {
        let usable = self.kept.iter().rev().take_while(|kept| kept.bytes.is_some());
        usable.copied().find(|kept| kept.stamp.commit.epoch == epoch)
    }

    pub(crate) fn find_commit(&self, commit: Commit) -> Option<Kept> {
        self.kept.iter().copied().find(|kept| kept.stamp.commit == commit)
    }

    /// Keeps what is needed to go back to this epoch until then, within bounds.
    pub(crate) fn hold(&mut self, kept: Kept, until: Millis) {
        self.held = Some((kept.seq, until));
    }

    /// The limits hold again.
    pub(crate) fn release(&mut self) {
        self.held = None;
    }

    /// Numbers of the records that lead to what that one leads to, newest first.
    pub(crate) fn back_to(&self, seq: u64) -> Vec<u64> {
        self.kept.iter().rev().map(|kept| kept.seq).take_while(|newer| *newer >= seq).collect()
    }
}

impl Kept {
    fn memory_bytes(&self) -> u64 {
        self.bytes.unwrap_or(0).next_multiple_of(RECORD_GRAIN_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Lineage, Term};

    fn commit(epoch: u64) -> Commit {
        Commit { lineage: Lineage::new(1), term: Term::new(1), epoch: Epoch::new(epoch) }
    }

    fn stamp(epoch: u64) -> Stamp {
        Stamp { commit: commit(epoch), at: Millis::new(epoch * 100) }
    }

    fn keep(epochs: u64, age_ms: u64, bytes: u64) -> Keep {
        Keep { epochs, age: Millis::new(age_ms), bytes }
    }

    fn filled(keep: Keep, epochs: u64) -> History {
        let mut history = History::new(keep);
        for epoch in 1..=epochs {
            let seq = history.push(stamp(epoch));
            history.made(seq, Some(5000));
        }
        history
    }

    fn epochs(history: &History) -> Vec<u64> {
        history.kept().map(|kept| kept.stamp.commit.epoch.get()).collect()
    }

    #[test]
    fn limits_drop_from_the_oldest_on() {
        let now = Millis::new(1000);
        for (limit, left, dropped) in [
            (keep(3, 0, 1 << 30), vec![8, 9, 10], Some(7)),
            (keep(0, 250, 1 << 30), vec![8, 9, 10], Some(7)),
            // Each takes two pages.
            (keep(0, 0, 3 * 8192), vec![8, 9, 10], Some(7)),
            (keep(0, 0, 1 << 30), (1..=10).collect(), None),
            (keep(20, 5000, 0), vec![], Some(10)),
        ] {
            let mut history = filled(limit, 10);
            assert_eq!(history.trim(now), dropped, "{limit:?}");
            assert_eq!(epochs(&history), left, "{limit:?}");
        }
    }

    #[test]
    fn a_held_epoch_stays_for_a_while_and_within_bounds() {
        let mut history = filled(keep(5, 0, 5 * 8192), 5);
        history.hold(history.find(Epoch::new(3)).unwrap(), Millis::new(2000));
        for epoch in 6..=9 {
            let seq = history.push(stamp(epoch));
            history.made(seq, Some(5000));
            history.trim(Millis::new(1000));
        }
        assert_eq!(epochs(&history), [3, 4, 5, 6, 7, 8, 9]);
        let seq = history.push(stamp(10));
        history.made(seq, Some(4 * 8192));
        history.trim(Millis::new(1000));
        assert_eq!(epochs(&history), [4, 5, 6, 7, 8, 9, 10], "twice the limit ends it");
        assert_eq!(history.trim(Millis::new(2001)), Some(8), "and so does time");
    }

    #[test]
    fn a_record_that_was_not_made_takes_all_before_it() {
        let mut history = filled(keep(0, 0, 1 << 30), 3);
        let (failed, later) = (history.push(stamp(4)), history.push(stamp(5)));
        assert_eq!(history.find(Epoch::new(2)), None, "not while a newer one is open");
        history.made(failed, None);
        history.made(later, Some(1));
        assert_eq!(epochs(&history), [5]);
    }

    /// Records 1 to 4 lead from epochs 2 to 5 back to 1 to 4.
    fn found() -> Vec<FoundUndo> {
        let head = |seq| UndoHead { seq, older: stamp(seq), newer: stamp(seq + 1) };
        (1..=4).map(|seq| FoundUndo { seq, bytes: 10, head: Some(head(seq)) }).collect()
    }

    #[test]
    fn a_restarted_agent_goes_on_with_an_unbroken_chain() {
        let on = keep(0, 0, 1 << 20);
        let resumed = History::resume(on, &found(), &[commit(5)]);
        assert_eq!((epochs(&resumed.history), resumed.drop), (vec![1, 2, 3, 4], vec![]));
        assert_eq!((resumed.recorded_to, resumed.history.next_seq), (Some(stamp(5)), 5));

        let mut torn = found();
        torn[3].head = None;
        let resumed = History::resume(on, &torn, &[commit(4), commit(5)]);
        assert_eq!(epochs(&resumed.history), [1, 2, 3]);
        assert_eq!((resumed.drop, resumed.recorded_to), (vec![4..=4], Some(stamp(4))));

        let mut gap = found();
        gap.remove(1);
        let resumed = History::resume(on, &gap, &[commit(5)]);
        assert_eq!((epochs(&resumed.history), resumed.drop), (vec![3, 4], vec![0..=1]));

        for (what, keep, known) in [("another image", on, commit(9)), ("off", Keep::default(), commit(5))] {
            let resumed = History::resume(keep, &found(), &[known]);
            assert_eq!((epochs(&resumed.history), resumed.drop), (vec![], vec![0..=4]), "{what}");
            assert_eq!(resumed.recorded_to, None, "{what}");
        }
    }
}

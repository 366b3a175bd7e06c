//! A restarted agent takes up its shadow where the last one left it.

use super::{Image, Promotion, Target, TargetConfig, TargetEffect};
use crate::codec::KnownPages;
use crate::journal::{JOURNAL_HEADER_BYTES, encode_header, scan};
use crate::state_record::{StateError, StateRecord};

/// A target made from what a former agent left.
#[derive(Debug)]
pub struct Resumed {
    pub target: Target,
    /// To be done before the first event.
    pub effects: Vec<TargetEffect>,
    /// What was found amiss; for the log.
    pub notes: Vec<String>,
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
    pub fn resume(config: TargetConfig, state: &[u8], journal: &[u8]) -> Result<Resumed, StateError> {
        let record = StateRecord::decode(state, config.guest)?;
        let mut target = Self::new(config);
        target.term = target.term.max(record.term);
        let mut resumed = Resumed { target, effects: Vec::new(), notes: Vec::new() };
        let Some(image) = record.image else { return Ok(resumed) };
        resumed.target.image = Some(Image {
            known: KnownPages::unknown(&image.layout),
            layout: image.layout,
            zero: false,
            committed: image.committed,
        });
        if record.promoted {
            resumed.target.take_up_promotion();
        } else {
            resumed.replay(journal);
        }
        Ok(resumed)
    }

    fn take_up_promotion(&mut self) {
        let committed = self.image.as_ref().and_then(|image| image.committed.clone());
        self.promotion = committed.map(|(commit, device_state)| Promotion { term: self.term, commit, device_state });
    }
}

impl Resumed {
    fn replay(&mut self, journal: &[u8]) {
        let target = &mut self.target;
        let Some(image) = &mut target.image else { return };
        let found = scan(journal, target.config.guest, &image.layout);
        // Whatever is there is longer than nothing and is cut off below.
        target.journal.len_bytes = (journal.len() as u64).max(1);
        match found {
            Ok(scan) => {
                if let Some(tail) = scan.tail {
                    self.notes.push(format!("dropped an epoch that was never acknowledged: {tail}"));
                }
                // Without a commit in the record nothing was staged: the journal is older than the record.
                let replayed = image.committed.is_some() && !scan.epochs.is_empty();
                for epoch in scan.epochs.into_iter().filter(|_| replayed) {
                    self.effects.extend(epoch.frames.into_iter().map(TargetEffect::Apply));
                    image.committed = Some((epoch.commit, epoch.device_state));
                }
            }
            Err(error) => {
                self.notes.push(error.to_string());
                // A header damaged while it was written, before anything was staged, is no loss; a longer file
                // may have held sealed epochs that are half applied.
                if journal.len() as u64 > JOURNAL_HEADER_BYTES && image.committed.take().is_some() {
                    self.notes.push("gave up the commit: the journal may have held a part of it".into());
                }
            }
        }
        let header = encode_header(target.config.guest, &image.layout);
        target.save_state(&mut self.effects);
        target.truncate_journal(0, &mut self.effects);
        target.append_journal(header, true, &mut self.effects);
    }
}

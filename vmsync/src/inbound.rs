//! Frames on their way to the guest, kept by shadows until an epoch tells that the guest had them: what a client sent
//! last can be given to the guest's copy. They help, and nothing relies on them: there may be gaps and repetitions, as on
//! any network.
//!
//! ```text
//! source: frame 1, frame 2, cut planned, frame 3, cut made: "all but the newest 1", Commit
//! target: keeps 1, 2, 3                                                             drops 1 and 2
//! ```
//! A frame that came before a cut was so much as planned has reached the guest when it stands still; of one that came later
//! nobody knows.

use std::collections::VecDeque;

use crate::bytes::{Put, Reader};

/// Longest frame that is kept, bytes; of bulk transfers, whose frames are longer, TCP takes care by itself.
pub const MAX_FRAME_BYTES: usize = 4096;
/// Sent to a peer from one cut to the next at most.
pub const MAX_SENT_BYTES: u64 = 64 << 10;
/// What a short frame counts for at least.
const LEAST_BYTES: u64 = 256;
/// As many short frames as that is.
pub const MAX_SENT_FRAMES: usize = (MAX_SENT_BYTES / LEAST_BYTES) as usize;
/// Longest body of a message: all that can be sent from one cut to the next.
pub(crate) const MAX_BODY_BYTES: usize = MAX_SENT_BYTES as usize + 2 * MAX_SENT_FRAMES;
/// Kept by a target at most, whatever its source says.
const MAX_KEPT_BYTES: u64 = 256 << 10;

fn cost(frame: &[u8]) -> u64 {
    (frame.len() as u64).max(LEAST_BYTES)
}

/// Frames that go together, each behind its length; of those that a [`Sent`] took.
pub(crate) fn write(frames: &[Vec<u8>], out: &mut Vec<u8>) {
    for frame in frames {
        out.put_u16(frame.len() as u16); // at most MAX_FRAME_BYTES
        out.extend_from_slice(frame);
    }
}

pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Vec<Vec<u8>>, &'static str> {
    let mut frames = Vec::new();
    while !reader.rest().is_empty() {
        let len = reader.u16().map_or(0, usize::from);
        if !fits(len) || frames.len() == MAX_SENT_FRAMES {
            return Err("it has too many frames, or one of a length that none has");
        }
        frames.push(reader.take(len).map_err(|_| "its last frame is cut short")?.to_vec());
    }
    if frames.is_empty() { Err("it has no frames") } else { Ok(frames) }
}

pub(crate) fn fits(len: usize) -> bool {
    (1..=MAX_FRAME_BYTES).contains(&len)
}

/// How many frames, and what they count for.
#[derive(Debug, Clone, Copy, Default)]
struct Amount {
    frames: u32,
    bytes: u64,
}

/// What a source has sent to one peer that no cut covers.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    all: Amount,
    /// Of them, before the newest cut was planned.
    planned: Amount,
}

impl Sent {
    /// For how many of them, the first, there is room; those then count.
    pub(crate) fn add(&mut self, frames: &[Vec<u8>]) -> usize {
        let takes = |frame: &&Vec<u8>| {
            let bytes = self.all.bytes + cost(frame);
            let takes = fits(frame.len()) && bytes <= MAX_SENT_BYTES;
            if takes {
                self.all = Amount { frames: self.all.frames + 1, bytes };
            }
            takes
        };
        frames.iter().take_while(takes).count()
    }

    pub(crate) fn plan(&mut self) {
        self.planned = self.all;
    }

    /// The cut was made, and the peer gets it: how many of the newest frames it does not cover. None: there are no frames.
    pub(crate) fn cut(&mut self) -> Option<u32> {
        if self.all.frames == 0 {
            return None;
        }
        let planned = std::mem::take(&mut self.planned);
        self.all.frames -= planned.frames;
        self.all.bytes -= planned.bytes;
        Some(self.all.frames)
    }
}

/// What a target keeps.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    frames: VecDeque<Vec<u8>>,
    bytes: u64,
    /// So many of the oldest go with the next commit.
    covered: usize,
}

impl Kept {
    /// Keeps a frame if there is room.
    pub(crate) fn add(&mut self, frame: Vec<u8>) {
        let bytes = self.bytes + cost(&frame);
        if bytes <= MAX_KEPT_BYTES {
            self.bytes = bytes;
            self.frames.push_back(frame);
        }
    }

    /// The next commit covers all but the newest so many.
    pub(crate) fn cover_all_but(&mut self, newest: u32) {
        self.covered = self.frames.len().saturating_sub(newest as usize);
    }

    pub(crate) fn committed(&mut self) {
        let covered = std::mem::take(&mut self.covered);
        self.bytes -= self.frames.drain(..covered).map(|frame| cost(&frame)).sum::<u64>();
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn take(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(self).frames.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_covers_what_came_before_it_was_planned() {
        let mut sent = Sent::default();
        assert_eq!(sent.cut(), None);
        assert_eq!(sent.add(&[vec![1], vec![2]]), 2);
        sent.plan();
        assert_eq!(sent.add(&[vec![3]]), 1);
        assert_eq!(sent.cut(), Some(1));
        // A cut that was planned and failed; then another one.
        sent.plan();
        assert_eq!(sent.add(&[vec![4]]), 1);
        sent.plan();
        assert_eq!((sent.cut(), sent.cut()), (Some(0), None));
    }

    #[test]
    fn what_is_sent_is_bounded_until_the_next_cut() {
        let mut sent = Sent::default();
        assert_eq!(sent.add(&[vec![], vec![0; MAX_FRAME_BYTES + 1]]), 0);
        assert_eq!(sent.add(&vec![vec![0; 60]; 1000]), MAX_SENT_FRAMES);
        sent.plan();
        assert_eq!(sent.cut(), Some(0));
        assert_eq!(sent.add(&vec![vec![0; MAX_FRAME_BYTES]; 1000]), 16);
        // Whatever is sent together fits a message.
        for len in [1, 255, 256, 257, 1500, MAX_FRAME_BYTES] {
            let frames = vec![vec![7; len]; 1000];
            let mut body = Vec::new();
            write(&frames[..Sent::default().add(&frames)], &mut body);
            assert!(body.len() <= MAX_BODY_BYTES, "{len}: {}", body.len());
        }
    }

    #[test]
    fn frames_that_go_together_come_apart_again() {
        let frames = vec![vec![1], vec![2; 300], vec![3; MAX_FRAME_BYTES]];
        let mut body = Vec::new();
        write(&frames, &mut body);
        assert_eq!(read(&mut Reader::new(&body)), Ok(frames));
        for len in (0..body.len()).filter(|len| ![3, 305].contains(len)) {
            assert!(read(&mut Reader::new(&body[..len])).is_err(), "{len}");
        }
        for bad in [&[0, 0][..], &[1, 0, 5, 0, 0], &[1, 16], &[1], &[1, 0, 9].repeat(MAX_SENT_FRAMES + 1)] {
            assert!(read(&mut Reader::new(bad)).is_err(), "{bad:?}");
        }
        assert!(read(&mut Reader::new(&[[1, 16].as_slice(), &[0; 4097]].concat())).is_err());
        assert!(read(&mut Reader::new(&[1, 0, 9].repeat(MAX_SENT_FRAMES))).is_ok());
    }

    #[test]
    fn what_is_kept_is_bounded_and_goes_with_its_commit() {
        let mut kept = Kept::default();
        (0..10_000u32).for_each(|i| kept.add(i.to_le_bytes().to_vec()));
        assert_eq!(kept.frames.len() as u64, MAX_KEPT_BYTES / LEAST_BYTES);
        kept.committed();
        assert_eq!(kept.frames.len() as u64, MAX_KEPT_BYTES / LEAST_BYTES, "no cut covers any of them");
        kept.cover_all_but(2);
        kept.add(vec![7]);
        kept.committed();
        assert_eq!((kept.frames.len(), kept.bytes), (2, 512));
        kept.add(vec![8; 300]);
        kept.cover_all_but(u32::MAX);
        kept.committed();
        assert_eq!((kept.bytes, kept.take().len(), kept.take().len()), (812, 3, 0));
    }
}

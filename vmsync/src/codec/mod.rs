//! The delta codec: what changed in a guest's memory, in few bytes and little time.
//!
//! ```text
//! source                                                          target
//! dirty pages --> Encoder --frames--> ~~~~ --> FrameDecoder --> KnownPages --> PagesFrame (staged, journaled, applied)
//!                  |    ^                                        in step?
//!                  v    |
//!                 mirror: previous contents
//! ```
//! A patch only means something to whoever has the same previous contents. The source knows which shadows have them
//! ([`crate::source`]); that it is right about it is checked with every patch by a [`sum`] of the contents
//! before it. Patches replace bytes, so that frames can be replayed from the journal onto an image that has a part of
//! them already.

pub mod capture;
pub mod effort;
pub mod encoder;
pub mod frame;
pub mod mirror;
pub mod sum;
pub mod undo;

pub mod blob;
mod diff;
mod noise;
mod records;
#[allow(unsafe_code)]
mod simd;
mod words;
mod writer;

pub use diff::Patch;
pub use effort::{Effort, Pace};
pub use encoder::{CodecStats, Encoder, FETCH_AHEAD, PageFate, is_zero};
pub use frame::{FrameDecoder, FrameError, MAX_FRAME_BYTES, OutOfStep, PageContent, PagesFrame};
pub use mirror::{Advise, MirrorBudget};
pub use simd::fetch_lines;
pub use sum::KnownPages;
pub use undo::UndoEncoder;

/// Room for the longest page of a stream; what is written beyond its end is written over by the next.
fn room<const N: usize>(bytes: &mut Vec<u8>, at: usize) -> &mut [u8; N] {
    bytes.resize(bytes.len().max(at + N), 0);
    bytes[at..].first_chunk_mut().expect("it was just made that long")
}

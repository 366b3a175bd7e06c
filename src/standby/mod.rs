//! The shadow's side: waiting domain, memory image, journal, promotion.
//!
//! ```text
//!          keep or create                   promote(device state)
//! (nothing) ──────────> waiting, armed ───────────────────────────> running guest, persistent, announced
//!     ^  ^               |   ^   | image: pages and zero pages             |
//!     |  `── remove ─────'   `───' journal: staged epochs                  | (its host keeps nothing of ours)
//!     `──────────── load failed: not loaded, remove ──────────────────────'
//! ```
//! A waiting shadow is a domain that libvirt shows paused and QEMU calls `inmigrate`. Its memory is a shared memfd
//! which the agent maps; its record under `run_dir/shadows/UUID` lets a restarted agent find it again, image included.

mod announce;
mod disk;
mod error;
mod feed;
pub mod history;
pub mod image;
pub mod journal;
mod mapping;
mod memory_file;
mod promote;
mod record;
mod shadow;

pub use error::{Result, StandbyError};
pub use history::{HistoryError, UndoFiles};
pub use image::{Image, ImageError};
pub use journal::{JournalError, JournalFile};
pub use promote::{Promotion, Started, Timings};
pub use record::{directory, is_uuid, journal_path, recorded, replace_file};
pub use shadow::{Adopted, Shadow, ShadowDescription};

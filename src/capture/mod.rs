//! The primary's side: which pages changed, the cut, and the reading of guest memory.

pub mod attach;
pub mod cutter;
pub mod guard;
pub mod inject;
pub mod memory;
pub mod tracker;
pub mod uffd;

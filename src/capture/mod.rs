//! The primary's side: which pages changed, the cut, and the reading of guest memory.

pub mod inject;
pub mod guard;
pub mod uffd;
pub mod cutter;
pub mod memory;
pub mod tracker;

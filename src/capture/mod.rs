//! The primary's side: which pages changed, the cut, and the reading of guest memory.

pub mod guard;
pub mod inject;
pub mod uffd;

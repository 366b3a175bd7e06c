//! The primary's side: which pages changed, the cut, and the reading of guest memory.

pub mod inject;

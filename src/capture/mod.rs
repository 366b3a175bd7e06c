//! The primary's side: which pages changed, the cut, and the reading of guest memory.

pub mod advice;
pub mod attach;
pub mod companion;
mod crew;
pub mod cutter;
pub mod guard;
pub mod inject;
pub mod memory;
pub mod pipe;
pub mod priority;
mod spares;
pub mod tracker;
pub mod uffd;

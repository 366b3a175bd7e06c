//! Holes in the images of disks and of shadows' memory.

use std::fs::File;
use std::io;

use nix::fcntl::{FallocateFlags, fallocate};

/// Gives the room of a range back; it reads as zeros from then on. Not every file system can: then zeros have to be
/// written.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let as_offset = |value: u64| i64::try_from(value).map_err(io::Error::other);
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, mode, as_offset(offset)?, as_offset(len)?)?)
}

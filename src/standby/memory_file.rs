//! Finds the file behind a range of QEMU's memory, so that the agent can map the same memory.
//!
//! A shadow's RAM is a memfd (or a file on tmpfs or hugetlbfs) that QEMU keeps open. `/proc/PID/maps` tells device,
//! inode and offset behind an address; among `/proc/PID/fd` is a descriptor of that inode, which can be opened anew.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;

/// A range of shared memory and where it lies in its file.
#[derive(Debug)]
pub(super) struct MemoryFile {
    pub(super) file: File,
    /// Offset of the range's first byte in `file`, bytes.
    pub(super) offset: u64,
}

/// What is mapped at an address, from one line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapped {
    start: u64,
    end: u64,
    shared: bool,
    offset: u64,
    device: (u32, u32),
    inode: u64,
}

/// The file behind `len` bytes at `address` of process `pid`; `None` if that is private memory, or not one piece.
pub(super) fn find(pid: i32, address: u64, len: u64) -> io::Result<Option<MemoryFile>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mapped: Vec<Mapped> = maps.lines().filter_map(parse_line).collect();
    let Some((first, offset)) = one_piece(&mapped, address, len) else { return Ok(None) };
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // A descriptor that is closed meanwhile is not the one of the memory.
        let Ok(entry) = entry else { continue };
        let Ok(found) = fs::metadata(entry.path()) else { continue };
        if found.ino() != first.inode || (major(found.dev()), minor(found.dev())) != first.device {
            continue;
        }
        let file = OpenOptions::new().read(true).write(true).open(entry.path())?;
        return Ok(Some(MemoryFile { file, offset }));
    }
    Ok(None)
}

/// The first mapping of a range that shared mappings of one file cover without a gap, and the range's file offset.
fn one_piece(mapped: &[Mapped], address: u64, len: u64) -> Option<(&Mapped, u64)> {
    let end = address.checked_add(len)?;
    let first = mapped.iter().find(|m| m.start <= address && address < m.end)?;
    let offset = first.offset.checked_add(address - first.start)?;
    let mut position = address;
    for part in mapped.iter().filter(|m| m.end > address && m.start < end) {
        let continues = part.start <= position
            && part.shared
            && part.inode != 0
            && (part.inode, part.device) == (first.inode, first.device)
            && part.offset.checked_add(position - part.start)? == offset + (position - address);
        if !continues {
            return None;
        }
        position = part.end;
    }
    (position >= end).then_some((first, offset))
}

/// `7f5a2be00000-7f5a3be00000 rw-s 00000000 00:01 1042   /memfd:memory-backend-memfd (deleted)`
fn parse_line(line: &str) -> Option<Mapped> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = fields.next()?.parse().ok()?;
    Some(Mapped { start: hex(start)?, end: hex(end)?, shared: permissions.ends_with('s'), offset, device, inode })
}

fn major(dev: u64) -> u32 {
    libc::major(dev)
}

fn minor(dev: u64) -> u32 {
    libc::minor(dev)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
7f0000100000-7f0000200000 rw-s 00000000 00:01 1042                       /memfd:memory-backend-memfd (deleted)
7f0000200000-7f0000300000 rw-s 00100000 00:01 1042                       /memfd:memory-backend-memfd (deleted)
7f0000300000-7f0000400000 rw-s 00000000 00:01 1043                       /memfd:other (deleted)
7f0000500000-7f0000600000 rw-p 00000000 00:01 1042                       /memfd:memory-backend-memfd (deleted)
";

    fn piece(address: u64, len: u64) -> Option<(u64, u64)> {
        let mapped: Vec<Mapped> = MAPS.lines().filter_map(parse_line).collect();
        assert_eq!(mapped.len(), 5);
        one_piece(&mapped, address, len).map(|(m, offset)| (m.inode, offset))
    }

    #[test]
    fn a_range_may_be_split_over_mappings_of_one_file() {
        assert_eq!(piece(0x7f00_0010_0000, 0x20_0000), Some((1042, 0)));
        assert_eq!(piece(0x7f00_0018_0000, 0x10_0000), Some((1042, 0x8_0000)));
        assert_eq!(piece(0x7f00_0030_0000, 0x10_0000), Some((1043, 0)));
    }

    #[test]
    fn ranges_that_are_not_one_shared_file_are_not_taken_for_one() {
        assert_eq!(piece(0x7f00_0000_0000, 0x1000), None, "anonymous");
        assert_eq!(piece(0x7f00_0020_0000, 0x20_0000), None, "two files");
        assert_eq!(piece(0x7f00_0030_0000, 0x20_0000), None, "a gap");
        assert_eq!(piece(0x7f00_0050_0000, 0x1000), None, "private copy of the file");
        assert_eq!(piece(0x7f00_0090_0000, 0x1000), None, "nothing there");
        assert_eq!(piece(u64::MAX, 2), None);
    }

    #[test]
    fn the_memory_of_this_process_is_found() {
        use std::os::unix::fs::FileExt;
        let name = std::ffi::CString::new("standby-test").unwrap();
        let fd = nix::sys::memfd::memfd_create(name.as_c_str(), nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(1 << 20).unwrap();
        let map = super::super::mapping::Mapping::new(&file, 0x1000, 0xff000).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let found = find(pid, map.address() + 0x3000, 0x2000).unwrap().unwrap();
        assert_eq!(found.offset, 0x4000);
        found.file.write_all_at(b"abc", found.offset).unwrap();
        let mut bytes = [0; 3];
        map.read(0x3000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"abc");
    }
}

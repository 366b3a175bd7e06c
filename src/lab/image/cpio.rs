//! Writer of the "newc" archives that the kernel unpacks as its first root: per entry a header of 6 + 13 x 8 hex
//! digits, the name with its NUL, the data, name and data each filled up to 4 bytes. Archives may follow each other.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const TRAILER: &str = "TRAILER!!!";
const TYPE_MASK: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;
const LINK: u32 = 0o120_000;
const FILE: u32 = 0o100_000;

/// What an entry is besides its name and data.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kind {
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Major and minor number of a device node.
    pub device: (u32, u32),
}

impl Kind {
    /// Of root's.
    pub fn mode(mode: u32) -> Self {
        Self { mode, ..Self::default() }
    }
}

pub struct Cpio<W> {
    out: W,
    entries: u32,
    written: u64,
}

impl<W: Write> Cpio<W> {
    pub fn new(out: W) -> Self {
        Self { out, entries: 0, written: 0 }
    }

    /// Adds an entry; the folder it lies in must have been added before.
    pub fn entry(&mut self, name: &[u8], kind: Kind, data: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let links = if kind.mode & TYPE_MASK == DIRECTORY { 2 } else { 1 };
        let size = u32::try_from(data.len()).map_err(|_| io::Error::other("a file of 4 GiB or more"))?;
        let name_size = name.len() as u32 + 1;
        let Kind { mode, uid, gid, device } = kind;
        let fields = [self.entries, mode, uid, gid, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut head = b"070701".to_vec();
        for field in fields {
            head.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        head.extend_from_slice(name);
        head.push(0);
        self.put(&head)?;
        self.put(data)
    }

    /// Adds all that is below `folder`, with owners and permissions, in order of names. Times are left out, so that the
    /// same tree gives the same bytes; files with several names become several files.
    pub fn tree(&mut self, folder: &Path) -> io::Result<()> {
        self.subtree(folder, &[])
    }

    fn subtree(&mut self, folder: &Path, prefix: &[u8]) -> io::Result<()> {
        let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, meta) = (entry.path(), entry.metadata()?);
            let name = [prefix, entry.file_name().as_bytes()].concat();
            let kind = Kind { mode: meta.mode(), uid: meta.uid(), gid: meta.gid(), device: (0, 0) };
            match meta.mode() & TYPE_MASK {
                DIRECTORY => {
                    self.entry(&name, kind, &[])?;
                    self.subtree(&path, &[&name[..], b"/"].concat())?;
                }
                LINK => self.entry(&name, kind, fs::read_link(&path)?.as_os_str().as_bytes())?,
                FILE => self.entry(&name, kind, &fs::read(&path)?)?,
                // Sockets and pipes that a program left behind mean nothing in another system.
                _ => {}
            }
        }
        Ok(())
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry(TRAILER.as_bytes(), Kind::default(), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        let fill = self.written.next_multiple_of(4) - self.written;
        self.written += fill;
        self.out.write_all(&[0; 3][..fill as usize])
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::Command;

    use super::*;
    use crate::lab::process::run_with_input;

    fn listing(archive: &[u8]) -> String {
        let input = std::str::from_utf8(archive).unwrap();
        let listing = run_with_input(Command::new("busybox").args(["cpio", "-tv"]), input);
        String::from_utf8(listing.unwrap().stdout).unwrap()
    }

    #[test]
    fn archives_are_what_cpio_writes() {
        let mut archive = Cpio::new(Vec::new());
        archive.entry(b"bin", Kind::mode(0o040_755), &[]).unwrap();
        archive.entry(b"bin/a", Kind::mode(0o100_755), b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        let listing = listing(&bytes);
        assert!(listing.contains("drwxr-xr-x") && listing.contains("bin/a") && listing.contains(" 5 "), "{listing}");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn a_tree_keeps_owners_permissions_and_links() {
        let dir = std::env::temp_dir().join(format!("virt-shadow-cpio-{}", std::process::id()));
        fs::create_dir_all(dir.join("data")).unwrap();
        fs::write(dir.join("data/secret"), "x").unwrap();
        fs::set_permissions(dir.join("data/secret"), fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(dir.join("data/secret"), Some(70), Some(71)).unwrap();
        symlink("data/secret", dir.join("link")).unwrap();
        let mut archive = Cpio::new(Vec::new());
        archive.tree(&dir).unwrap();
        let listing = listing(&archive.finish().unwrap());
        fs::remove_dir_all(&dir).unwrap();
        let secret = listing.lines().find(|line| line.ends_with("data/secret")).unwrap();
        assert!(secret.starts_with("-rw-------") && secret.contains("70/71"), "{listing}");
        assert!(listing.contains("link -> data/secret"), "{listing}");
    }
}

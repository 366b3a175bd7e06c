//! Where the disks' copies and the shadows' disks lie: `disk_dir/UUID/TARGET.a.img` and `.b.img`.
//!
//! A guest that was promoted here has one of the two as its disk, so its own copy is the other one. A host that becomes a
//! shadow takes whichever is newer, and only what differs is sent.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::sys::statfs::statfs;

const SIDES: [&str; 2] = ["a", "b"];
/// File systems that several hosts can have mounted: NFS, SMB, CIFS, Ceph, GFS2, OCFS2, Lustre, FUSE (GlusterFS and
/// others), 9P, AFS.
const SHARED_FILE_SYSTEMS: [i64; 11] = [
    0x6969,
    0x517b,
    0xff53_4d42,
    0xfe53_4d42,
    0x00c3_6400,
    0x0116_1970,
    0x7461_636f,
    0x0bd0_0bd0,
    0x6573_5546,
    0x0102_1997,
    0x5346_414f,
];

/// Prefix of the names of blocks that are disks; QEMU has no RAM block of such a name.
pub const BLOCK_PREFIX: &str = "disk:";

/// The block of a disk.
pub fn block_name(target: &str) -> String {
    format!("{BLOCK_PREFIX}{target}")
}

/// The disk that a block stands for, if it does.
pub fn target_of(block: &str) -> Option<&str> {
    block.strip_prefix(BLOCK_PREFIX)
}

/// Whether this may be part of a file's name, as libvirt's targets may.
pub fn is_target(target: &str) -> bool {
    (1..=32).contains(&target.len()) && target.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// Folder of one guest's images, made if it is not there.
pub fn folder(disk_dir: &Path, uuid: &str) -> io::Result<PathBuf> {
    // Images are the owner's alone; QEMU, which may be another user, only has to get to them.
    fs::DirBuilder::new().recursive(true).mode(0o711).create(disk_dir)?;
    let kind = statfs(disk_dir)?.filesystem_type().0;
    if SHARED_FILE_SYSTEMS.contains(&(kind as i64)) {
        return Err(io::Error::other(
            "it is on a file system that other hosts may share, where copies of several hosts would meet; set \
             agent.disk_dir to a folder on a disk of this host",
        ));
    }
    let folder = disk_dir.join(uuid);
    fs::DirBuilder::new().recursive(true).mode(0o711).create(&folder)?;
    Ok(folder)
}

/// The image for `target` that is not `in_use`: the newest there is, or a new name.
pub fn choose(folder: &Path, target: &str, in_use: &[String]) -> PathBuf {
    let free = SIDES.map(|side| folder.join(format!("{target}.{side}.img")));
    let mut free: Vec<PathBuf> = free.into_iter().filter(|path| !is_in_use(path, in_use)).collect();
    let changed = |path: &PathBuf| fs::metadata(path).and_then(|found| found.modified()).ok();
    free.sort_by_key(|path| std::cmp::Reverse(changed(path).unwrap_or(SystemTime::UNIX_EPOCH)));
    free.into_iter().next().unwrap_or_else(|| folder.join(format!("{target}.c.img")))
}

/// Removes the images of a guest that are not `in_use`, and its folder if nothing is left.
pub fn remove(disk_dir: &Path, uuid: &str, in_use: &[String]) -> io::Result<()> {
    let folder = disk_dir.join(uuid);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "img") && !is_in_use(&path, in_use) {
            fs::remove_file(path)?;
        }
    }
    let _ = fs::remove_dir(folder);
    Ok(())
}

fn is_in_use(path: &Path, in_use: &[String]) -> bool {
    in_use.iter().any(|used| Path::new(used) == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_is_never_the_disk_itself() {
        let dir = std::env::temp_dir().join(format!("virt-shadow-images-{}", std::process::id()));
        let folder = folder(&dir, "u").unwrap();
        let first = choose(&folder, "vda", &[]);
        let own = [first.to_string_lossy().into_owned()];
        let second = choose(&folder, "vda", &own);
        assert_ne!(first, second);
        fs::write(&first, "1").unwrap();
        assert_eq!(choose(&folder, "vda", &[]), first, "what is there is worth more than nothing");
        fs::write(&second, "2").unwrap();
        fs::File::open(&first).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(choose(&folder, "vda", &[]), second, "the newer one");
        remove(&dir, "u", &own).unwrap();
        assert!(first.exists() && !second.exists());
        remove(&dir, "u", &[]).unwrap();
        assert!(!folder.exists());
        remove(&dir, "u", &[]).unwrap();
        fs::remove_dir(dir).unwrap();
        assert!(is_target("vda") && !is_target("../a") && !is_target("") && !is_target("a/b"));
    }
}

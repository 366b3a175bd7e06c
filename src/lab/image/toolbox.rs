//! The programs that a guest's software is made of, run on this machine: clients of it, and what checks its data.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::lab::error::{LabError, Result};

pub const HOST_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Mounts what a program expects, goes into the tree and becomes the script.
const ENTER: &str = r#"set -eu
mount --bind "$1" "$2/work"
mount -t proc proc "$2/proc"
mount -t tmpfs -o mode=755 dev "$2/dev"
mount -t tmpfs -o mode=1777 tmp "$2/tmp"
mount -t tmpfs applets "$2/guest/bin"
mknod -m 666 "$2/dev/null" c 1 3
mknod -m 666 "$2/dev/urandom" c 1 9
mkdir -m 1777 "$2/dev/shm"
chroot "$2" /bin/busybox --install -s /guest/bin
for bin in "$2"/usr/lib/postgresql/*/bin; do [ ! -d "$bin" ] || PATH="${bin#"$2"}:$PATH"; done
PATH=$PATH:/guest/bin exec chroot "$2" /bin/busybox sh -c "$3"
"#;

/// A tree of programs. Nothing that runs in it can change it for others: its mounts are its own, and end with it.
#[derive(Debug, Clone)]
pub struct Toolbox {
    root: PathBuf,
}

/// What a tree needs besides what a guest has of it.
pub(super) fn furnish(root: &Path, busybox: &[u8]) -> Result<()> {
    let program = root.join("bin/busybox");
    let done = fs::write(&program, busybox)
        .and_then(|()| fs::set_permissions(&program, fs::Permissions::from_mode(0o755)))
        .and_then(|()| fs::create_dir_all(root.join("work")));
    done.map_err(LabError::io("furnish", root))
}

impl Toolbox {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// A command that runs a script of busybox's shell among the programs, with the folder `work` at /work. It sees the
    /// network that it is started in, and ends with its parent.
    pub fn command(&self, work: &Path, script: &str) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]);
        command.arg(work).arg(&self.root).arg(script);
        command.env_clear().env("PATH", HOST_PATH);
        command
    }
}

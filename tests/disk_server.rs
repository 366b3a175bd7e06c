//! The agent's NBD server before QEMU's own client, and before one that sends garbage.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virt_shadow::capture::guard::Guard;
use virt_shadow::disk::DiskCopy;
use virt_shadow::disk::server::{Server, State};
use vmsync::{BlockIndex, PageSet, RamBlock, RamLayout};

const LEN: u64 = 1 << 20;

struct Bed {
    dir: PathBuf,
    copy: Arc<DiskCopy>,
    server: Server,
}

impl Bed {
    fn new(name: &str, allowed: fn(i32) -> bool) -> Self {
        let dir = std::env::temp_dir().join(format!("virt-shadow-nbd-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let copy = Arc::new(DiskCopy::open(&dir.join("copy"), LEN).unwrap());
        copy.track();
        let own = std::env::current_exe().unwrap();
        let daemon = own.parent().and_then(Path::parent).unwrap().join("virtshadowd");
        let guard = Arc::new(Guard::start_program(Command::new(daemon)).unwrap());
        let uid = std::fs::metadata(&dir).unwrap().uid();
        let server = Server::start(&dir.join("nbd"), uid, allowed, "vda", Arc::clone(&copy), guard).unwrap();
        Self { dir, copy, server }
    }

    fn qemu_io(&self, commands: &[&str]) -> Output {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", "-d", "unmap"]);
        for text in commands {
            command.args(["-c", text]);
        }
        command.arg(format!("nbd+unix:///vda?socket={}", self.dir.join("nbd").display())).output().unwrap()
    }

    fn wait_ended(&self) -> String {
        let began = Instant::now();
        loop {
            if let State::Ended(reason) = self.server.state() {
                return reason;
            }
            assert!(began.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn what_qemu_writes_is_in_the_copy_and_known_as_written() {
    let bed = Bed::new("qemu", |_| true);
    let output = bed.qemu_io(&[
        "write -P 7 4k 8k",
        "write -P 9 70000 512",
        "write -P 1 512k 64k",
        "write -z 520k 8k",
        "flush",
        "discard 4k 4k",
        "read -P 0 4k 4k",
        "read -P 7 8k 4k",
        "read -P 9 70000 512",
        "read -P 0 520k 8k",
        "read -P 1 512k 8k",
    ]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !text.contains("fail"), "{output:?}");
    assert_eq!(bed.wait_ended(), "QEMU closed the connection");
    assert!(!bed.server.is_settled(), "no cut may take an ended mirror's copy for whole");
    let layout = RamLayout::new(vec![RamBlock { name: "disk:vda".into(), len_bytes: LEN }]).unwrap();
    let mut written = PageSet::new(&layout);
    bed.copy.take_written(BlockIndex::new(0), &mut written).unwrap();
    let ranges: Vec<_> = written.ranges().map(|(first, count)| (first.page.get(), count)).collect();
    assert_eq!(ranges, [(1, 2), (17, 1), (128, 16)]);
    let mut byte = [0; 2];
    bed.copy.read(70_511, &mut byte).unwrap();
    assert_eq!(byte, [9, 0]);
}

#[test]
fn only_the_guests_qemu_is_served() {
    let bed = Bed::new("stranger", |_| false);
    let output = bed.qemu_io(&["write -P 7 0 4k"]);
    assert!(!output.status.success());
    assert_eq!(bed.server.state(), State::Waiting, "the guest's QEMU may still come");
    let mut byte = [1];
    bed.copy.read(0, &mut byte).unwrap();
    assert_eq!(byte, [0]);
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let good = [&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 3], b"vda"].concat();
    for (name, sent) in [
        ("flags", vec![0xff; 64]),
        ("option", [&[0, 0, 0, 3][..], &[7; 64]].concat()),
        ("length", [&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff]].concat()),
        ("request", [&good[..], &[0x55; 28]].concat()),
        ("write", [&good[..], &[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1], &[0; 16], &[0xff; 4]].concat()),
    ] {
        let bed = Bed::new(name, |_| true);
        let mut stream = UnixStream::connect(bed.dir.join("nbd")).unwrap();
        let _ = stream.write_all(&sent);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(!bed.wait_ended().is_empty(), "{name}");
    }
}

//! Records a guest's epochs in the capture format of `vmsync`, for measuring codecs on the same bytes again and again.
//!
//! Off unless the configuration names a folder: the files hold the guest's memory in the clear, so they are readable by
//! their owner only. The first epoch of a file is all of the guest's memory that is not zero, read while it runs; so for
//! the first moments a page may be recorded as it was already. What is recorded has limits; a guest is never held up for
//! it: when the disk does not follow, the file ends.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use vmsync::batch::PageBatch;
use vmsync::codec::capture::CaptureWriter;
use vmsync::codec::is_zero;

use crate::capture::memory::GuestMemory;

/// Epochs and bytes of one file; then it ends.
const EPOCHS_MAX: u64 = 2_000;
const BYTES_MAX: u64 = 8 << 30;
/// Epochs that wait to be written.
const QUEUED_MAX: usize = 64;

struct Epoch {
    number: u64,
    at: Duration,
    pages: PageBatch,
    device_state: Vec<u8>,
}

/// One file under way.
pub(super) struct Recorder {
    guest: String,
    /// None once the file has ended.
    queue: Option<SyncSender<Epoch>>,
    epochs: u64,
    bytes: u64,
}

impl Recorder {
    /// Begins a file of its own; None, with a warning, if that fails.
    pub(super) fn start(dir: &Path, guest: &str, interval_ms: u128, memory: &GuestMemory) -> Option<Self> {
        let (queue, received) = sync_channel(QUEUED_MAX);
        let begun = create(dir, guest, interval_ms).and_then(|(path, file)| {
            let (name, memory) = (guest.to_owned(), memory.clone());
            tracing::warn!(guest, path = %path.display(), "recording the guest's memory in the clear");
            std::thread::Builder::new().name("recorder".into()).spawn(move || {
                match write(BufWriter::new(file), &memory, &received) {
                    Ok(epochs) => tracing::info!(guest = name, path = %path.display(), epochs, "recorded"),
                    Err(error) => tracing::warn!(guest = name, path = %path.display(), %error, "recording ended"),
                }
            })
        });
        match begun {
            Ok(_) => Some(Self { guest: guest.into(), queue: Some(queue), epochs: 0, bytes: 0 }),
            Err(error) => {
                tracing::warn!(guest, dir = %dir.display(), %error, "cannot record epochs");
                None
            }
        }
    }

    /// Adds an epoch: what a cut brought.
    pub(super) fn cut(&mut self, number: u64, at: Duration, pages: &PageBatch, device_state: &[u8]) {
        let Some(queue) = &self.queue else { return };
        self.epochs += 1;
        self.bytes += (pages.bytes().len() + device_state.len()) as u64;
        let epoch = Epoch { number, at, pages: pages.clone(), device_state: device_state.to_vec() };
        let full = self.epochs > EPOCHS_MAX || self.bytes > BYTES_MAX;
        if full || queue.try_send(epoch).is_err() {
            let why = if full { "it is as long as it may be" } else { "the disk does not follow" };
            tracing::info!(guest = self.guest, why, "the recording ends");
            self.queue = None;
        }
    }
}

/// A new file for its owner only, in a folder that is made for its owner only.
fn create(dir: &Path, guest: &str, interval_ms: u128) -> io::Result<(PathBuf, File)> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let safe = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let guest: String = guest.chars().map(safe).collect();
    // Numbered, so that nothing recorded before is lost.
    for number in 1..=9_999 {
        let path = dir.join(format!("{guest}-{interval_ms}ms-{number}.capture"));
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            opened => return Ok((path, opened?)),
        }
    }
    Err(io::Error::other("the folder is full of this guest's recordings"))
}

/// Writes the guest's memory, then what is received until the sender is gone; the number of epochs.
fn write(out: impl Write, memory: &GuestMemory, received: &Receiver<Epoch>) -> io::Result<u64> {
    let mut writer = CaptureWriter::new(out, memory.layout())?;
    let mut populated = PageBatch::new();
    let read = memory.for_each_page(|addr, page| {
        if !is_zero(page) {
            populated.push(addr, page);
        }
    });
    read.map_err(io::Error::other)?;
    writer.epoch(0, 0, &populated, &[])?;
    drop(populated);
    let mut epochs = 0;
    for Epoch { number, at, pages, device_state } in received {
        writer.epoch(number, at.as_micros() as u64, &pages, &device_state)?;
        epochs += 1;
    }
    writer.finish()?;
    Ok(epochs)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_their_owners_and_never_replaced() {
        let dir = std::env::temp_dir().join(format!("virt-shadow-recorder-{}", std::process::id()));
        let (first, _) = create(&dir, "a b/../c", 50).unwrap();
        let (second, file) = create(&dir, "a b/../c", 50).unwrap();
        assert_eq!(first, dir.join("a_b_.._c-50ms-1.capture"));
        assert_eq!(second, dir.join("a_b_.._c-50ms-2.capture"));
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(dir.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_guest_is_not_held_up_by_a_disk_that_does_not_follow() {
        let (queue, received) = sync_channel(QUEUED_MAX);
        let mut recorder = Recorder { guest: "g".into(), queue: Some(queue), epochs: 0, bytes: 0 };
        for epoch in 0..QUEUED_MAX as u64 {
            recorder.cut(epoch, Duration::ZERO, &PageBatch::new(), b"state");
        }
        assert!(recorder.queue.is_some());
        recorder.cut(99, Duration::ZERO, &PageBatch::new(), b"state");
        assert!(recorder.queue.is_none());
        // What was queued before is all that is recorded: no gap.
        assert_eq!(received.iter().map(|epoch| epoch.number).collect::<Vec<_>>(), (0..64).collect::<Vec<_>>());
    }
}

//! Recorded epochs, in memory.

use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::Path;

use vmsync::codec::capture::{CaptureError, CaptureReader, CapturedEpoch};
use vmsync::{PAGE_SIZE, PageBatch, RamLayout};

use crate::lab::error::{LabError, Result};

/// Bytes of pages that are coded; a longer recording is cut off there.
const BYTES_MAX: usize = 384 << 20;

/// The first epoch fills what remembers, and is not counted.
pub(super) struct Recording {
    pub(super) layout: RamLayout,
    pub(super) epochs: Vec<CapturedEpoch>,
}

impl Recording {
    pub(super) fn load(path: &Path) -> Result<Self> {
        let corrupt = |error: CaptureError| LabError::Corrupt { path: path.into(), reason: error.to_string() };
        let file = File::open(path).map_err(LabError::io("open", path))?;
        let mut reader = CaptureReader::new(BufReader::new(file)).map_err(corrupt)?;
        let (mut epochs, mut bytes) = (Vec::new(), 0);
        while bytes < BYTES_MAX {
            match reader.next_epoch() {
                Ok(Some(epoch)) => {
                    bytes += if epochs.is_empty() { 0 } else { epoch.pages.bytes().len() };
                    epochs.push(epoch);
                }
                Ok(None) => break,
                // The agent was ended while it wrote.
                Err(CaptureError::Io(error)) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(corrupt(error)),
            }
        }
        if bytes == 0 {
            let reason = "a recording needs at least two epochs, and pages in them".into();
            return Err(LabError::Corrupt { path: path.into(), reason });
        }
        Ok(Self { layout: reader.layout().clone(), epochs })
    }

    /// Epochs that count.
    pub(super) fn counted(&self) -> usize {
        self.epochs.len() - 1
    }

    pub(super) fn pages_an_epoch(&self) -> usize {
        self.epochs[1..].iter().map(|epoch| epoch.pages.len()).sum::<usize>() / self.counted()
    }

    /// Zeroed memory of the guest's size, of which only what is written takes any.
    pub(super) fn memory(&self) -> Vec<u8> {
        vec![0; self.layout.total_pages() as usize * PAGE_SIZE]
    }
}

/// The epoch's pages as a cut leaves them: just copied, into the same buffer each time.
pub(super) fn staged(epoch: &CapturedEpoch, buffer: &mut Vec<u8>) -> PageBatch {
    buffer.clear();
    buffer.extend_from_slice(epoch.pages.bytes());
    PageBatch::from_parts(epoch.pages.addrs().to_vec(), std::mem::take(buffer)).expect("as many bytes as it had")
}

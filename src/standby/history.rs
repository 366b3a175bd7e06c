//! Undo records of a shadow, one file each: what the image is led back to former epochs with. What the bytes mean is
//! `vmsync`'s business.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vmsync::history::{FoundUndo, Undo, UndoError, UndoRecord};
use vmsync::layout::RamLayout;
use vmsync::units::{GuestUuid, Page, PageAddr};

use super::image::{Image, ImageError};
use super::journal::is_on_tmpfs;

const WRITE_BUFFER_BYTES: usize = 256 << 10;

#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("more changed than {0} bytes of undo records can hold; keep more, or nothing")]
    TooLong(u64),
}

type Result<T> = std::result::Result<T, HistoryError>;

/// A folder of undo records, named by their numbers.
#[derive(Debug)]
pub struct UndoFiles {
    dir: PathBuf,
    seqs: BTreeSet<u64>,
    durable: bool,
}

impl UndoFiles {
    /// Looks at what a former agent left. The folder is made when there is something to keep.
    pub fn open(dir: &Path) -> Self {
        let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let seqs = names.filter_map(|name| name.to_str()?.parse().ok()).collect();
        Self { dir: dir.to_owned(), seqs, durable: !is_on_tmpfs(dir) }
    }

    /// All records with what they are about; those that are not whole have no head.
    pub fn found(&self, guest: GuestUuid, layout: &RamLayout) -> Vec<FoundUndo> {
        let found = self.seqs.iter().map(|seq| {
            let bytes = self.read(*seq).unwrap_or_default();
            let head = UndoRecord::read(&bytes, guest, layout).ok().map(|record| record.head);
            // A record that was renamed is not the one that its name says.
            FoundUndo { seq: *seq, bytes: bytes.len() as u64, head: head.filter(|head| head.seq == *seq) }
        });
        found.collect()
    }

    /// Makes a record of the image as it is. If that fails something of it may be left; see [`Self::clear`].
    pub fn make(&mut self, undo: &Undo, image: &Image) -> Result<u64> {
        let seq = undo.head.seq;
        let path = self.path(seq);
        let failed = |action| {
            let path = path.clone();
            move |source| HistoryError::Io { action, path, source }
        };
        if self.seqs.is_empty() {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(failed("make the folder of"))?;
        }
        self.seqs.insert(seq);
        // Guests' memory is in it: nobody else may read it.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        let mut out = BufWriter::with_capacity(WRITE_BUFFER_BYTES, file.map_err(failed("make"))?);
        let made = undo.make(
            |addr: PageAddr, page: &mut Page| Ok(image.read_page(addr, page)?),
            |bytes| out.write_all(bytes).map_err(failed("write")),
        );
        let len = made.map_err(|error| match error {
            UndoError::Driver(error) => error,
            UndoError::TooLong(limit) => HistoryError::TooLong(limit),
        })?;
        let file = out.into_inner().map_err(|error| failed("write")(error.into_error()))?;
        if self.durable {
            let synced = file.sync_all().and_then(|()| File::open(&self.dir)?.sync_all());
            synced.map_err(failed("sync"))?;
        }
        Ok(len)
    }

    pub fn read(&self, seq: u64) -> Result<Vec<u8>> {
        let path = self.path(seq);
        fs::read(&path).map_err(|source| HistoryError::Io { action: "read", path, source })
    }

    /// Removes records with these numbers, oldest first. Those that are all there were do not come back after a power cut:
    /// what is applied without a record from here on must not be met by them.
    pub fn remove(&mut self, first: u64, last: u64) -> Result<()> {
        while let Some(seq) = self.seqs.range(first..=last).next().copied() {
            let path = self.path(seq);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(HistoryError::Io { action: "remove", path, source });
                }
                _ => self.seqs.remove(&seq),
            };
            if self.seqs.is_empty() && self.durable {
                let synced = File::open(&self.dir).and_then(|dir| dir.sync_all());
                synced.map_err(|source| HistoryError::Io { action: "sync", path: self.dir.clone(), source })?;
            }
        }
        Ok(())
    }

    pub fn clear(&mut self) -> Result<()> {
        self.remove(0, u64::MAX)
    }

    fn path(&self, seq: u64) -> PathBuf {
        self.dir.join(format!("{seq:020}"))
    }
}

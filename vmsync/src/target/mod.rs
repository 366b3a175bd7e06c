//! The shadow's side: one guest's image, fed by one source at a time.
//!
//! ```text
//!         Hello            PrepareDone                Pages, DeviceState, Commit
//!  Idle ---------> Preparing ---------> Open <-------------------------------------+
//!    ^                                   |  \-- image has a commit: staged in the journal, sealed, applied
//!    +---- Disconnected, refused --------+  \-- it has none yet: applied as it comes; the Commit makes it whole
//!
//!  Promote (only with a commit): Promoted, for good. It refuses every source from then on.
//!  Promote back to an older epoch: its undo records are read, and then applied (see `back`).
//! ```
//! The image is touched in two ways only. With a commit: whole sealed epochs, replayable from the journal, so that
//! the last committed epoch can be promoted at any moment and after any crash. Without one: as pages come, after the
//! state record says durably that there is no commit. When staging would exceed its limit, the commit is given up
//! on purpose, and the source is told.

mod back;
mod commit;
mod promote;
mod resume;
mod session;

use std::sync::Arc;

use back::GoingBack;
pub use back::NotKept;
pub use resume::{Left, Resumed};

use crate::codec::{FrameDecoder, KnownPages, PagesFrame};
use crate::device_state::DeviceState;
use crate::hashes::HashSeed;
use crate::history::{History, Keep, Stamp, Undo};
use crate::inbound::Kept as KeptFrames;
use crate::journal::{Commit, JOURNAL_HEADER_BYTES, RecordEncoder};
use crate::layout::RamLayout;
use crate::message::{Hello, RefuseCode, SourceMessage};
use crate::state_record::{ImageRecord, StateRecord};
use crate::units::{Epoch, GuestUuid, Millis, PageAddr, Term};
use crate::wire::WireError;
use session::Session;

/// What a target is made from.
#[derive(Debug, Clone)]
pub struct TargetConfig {
    pub guest: GuestUuid,
    /// This host's name, for messages.
    pub host: String,
    /// Highest term known so far; sources with a lower one are refused.
    pub term: Term,
    /// Most memory for pages of epochs that are not applied yet. The journal stays below twice as many bytes (and
    /// a device state or two).
    pub staging_limit_bytes: u64,
    /// How many former epochs are kept.
    pub keep: Keep,
}

/// One connection, numbered by the driver; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// Names a hashing run, so that an answer that comes late is known as such.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HashId(u64);

/// What the driver tells a target.
#[derive(Debug, Clone)]
pub enum TargetEvent {
    /// A message on any connection for this guest; the first one must be Hello.
    Received { conn: ConnId, message: SourceMessage },
    /// The decoder failed: what comes on this connection cannot be read.
    Unreadable { conn: ConnId, error: WireError },
    /// The connection is gone. Not needed after an effect [`TargetEffect::Close`], and harmless there.
    Disconnected { conn: ConnId },
    /// Answer to [`TargetEffect::Prepare`]: what the image holds, or why there is none and what to do.
    PrepareDone { result: Result<PreparedImage, String> },
    /// The image is about to be destroyed, or was found destroyed (its domain is gone). The effects of this event
    /// must be done before it is destroyed.
    ImageLost,
    /// Part of the answer to [`TargetEffect::Hash`]: hashes of neighbouring pages from `start` on.
    Hashed { id: HashId, start: PageAddr, hashes: Vec<u64> },
    /// The answer to [`TargetEffect::Hash`] is complete.
    HashingDone { id: HashId },
    /// The guest's primaryship has this term now, says the manager: a source of a lower one is cut off at once.
    TermKnown { term: Term },
    /// Become primary with `term` (higher than any known), from the newest commit, unless it is older than
    /// `after_epoch`. Answered by [`TargetEffect::Promote`] or [`TargetEffect::PromoteRefused`].
    /// With `back_to`: from that epoch, which is kept.
    Promote { term: Term, after_epoch: Epoch, back_to: Option<Epoch> },
    /// Answer to [`TargetEffect::Keep`]: the record's length; or none, and then all records are gone.
    Kept { seq: u64, bytes: Option<u64> },
    /// Answer to [`TargetEffect::ReadBack`].
    BackRead { result: Result<DeviceState, String> },
    /// From now on so many former epochs are kept.
    KeepChanged { keep: Keep },
}

/// What [`TargetEffect::Prepare`] led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreparedImage {
    /// A new image, all zero.
    Fresh,
    /// The image that was there, untouched.
    Kept,
}

/// What the driver is to do, strictly in this order: each effect done, and those named durable on stable storage,
/// before the next one begins.
#[derive(Debug, Clone)]
pub enum TargetEffect {
    /// Make the waiting domain for this Hello, with an image of its layout; answer with
    /// [`TargetEvent::PrepareDone`]. Events may come meanwhile; no second Prepare comes before the answer.
    /// `keep`: there is an image of this layout worth keeping; otherwise make a fresh one. A driver that cannot
    /// keep it (the definition changed) steps [`TargetEvent::ImageLost`] first.
    Prepare {
        hello: Box<Hello>,
        keep: bool,
    },
    /// Replace the state record by these bytes, atomically and durably (write aside, sync, rename).
    SaveState(Vec<u8>),
    /// Append to the journal. `durable`: sync it, with all that was appended before.
    AppendJournal {
        bytes: Vec<u8>,
        durable: bool,
    },
    /// Cut the journal to this length.
    TruncateJournal {
        len_bytes: u64,
    },
    /// Write these pages into the image. If the image can outlive a host's crash, it must be synced before the
    /// next SaveState.
    Apply(Arc<PagesFrame>),
    /// Make this undo record of the image as it is, with [`Undo::make`], durably, under the number it has; and answer
    /// with [`TargetEvent::Kept`]. If it cannot be made, remove all records there are before anything else is done.
    Keep(Box<Undo>),
    /// Remove undo records with these numbers; some of them may not be there. Durably, if no others are left.
    DropKept {
        first: u64,
        last: u64,
    },
    /// Read and check these undo records, the newest first, with [`read_back`](crate::history::read_back). Answer with
    /// [`TargetEvent::BackRead`].
    ReadBack {
        seqs: Vec<u64>,
        state: DeviceState,
    },
    /// Apply the frames of that undo record to the image, in order.
    StepBack {
        seq: u64,
    },
    /// Hash all pages of the image with [`hash_page`](crate::hashes::hash_page) and answer, block by block and in
    /// order, with [`TargetEvent::Hashed`] (not faster than the connection takes them), at last
    /// [`TargetEvent::HashingDone`]. Beside the loop: other events and effects go on meanwhile. No Apply comes
    /// before the end, unless after a StopHash.
    Hash {
        id: HashId,
        seed: HashSeed,
    },
    /// Stop that hashing; nobody waits for its answers any more.
    StopHash {
        id: HashId,
    },
    Send {
        conn: ConnId,
        bytes: Arc<[u8]>,
    },
    /// Close the connection once what was sent before has left, or after a second.
    Close {
        conn: ConnId,
        reason: TargetCloseReason,
    },
    /// For status: this is the newest epoch that can be promoted.
    Committed(Commit),
    /// For status: there is no epoch that could be promoted any more.
    CommitLost,
    /// Start the guest from the image and this device state. All pages are applied. The term is saved.
    Promote(Promotion),
    PromoteRefused(PromoteRefusal),
}

/// From what a shadow was promoted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promotion {
    /// The new primary's term.
    pub term: Term,
    pub commit: Commit,
    /// The newest epoch that this shadow had; another one if it went back. Numbers go on behind it.
    pub newest: Epoch,
    pub device_state: DeviceState,
}

/// Epochs of a guest that went back are numbered from the next multiple of this on, so that none of the epochs that
/// other shadows still have is taken for one of them.
const EPOCHS_APART: u64 = 1_000_000;

impl Promotion {
    /// The new primary's epochs are numbered above this.
    pub fn numbers_after(&self) -> Epoch {
        if self.newest == self.commit.epoch {
            return self.newest;
        }
        let parts = self.newest.get() / EPOCHS_APART + 1;
        Epoch::new(parts.saturating_mul(EPOCHS_APART))
    }
}

/// Why a target closes a connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetCloseReason {
    #[error("{0}")]
    Unreadable(WireError),
    #[error("refused: {0}")]
    Refused(String),
    #[error("the source broke the protocol: {0}")]
    Protocol(String),
    #[error("a newer connection replaces this one")]
    Replaced,
    #[error("this shadow was promoted with term {0}")]
    Promoted(Term),
    #[error("the shadow's image is gone")]
    ImageLost,
}

/// What a source sent is not what it may send now; the session ends.
#[derive(Debug)]
struct Breach {
    code: RefuseCode,
    text: String,
}

impl Breach {
    fn out_of_step(error: &dyn std::fmt::Display) -> Self {
        Self { code: RefuseCode::OutOfStep, text: error.to_string() }
    }
}

impl From<String> for Breach {
    fn from(text: String) -> Self {
        Self { code: RefuseCode::Protocol, text }
    }
}

impl From<&str> for Breach {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

/// Why a shadow is not promoted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromoteRefusal {
    #[error("this shadow was promoted already, with term {0}")]
    AlreadyPromoted(Term),
    #[error("term {asked} is not higher than {known}, which this shadow knows")]
    Term { asked: Term, known: Term },
    #[error("this shadow has no committed epoch")]
    NoCommit,
    #[error("this shadow's newest epoch is {committed}; at least {wanted} is wanted")]
    TooOld { committed: Epoch, wanted: Epoch },
    #[error("this shadow does not keep epoch {asked}; it has {kept}")]
    NotKept { asked: Epoch, kept: String },
    #[error("this shadow cannot go back to epoch {asked}: {reason}")]
    CannotGoBack { asked: Epoch, reason: String },
}

/// What a target shows of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetView {
    pub term: Term,
    /// The newest epoch that can be promoted.
    pub commit: Option<Commit>,
    pub promoted: bool,
    /// Host name of the source that is connected.
    pub source_host: Option<String>,
    /// When a source was last heard.
    pub heard_at: Option<Millis>,
    /// Memory held for epochs that are not applied.
    pub staged_bytes: u64,
}

/// The state machine; see the module's description.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    /// Highest term known.
    term: Term,
    promotion: Option<Promotion>,
    image: Option<Image>,
    session: Option<Session>,
    /// The Hello that a Prepare is under way for.
    preparing: Option<Box<Hello>>,
    history: History,
    going_back: Option<GoingBack>,
    /// Of the event at hand.
    now: Millis,
    journal: Journal,
    decoder: FrameDecoder,
    next_hash: u64,
    /// Frames that the guest may not have had by the newest commit.
    inbound: KeptFrames,
    heard_at: Option<Millis>,
}

/// The shadow's memory.
#[derive(Debug, Clone)]
struct Image {
    layout: RamLayout,
    /// True until something is applied to a fresh image.
    zero: bool,
    committed: Option<(Commit, DeviceState)>,
    /// The epoch that is in place: sealed ones may wait to be applied.
    applied: Option<Applied>,
    /// Contents of its pages once all that came is applied: what changes must be made against.
    known: KnownPages,
}

#[derive(Debug, Clone)]
struct Applied {
    stamp: Stamp,
    device_state: DeviceState,
}

/// Lengths of the journal's file, as this side made it.
#[derive(Debug, Default)]
struct Journal {
    len_bytes: u64,
    /// Up to here epochs are sealed.
    sealed_len_bytes: u64,
    records: RecordEncoder,
}

impl Target {
    /// A target for a guest that this host has no image of.
    pub fn new(config: TargetConfig) -> Self {
        Self {
            term: config.term,
            promotion: None,
            image: None,
            session: None,
            preparing: None,
            history: History::new(config.keep),
            going_back: None,
            now: Millis::default(),
            journal: Journal::default(),
            decoder: FrameDecoder::new(),
            next_hash: 0,
            inbound: KeptFrames::default(),
            heard_at: None,
            config,
        }
    }

    /// Takes one event and appends what is to be done.
    pub fn step(&mut self, now: Millis, event: TargetEvent, effects: &mut Vec<TargetEffect>) {
        self.now = now;
        match event {
            TargetEvent::Received { conn, message } => self.received(now, conn, message, effects),
            TargetEvent::Unreadable { conn, error } => self.unreadable(conn, error, effects),
            TargetEvent::Disconnected { conn } => {
                if self.session.as_ref().is_some_and(|s| s.conn == conn) {
                    self.end_session(effects);
                }
            }
            TargetEvent::PrepareDone { result } => self.prepare_done(result, effects),
            TargetEvent::ImageLost => self.image_lost(effects),
            TargetEvent::Hashed { id, start, hashes } => self.hashed(id, start, &hashes, effects),
            TargetEvent::HashingDone { id } => self.hashing_done(id, effects),
            TargetEvent::TermKnown { term } => self.term_known(term, effects),
            TargetEvent::Promote { term, after_epoch, back_to } => self.promote(term, after_epoch, back_to, effects),
            TargetEvent::Kept { seq, bytes } => {
                self.history.made(seq, bytes);
                self.trim_history(effects);
            }
            TargetEvent::BackRead { result } => self.back_read(result, effects),
            TargetEvent::KeepChanged { keep } => self.keep_changed(keep, effects),
        }
    }

    /// The newest epoch that can be promoted.
    pub fn committed(&self) -> Option<Commit> {
        self.image.as_ref().and_then(|image| image.committed.as_ref()).map(|(commit, _)| *commit)
    }

    /// Frames for the guest, in their order, that it may not have had at the newest commit: for whoever carries out
    /// [`TargetEffect::Promote`]. None after going back.
    pub fn take_inbound(&mut self) -> Vec<Vec<u8>> {
        self.inbound.take()
    }

    /// Set once the shadow was promoted, also after a restart.
    pub fn promotion(&self) -> Option<&Promotion> {
        self.promotion.as_ref()
    }

    pub fn view(&self) -> TargetView {
        TargetView {
            term: self.term,
            commit: self.committed(),
            promoted: self.promotion.is_some(),
            source_host: self.session.as_ref().map(|s| s.hello.source_host.clone()),
            heard_at: self.heard_at,
            staged_bytes: self.session.as_ref().map_or(0, |s| s.staged.bytes + s.sealed_bytes()),
        }
    }

    fn save_state(&self, effects: &mut Vec<TargetEffect>) {
        let image = self
            .image
            .as_ref()
            .map(|image| ImageRecord { layout: image.layout.clone(), committed: image.committed.clone() });
        let record =
            StateRecord { guest: self.config.guest, term: self.term, promoted: self.promotion.is_some(), image };
        effects.push(TargetEffect::SaveState(record.encode()));
    }

    fn append_journal(&mut self, bytes: Vec<u8>, durable: bool, effects: &mut Vec<TargetEffect>) {
        self.journal.len_bytes += bytes.len() as u64;
        if durable {
            self.journal.sealed_len_bytes = self.journal.len_bytes;
        }
        effects.push(TargetEffect::AppendJournal { bytes, durable });
    }

    fn truncate_journal(&mut self, len_bytes: u64, effects: &mut Vec<TargetEffect>) {
        if self.journal.len_bytes > len_bytes {
            effects.push(TargetEffect::TruncateJournal { len_bytes });
            self.journal.len_bytes = len_bytes;
            self.journal.sealed_len_bytes = self.journal.sealed_len_bytes.min(len_bytes);
        }
    }

    /// Empties the journal down to its header, which is right for the image.
    fn clear_journal(&mut self, effects: &mut Vec<TargetEffect>) {
        self.truncate_journal(JOURNAL_HEADER_BYTES, effects);
    }
}

//! The primary's side: one guest, any number of shadows.
//!
//! ```text
//!                 Connected            Welcome                    cut holds all it lacks
//!  Disconnected ------------> Handshaking ----> [Hashing] ----> CatchUp ----------------> Streaming
//!       ^                                                          ^                          |
//!       |                                                          +--------------------------+
//!       +-------- Disconnected, refused or silent, from anywhere      too far behind, or a cut
//!                                                                     without contents
//! ```
//! For each peer the source keeps `pending`: the pages whose contents there may differ from the guest's. In
//! *CatchUp* they are read while the guest runs and sent, batch by batch; every cut adds what was dirtied. When few
//! enough are left, the next cut is asked to hold them as extras ([`CutPlan::Cut`]); with it the peer has all of
//! that epoch and joins. In *Streaming* it gets each epoch's pages, encoded once for all peers. A peer that does not
//! keep up falls back to *CatchUp*, where its epochs coalesce; nobody waits for it.
//!
//! # What changes are made against
//! There is one mirror of previous contents, for all peers. Of each peer the source knows where it is *apart*: the
//! pages of the mirror whose contents at the peer, once all that was sent has arrived, may be others.
//! - A cut that is sent makes its contents the mirror's. Who gets it is no longer apart on its pages; who does not is,
//!   on all that changed.
//! - A page that was read live and sent is compared with the mirror: equal, or apart.
//! - What was lost with a connection is apart. Of an image that is not known everything is.
//! - A collection changes nothing here: peers still hold what they held, and so does the mirror.
//!
//! A streaming peer is apart on nothing, so changes encoded once are good for all of them. A peer that joins gets
//! whole pages of its own, unless it is not apart on any page of that cut: then it takes what the others get. When
//! nobody streams, the mirror forgets what those who join are apart on. On pages of which the cut holds nothing the
//! mirror forgets what a joining peer is apart on: the next time they go whole to everybody.

mod catch_up;
mod cut;
mod peer;
mod session;
mod verify;
mod view;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use verify::{NotCompared, PeerVerdict, VerifyReport};
pub use view::{PeerState, PeerView, SourceTotals};

use crate::batch::PageBatch;
use crate::codec::{Advise, CodecStats, Effort, Encoder, MirrorBudget, Pace};
use crate::device_state::DeviceState;
use crate::device_state::MAX_DEVICE_STATE_BYTES;
use crate::hashes::HashSeed;
use crate::layout::RamLayout;
use crate::message::{MAX_DESCRIPTION_BYTES, RefuseCode, TargetMessage};
use crate::page_set::PageSet;
use crate::units::{Epoch, GuestUuid, Lineage, Millis, PageAddr, PeerId, Term};
use crate::wire::WireError;
use peer::Peer;
use verify::Verify;

/// What a source is made from.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    pub term: Term,
    /// A random number, new for each source.
    pub lineage: Lineage,
    pub guest: GuestUuid,
    /// Domain name.
    pub domain: String,
    /// This host's name.
    pub host: String,
    pub layout: RamLayout,
    /// Handed to the target's driver as it is; at most [`MAX_DESCRIPTION_BYTES`].
    pub description: Vec<u8>,
    /// Level of whole pages while neither CPU nor link is scarce; 0: no compression at all. See
    /// [`codec::effort`](crate::codec::effort).
    pub zstd_level: i32,
    /// Memory for previous contents of pages.
    pub mirror: MirrorBudget,
    pub limits: SourceLimits,
}

/// The bounds of a source. The defaults suit 20 epochs a second on a 1 Gbit/s link or better.
#[derive(Debug, Clone)]
pub struct SourceLimits {
    /// Epochs sent to a peer and not acknowledged yet; at the limit the peer's epochs coalesce.
    pub in_flight_epochs: usize,
    /// Bytes handed to the driver for a peer and not written yet. One cut may exceed it once.
    pub unsent_bytes: u64,
    /// Pages in one live read of a peer that catches up.
    pub live_batch_pages: usize,
    /// A peer joins when it lacks no more pages than this; doubles with each pass that did not get there ...
    pub join_pages: u64,
    /// ... up to this. Also the most pages a cut is asked for as extras.
    pub join_pages_max: u64,
    /// After this many plans without a cut, the next cut only collects what is dirty: too much may have piled up
    /// to be copied within a pause.
    pub skipped_plans: u32,
    /// Silence of a peer before it is pinged.
    pub ping_after: Millis,
    /// Silence of a peer, or no acknowledgement of an epoch, before its connection is given up.
    pub silence: Millis,
    /// How long a target may take to make its domain before it says Welcome.
    pub welcome: Millis,
    /// Pages in one read of a verification.
    pub verify_batch_pages: usize,
    /// How long a verification may take.
    pub verify: Millis,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self {
            in_flight_epochs: 4,
            unsent_bytes: 32 << 20,
            live_batch_pages: 256,
            join_pages: 1024,
            join_pages_max: 16_384,
            skipped_plans: 2,
            ping_after: Millis::new(1_000),
            silence: Millis::new(10_000),
            welcome: Millis::new(60_000),
            verify_batch_pages: 1024,
            verify: Millis::new(60_000),
        }
    }
}

/// Names a live read, so that an answer that comes late is known as such.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReadId(u64);

/// One complete cut: everything was taken while the guest stood still.
#[derive(Debug, Clone)]
pub struct Cut {
    /// Greater than that of every cut before.
    pub epoch: Epoch,
    /// When the guest was stopped.
    pub at: Millis,
    /// Pages written since the tracker was last read and cleared (by a cut or a collection).
    pub dirty: PageSet,
    /// Contents of all pages in `dirty`.
    pub pages: PageBatch,
    /// Contents of the extra pages that the plan asked for. Pages that are in `pages` need not be here too.
    pub extras: PageBatch,
    pub device_state: Arc<[u8]>,
    /// Whether the guest ran before the cut (and after it).
    pub running: bool,
}

/// What the driver tells a source.
#[derive(Debug, Clone)]
pub enum SourceEvent {
    /// Keep a shadow on that host.
    PeerAdded {
        peer: PeerId,
    },
    /// Keep no shadow on that host any more.
    PeerRemoved {
        peer: PeerId,
    },
    /// A connection to the peer's host is open; the source speaks first.
    Connected {
        peer: PeerId,
    },
    Received {
        peer: PeerId,
        message: TargetMessage,
    },
    /// The decoder failed: what the peer sends cannot be read.
    Unreadable {
        peer: PeerId,
        error: WireError,
    },
    /// The connection is gone. Not needed after an effect [`SourceEffect::Close`], and harmless there.
    Disconnected {
        peer: PeerId,
    },
    /// So many bytes of what was to be sent are with the kernel now.
    Written {
        peer: PeerId,
        bytes: u64,
    },
    /// A cut was made, with contents.
    Cut(Cut),
    /// The tracker was read and cleared at `at` while the guest stood still, but these pages' contents were not
    /// taken: the plan was [`CutPlan::Collect`], or a cut failed half-way, or there were too many.
    Collected {
        at: Millis,
        dirty: PageSet,
    },
    /// Answer to [`SourceEffect::ReadLive`]. Pages that could not be read may be left out: they are asked again.
    LiveRead {
        peer: PeerId,
        read: ReadId,
        pages: PageBatch,
    },
    /// The step of the last [`Cut`](Self::Cut) took so long; cuts are so far apart. May be left out: compression then
    /// stays as it is.
    Paced {
        coding_us: u64,
        interval_us: u64,
    },
    /// Compare all memory with all shadows. While a verification runs another one is not started: whoever asks
    /// then gets the result of the running one.
    VerifyStart,
    /// Answer to [`SourceEffect::ReadVerify`].
    VerifyRead {
        read: ReadId,
        pages: PageBatch,
    },
    /// Frames are on their way to the guest, in this order: for shadows that follow, until a cut covers them. Longer ones
    /// than [`MAX_FRAME_BYTES`](crate::inbound::MAX_FRAME_BYTES) are left out, and those beyond a bound.
    Inbound {
        frames: Vec<Vec<u8>>,
    },
    /// Time passed; at least every 100 ms.
    Tick,
}

/// What the driver is to do, in this order.
#[derive(Debug, Clone)]
pub enum SourceEffect {
    /// Queue these bytes for the peer; tell with [`SourceEvent::Written`].
    Send { peer: PeerId, bytes: Arc<[u8]> },
    /// Read these pages now, while the guest runs, and answer with [`SourceEvent::LiveRead`].
    ReadLive { peer: PeerId, read: ReadId, pages: Vec<PageAddr> },
    /// Close the peer's connection and drop what is queued for it. Connect again after a while.
    Close { peer: PeerId, reason: CloseReason },
    /// That epoch is committed at the peer.
    Committed { peer: PeerId, epoch: Epoch },
    /// The peer had to give up its last commit and receives a new first copy.
    CommitLost { peer: PeerId },
    /// The peer knows a higher term: this host's guest is no longer the primary and must be stopped.
    Superseded { peer: PeerId, newer_term: Term },
    /// The peer's host refuses; `text` says why and what to do. Its connection is closed by a following `Close`.
    PeerRefused { peer: PeerId, code: RefuseCode, text: String },
    /// Read these pages now, while the guest runs, and answer with [`SourceEvent::VerifyRead`].
    ReadVerify { read: ReadId, pages: Vec<PageAddr> },
    /// The verification ended.
    Verified(VerifyReport),
}

/// Why a source closes a connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    #[error("the shadow is no longer wanted")]
    Removed,
    #[error("the shadow's host refused: {0}")]
    Refused(String),
    #[error("{0}")]
    Unreadable(WireError),
    #[error("the shadow's host broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the shadow's host has been silent for {0}")]
    Silent(Millis),
    #[error("the shadow's host did not answer the greeting within {0}")]
    NoWelcome(Millis),
}

/// What the driver is to do when the next cut is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CutPlan {
    /// Nothing: do not stop the guest. The tracker goes on accumulating.
    Skip,
    /// Stop the guest, read and clear the tracker, let it run: [`SourceEvent::Collected`]. No contents, no device
    /// state.
    Collect,
    /// A whole cut, with the contents of these pages besides the dirty ones.
    Cut { extras: PageSet },
}

/// The driver broke its part of the contract, or a limit nobody can work with was met. The source is of no more
/// use: close its connections and make a new one, with a new lineage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceAlarm {
    #[error("a cut or collection brought pages of another RAM layout: blocks were plugged or unplugged")]
    OtherLayout,
    #[error("a cut brought {0}, which the guest's RAM layout does not have")]
    OutsideLayout(PageAddr),
    #[error("a cut has epoch {found}, but epoch {last} was cut before")]
    EpochOrder { last: Epoch, found: Epoch },
    #[error("device state of {0} bytes; at most {MAX_DEVICE_STATE_BYTES} can be sent")]
    DeviceState(usize),
}

/// A source cannot be made from this configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceConfigError {
    #[error("description of {0} bytes; at most {MAX_DESCRIPTION_BYTES} are allowed")]
    Description(usize),
    #[error("limit {0} must not be 0")]
    ZeroLimit(&'static str),
    #[error("zstd level {0} is not within -7 to 19")]
    ZstdLevel(i32),
}

/// The state machine; see the module's description.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    seed: HashSeed,
    peers: BTreeMap<PeerId, Peer>,
    /// Knows the contents of pages as of the last cut that brought them. Never set from live reads: a streaming peer
    /// must have seen exactly that content.
    encoder: Encoder,
    effort: Effort,
    /// At the last cut a streaming peer had too much unsent.
    congested: bool,
    /// Of the last epoch that was sent.
    former_state: Option<(Epoch, DeviceState)>,
    last_epoch: Epoch,
    /// Plans without a cut or collection since the last one.
    skipped_plans: u32,
    next_read: u64,
    verify: Option<Verify>,
    totals: SourceTotals,
    /// Pages of the last cut, for their memory.
    spent: PageBatch,
}

impl Source {
    pub fn new(config: SourceConfig) -> Result<Self, SourceConfigError> {
        if config.description.len() > MAX_DESCRIPTION_BYTES {
            return Err(SourceConfigError::Description(config.description.len()));
        }
        if !(-7..=19).contains(&config.zstd_level) {
            return Err(SourceConfigError::ZstdLevel(config.zstd_level));
        }
        let limits = &config.limits;
        for (name, value) in [
            ("in_flight_epochs", limits.in_flight_epochs as u64),
            ("unsent_bytes", limits.unsent_bytes),
            ("live_batch_pages", limits.live_batch_pages as u64),
            ("join_pages", limits.join_pages),
            ("join_pages_max", limits.join_pages_max),
            ("verify_batch_pages", limits.verify_batch_pages as u64),
        ] {
            if value == 0 {
                return Err(SourceConfigError::ZeroLimit(name));
            }
        }
        let level = if config.zstd_level == 0 { 0 } else { Effort::new(config.zstd_level).level() };
        Ok(Self {
            seed: config.lineage.into(),
            peers: BTreeMap::new(),
            encoder: Encoder::new(&config.layout, config.mirror, config.lineage.into(), level),
            effort: Effort::new(config.zstd_level),
            congested: false,
            former_state: None,
            last_epoch: Epoch::NONE,
            // The tracker has run since before this source was made: as if many plans had been skipped.
            skipped_plans: u32::MAX,
            next_read: 0,
            verify: None,
            totals: SourceTotals::default(),
            spent: PageBatch::new(),
            config,
        })
    }

    /// Takes one event and appends what is to be done. `now` must not run backwards.
    pub fn step(
        &mut self,
        now: Millis,
        event: SourceEvent,
        effects: &mut Vec<SourceEffect>,
    ) -> Result<(), SourceAlarm> {
        match event {
            SourceEvent::PeerAdded { peer } => self.peer_added(peer),
            SourceEvent::PeerRemoved { peer } => self.peer_removed(&peer, effects),
            SourceEvent::Connected { peer } => self.connected(now, &peer, effects),
            SourceEvent::Received { peer, message } => self.received(now, &peer, message, effects),
            SourceEvent::Unreadable { peer, error } => self.unreadable(&peer, error, effects),
            SourceEvent::Disconnected { peer } => self.disconnected(&peer, effects),
            SourceEvent::Written { peer, bytes } => self.written(now, &peer, bytes, effects),
            SourceEvent::Cut(cut) => self.cut(now, cut, effects)?,
            SourceEvent::Collected { at: _, dirty } => {
                if dirty.layout() != &self.config.layout {
                    return Err(SourceAlarm::OtherLayout);
                }
                self.collected(&dirty, effects);
            }
            SourceEvent::LiveRead { peer, read, pages } => self.live_read(&peer, read, &pages, effects),
            SourceEvent::Paced { coding_us, interval_us } => self.paced(coding_us, interval_us),
            SourceEvent::VerifyStart => self.verify_start(now, effects),
            SourceEvent::VerifyRead { read, pages } => self.verify_read(read, &pages, effects),
            SourceEvent::Inbound { frames } => self.inbound(frames, effects),
            SourceEvent::Tick => self.tick(now, effects),
        }
        Ok(())
    }

    pub fn config(&self) -> &SourceConfig {
        &self.config
    }

    /// The last epoch that was cut with contents.
    pub fn last_epoch(&self) -> Epoch {
        self.last_epoch
    }

    /// The mirror's memory is told about before it is used. What was held is forgotten: best before the first cut.
    pub fn set_mirror_advice(&mut self, advise: Advise) {
        self.encoder.set_advice(advise);
        self.encoder.set_mirror(self.config.mirror);
    }

    /// Other memory for previous contents from now on. What it held is forgotten: pages go whole once.
    pub fn set_mirror(&mut self, budget: MirrorBudget) {
        if budget != self.config.mirror {
            self.config.mirror = budget;
            self.encoder.set_mirror(budget);
        }
    }

    /// Level of compression now.
    pub fn zstd_level(&self) -> i32 {
        if self.config.zstd_level == 0 { 0 } else { self.effort.level() }
    }

    /// What coding came to so far, and how full the mirror is.
    pub fn codec_stats(&self) -> CodecStats {
        self.encoder.stats()
    }

    fn paced(&mut self, coding_us: u64, interval_us: u64) {
        if self.config.zstd_level != 0 {
            let before = self.effort.level();
            let level = self.effort.after(Pace { interval_us, coding_us, congested: self.congested });
            if level != before {
                self.encoder.set_level(level);
            }
        }
    }

    fn new_read(&mut self) -> ReadId {
        self.next_read += 1;
        ReadId(self.next_read)
    }
}

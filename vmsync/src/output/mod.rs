//! Holds a guest's outgoing packets until what they tell is true on other hosts too.
//!
//! ```text
//!  agent                                            process beside it, which owns the packets
//!  Committer: epochs, quorum, what to do on loss    Gate: frames in the order of each NIC, marks between them
//!     | cut: a mark goes into each NIC's stream ------> frames before it belong to that epoch, or an earlier one
//!     | quorum has committed: Release(mark) ----------> they leave, in order
//!     | <------------------------------- Waits(mark)    output waits since that mark: cut on demand
//! ```
//! A mark is placed while the guest stands still and everything it has sent has arrived, so no frame can be told from
//! a later state than the one that was cut. Marks only grow; releasing one releases all before it: a cut that failed
//! needs no care, its frames go with the next.
//!
//! What a gate holds is bounded in frames and bytes (what comes on top is dropped, as a full network queue does) and,
//! unless consistency goes first, in age: then it opens by itself, whoever has died or hangs.

mod commit;
mod frame;
mod gate;
mod spacing;

pub use commit::{Cause, Committer, Effect, Mode, PeerPart, Policy};
pub use frame::is_bare_ack;
pub use gate::{Fate, Gate, GateLimits, GateStats};
pub use spacing::OnDemand;

/// Number of a mark; grows with every cut of an attachment. 0: before the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mark(u32);

impl Mark {
    pub const fn new(number: u32) -> Self {
        Self(number)
    }
    pub const fn get(self) -> u32 {
        self.0
    }
    /// The mark after this one; `None` after the last representable one.
    pub fn checked_next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

/// How many shadows must have committed an epoch before its output leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quorum {
    #[default]
    Any,
    /// Every shadow that is wanted.
    All,
    Count(u32),
}

impl Quorum {
    /// Of `wanted` shadows; at least one.
    pub fn needs(self, wanted: usize) -> usize {
        match self {
            Self::Any => 1,
            Self::All => wanted.max(1),
            Self::Count(count) => (count as usize).max(1),
        }
    }
}

/// What goes first when the quorum cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnLoss {
    /// Output leaves although a failover could undo what it tells; loudly.
    #[default]
    Availability,
    /// The guest is cut off from the network until the quorum is back.
    Consistency,
}

//! What agents tell of hosts and guests.

use std::collections::BTreeSet;

use super::policy::Policy;
use crate::instance::{HostState, MAX_AMOUNT};
use crate::units::{GuestId, HostName};

/// What a shadow needs on its host beyond the guest's memory, MiB (36 measured for an idle one, and its journal).
pub const SHADOW_OVERHEAD_MIB: i64 = 64;

/// How much there is, and how much of that is free for shadows: all but what primaries and others use. What shadows use
/// now counts as free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    pub total: i64,
    pub free: i64,
}

impl Capacity {
    /// Nobody knows how much, so it is never short.
    pub const UNKNOWN: Self = Self { total: MAX_AMOUNT, free: MAX_AMOUNT };

    /// Within what the planner computes with.
    pub(super) fn clamped(self) -> Self {
        let total = self.total.clamp(0, MAX_AMOUNT);
        Self { total, free: self.free.clamp(0, total) }
    }
}

/// A host as its agent reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    pub name: HostName,
    pub state: HostState,
    /// Milli-vCPU.
    pub cpu: Capacity,
    /// MiB.
    pub memory: Capacity,
    /// Room for images of warm and cold shadows, MiB.
    pub far_mib: i64,
    /// Free SR-IOV virtual functions.
    pub vfs: i64,
    /// CPU models and machine types that libvirt's domain capabilities call usable; empty: not known, so not held
    /// against it.
    pub cpu_models: BTreeSet<String>,
    pub machine_types: BTreeSet<String>,
    /// Those its own configuration gives it, besides those of the topology.
    pub labels: BTreeSet<String>,
}

impl HostFacts {
    /// A host that is up, of which only its memory is known.
    pub fn with_memory(name: HostName, memory: Capacity) -> Self {
        Self {
            name,
            state: HostState::Up,
            cpu: Capacity::UNKNOWN,
            memory,
            far_mib: MAX_AMOUNT,
            vfs: MAX_AMOUNT,
            cpu_models: BTreeSet::new(),
            machine_types: BTreeSet::new(),
            labels: BTreeSet::new(),
        }
    }
}

/// A guest, what it asks for and where its shadows are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFacts {
    pub id: GuestId,
    pub primary: HostName,
    pub cpu_milli: i64,
    pub memory_mib: i64,
    pub vfs: i64,
    /// What a host must be able to run; none: any host can.
    pub cpu_model: Option<String>,
    pub machine_type: Option<String>,
    /// What one sync stream takes, Mbit/s.
    pub stream_mbit: i64,
    pub policy: Policy,
    /// Hosts of its shadows now, in the order of `policy.shadows`; what is missing there is placed.
    pub shadows: Vec<Option<HostName>>,
    /// Hosts that have refused it a moment ago.
    pub excluded: BTreeSet<HostName>,
}

impl GuestFacts {
    /// A guest of which only its memory is known and that has no shadow yet.
    pub fn with_memory(id: GuestId, primary: HostName, memory_mib: i64, policy: Policy) -> Self {
        Self {
            id,
            primary,
            cpu_milli: 0,
            memory_mib,
            vfs: 0,
            cpu_model: None,
            machine_type: None,
            stream_mbit: 0,
            policy,
            shadows: Vec::new(),
            excluded: BTreeSet::new(),
        }
    }
}

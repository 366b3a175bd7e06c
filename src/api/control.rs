//! What an agent and its manager say to each other: one TCP connection, opened by the agent, that carries JSON
//! values as frames of a be32 length and that many bytes (at most [`MAX_FRAME_BYTES`]).
//!
//! ```text
//! agent                                   manager
//!   Hello  ------------------------------->        version checked, host registered
//!          <------------------------------- Welcome | Refused (then closed)
//!   Heartbeat every heartbeat_ms --------->        silence is what makes a host suspect
//!   Event { seq } (a guest died, moved) -->        kept by the agent until acknowledged
//!          <------------------------------- EventSeen { seq }
//!          <------------------------------- Request { id, command }
//!   Reply { id } ------------------------->
//!   Api { id, a REST call made here } ---->        the manager answers for the whole fleet
//!          <------------------------------- ApiReply { id }
//! ```
//! Commands say what shall be (`Protect`, `AcceptShadow`), not how to get there; repeating one is harmless. Every
//! command about a guest carries its term: an agent that knows a higher one refuses.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::types::{
    ApiError, Budget, CaptureStats, Consistency, DoctorReport, Keep, KeptEpoch, Percentiles, ShadowState, VerifyReport,
};

/// Grows with every incompatible change; both sides must have the same.
pub const CONTROL_VERSION: u32 = 1;
/// Longest frame either side accepts, bytes.
pub const MAX_FRAME_BYTES: usize = 4 << 20;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum ToManager {
    Hello(AgentHello),
    Heartbeat(Heartbeat),
    /// `seq` counts from 1 since the agent started; sent again after a reconnection until acknowledged, so the
    /// manager may see one twice.
    Event {
        seq: u64,
        #[serde(flatten)]
        event: GuestEvent,
    },
    Reply {
        id: u64,
        #[serde(flatten)]
        outcome: Outcome,
    },
    Api {
        id: u64,
        method: String,
        path: String,
        body: serde_json::Value,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum ToAgent {
    Welcome {
        heartbeat_ms: u64,
        version: String,
    },
    Refused {
        reason: String,
    },
    Request {
        id: u64,
        command: Command,
    },
    ApiReply {
        id: u64,
        status: u16,
        body: serde_json::Value,
    },
    /// All events up to and including `seq` have been taken.
    EventSeen {
        seq: u64,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentHello {
    pub control_version: u32,
    /// Of the program, for people.
    pub version: String,
    pub host: String,
    pub rack: String,
    pub sync_port: u16,
    /// Address other hosts reach the sync port at; none: the one this connection comes from.
    #[serde(default)]
    pub sync_ip: Option<IpAddr>,
    pub tracker: String,
    /// What this host's records say it runs or keeps; the manager answers with what shall be.
    pub records: Vec<GuestRecord>,
}

/// One guest in an agent's own records, which survive a reboot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRecord {
    pub uuid: String,
    pub domain: String,
    pub term: u64,
    pub role: Role,
    /// Of a shadow: the host whose guest it follows, and which alone may write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<String>,
    /// Of a shadow: how many former epochs it keeps.
    #[serde(default)]
    pub keep: Keep,
    /// Whether a domain of that UUID is active in this host's libvirt right now.
    #[serde(default)]
    pub active: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Primary,
    Shadow,
    /// Was primary; another host has a higher term. Must not run.
    Retired,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Heartbeat {
    pub seq: u64,
    pub memory_total_mib: u64,
    pub memory_free_mib: u64,
    /// In the first of a connection, and when it has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inventory: Option<Inventory>,
    pub primaries: Vec<PrimaryStatus>,
    pub shadows: Vec<ShadowStatus>,
}

/// What a host is able to do and what it hangs on. What is empty could not be found out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Inventory {
    pub cpus: u32,
    /// Name of its processor.
    pub processor: String,
    pub numa: Vec<NumaNode>,
    /// SR-IOV virtual functions.
    pub vfs: u32,
    /// `ACCELERATOR/MODEL` and `ARCH/MACHINE` that guests can have here.
    pub cpu_models: BTreeSet<String>,
    pub machine_types: BTreeSet<String>,
    pub labels: BTreeSet<String>,
    /// Power domain of its rack.
    pub power: Option<String>,
    pub bridges: Vec<Bridge>,
    pub neighbours: Vec<Neighbour>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaNode {
    pub node: u32,
    pub memory_mib: u64,
    /// As the kernel writes it: `0-7,16-23`.
    pub cpus: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bridge {
    pub name: String,
    pub ports: Vec<String>,
}

/// A switch that said by LLDP what hangs on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    pub interface: String,
    pub switch: String,
    pub port: String,
}

/// What a guest needs of a host besides memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestNeeds {
    pub vcpus: u32,
    pub cpu_model: Option<String>,
    pub machine_type: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PrimaryStatus {
    pub uuid: String,
    pub term: u64,
    /// Whether the guest's vCPUs run (an operator may have suspended it).
    pub running: bool,
    pub memory_bytes: u64,
    /// Why nothing is captured; empty while capturing.
    pub problem: String,
    pub stats: CaptureStats,
    pub peers: Vec<PeerStatus>,
}

/// A shadow as its primary sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerStatus {
    pub host: String,
    pub state: ShadowState,
    pub reason: String,
    pub committed_epoch: u64,
    pub lag_ms: u64,
    #[serde(default)]
    pub lag_peak_ms: Percentiles,
    pub wire_bytes_per_s: u64,
    pub pending_pages: u64,
}

/// A shadow as its own host sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ShadowStatus {
    pub uuid: String,
    pub term: u64,
    pub committed_epoch: u64,
    /// Term of the primary that it came from; 0: none.
    #[serde(default)]
    pub committed_term: u64,
    pub connected: bool,
    /// Why it could not be promoted now; empty when it could.
    pub problem: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum GuestEvent {
    /// QEMU of a primary ended without anybody asking for it.
    Died { uuid: String, term: u64, detail: String, last_epoch: u64 },
    /// A primary ended on purpose: `shutdown`, `destroyed`, `saved`, `migrated`.
    Stopped { uuid: String, term: u64, how: String },
    /// A guest this host has a record of (or that the manager may know) runs here now.
    Started { uuid: String, domain: String },
    /// A newer term was met on the wire: this host's copy has been stopped.
    Superseded { uuid: String, term: u64, newer_term: u64 },
    /// Something an operator should read.
    Notice { uuid: Option<String>, level: String, name: String, message: String },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Command {
    /// Find a domain by name or UUID and say whether it can be protected. -> [`Done::Described`]
    Describe { domain: String },
    /// Be primary of this guest with this term and keep these shadows (replaces the former list).
    Protect {
        uuid: String,
        domain: String,
        term: u64,
        /// Time between cuts; with a budget, the shortest.
        interval_ms: u64,
        #[serde(default)]
        budget: Budget,
        /// Memory for previous contents of pages.
        #[serde(default = "crate::api::types::default_mirror_mib")]
        mirror_mib: u64,
        #[serde(default)]
        consistency: Consistency,
        /// Kept with the guest's definition; empty: none is.
        #[serde(default)]
        policy: String,
        shadows: Vec<ShadowTarget>,
    },
    /// Stop protecting; forget the guest. The guest runs on.
    Release { uuid: String },
    /// Accept a shadow of this guest from that host. The stream brings its definition.
    AcceptShadow {
        uuid: String,
        domain: String,
        term: u64,
        primary: String,
        /// How many former epochs it shall keep.
        #[serde(default)]
        keep: Keep,
    },
    /// Give up a shadow: its domain, memory and journal are gone when this returns.
    DropShadow { uuid: String },
    /// Become primary with `term`, from the newest committed epoch. -> [`Done::Promoted`]
    /// `after_epoch`: refuse unless at least that epoch is committed. `back_to`: from that former epoch instead.
    Promote {
        uuid: String,
        term: u64,
        after_epoch: u64,
        #[serde(default)]
        back_to: Option<u64>,
    },
    /// Which epochs the shadow here could be promoted from. -> [`Done::Epochs`]
    Epochs { uuid: String },
    /// Keep that epoch for so long, whatever the limits say: a promotion back to it is about to come.
    HoldEpoch { uuid: String, epoch: u64, hold_ms: u64 },
    /// The shadow here was found different from its guest: give up what it has committed, and have it compared anew.
    DistrustShadow { uuid: String, difference: String },
    /// Suspend the guest, cut, and wait until `to` has committed it. The guest stays suspended. -> [`Done::FinalCut`]
    FinalCut { uuid: String, to: String },
    /// Undo a `FinalCut`: the guest goes on here.
    UndoFinalCut { uuid: String, term: u64 },
    /// Another host is primary with `term`: stop the copy here, never start it again.
    Retire { uuid: String, term: u64 },
    /// Compare all memory and device state with all shadows. -> [`Done::Verified`]
    Verify { uuid: String },
    /// Does that address answer (TCP connect, a refusal counts) within `timeout_ms`? Asked of shadow hosts before
    /// a promotion; also says how long ago the primary's stream of `uuid` was last heard. -> [`Done::Witnessed`]
    Witness { addr: SocketAddr, timeout_ms: u64, uuid: Option<String> },
    /// What a shadow's own host knows of it right now; asked before a promotion. -> [`Done::Shadow`]
    ShadowStatus { uuid: String },
    /// Keep that policy with the definition of a domain, named by name or UUID; empty: keep none. -> [`Done::Described`]
    SetPolicy { domain: String, policy: String },
    /// -> [`Done::Doctor`]
    Doctor,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShadowTarget {
    pub host: String,
    pub addr: SocketAddr,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Ok(Done),
    Error(ApiError),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "done")]
pub enum Done {
    Nothing,
    Described {
        uuid: String,
        domain: String,
        memory_bytes: u64,
        running: bool,
        refusals: Vec<String>,
        /// Why its output cannot be held.
        #[serde(default)]
        output_refusals: Vec<String>,
        #[serde(default)]
        needs: GuestNeeds,
        /// What is kept with its definition; empty: nothing.
        #[serde(default)]
        policy: String,
    },
    Promoted {
        epoch: u64,
        took_us: u64,
    },
    /// `paused_for_us`: how long the guest had stood still when this answer was sent (clocks of two hosts cannot be
    /// compared, so the manager adds its own time from here to the answer of `Promote`).
    FinalCut {
        epoch: u64,
        paused_for_us: u64,
    },
    Verified(VerifyReport),
    Witnessed {
        answers: bool,
        stream_silent_ms: Option<u64>,
    },
    /// None: this host has no shadow of that guest.
    Shadow {
        status: Option<ShadowStatus>,
    },
    Doctor(DoctorReport),
    /// Oldest first; none without a shadow here.
    Epochs {
        epochs: Vec<KeptEpoch>,
    },
}

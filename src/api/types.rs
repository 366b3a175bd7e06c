//! What the REST API speaks: requests, and the views that `virt-shadow` prints. Field names are stable.

pub use placement::{Budget, Consistency, ConsistencyMode, Keep, OnLoss, Quorum};
use serde::{Deserialize, Serialize};

/// Sent to `POST /v1/guests`: protect a running guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnableRequest {
    /// Name or UUID of a running domain.
    pub domain: String,
    /// How many shadows are wanted; none: as many as its policy says, else one.
    #[serde(default)]
    pub shadows: Option<u32>,
    /// Time between cuts, milliseconds; none: what its policy says, else 50.
    #[serde(default)]
    pub interval_ms: Option<u64>,
    /// Limits of what that may cost; with one, the interval is the shortest and grows as needed.
    #[serde(default)]
    pub budget: Budget,
    /// Memory on the primary's host for previous contents of pages, MiB; as much as the guest has, or more: of all.
    #[serde(default = "default_mirror_mib")]
    pub mirror_mib: u64,
    /// What clients may rely on after a failover.
    #[serde(default)]
    pub consistency: Consistency,
    /// How much of the past each shadow keeps, to go back to; nothing if not given.
    #[serde(default)]
    pub keep: Keep,
    /// Hosts that must hold the shadows; empty: the manager chooses.
    #[serde(default)]
    pub on: Vec<String>,
    /// Host the domain runs on; filled in by the agent that forwards the request.
    #[serde(default)]
    pub host: Option<String>,
}

impl EnableRequest {
    /// With nothing but defaults.
    pub fn of(domain: &str) -> Self {
        Self {
            domain: domain.into(),
            shadows: None,
            interval_ms: None,
            budget: Budget::default(),
            mirror_mib: DEFAULT_MIRROR_MIB,
            consistency: Consistency::default(),
            keep: Keep::default(),
            on: Vec::new(),
            host: None,
        }
    }
}

pub const DEFAULT_INTERVAL_MS: u64 = 50;
pub const DEFAULT_MIRROR_MIB: u64 = placement::guardian::DEFAULT_MIRROR_MIB;
pub(crate) fn default_mirror_mib() -> u64 {
    DEFAULT_MIRROR_MIB
}

/// What a guest asks of its shadows: answer of `GET /v1/guests/{domain}/policy`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PolicyView {
    pub domain: String,
    pub uuid: String,
    /// Host that the guest runs on, or is defined on.
    pub host: String,
    pub protected: bool,
    /// TOML, one line for each key that is not as by default; see docs/placement.md.
    pub policy: String,
}

/// Sent to `POST /v1/guests/{domain}/policy`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyRequest {
    /// A whole policy in the place of the one there is; empty: the default.
    #[serde(default)]
    pub policy: Option<String>,
    /// `KEY=VALUE` to change; an empty value takes the key away.
    #[serde(default)]
    pub set: Vec<String>,
}

/// A plan that was made to be looked at: answer of `GET /v1/plan`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlanView {
    /// How many hosts it is about.
    pub hosts: u64,
    pub took_ms: f64,
    /// Shadows that would leave a host that is up.
    pub moves: u64,
    /// Hosts that report, but are not in the topology file.
    #[serde(default)]
    pub unknown_hosts: Vec<String>,
    pub guests: Vec<PlannedGuest>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlannedGuest {
    pub domain: String,
    pub uuid: String,
    pub primary: String,
    pub shadows: Vec<PlannedShadow>,
    /// Why it does not get all its shadows, and the nearest remedy; empty if it does.
    #[serde(default)]
    pub reason: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlannedShadow {
    /// From 1, in the order of the policy.
    pub shadow: u64,
    /// Where it would be; none: nowhere.
    pub host: Option<String>,
    /// Where it is, or is wished to be.
    pub now: Option<String>,
    /// Of one without a host: hosts by the first reason that bars each. They sum to the number of hosts.
    #[serde(default)]
    pub counts: std::collections::BTreeMap<String, u64>,
    /// The host that is nearest to taking it, and what would help: mostly something to be done there.
    #[serde(default)]
    pub nearest: Option<String>,
    #[serde(default)]
    pub remedy: String,
    /// Of each host why it was taken or not; only if asked for.
    #[serde(default)]
    pub verdicts: Vec<HostVerdict>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostVerdict {
    pub host: String,
    pub rack: String,
    /// `chosen`, `possible`, `barred`.
    pub verdict: String,
    /// Names of the rules that bar it, in the order in which they are asked.
    #[serde(default)]
    pub reasons: Vec<String>,
    pub text: String,
    #[serde(default)]
    pub remedy: String,
}

/// Sent to `POST /v1/guests/{domain}/promote` and `/switchover`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    #[serde(default)]
    pub to: Option<String>,
    /// `promote` only: go on although the primary still answers. It is stopped first.
    #[serde(default)]
    pub force: bool,
    /// `promote` only: back to that epoch, which a shadow keeps.
    #[serde(default)]
    pub epoch: Option<u64>,
}

/// An epoch that a shadow could be promoted from: `GET /v1/guests/{domain}/epochs`, `virt-shadow epochs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptEpoch {
    pub epoch: u64,
    /// Term of the primary that cut it.
    pub term: u64,
    /// Since it was committed on this shadow, milliseconds.
    pub age_ms: u64,
    /// What keeping it takes; 0 for the newest, which the shadow is at.
    pub bytes: u64,
}

/// The epochs of one shadow, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShadowEpochs {
    pub host: String,
    /// Why its host could not say; empty otherwise.
    #[serde(default)]
    pub problem: String,
    pub epochs: Vec<KeptEpoch>,
}

/// A protected guest as the manager knows it: `GET /v1/guests/{domain}`, `virt-shadow info`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestView {
    pub domain: String,
    pub uuid: String,
    pub term: u64,
    pub state: GuestState,
    /// Why the guest is not `protected`, and what to do; empty otherwise.
    #[serde(default)]
    pub reason: String,
    pub primary: HostRef,
    pub shadows_wanted: u32,
    /// What it asks of its shadows, as TOML; empty: nothing but the default.
    #[serde(default)]
    pub policy: String,
    pub interval_ms: u64,
    #[serde(default)]
    pub budget: Budget,
    #[serde(default = "default_mirror_mib")]
    pub mirror_mib: u64,
    #[serde(default)]
    pub consistency: Consistency,
    #[serde(default)]
    pub keep: Keep,
    pub memory_bytes: u64,
    #[serde(flatten)]
    pub capture: CaptureStats,
    pub shadows: Vec<ShadowView>,
}

/// What the primary's agent measures; part of its heartbeats.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CaptureStats {
    /// Newest epoch that was cut.
    pub epoch: u64,
    pub pause_us: Percentiles,
    /// Of the pauses: finding the written pages, as far as QEMU waited for it, and copying them, while it writes its state.
    #[serde(default)]
    pub search_us: Percentiles,
    #[serde(default)]
    pub copy_us: Percentiles,
    pub dirty_pages: DirtyPages,
    /// Page bytes before encoding, and bytes put on the wire to all shadows, since protection began.
    pub raw_bytes_total: u64,
    pub wire_bytes_total: u64,
    /// `userfaultfd` or `hash`; empty while not capturing.
    pub tracker: String,
    /// Why that tracker: one sentence.
    pub tracker_reason: String,
    pub epochs_total: u64,
    /// Time between cuts at the moment, and what keeps it from being shorter: `interval` (it is the shortest asked for),
    /// `pause`, `wire` or `cpu`.
    #[serde(default)]
    pub interval_now_us: u64,
    #[serde(default)]
    pub paced_by: String,
    /// Cuts that the watchdog ended.
    pub watchdog_fired_total: u64,
    /// What becomes of the guest's output; all empty with `async`.
    #[serde(default)]
    pub output: OutputStats,
}

/// The output gate of a guest with `output-commit`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputStats {
    /// `holding`, `partial` (not all interfaces), `open` (output leaves at once), `none` (nothing is between guest and network); empty with `async`.
    pub gate: String,
    /// Why it is not `holding`.
    #[serde(default)]
    pub reason: String,
    pub held_frames: u64,
    pub held_bytes: u64,
    /// How long frames waited, microseconds; of the newest few thousand.
    pub hold_us: Percentiles,
    pub released_frames_total: u64,
    /// Frames dropped because as many were held as may be.
    pub dropped_frames_total: u64,
    /// How often output had to leave uncommitted.
    pub opened_total: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Percentiles {
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DirtyPages {
    pub last: u64,
    pub mean: f64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRef {
    pub host: String,
    pub rack: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestState {
    /// Enabled; first copies under way, nothing committed yet.
    Syncing,
    /// All wanted shadows have a committed epoch and follow.
    Protected,
    /// At least one shadow, but fewer than wanted, can be promoted.
    Degraded,
    /// No shadow can be promoted.
    Unprotected,
    /// The primary is gone; a shadow is being promoted.
    FailingOver,
    /// A planned move is under way.
    SwitchingOver,
    /// The guest was shut off or saved on purpose; protection resumes when it starts.
    Stopped,
    /// The primary is gone and no shadow could take over; an operator has to act.
    Lost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShadowState {
    /// No connection from the primary yet, or lost.
    Disconnected,
    /// Receives pages; what it has (if anything) is older than the primary's last cuts.
    Syncing,
    /// Commits each epoch.
    Following,
    /// Refused by its host; see `reason`.
    Refused,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ShadowView {
    pub host: String,
    pub rack: String,
    /// `hot` until warm and cold shadows exist.
    pub tier: String,
    pub state: ShadowState,
    #[serde(default)]
    pub reason: String,
    /// Newest epoch that could be promoted; 0: none.
    pub committed_epoch: u64,
    /// Age of that epoch, milliseconds.
    pub lag_ms: u64,
    /// How old each epoch became until the next was committed, milliseconds.
    #[serde(default)]
    pub lag_peak_ms: Percentiles,
    /// Bytes per second to this shadow over the last second.
    pub wire_bytes_per_s: u64,
    /// Pages this shadow still lacks.
    pub pending_pages: u64,
}

/// `GET /v1/hosts`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostView {
    pub host: String,
    pub rack: String,
    pub state: HostState,
    pub version: String,
    pub sync_addr: String,
    pub memory_total_mib: u64,
    pub memory_free_mib: u64,
    pub tracker: String,
    pub primaries: u32,
    pub shadows: u32,
    pub last_seen_ms: u64,
    #[serde(default)]
    pub reason: String,
    /// What it is able to do and what it hangs on, as its agent found it.
    #[serde(default)]
    pub inventory: Option<super::control::Inventory>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    Up,
    /// Its agent is silent but the host answers: nothing is promoted away from it.
    AgentSilent,
    /// Silent, being probed.
    Suspect,
    Down,
}

/// `GET /v1/events?since=SEQ&wait_ms=MS`: what happened, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EventView {
    pub seq: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// `info`, `warning`, `alarm`.
    pub level: String,
    /// Stable kind, such as `guest-promoted`, `host-down`, `shadow-committed`, `enable`.
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    pub message: String,
    /// What the message tells in numbers: names and values.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub figures: serde_json::Map<String, serde_json::Value>,
}

/// Answer of `promote` and `switchover`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MoveReport {
    pub domain: String,
    pub from: String,
    pub to: String,
    pub term: u64,
    pub epoch: u64,
    /// Epochs cut on the primary but not committed on the promoted shadow (0 for a switchover).
    pub epochs_lost: u64,
    /// From the decision until libvirt showed the shadow running, milliseconds.
    pub took_ms: f64,
    /// How long the guest stood still (switchover), milliseconds.
    pub pause_ms: Option<f64>,
}

/// Answer of `verify`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyReport {
    pub domain: String,
    pub epoch: u64,
    pub shadows: Vec<VerifyShadow>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyShadow {
    pub host: String,
    pub equal: bool,
    pub pages_compared: u64,
    /// Empty when equal: which block and page (or the device state) differs first, and how many pages do.
    #[serde(default)]
    pub difference: String,
}

/// Answer of `doctor`: what this host can be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DoctorReport {
    pub host: String,
    pub primary: bool,
    pub standby: bool,
    pub tracker: String,
    pub checks: Vec<DoctorCheck>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DoctorCheck {
    pub name: String,
    /// `ok`, `warning`, `missing`.
    pub status: String,
    pub found: String,
    /// What to do; empty when `ok`.
    #[serde(default)]
    pub remedy: String,
}

/// Body of every answer that is not 2xx.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Stable: `not-found`, `not-running`, `refused`, `conflict`, `invalid`, `unavailable`, `failed`,
    /// `method-not-allowed`.
    pub code: String,
    /// What failed, on which guest and host, and what to do.
    pub message: String,
}

impl ApiError {
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into() }
    }
    pub fn http_status(&self) -> u16 {
        match self.code.as_str() {
            "not-found" => 404,
            "not-running" | "refused" | "conflict" => 409,
            "invalid" => 400,
            "method-not-allowed" => 405,
            "unavailable" => 503,
            _ => 500,
        }
    }
}

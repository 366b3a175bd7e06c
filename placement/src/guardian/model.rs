//! What the guardian knows: the part that is saved, and the part that reports bring back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{RequestId, Token};
use crate::consistency::Consistency;
use crate::fleet::Policy;
use crate::term::Role;
use crate::units::{Budget, Epoch, GuestId, HostName, Keep, Moment, Term};

/// A host as its agent introduces it. Saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIntro {
    pub name: HostName,
    pub rack: String,
    /// Where the manager probes it: the address its control connection came from, with its sync port.
    pub probe_addr: SocketAddr,
    /// Where other hosts reach its sync port.
    pub sync_addr: SocketAddr,
}

/// One guest in the records of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub guest: GuestId,
    pub domain: String,
    pub term: Term,
    pub role: Role,
    /// Its domain is active there right now.
    pub active: bool,
}

/// What a host is able to do, as its agent found it. What is empty is not known and not held against it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Abilities {
    /// Processors; 0: not known.
    pub cpus: u32,
    /// SR-IOV virtual functions.
    pub vfs: Option<u32>,
    pub cpu_models: BTreeSet<String>,
    pub machine_types: BTreeSet<String>,
    pub labels: BTreeSet<String>,
    /// Of its rack.
    pub power: Option<String>,
    pub switch: Option<String>,
}

/// What a guest needs of a host besides memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    pub vcpus: u32,
    pub vfs: u32,
    pub cpu_model: Option<String>,
    pub machine_type: Option<String>,
}

/// What a heartbeat tells.
#[derive(Debug, Clone, Default)]
pub struct HostReport {
    pub memory_total_mib: u64,
    pub memory_free_mib: u64,
    /// Only now and then: it hardly changes.
    pub abilities: Option<Abilities>,
    pub primaries: BTreeMap<GuestId, PrimaryReport>,
    pub shadows: BTreeMap<GuestId, ShadowReport>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrimaryReport {
    pub term: Term,
    pub memory_mib: u64,
    /// Newest epoch that was cut.
    pub epoch: Epoch,
    /// Why nothing is captured; empty while capturing.
    pub problem: String,
    pub peers: BTreeMap<HostName, PeerReport>,
}

/// A shadow as its primary sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerReport {
    pub committed: Epoch,
    /// It commits each epoch.
    pub following: bool,
    /// What its stream took over the last second, kbit/s.
    pub kbit_per_s: u64,
}

impl PeerReport {
    /// It has an epoch and commits each further one.
    pub(super) fn follows(&self) -> bool {
        self.following && self.committed > Epoch(0)
    }
}

/// A shadow as its own host sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShadowReport {
    /// Term of the committed epoch.
    pub term: Term,
    pub committed: Epoch,
    pub connected: bool,
    /// Why it could not be promoted now; empty when it could.
    pub problem: String,
}

/// How well a host is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Up,
    /// Silent; asked by us and by witnesses.
    Suspect(Suspicion),
    /// Its agent is silent, but the host answers. `until`: when it is asked again.
    AgentSilent {
        until: Moment,
        reason: String,
    },
    Down {
        since: Moment,
    },
}

/// A round of questions about a silent host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspicion {
    pub(super) since: Moment,
    /// Our own probe has ended without an answer.
    pub(super) unanswered: bool,
    /// Hosts asked, and what they said: `None` not yet, `Some(true)` it is gone for me, `Some(false)` cannot tell.
    pub(super) witnesses: BTreeMap<HostName, Option<bool>>,
    /// Why the last round did not end with a decision; empty in the first.
    pub(super) note: String,
}

#[derive(Debug, Clone)]
pub struct Host {
    pub intro: HostIntro,
    pub health: Health,
    /// Its agent has a connection to us, so that orders can be sent.
    pub connected: bool,
    pub last_seen: Moment,
    /// What the last heartbeat told.
    pub report: HostReport,
    pub abilities: Abilities,
}

impl Host {
    pub(super) fn known(intro: HostIntro, now: Moment) -> Self {
        Self {
            intro,
            health: Health::Up,
            connected: false,
            last_seen: now,
            report: HostReport::default(),
            abilities: Abilities::default(),
        }
    }
    /// It can be given orders.
    pub fn is_up(&self) -> bool {
        self.connected && self.health == Health::Up
    }
    pub fn is_down(&self) -> bool {
        matches!(self.health, Health::Down { .. })
    }
}

/// What is decided about a guest. Saved whenever it changes, before anything that follows from it is said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestPlan {
    pub id: GuestId,
    pub domain: String,
    /// The highest term ever given out for this guest.
    pub term: Term,
    pub primary: HostName,
    pub shadows_wanted: u32,
    /// Time between cuts; with a budget, the shortest.
    pub interval_ms: u64,
    #[serde(default)]
    pub budget: Budget,
    /// Memory on the primary's host for previous contents of pages.
    #[serde(default = "default_mirror_mib")]
    pub mirror_mib: u64,
    #[serde(default)]
    pub consistency: Consistency,
    #[serde(default)]
    pub keep: Keep,
    pub memory_mib: u64,
    #[serde(default)]
    pub needs: Needs,
    /// Where its shadows may be; how many there are to be is `shadows_wanted`.
    #[serde(default)]
    pub policy: Policy,
    /// Hosts the operator named for shadows; taken first whenever shadows are placed.
    pub on: Vec<HostName>,
    /// Hosts that shall keep a shadow.
    pub seats: BTreeSet<HostName>,
    /// Seats in the order of the policy's shadows, as they were planned.
    #[serde(default)]
    pub order: Vec<HostName>,
    /// Seats that are given up as soon as all others follow.
    #[serde(default)]
    pub going: BTreeSet<HostName>,
    /// Where its next shadow would be at home: it has just been moved away from there.
    #[serde(default)]
    pub home: Option<HostName>,
    /// Hosts that had a copy and have to be told, or were, that they have none now.
    pub former: BTreeMap<HostName, Leave>,
    pub phase: Phase,
}

impl GuestPlan {
    /// The policy for as many shadows as are wanted.
    pub fn wanted_policy(&self) -> Policy {
        self.policy.resized(self.shadows_wanted as usize)
    }

    /// Seats that are to stay.
    pub fn staying(&self) -> impl Iterator<Item = &HostName> {
        self.seats.iter().filter(|host| !self.going.contains(*host))
    }

    /// It has a shadow there, or would like to have it there again.
    pub(super) fn is_at_home(&self, host: &HostName) -> bool {
        self.seats.contains(host) || self.home.as_ref() == Some(host)
    }

    /// That host has not given up its former copy yet, and is no home of it: it takes no shadow before.
    pub(super) fn is_left_behind(&self, host: &HostName) -> bool {
        self.former.get(host).is_some_and(|leave| *leave != Leave::Retired) && !self.is_at_home(host)
    }
}

/// What plans have that were saved before there was a choice.
fn default_mirror_mib() -> u64 {
    super::DEFAULT_MIRROR_MIB
}

/// What a host with a former copy is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leave {
    /// To stop its copy of an older term and never start it.
    Retire,
    /// It was told; its record keeps libvirt from starting the guest there.
    Retired,
    /// To give up its shadow.
    Drop,
    /// To forget the guest, which is protected no more.
    Release,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "phase")]
pub enum Phase {
    Steady,
    /// Ended on purpose (`how`).
    Stopped {
        how: String,
    },
    FailingOver(Failover),
    SwitchingOver(Switchover),
    /// No shadow could take over.
    Lost {
        reason: String,
    },
    /// Disabled; forgotten as soon as all hosts have been told.
    Leaving,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failover {
    pub cause: String,
    /// The only host the operator wants it on.
    pub only_to: Option<HostName>,
    /// The epoch the operator wants to go back to.
    #[serde(default)]
    pub back_to: Option<Epoch>,
    /// Newest epoch that is known to have been cut.
    pub last_epoch: Epoch,
    /// Hosts that gave a definite no, with their reason.
    pub tried: BTreeMap<HostName, String>,
    pub step: FailoverStep,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
pub enum FailoverStep {
    /// Ordered by force although the primary answers: its copy is stopped first.
    RetireFirst,
    /// Looking for the shadow with the newest commit.
    Choose,
    /// `to` was ordered to become primary with the plan's term.
    Promote { to: HostName, after_epoch: Epoch },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switchover {
    pub to: HostName,
    pub step: SwitchoverStep,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
pub enum SwitchoverStep {
    Cut,
    /// `to` was ordered to become primary with the plan's term; it has `epoch`, the last one.
    Promote {
        epoch: Epoch,
    },
    /// It did not work: the primary goes on, with the plan's term.
    Undo {
        reason: String,
    },
}

/// A guest: what is decided, and how far it has been carried out.
#[derive(Debug, Clone)]
pub struct Guest {
    pub plan: GuestPlan,
    pub(super) live: Live,
}

impl GuestPlan {
    /// What a shadow takes on its host.
    pub(super) fn shadow_mib(&self) -> u64 {
        self.memory_mib.saturating_add(self.keep.mib)
    }
}

impl Guest {
    pub(super) fn new(plan: GuestPlan, now: Moment) -> Self {
        Self { plan, live: Live::new(now) }
    }
    /// After a restart of ours: what was told need not be told again.
    pub(super) fn resumed(plan: GuestPlan, now: Moment) -> Self {
        Self { plan, live: Live { told_whole: Some(true), ..Live::new(now) } }
    }
    /// Why fewer shadows than wanted are kept, or the primary cannot be captured; empty when all is well.
    pub fn reason(&self) -> String {
        let failed = |(host, seat): (&HostName, &Seat)| match seat {
            Seat::Failed { reason, .. } => Some(format!("{host}: {reason}")),
            _ => None,
        };
        let reason = match &self.plan.phase {
            Phase::Stopped { how } => format!("the guest was stopped ({how}); protection resumes when it starts"),
            Phase::Lost { reason } => reason.clone(),
            Phase::FailingOver(failover) if self.live.waiting_note.is_empty() => failover.cause.clone(),
            Phase::FailingOver(failover) => format!("{}; {}", failover.cause, self.live.waiting_note),
            Phase::SwitchingOver(Switchover { step: SwitchoverStep::Undo { reason }, .. }) => reason.clone(),
            _ => String::new(),
        };
        let primary = failed((&self.plan.primary, &self.live.protect));
        let seats = self.live.accepts.iter().filter_map(failed);
        let placement = (!self.live.placement_note.is_empty()).then(|| self.live.placement_note.clone());
        let elsewhere = self.live.elsewhere.as_ref().map(|(host, _)| format!("it has also been started on {host}"));
        let parts = (!reason.is_empty()).then_some(reason).into_iter().chain(primary).chain(seats);
        parts.chain(placement).chain(elsewhere).collect::<Vec<_>>().join("; ")
    }
    /// How far the order to keep a shadow on `host` has come.
    pub fn seat(&self, host: &HostName) -> Option<&Seat> {
        self.plan.seats.contains(host).then(|| self.live.accepts.get(host).unwrap_or(&Seat::Needed))
    }
}

/// How far an order that says what shall be has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Seat {
    #[default]
    Needed,
    Sent(Token),
    Done {
        at: Moment,
    },
    Failed {
        reason: String,
        retry_at: Moment,
    },
}

impl Seat {
    pub(super) fn due(&self, now: Moment) -> bool {
        match self {
            Self::Needed => true,
            Self::Sent(_) | Self::Done { .. } => false,
            Self::Failed { retry_at, .. } => now >= *retry_at,
        }
    }
    /// After the given number of failed attempts in a row.
    pub(super) fn failed(reason: String, attempts: u32, now: Moment) -> Self {
        let wait_ms = 250u64.saturating_mul(1 << attempts.min(8)).min(30_000);
        Self::Failed { reason, retry_at: now.plus_ms(wait_ms) }
    }
}

/// How far the plan has been carried out. Not saved: after a restart every order is given again.
#[derive(Debug, Clone)]
pub(super) struct Live {
    pub(super) accepts: BTreeMap<HostName, Seat>,
    pub(super) protect: Seat,
    /// Shadows named by the last `Protect` order.
    pub(super) protected_with: Vec<HostName>,
    pub(super) leaves: BTreeMap<HostName, Seat>,
    /// Failed attempts in a row, by host, of all of the above.
    pub(super) attempts: BTreeMap<HostName, u32>,
    /// Hosts that have refused a shadow a moment ago.
    pub(super) excluded: BTreeMap<HostName, (Moment, String)>,
    /// Why it has fewer shadows than wanted, as the last plan had it.
    pub(super) placement_note: String,
    /// The most that a stream to a shadow that follows took lately, kbit/s.
    pub(super) stream_kbit: u64,
    /// Order of the failover or switchover that is under way.
    pub(super) moving: Option<Token>,
    /// Not before then is it given again.
    pub(super) move_again: Moment,
    /// Shadow hosts asked for their newest commit, and what they said.
    pub(super) asked: BTreeMap<HostName, Option<Option<ShadowReport>>>,
    pub(super) waiting_note: String,
    pub(super) decided: Moment,
    /// When the answer to the final cut came, and for how long the guest had stood still then.
    pub(super) cut: Option<(Moment, u64)>,
    /// The shadow was looked at before its promotion is ordered again.
    pub(super) looked: bool,
    /// Operator who waits for the move or the release.
    pub(super) asker: Option<RequestId>,
    /// The primary's host runs no such guest and has not said why: since when, and whether it was asked.
    pub(super) doubt: Option<(Moment, bool)>,
    /// A shadow of a lost guest is back: whether its primary's host was asked if it runs the guest again.
    pub(super) revival: Option<bool>,
    /// Another host says that it runs the guest.
    pub(super) elsewhere: Option<(HostName, Moment)>,
    pub(super) elsewhere_told: bool,
    /// Whether all wanted shadows followed when that was last told, and since when it is different.
    pub(super) told_whole: Option<bool>,
    pub(super) change_seen: Option<Moment>,
}

impl Live {
    pub(super) fn new(now: Moment) -> Self {
        Self {
            accepts: BTreeMap::new(),
            protect: Seat::Needed,
            protected_with: Vec::new(),
            leaves: BTreeMap::new(),
            attempts: BTreeMap::new(),
            excluded: BTreeMap::new(),
            placement_note: String::new(),
            stream_kbit: 0,
            moving: None,
            move_again: now,
            asked: BTreeMap::new(),
            waiting_note: String::new(),
            decided: now,
            cut: None,
            looked: false,
            asker: None,
            doubt: None,
            revival: None,
            elsewhere: None,
            elsewhere_told: false,
            told_whole: None,
            change_seen: None,
        }
    }
}

//! Watches over hosts and guests: who is silent, who is gone, who takes over, and that it happens once.
//!
//! ```text
//! a host                                               a guest
//!   Up --silent for suspect_ms--> Suspect                Steady --died / host down--> FailingOver --> Steady
//!   ^                              |  |                    |  ^                         | no shadow left
//!   |  <----- reports again -------+  | no answer to       |  +---- Stopped <- stopped  v
//!   |                              |  | us nor witnesses   |                           Lost
//!   |          AgentSilent <- answers |                    +-- asked for --> SwitchingOver --> Steady
//!   +----------------------------- Down                    +-- disabled --> Leaving --> forgotten
//! ```
//! [`Guardian::step`] takes the time and an event and returns a [`Ready`]: what must be durable first, then what may be
//! done. A promotion is in the first part with its term and its one host before the order is in the second, so that a
//! manager that ends at any point goes on from what it wrote down, and a term is never given to two hosts.
//!
//! Where shadows go is planned elsewhere, for all guests at once, and taken over when the plan comes back ([`planning`]):
//! a promotion chooses among the shadows there are and waits for no plan.
//!
//! Rules of a promotion:
//! - The term grows before each order to a host that was not ordered before; repeating an order keeps the term.
//! - An order whose outcome is unknown is repeated to the same host. Another host gets its turn only after a definite
//!   no, or when the ordered host is counted as down.
//! - A host is counted as down when it answers neither us nor any host asked as a witness. This is the place where
//!   fencing comes in, and [`crate::term`] says where leases do.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::consistency::Consistency;
use crate::fleet::{FleetError, FleetPlan, Policy, Question, Topology};
use crate::units::{Budget, Epoch, GuestId, HostName, Keep, Moment, Term};

mod context;
mod failover;
mod health;
mod lifecycle;
mod model;
mod planning;
mod requests;
mod switchover;
#[cfg(test)]
mod tests;
mod upkeep;

use context::{Context, Orders};
pub use model::{
    Abilities, Failover, FailoverStep, Guest, GuestPlan, Health, Host, HostIntro, HostReport, Leave, Needs, PeerReport,
    Phase, PrimaryReport, Record, Seat, ShadowReport, Switchover, SwitchoverStep,
};
pub use planning::why_not;
pub use requests::{DEFAULT_KEEP_MIB, DEFAULT_MIRROR_MIB, INTERVAL_MS, KEEP_EPOCHS, KEEP_MIB, MIRROR_MIB, Wish};

/// Times of the state machine. Those of single orders are beside them.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Silence after which a host is suspected and probed.
    pub suspect_ms: u64,
    /// How long a suspected host is probed without any answer before it can count as down.
    pub confirm_ms: u64,
    /// How long a shadow's host is down before the shadow is made elsewhere.
    pub replace_after_ms: u64,
    /// How long an agent whose guest is not running may take to say why, before the guest counts as dead.
    pub explain_ms: u64,
    /// Moves that a plan may try for each shadow that has no host yet.
    pub plan_effort: u64,
    /// How many vCPUs a processor may carry.
    pub cpu_overcommit: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            suspect_ms: 700,
            confirm_ms: 300,
            replace_after_ms: 5_000,
            explain_ms: 1_500,
            plan_effort: 2_000,
            cpu_overcommit: 16,
        }
    }
}

/// Names one order, so that its outcome can be told from others'. Unique while the guardian lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(pub u64);

/// Names a request of an operator, who waits for its [`Action::Answer`]. Chosen by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// An agent has connected (again).
    Hello {
        intro: HostIntro,
        records: Vec<Record>,
    },
    Heartbeat {
        host: HostName,
        report: HostReport,
    },
    /// The connection of that host's agent is gone.
    Disconnected {
        host: HostName,
    },
    /// QEMU of a primary ended without anybody asking for it.
    Died {
        host: HostName,
        guest: GuestId,
        term: Term,
        detail: String,
        last_epoch: Epoch,
    },
    /// A primary ended on purpose; `how`: `shutdown`, `destroyed`, `saved`, `migrated`.
    Stopped {
        host: HostName,
        guest: GuestId,
        term: Term,
        how: String,
    },
    /// A guest runs there now.
    Started {
        host: HostName,
        guest: GuestId,
    },
    /// That host's copy was stopped because it met a newer term.
    Superseded {
        host: HostName,
        guest: GuestId,
        term: Term,
        newer: Term,
    },
    /// Outcome of an [`Action::Probe`].
    Probed {
        host: HostName,
        answered: bool,
    },
    /// Outcome of an [`Action::Order`]: exactly one for each.
    OrderDone {
        token: Token,
        outcome: Outcome,
    },
    Requested {
        id: RequestId,
        request: Request,
    },
    /// Outcome of an [`Action::Plan`]: exactly one for each. A plan is there only if the checker has accepted it.
    Planned {
        number: u64,
        result: Result<Arc<FleetPlan>, Arc<FleetError>>,
    },
    /// Time goes on; at least every 100 ms.
    Tick,
}

/// How an order ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Done(Answer),
    /// A definite no: nothing was done.
    Refused {
        code: String,
        message: String,
    },
    /// No answer in time, or the connection was lost: it may have been carried out.
    Unknown {
        why: String,
    },
}

/// What a host answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Nothing,
    Promoted {
        epoch: Epoch,
    },
    /// The guest stands still since `paused_for_us` before the answer was sent.
    Cut {
        epoch: Epoch,
        paused_for_us: u64,
    },
    Witnessed {
        answers: bool,
        stream_silent_ms: Option<u64>,
    },
    Shadow(Option<ShadowReport>),
    Described {
        running: bool,
    },
}

/// What an operator asks for.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "one at a time, and soon gone")]
pub enum Request {
    Enable(Wish),
    /// What a protected guest asks of its shadows from now on, their number included.
    SetPolicy {
        guest: GuestId,
        policy: Policy,
    },
    Disable {
        guest: GuestId,
    },
    /// With `back_to` from that epoch, which the shadow on `to` keeps.
    Promote {
        guest: GuestId,
        to: Option<HostName>,
        force: bool,
        back_to: Option<Epoch>,
    },
    Switchover {
        guest: GuestId,
        to: Option<HostName>,
    },
}

/// Answer to a [`Request`].
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    Enabled,
    PolicySet,
    Disabled {
        message: String,
    },
    Moved {
        from: HostName,
        to: HostName,
        term: Term,
        epoch: Epoch,
        epochs_lost: u64,
        took_us: u64,
        pause_us: Option<u64>,
    },
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("{0}")]
    NotFound(String),
    /// Not with these arguments.
    #[error("{0}")]
    Invalid(String),
    /// It could be done, but not as things stand.
    #[error("{0}")]
    Conflict(String),
    /// Against a rule.
    #[error("{0}")]
    Refused(String),
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

/// What a host shall do. Repeating an order is harmless.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    AcceptShadow {
        guest: GuestId,
        domain: String,
        term: Term,
        primary: HostName,
        keep: Keep,
    },
    DropShadow {
        guest: GuestId,
    },
    Protect {
        guest: GuestId,
        domain: String,
        term: Term,
        interval_ms: u64,
        budget: Budget,
        mirror_mib: u64,
        consistency: Consistency,
        /// To be kept with the guest's definition.
        policy: String,
        shadows: Vec<HostName>,
    },
    Release {
        guest: GuestId,
    },
    Promote {
        guest: GuestId,
        term: Term,
        after_epoch: Epoch,
        back_to: Option<Epoch>,
    },
    FinalCut {
        guest: GuestId,
        to: HostName,
    },
    UndoFinalCut {
        guest: GuestId,
        term: Term,
    },
    Retire {
        guest: GuestId,
        term: Term,
    },
    /// Does `suspect` answer there, and how long is the stream of `guest` from it silent?
    Witness {
        suspect: HostName,
        timeout_ms: u64,
        guest: Option<GuestId>,
    },
    ShadowStatus {
        guest: GuestId,
    },
    Describe {
        guest: GuestId,
    },
}

/// Something a person should be able to read later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    pub level: Level,
    /// Stable, such as `guest-promoted`.
    pub kind: Cow<'static, str>,
    pub domain: Option<String>,
    pub host: Option<HostName>,
    pub message: String,
    /// What the message tells in numbers, for programs: names and values.
    pub figures: Vec<(&'static str, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Info,
    Warning,
    Alarm,
}

/// What must be durable before any [`Action`] of the same step.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "few are there at a time, and most are guests")]
pub enum Save {
    Host(HostIntro),
    Guest(GuestPlan),
    /// The guest is protected no more; its term is kept, for hosts that come back with a record of it.
    ForgetGuest {
        guest: GuestId,
        term: Term,
    },
    Note(Note),
}

/// What may be done once everything in [`Ready::save`] is durable, or at once if it [`Action::only_asks`].
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Order {
        token: Token,
        host: HostName,
        order: Order,
        timeout_ms: u64,
    },
    /// Does `addr` answer a connection attempt (a refusal counts), within `timeout_ms`?
    Probe {
        host: HostName,
        addr: SocketAddr,
        timeout_ms: u64,
    },
    Answer {
        id: RequestId,
        result: Result<Reply, RequestError>,
    },
    /// Have it answered elsewhere, however long that takes: nothing waits for it. One at a time.
    Plan {
        number: u64,
        question: Box<Question>,
    },
}

impl Action {
    /// It changes nothing and tells nobody what was decided: what a failover waits for need not wait for a disk as well.
    pub fn only_asks(&self) -> bool {
        matches!(self, Self::Probe { .. } | Self::Order { order: Order::ShadowStatus { .. }, .. })
    }
}

/// Outcome of a step: write `save`, in one transaction, then do `then`, in order. What only asks may be done before.
#[derive(Debug, Default, PartialEq)]
pub struct Ready {
    pub save: Vec<Save>,
    pub then: Vec<Action>,
}

/// The state machine.
#[derive(Debug)]
pub struct Guardian {
    settings: Settings,
    hosts: BTreeMap<HostName, Host>,
    guests: BTreeMap<GuestId, Guest>,
    orders: Orders,
    last_tick: Option<Moment>,
    /// The site as its operator described it; none: as its hosts tell.
    topology: Option<Topology>,
    planning: planning::Planning,
    /// Guests that were disabled, with their last term. If one is enabled again, its term starts above.
    forgotten: BTreeMap<GuestId, Term>,
    /// The same for guests that we never heard of but in records of hosts.
    strangers: BTreeMap<GuestId, Term>,
}

/// Guests unknown to us whose terms are kept.
const MAX_STRANGERS: usize = 10_000;

impl Guardian {
    /// Goes on from what was saved. No host is suspected before `suspect_ms` after `now`.
    /// `forgotten`: guests that were disabled, with the term each had then.
    pub fn resume(
        settings: Settings,
        now: Moment,
        hosts: Vec<HostIntro>,
        guests: Vec<GuestPlan>,
        forgotten: Vec<(GuestId, Term)>,
    ) -> Self {
        let hosts = hosts.into_iter().map(|intro| (intro.name.clone(), Host::known(intro, now))).collect();
        let guests = guests.into_iter().map(|plan| (plan.id.clone(), Guest::resumed(plan, now))).collect();
        Self {
            settings,
            hosts,
            guests,
            orders: Orders::default(),
            last_tick: None,
            topology: None,
            planning: planning::Planning::begin(now),
            forgotten: forgotten.into_iter().collect(),
            strangers: BTreeMap::new(),
        }
    }

    /// Plans for the site that an operator has described. Hosts that are not in it get no shadows.
    pub fn with_topology(mut self, topology: Option<Topology>) -> Self {
        self.topology = topology;
        self
    }

    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }
    pub fn host(&self, name: &HostName) -> Option<&Host> {
        self.hosts.get(name)
    }
    /// All guests that are not being forgotten.
    pub fn guests(&self) -> impl Iterator<Item = &Guest> {
        self.guests.values().filter(|guest| guest.plan.phase != Phase::Leaving)
    }
    pub fn guest(&self, id: &GuestId) -> Option<&Guest> {
        self.guests.get(id).filter(|guest| guest.plan.phase != Phase::Leaving)
    }

    /// The one entry: what `event` at `now` leads to.
    pub fn step(&mut self, now: Moment, event: Event) -> Ready {
        let mut ready = Ready::default();
        let may_need_plan = !matches!(event, Event::Heartbeat { .. } | Event::Probed { .. });
        match event {
            Event::Hello { intro, records } => self.hello(now, intro, &records, &mut ready),
            Event::Heartbeat { host, report } => self.heartbeat(now, &host, report, &mut ready),
            Event::Disconnected { host } => {
                if let Some(host) = self.hosts.get_mut(&host) {
                    host.connected = false;
                }
            }
            Event::Died { host, guest, term, detail, last_epoch } => {
                self.with_guest(now, &guest, &mut ready, |guest, cx| {
                    lifecycle::died(guest, cx, &host, term, &detail, last_epoch);
                });
            }
            Event::Stopped { host, guest, term, how } => {
                self.with_guest(now, &guest, &mut ready, |guest, cx| lifecycle::stopped(guest, cx, &host, term, &how));
            }
            Event::Started { host, guest } => {
                self.with_guest(now, &guest, &mut ready, |guest, cx| lifecycle::started(guest, cx, &host));
            }
            Event::Superseded { host, guest, term, newer } => {
                self.with_guest(now, &guest, &mut ready, |guest, cx| {
                    lifecycle::superseded(guest, cx, &host, term, newer);
                });
            }
            Event::Probed { host, answered } => self.probed(now, &host, answered, &mut ready),
            Event::OrderDone { token, outcome } => self.order_done(now, token, outcome, &mut ready),
            Event::Requested { id, request } => self.requested(now, id, request, &mut ready),
            Event::Planned { number, result } => self.planned(now, number, result, &mut ready),
            Event::Tick => {
                self.check_silence(now, &mut ready);
                for id in self.guests.keys().cloned().collect::<Vec<_>>() {
                    self.with_guest(now, &id, &mut ready, |_, _| ());
                }
            }
        }
        if may_need_plan {
            self.plan_if_needed(now, &mut ready);
        }
        ready
    }

    /// Lets `act` change a guest, then does whatever that guest's state asks for, and saves it if it changed. All
    /// changes of guests go through here, so none can miss being saved.
    fn with_guest(
        &mut self,
        now: Moment,
        id: &GuestId,
        ready: &mut Ready,
        act: impl FnOnce(&mut Guest, &mut Context<'_>),
    ) {
        let Some(mut guest) = self.guests.remove(id) else { return };
        let before = guest.plan.clone();
        let mut cx = Context { now, settings: &self.settings, hosts: &mut self.hosts, orders: &mut self.orders, ready };
        act(&mut guest, &mut cx);
        upkeep::tend(&mut guest, &mut cx);
        let seats = &guest.plan.seats;
        guest.plan.going.retain(|host| seats.contains(host));
        if guest.plan.phase == Phase::Leaving && guest.plan.former.is_empty() {
            let term = guest.plan.term;
            self.forgotten.insert(id.clone(), term);
            ready.save.push(Save::ForgetGuest { guest: id.clone(), term });
            return;
        }
        if guest.plan != before {
            ready.save.push(Save::Guest(guest.plan.clone()));
        }
        self.guests.insert(id.clone(), guest);
    }

    fn order_done(&mut self, now: Moment, token: Token, outcome: Outcome, ready: &mut Ready) {
        let Some(pending) = self.orders.finish(token) else { return };
        match pending.guest {
            None => self.witnessed(now, &pending.host, &pending.order, outcome, ready),
            Some(id) => self.with_guest(now, &id, ready, |guest, cx| {
                let done = context::DoneOrder { token, host: pending.host, order: pending.order, outcome };
                match &done.order {
                    Order::Promote { .. } | Order::ShadowStatus { .. } => failover::order_done(guest, cx, done),
                    Order::FinalCut { .. } | Order::UndoFinalCut { .. } => switchover::order_done(guest, cx, done),
                    Order::Describe { .. } => lifecycle::order_done(guest, cx, done),
                    _ => upkeep::order_done(guest, cx, done),
                }
            }),
        }
    }
}

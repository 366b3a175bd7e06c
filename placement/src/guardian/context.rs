//! What the parts of the guardian work with while one guest is changed.

use std::collections::BTreeMap;

use super::model::{Guest, Health, Host};
use super::{Action, Level, Note, Order, Outcome, Ready, Reply, RequestError, RequestId, Save, Settings, Token};
use crate::topology::{Availability, HostFacts, SHADOW_OVERHEAD_MIB};
use crate::units::{GuestId, HostName, Moment};

/// Orders whose outcome is awaited.
#[derive(Debug, Default)]
pub(super) struct Orders {
    last: u64,
    pending: BTreeMap<Token, PendingOrder>,
}

#[derive(Debug)]
pub(super) struct PendingOrder {
    /// None: a question about a host.
    pub(super) guest: Option<GuestId>,
    pub(super) host: HostName,
    pub(super) order: Order,
}

/// An order with its outcome.
pub(super) struct DoneOrder {
    pub(super) token: Token,
    pub(super) host: HostName,
    pub(super) order: Order,
    pub(super) outcome: Outcome,
}

impl Orders {
    pub(super) fn begin(&mut self, guest: Option<GuestId>, host: &HostName, order: Order) -> Token {
        self.last += 1;
        self.pending.insert(Token(self.last), PendingOrder { guest, host: host.clone(), order });
        Token(self.last)
    }
    pub(super) fn finish(&mut self, token: Token) -> Option<PendingOrder> {
        self.pending.remove(&token)
    }
}

pub(super) struct Context<'a> {
    pub(super) now: Moment,
    pub(super) settings: &'a Settings,
    pub(super) hosts: &'a mut BTreeMap<HostName, Host>,
    /// All guests but the one at hand.
    pub(super) others: &'a BTreeMap<GuestId, Guest>,
    pub(super) orders: &'a mut Orders,
    pub(super) ready: &'a mut Ready,
}

impl Context<'_> {
    pub(super) fn is_up(&self, host: &HostName) -> bool {
        self.hosts.get(host).is_some_and(Host::is_up)
    }
    /// An order can reach it. That its heartbeat is late is no reason not to try.
    pub(super) fn is_connected(&self, host: &HostName) -> bool {
        self.hosts.get(host).is_some_and(|host| host.connected)
    }
    /// Counted as down, or unknown altogether.
    pub(super) fn is_down(&self, host: &HostName) -> bool {
        self.hosts.get(host).is_none_or(Host::is_down)
    }

    pub(super) fn order(&mut self, guest: &Guest, host: &HostName, order: Order, timeout_ms: u64) -> Token {
        let token = self.orders.begin(Some(guest.plan.id.clone()), host, order.clone());
        self.ready.then.push(Action::Order { token, host: host.clone(), order, timeout_ms });
        token
    }

    pub(super) fn answer(&mut self, asker: Option<RequestId>, result: Result<Reply, RequestError>) {
        if let Some(id) = asker {
            self.ready.then.push(Action::Answer { id, result });
        }
    }

    pub(super) fn note(
        &mut self,
        level: Level,
        kind: &'static str,
        guest: &Guest,
        host: Option<&HostName>,
        message: impl Into<String>,
    ) {
        self.note_figures(level, kind, guest, host, message, Vec::new());
    }

    /// [`Context::note`] with figures for programs.
    pub(super) fn note_figures(
        &mut self,
        level: Level,
        kind: &'static str,
        guest: &Guest,
        host: Option<&HostName>,
        message: impl Into<String>,
        figures: Vec<(&'static str, u64)>,
    ) {
        self.ready.save.push(Save::Note(Note {
            level,
            kind: kind.into(),
            domain: Some(guest.plan.domain.clone()),
            host: host.cloned(),
            message: message.into(),
            figures,
        }));
    }

    /// All hosts as the choice of shadows for `guest` sees them.
    pub(super) fn facts(&self, guest: Option<&Guest>) -> Vec<HostFacts> {
        self.hosts.values().map(|host| self.facts_of(host, guest)).collect()
    }

    fn facts_of(&self, host: &Host, guest: Option<&Guest>) -> HostFacts {
        let name = &host.intro.name;
        let excluded = guest.and_then(|guest| {
            if guest.plan.former.get(name).is_some_and(|leave| *leave != super::Leave::Retired) {
                return Some("has not given up its former copy yet".to_owned());
            }
            let (until, reason) = guest.live.excluded.get(name)?;
            (self.now < *until).then(|| reason.clone())
        });
        HostFacts {
            name: name.clone(),
            rack: host.intro.rack.clone(),
            availability: match host.health {
                Health::Up if host.connected => Availability::Up,
                Health::Down { .. } => Availability::Down,
                _ => Availability::Silent,
            },
            memory_free_mib: host.report.memory_free_mib.saturating_sub(self.promised_mib(host)),
            excluded,
        }
    }

    /// Memory of shadows that have a seat on `host` but may not have taken it yet.
    fn promised_mib(&self, host: &Host) -> u64 {
        let fills = |guest: &&Guest| {
            guest.plan.seats.contains(&host.intro.name)
                && host.report.shadows.get(&guest.plan.id).is_none_or(|shadow| shadow.committed.0 == 0)
        };
        let needs = |guest: &Guest| guest.plan.memory_mib.saturating_add(SHADOW_OVERHEAD_MIB);
        self.others.values().filter(fills).map(needs).fold(0, u64::saturating_add)
    }
}

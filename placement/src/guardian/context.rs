//! What the parts of the guardian work with while one guest is changed.

use std::collections::BTreeMap;

use super::model::{Guest, Host};
use super::{Action, Level, Note, Order, Outcome, Ready, Reply, RequestError, RequestId, Save, Settings, Token};
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
}

//! Connections of agents: accepted, checked, and used to give orders.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use placement::HostName;
use tokio::sync::{mpsc, oneshot};

use super::translate::Addresses;
use crate::api::control::{Command, Done, Outcome, ToAgent};
use crate::api::types::ApiError;

/// Messages that wait to be sent to one agent; more mean that it takes nothing any more.
pub(super) const MAX_OUTGOING: usize = 1024;

/// Why a call of an agent brought no [`Done`].
#[derive(Debug)]
pub(super) enum CallError {
    /// A definite no.
    Refused(ApiError),
    /// It may have been carried out or not.
    Unknown(String),
}

/// All connections, by host.
#[derive(Clone, Default)]
pub(super) struct Links {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    by_host: Mutex<HashMap<HostName, Link>>,
    last_serial: AtomicU64,
    last_call: AtomicU64,
}

struct Link {
    serial: u64,
    out: mpsc::Sender<ToAgent>,
    waiting: HashMap<u64, oneshot::Sender<Outcome>>,
    peer: IpAddr,
    local: IpAddr,
    sync_addr: SocketAddr,
    heard: Instant,
}

/// What a connection is known by.
pub(super) struct NewLink {
    pub(super) out: mpsc::Sender<ToAgent>,
    pub(super) peer: IpAddr,
    pub(super) local: IpAddr,
    pub(super) sync_addr: SocketAddr,
}

impl Links {
    fn lock(&self) -> MutexGuard<'_, HashMap<HostName, Link>> {
        // Nothing panics while it is held.
        self.shared.by_host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the place of an older connection of the same host. Refused while another address speaks for that host.
    /// -> serial number of the connection
    pub(super) fn register(&self, host: &HostName, new: NewLink, alive_within: Duration) -> Result<u64, String> {
        let mut by_host = self.lock();
        if let Some(old) = by_host.get(host)
            && old.peer != new.peer
            && !old.out.is_closed()
            && old.heard.elapsed() < alive_within
        {
            return Err(format!(
                "a host named {host} is connected from {} already; give each host its own name (`host` in \
                 virtshadowd.toml)",
                old.peer
            ));
        }
        let serial = self.shared.last_serial.fetch_add(1, Ordering::Relaxed) + 1;
        let NewLink { out, peer, local, sync_addr } = new;
        let link = Link { serial, out, waiting: HashMap::new(), peer, local, sync_addr, heard: Instant::now() };
        // Dropping the older one ends its calls with an unknown outcome.
        by_host.insert(host.clone(), link);
        Ok(serial)
    }

    pub(super) fn unregister(&self, host: &HostName, serial: u64) {
        let mut by_host = self.lock();
        if by_host.get(host).is_some_and(|link| link.serial == serial) {
            by_host.remove(host);
        }
    }

    /// Ends all connections; the agents come back and say what they have.
    pub(super) fn drop_all(&self) {
        self.lock().clear();
    }

    /// Whether that connection still is its host's.
    pub(super) fn heard(&self, host: &HostName, serial: u64) -> bool {
        match self.lock().get_mut(host) {
            Some(link) if link.serial == serial => {
                link.heard = Instant::now();
                true
            }
            _ => false,
        }
    }

    pub(super) fn replied(&self, host: &HostName, serial: u64, id: u64, outcome: Outcome) {
        let mut by_host = self.lock();
        let Some(link) = by_host.get_mut(host).filter(|link| link.serial == serial) else { return };
        if let Some(waiting) = link.waiting.remove(&id) {
            // Whoever waited may have given up.
            let _ = waiting.send(outcome);
        }
    }

    pub(super) fn connected(&self) -> Vec<HostName> {
        let mut names: Vec<_> = self.lock().keys().cloned().collect();
        names.sort();
        names
    }

    /// Has `host` carry out `command`.
    pub(super) async fn call(&self, host: &HostName, command: Command, timeout: Duration) -> Result<Done, CallError> {
        let id = self.shared.last_call.fetch_add(1, Ordering::Relaxed) + 1;
        let (reply, replied) = oneshot::channel();
        {
            let mut by_host = self.lock();
            let Some(link) = by_host.get_mut(host) else {
                return Err(CallError::Unknown(format!("{host} is not connected")));
            };
            link.waiting.retain(|_, waiting| !waiting.is_closed());
            if link.out.try_send(ToAgent::Request { id, command }).is_err() {
                return Err(CallError::Unknown(format!("{host} takes no more orders")));
            }
            link.waiting.insert(id, reply);
        }
        match tokio::time::timeout(timeout, replied).await {
            Ok(Ok(Outcome::Ok(done))) => Ok(done),
            Ok(Ok(Outcome::Error(error))) => Err(CallError::Refused(error)),
            Ok(Err(_)) => Err(CallError::Unknown(format!("connection to {host} was lost"))),
            Err(_) => Err(CallError::Unknown(format!("{host} did not answer within {} ms", timeout.as_millis()))),
        }
    }
}

/// Addresses of connected hosts, else those that are known from before.
pub(super) struct KnownAddresses<'a> {
    pub(super) links: &'a Links,
    pub(super) guardian: &'a placement::guardian::Guardian,
}

impl Addresses for KnownAddresses<'_> {
    fn sync_addr(&self, of: &HostName) -> Option<SocketAddr> {
        let connected = self.links.lock().get(of).map(|link| link.sync_addr);
        connected.or_else(|| self.guardian.host(of).map(|host| host.intro.sync_addr))
    }
    fn manager_as_seen_by(&self, host: &HostName) -> Option<IpAddr> {
        self.links.lock().get(host).map(|link| link.local)
    }
}

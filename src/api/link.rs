//! An agent's connection to its manager.
//!
//! ```text
//!  link's own thread (I/O, heartbeats)            caller's runtime
//!  connect -> Hello -> Welcome -> session         CommandHandler::handle, one task per command
//!     ^                              |
//!     +---- wait, 50 ms to 1 s ------+            AgentLink::event, AgentLink::api from anywhere
//! ```
//! The thread does nothing but this, so a heartbeat never waits for a command, a busy runtime or a slow libvirt.
//! Events are kept until the manager has acknowledged them and sent again after each reconnection, in order.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::control::{Command, Done, GuestEvent, GuestRecord, Heartbeat, Inventory, ToManager};
use super::types::ApiError;
use crate::config::Config;
use crate::transport::{PeerName, Security};

mod session;

/// Events kept while the manager cannot be reached; beyond it the oldest go.
pub const MAX_EVENTS_KEPT: usize = 1024;
/// Commands worked on at a time; more are answered `unavailable`.
pub const MAX_COMMANDS_IN_FLIGHT: usize = 256;
/// Forwarded REST calls without an answer at a time.
const MAX_API_IN_FLIGHT: usize = 256;

/// Between libvirt's word that a guest comes by migration and its start.
const INCOMING_FOR: Duration = Duration::from_secs(30);
/// Migrations to one host at a time; libvirt's own limits are far lower.
const MAX_INCOMING: usize = 256;

/// What the link asks its agent for.
pub trait AgentStatus: Send + Sync + 'static {
    /// `userfaultfd` or `hash`: what guests of this host would be tracked with.
    fn tracker(&self) -> String;
    /// What this host's records say, with `active` as libvirt says now. Called at each connection, on a thread that
    /// may block.
    fn records(&self) -> Vec<GuestRecord>;
    /// The state right now; `seq` is filled in by the link. Called every heartbeat on the link's thread: must not
    /// block, so copy what other threads have left ready.
    fn heartbeat(&self) -> Heartbeat;
    /// What this host is able to do, once that has been found out. Called as `heartbeat`.
    fn inventory(&self) -> Option<Arc<Inventory>> {
        None
    }
}

/// Why a guest must not start on this host, and what to do.
#[derive(Debug, Clone)]
pub struct StartRefusal {
    pub reason: String,
    /// It is only not decided yet: worth asking again in a moment.
    pub undecided: bool,
}

impl StartRefusal {
    pub fn never(reason: String) -> Self {
        Self { reason, undecided: false }
    }
    pub fn not_yet(reason: String) -> Self {
        Self { reason, undecided: true }
    }
}

/// What carries out the manager's commands. Several are in flight at a time; repeating one is harmless.
pub trait CommandHandler: Send + Sync + 'static {
    /// An `Err` is a definite no: nothing was done, or it was undone. Runs on the runtime that started the link.
    fn handle(&self, command: Command) -> impl Future<Output = Result<Done, ApiError>> + Send;
    /// May libvirt start this guest on this host (asked by the hook)?
    fn may_start(&self, uuid: &str) -> Result<(), StartRefusal>;
}

/// What an agent tells about itself, and where it finds its manager.
#[derive(Debug, Clone)]
pub struct LinkOptions {
    pub manager: SocketAddr,
    /// As whom the manager must show itself.
    pub manager_name: PeerName,
    pub security: Security,
    pub host: String,
    pub rack: String,
    pub sync_port: u16,
    /// None: other hosts reach this one at the address its control connection comes from.
    pub sync_ip: Option<IpAddr>,
}

impl LinkOptions {
    /// None if the configuration names no manager.
    pub fn from_config(config: &Config, security: Security) -> Option<Self> {
        let ip = config.agent.sync_listen.ip();
        Some(Self {
            manager: config.manager_addr()?,
            manager_name: config.manager_name()?,
            security,
            host: config.host.clone(),
            rack: config.rack.clone(),
            sync_port: config.agent.sync_listen.port(),
            sync_ip: (!ip.is_unspecified()).then_some(ip),
        })
    }
}

/// Handle of a running link; clones share it. It ends when `shutdown` turns true or its last handle is dropped.
#[derive(Clone)]
pub struct AgentLink {
    shared: Arc<Shared>,
    handler: Arc<dyn ErasedHandler>,
    /// Dropped with the last handle, which ends the thread.
    _alive: Arc<watch::Sender<()>>,
}

impl AgentLink {
    /// Starts the link's thread. Call it inside the tokio runtime that commands shall run on.
    pub fn start<S: AgentStatus, H: CommandHandler>(
        options: LinkOptions,
        status: Arc<S>,
        handler: Arc<H>,
        shutdown: watch::Receiver<bool>,
    ) -> io::Result<Self> {
        let (alive, alive_seen) = watch::channel(());
        let (connected, connected_seen) = watch::channel(false);
        let shared = Arc::new(Shared {
            options,
            events: Mutex::default(),
            event_added: Notify::new(),
            session: Mutex::default(),
            held: Mutex::default(),
            incoming: Mutex::default(),
            connected_seen,
        });
        let handler: Arc<dyn ErasedHandler> = handler;
        let driver = session::Driver {
            shared: shared.clone(),
            status,
            handler: handler.clone(),
            commands_on: tokio::runtime::Handle::current(),
            connected,
            alive: alive_seen,
            shutdown,
            slots: Arc::new(tokio::sync::Semaphore::new(MAX_COMMANDS_IN_FLIGHT)),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("manager-link".into()).spawn(move || runtime.block_on(driver.run()))?;
        Ok(Self { shared, handler, _alive: Arc::new(alive) })
    }

    /// Hands over an event; never blocks. It reaches the manager at least once, after those handed over before.
    pub fn event(&self, event: GuestEvent) {
        if let GuestEvent::Died { uuid, term, .. } = &event {
            self.shared.held().insert(uuid.clone(), *term);
        }
        self.shared.events().push(event);
        self.shared.event_added.notify_one();
    }

    /// True while the manager has accepted this agent.
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.shared.connected_seen.clone()
    }

    /// Lets the manager answer a REST call made on this host. `Err` if it could not be asked or did not answer in
    /// time; an order may then have been carried out or not.
    pub async fn api(
        &self,
        method: &str,
        path: &str,
        body: Value,
        timeout: Duration,
    ) -> Result<(u16, Value), ApiError> {
        let manager = self.shared.options.manager;
        let mut connected = self.connected();
        let soon = timeout.min(Duration::from_secs(2));
        if tokio::time::timeout(soon, connected.wait_for(|up| *up)).await.is_err() {
            return Err(ApiError::new(
                "unavailable",
                format!("manager at {manager} is not connected; is virtshadowd with the manager role running there?"),
            ));
        }
        let (answer, answered) = oneshot::channel();
        let out = self.shared.session().begin_call(method, path, body, answer)?;
        let waiting = async {
            let (sender, message) = out;
            sender.send(message).await.ok();
            answered.await
        };
        match tokio::time::timeout(timeout, waiting).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(ApiError::new(
                "unavailable",
                format!("connection to the manager at {manager} was lost; look with `virt-shadow info` what was done"),
            )),
            Err(_) => Err(ApiError::new(
                "unavailable",
                format!("manager at {manager} did not answer within {} s", timeout.as_secs()),
            )),
        }
    }

    /// Carries out a command asked for on this host itself (`doctor`).
    pub async fn local(&self, command: Command) -> Result<Done, ApiError> {
        self.handler.handle(command).await
    }

    /// libvirt has begun to take that guest in by migration: for a short time it may start here, whatever ran before.
    pub fn note_incoming(&self, uuid: &str) {
        let mut incoming = self.shared.incoming();
        incoming.retain(|_, begun| begun.elapsed() < INCOMING_FOR);
        if incoming.len() < MAX_INCOMING {
            incoming.insert(uuid.to_owned(), Instant::now());
        }
    }

    /// See [`CommandHandler::may_start`]. A guest whose death was told must not be started before the manager has said
    /// where it goes on: a shadow may be taking over this very moment.
    pub fn may_start(&self, uuid: &str) -> Result<(), StartRefusal> {
        if self.shared.incoming().remove(uuid).is_some_and(|begun| begun.elapsed() < INCOMING_FOR) {
            return Ok(());
        }
        if let Some(term) = self.shared.held().get(uuid) {
            return Err(StartRefusal::not_yet(format!(
                "its QEMU died here (term {term}), and the manager has not said yet where it goes on; look with \
                 `virt-shadow info {uuid}`"
            )));
        }
        self.handler.may_start(uuid)
    }
}

type HandlerFuture<'a> = std::pin::Pin<Box<dyn Future<Output = Result<Done, ApiError>> + Send + 'a>>;

/// [`CommandHandler`] behind a pointer.
trait ErasedHandler: Send + Sync {
    fn handle(&self, command: Command) -> HandlerFuture<'_>;
    fn may_start(&self, uuid: &str) -> Result<(), StartRefusal>;
}

impl<H: CommandHandler> ErasedHandler for H {
    fn handle(&self, command: Command) -> HandlerFuture<'_> {
        Box::pin(CommandHandler::handle(self, command))
    }
    fn may_start(&self, uuid: &str) -> Result<(), StartRefusal> {
        CommandHandler::may_start(self, uuid)
    }
}

/// Between the handles and the thread.
struct Shared {
    options: LinkOptions,
    events: Mutex<EventQueue>,
    event_added: Notify,
    session: Mutex<SessionState>,
    /// Guests that died here as primaries of a term, and of which the manager has said nothing newer.
    held: Mutex<HashMap<String, u64>>,
    /// Guests that libvirt is about to take in by migration, since when. One start each.
    incoming: Mutex<HashMap<String, Instant>>,
    connected_seen: watch::Receiver<bool>,
}

impl Shared {
    // No code panics while it holds one of these; a poisoned value is as good as any.
    fn events(&self) -> MutexGuard<'_, EventQueue> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn held(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn incoming(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// That command was carried out: does it decide about a guest that died?
    fn decided(&self, decision: Option<(String, u64)>) {
        let Some((uuid, term)) = decision else { return };
        let mut held = self.held();
        if held.get(&uuid).is_some_and(|died| *died < term) {
            held.remove(&uuid);
        }
    }
    fn session(&self) -> MutexGuard<'_, SessionState> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Guest and term that `command` decides about. What says nothing of a term is newer than all.
fn decision(command: &Command) -> Option<(String, u64)> {
    match command {
        Command::Protect { uuid, term, .. }
        | Command::AcceptShadow { uuid, term, .. }
        | Command::Promote { uuid, term, .. }
        | Command::Retire { uuid, term } => Some((uuid.clone(), *term)),
        Command::Release { uuid } => Some((uuid.clone(), u64::MAX)),
        _ => None,
    }
}

/// Events in order, each kept until it is acknowledged.
#[derive(Default)]
struct EventQueue {
    /// The first one's number is `acknowledged + 1`.
    waiting: VecDeque<(u64, GuestEvent)>,
    last_seq: u64,
    /// Number of the last one written in this session.
    sent_seq: u64,
}

impl EventQueue {
    fn push(&mut self, event: GuestEvent) {
        if self.waiting.len() == MAX_EVENTS_KEPT {
            tracing::warn!("manager unreachable for long: the oldest event is dropped");
            self.waiting.pop_front();
        }
        self.last_seq += 1;
        self.waiting.push_back((self.last_seq, event));
    }
    fn session_began(&mut self) {
        self.sent_seq = 0;
    }
    fn next_to_send(&mut self) -> Option<(u64, GuestEvent)> {
        let next = self.waiting.iter().find(|(seq, _)| *seq > self.sent_seq)?.clone();
        self.sent_seq = next.0;
        Some(next)
    }
    fn acknowledged(&mut self, seq: u64) {
        while self.waiting.front().is_some_and(|(first, _)| *first <= seq) {
            self.waiting.pop_front();
        }
    }
}

/// Where REST calls go while a session lasts.
#[derive(Default)]
struct SessionState {
    out: Option<mpsc::Sender<ToManager>>,
    calls: HashMap<u64, oneshot::Sender<(u16, Value)>>,
    last_id: u64,
}

impl SessionState {
    fn begin_call(
        &mut self,
        method: &str,
        path: &str,
        body: Value,
        answer: oneshot::Sender<(u16, Value)>,
    ) -> Result<(mpsc::Sender<ToManager>, ToManager), ApiError> {
        self.calls.retain(|_, waiting| !waiting.is_closed());
        if self.calls.len() >= MAX_API_IN_FLIGHT {
            return Err(ApiError::new(
                "unavailable",
                format!("{MAX_API_IN_FLIGHT} calls wait for the manager already"),
            ));
        }
        let Some(out) = self.out.clone() else {
            return Err(ApiError::new("unavailable", "connection to the manager was lost; try again"));
        };
        self.last_id += 1;
        self.calls.insert(self.last_id, answer);
        Ok((out, ToManager::Api { id: self.last_id, method: method.into(), path: path.into(), body }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn died(term: u64) -> GuestEvent {
        GuestEvent::Died { uuid: "u".into(), term, detail: String::new(), last_epoch: 0 }
    }

    #[test]
    fn events_go_again_after_a_reconnection_until_acknowledged() {
        let mut queue = EventQueue::default();
        (1..=3).for_each(|term| queue.push(died(term)));
        let sent =
            |queue: &mut EventQueue| std::iter::from_fn(|| queue.next_to_send().map(|e| e.0)).collect::<Vec<_>>();
        assert_eq!(sent(&mut queue), [1, 2, 3]);
        queue.acknowledged(1);
        queue.session_began();
        assert_eq!(sent(&mut queue), [2, 3]);
        queue.acknowledged(3);
        queue.session_began();
        assert_eq!(sent(&mut queue), [] as [u64; 0]);
    }

    #[test]
    fn a_full_queue_keeps_the_newest() {
        let mut queue = EventQueue::default();
        (0..MAX_EVENTS_KEPT as u64 + 5).for_each(|term| queue.push(died(term)));
        assert_eq!(queue.waiting.len(), MAX_EVENTS_KEPT);
        assert_eq!(queue.next_to_send().unwrap().0, 6);
    }
}

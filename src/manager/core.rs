//! The manager's one thread that decides: inputs in, [`placement::guardian`] steps, what it says made durable, then done.
//!
//! If the database cannot be written, nothing that depends on it is done: the state in memory is thrown away, agents are
//! disconnected, and all is read back as after a restart.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use placement::fleet::Topology;
use placement::guardian::{
    Action, Event, Guardian, Level, Note, Reply, Request, RequestError, RequestId, Save, Settings,
};
use placement::{HostName, Moment};
use tokio::sync::{mpsc, oneshot, watch};

use super::links::{KnownAddresses, Links};
use super::planner;
use super::probe;
use super::store::{Store, StoreError};
use super::translate;
use crate::api::control::{GuestEvent, Heartbeat, Inventory, ToAgent};

/// Inputs that wait; whoever brings more waits as well.
pub(super) const MAX_INPUTS: usize = 4096;
const REOPEN_AFTER: Duration = Duration::from_secs(1);
const MAX_NOTICE_BYTES: usize = 2048;

pub(super) enum Input {
    Hello {
        host: HostName,
        serial: u64,
        about: AgentAbout,
        event: Event,
    },
    Disconnected {
        host: HostName,
        serial: u64,
    },
    Heartbeat {
        host: HostName,
        heartbeat: Heartbeat,
    },
    /// `seen`: where to acknowledge it, once it is durable.
    Reported {
        host: HostName,
        event: GuestEvent,
        seen: (mpsc::Sender<ToAgent>, u64),
    },
    /// Outcome of something that was done for the guardian of that generation.
    Outcome(u64, Event),
    Request {
        request: Request,
        answer: oneshot::Sender<Result<Reply, RequestError>>,
    },
    /// Looks at the state.
    Read(Box<dyn FnOnce(&State) + Send>),
    Tick,
    /// Close the database and end.
    Stop,
}

/// What an agent says of itself for people to see.
#[derive(Debug, Clone)]
pub(super) struct AgentAbout {
    pub(super) version: String,
    pub(super) tracker: String,
}

/// What the thread owns.
pub(super) struct State {
    pub(super) guardian: Guardian,
    pub(super) store: Store,
    /// Last heartbeat of each host, and when it came.
    pub(super) heartbeats: BTreeMap<HostName, (Instant, Heartbeat)>,
    pub(super) about: BTreeMap<HostName, AgentAbout>,
    /// What each host has told of itself last.
    pub(super) inventories: BTreeMap<HostName, Inventory>,
    pub(super) now: Moment,
    /// Grows each time the state is read back, so that an outcome is never taken for that of a later order.
    generation: u64,
}

pub(super) struct Core {
    pub(super) path: PathBuf,
    pub(super) settings: Settings,
    pub(super) topology: Option<Topology>,
    pub(super) links: Links,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) inputs: mpsc::WeakSender<(Instant, Input)>,
    pub(super) newest_event: watch::Sender<u64>,
    pub(super) began: Instant,
}

impl Core {
    /// Reads what was saved.
    pub(super) fn open(&self, generation: u64) -> Result<State, StoreError> {
        let store = Store::open(&self.path)?;
        let now = Moment::from_us(self.began.elapsed().as_micros() as u64);
        let guardian = Guardian::resume(self.settings, now, store.hosts()?, store.guests()?, store.forgotten()?)
            .with_topology(self.topology.clone());
        self.newest_event.send_replace(store.newest_event()?);
        Ok(State {
            guardian,
            store,
            heartbeats: BTreeMap::new(),
            about: BTreeMap::new(),
            inventories: BTreeMap::new(),
            now,
            generation,
        })
    }

    /// Until it is told to stop, or all senders of `inputs` are gone.
    pub(super) fn run(self, mut state: State, mut inputs: mpsc::Receiver<(Instant, Input)>) {
        let mut waiting = Waiting::default();
        while let Some((at, input)) = inputs.blocking_recv() {
            // Inputs carry the time they came in, so that a slow disk makes nobody look silent. Time never goes back.
            let now = Moment::from_us(at.saturating_duration_since(self.began).as_micros() as u64);
            state.now = state.now.max(now);
            if matches!(input, Input::Stop) {
                return;
            }
            if let Err(error) = self.take(&mut state, at, input, &mut waiting) {
                tracing::error!("the manager's database cannot be written, nothing is decided until it can: {error}");
                waiting = Waiting::default();
                self.links.drop_all();
                let generation = state.generation + 1;
                drop(state);
                state = loop {
                    std::thread::sleep(REOPEN_AFTER);
                    if inputs.is_closed() {
                        return;
                    }
                    // What came in meanwhile belongs to connections that are gone.
                    while inputs.try_recv().is_ok() {}
                    match self.open(generation) {
                        Ok(state) => break state,
                        Err(error) => tracing::error!("the manager's database cannot be opened: {error}"),
                    }
                };
            }
        }
    }

    fn take(&self, state: &mut State, at: Instant, input: Input, waiting: &mut Waiting) -> Result<(), StoreError> {
        match input {
            Input::Hello { host, serial, about, event } => {
                waiting.serials.insert(host.clone(), serial);
                state.heartbeats.remove(&host);
                state.about.insert(host, about);
                self.step(state, event, waiting)
            }
            Input::Disconnected { host, serial } if waiting.serials.get(&host) == Some(&serial) => {
                waiting.serials.remove(&host);
                self.step(state, Event::Disconnected { host }, waiting)
            }
            Input::Disconnected { .. } => Ok(()),
            Input::Heartbeat { host, mut heartbeat } => {
                let report = translate::report(&heartbeat);
                if let Some(inventory) = heartbeat.inventory.take() {
                    state.inventories.insert(host.clone(), inventory);
                }
                state.heartbeats.insert(host.clone(), (at, heartbeat));
                self.step(state, Event::Heartbeat { host, report }, waiting)
            }
            Input::Reported { host, event, seen: (out, seq) } => {
                match (translate::event(&host, &event), event) {
                    (Some(event), _) => self.step(state, event, waiting)?,
                    (None, GuestEvent::Notice { uuid, level, name, message }) => {
                        self.notice(state, &host, uuid.as_deref(), &level, name, message)?;
                    }
                    (None, _) => (),
                }
                // If its queue is full it is acknowledged with a later one, or sent again.
                let _ = out.try_send(ToAgent::EventSeen { seq });
                Ok(())
            }
            Input::Outcome(generation, event) if generation == state.generation => self.step(state, event, waiting),
            Input::Outcome(..) => Ok(()),
            Input::Request { request, answer } => {
                waiting.last_request += 1;
                let id = RequestId(waiting.last_request);
                waiting.requests.retain(|_, waiting| !waiting.is_closed());
                waiting.requests.insert(id, answer);
                self.step(state, Event::Requested { id, request }, waiting)
            }
            Input::Read(look) => {
                look(state);
                Ok(())
            }
            Input::Tick => self.step(state, Event::Tick, waiting),
            Input::Stop => Ok(()),
        }
    }

    /// Decides, makes it durable, does it.
    fn step(&self, state: &mut State, event: Event, waiting: &mut Waiting) -> Result<(), StoreError> {
        let ready = state.guardian.step(state.now, event);
        let (questions, then): (Vec<_>, Vec<_>) = ready.then.into_iter().partition(Action::only_asks);
        for action in questions {
            self.act(state, action, waiting);
        }
        if !ready.save.is_empty() {
            let newest = state.store.save(&ready.save)?;
            self.newest_event.send_replace(newest);
            ready.save.iter().for_each(tell_log);
        }
        for action in then {
            self.act(state, action, waiting);
        }
        Ok(())
    }

    fn act(&self, state: &State, action: Action, waiting: &mut Waiting) {
        let Some(inputs) = self.inputs.upgrade() else { return };
        let generation = state.generation;
        match action {
            Action::Answer { id, result } => {
                if let Some(answer) = waiting.requests.remove(&id) {
                    // The caller may have given up.
                    let _ = answer.send(result);
                }
            }
            Action::Probe { host, addr, timeout_ms } => {
                self.runtime.spawn(async move {
                    let answered = probe::answers(addr, Duration::from_millis(timeout_ms)).await;
                    send(&inputs, generation, Event::Probed { host, answered }).await;
                });
            }
            Action::Plan { number, question } => {
                self.runtime.spawn(async move {
                    let result = planner::answer(*question).await;
                    send(&inputs, generation, Event::Planned { number, result }).await;
                });
            }
            Action::Order { token, host, order, timeout_ms } => {
                tracing::debug!(%host, ?order, "order");
                let addresses = KnownAddresses { links: &self.links, guardian: &state.guardian };
                let command = translate::command(&order, &host, &addresses);
                let links = self.links.clone();
                self.runtime.spawn(async move {
                    let result = match command {
                        Ok(command) => links.call(&host, command, Duration::from_millis(timeout_ms)).await,
                        Err(unknown) => {
                            Err(super::links::CallError::Unknown(format!("no address of {unknown} is known")))
                        }
                    };
                    let outcome = translate::outcome(&order, result);
                    tracing::debug!(%host, ?order, ?outcome, "order done");
                    send(&inputs, generation, Event::OrderDone { token, outcome }).await;
                });
            }
        }
    }

    /// Something an agent wants an operator to read.
    fn notice(
        &self,
        state: &mut State,
        host: &HostName,
        uuid: Option<&str>,
        level: &str,
        name: String,
        mut message: String,
    ) -> Result<(), StoreError> {
        let level = match level {
            "alarm" => Level::Alarm,
            "warning" => Level::Warning,
            _ => Level::Info,
        };
        if message.len() > MAX_NOTICE_BYTES {
            let end = (0..=MAX_NOTICE_BYTES).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(end);
        }
        let kind: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect();
        let guest = uuid.and_then(|uuid| state.guardian.guest(&translate::guest_id(uuid)));
        let domain = guest.map(|guest| guest.plan.domain.clone()).or(uuid.map(str::to_owned));
        let host = Some(host.clone());
        let note = Save::Note(Note { level, kind: kind.into(), domain, host, message, figures: Vec::new() });
        let newest = state.store.save(std::slice::from_ref(&note))?;
        self.newest_event.send_replace(newest);
        tell_log(&note);
        Ok(())
    }
}

/// Who waits for what; gone after a restart.
#[derive(Default)]
struct Waiting {
    requests: HashMap<RequestId, oneshot::Sender<Result<Reply, RequestError>>>,
    last_request: u64,
    serials: HashMap<HostName, u64>,
}

async fn send(inputs: &mpsc::Sender<(Instant, Input)>, generation: u64, event: Event) {
    // The core is gone only when all is shut down.
    let _ = inputs.send((Instant::now(), Input::Outcome(generation, event))).await;
}

fn tell_log(save: &Save) {
    let Save::Note(note) = save else { return };
    let (domain, host) = (note.domain.as_deref().unwrap_or("-"), note.host.as_ref().map_or("-", |host| host.as_str()));
    match note.level {
        Level::Info => tracing::info!(domain, host, "{}: {}", note.kind, note.message),
        Level::Warning => tracing::warn!(domain, host, "{}: {}", note.kind, note.message),
        Level::Alarm => tracing::error!(domain, host, "{}: {}", note.kind, note.message),
    }
}

//! The link's thread: connects, keeps one session at a time, waits and connects again.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, timeout};

use super::{AgentStatus, ErasedHandler, LinkOptions, MAX_COMMANDS_IN_FLIGHT, Shared};
use crate::api::control::{AgentHello, CONTROL_VERSION, Command, Outcome, ToAgent, ToManager};
use crate::api::frame::{FrameError, read_frame, write_frame};
use crate::api::types::ApiError;
use crate::transport::control::{self, ControlStream};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);
/// A manager that takes nothing for this long is as good as gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(1);
/// After a refusal, which only an operator can change.
const RETRY_REFUSED: Duration = Duration::from_secs(5);
const HEARTBEAT_MS_RANGE: std::ops::RangeInclusive<u64> = 10..=60_000;

pub(super) struct Driver<S> {
    pub(super) shared: Arc<Shared>,
    pub(super) status: Arc<S>,
    pub(super) handler: Arc<dyn ErasedHandler>,
    pub(super) commands_on: tokio::runtime::Handle,
    pub(super) connected: watch::Sender<bool>,
    pub(super) alive: watch::Receiver<()>,
    pub(super) shutdown: watch::Receiver<bool>,
    /// Commands that may be worked on; those of former sessions count until they end.
    pub(super) slots: Arc<tokio::sync::Semaphore>,
}

/// How a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("closed by the manager")]
    Closed,
    #[error("no answer within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("refused: {0}")]
    Refused(String),
    #[error("expected Welcome or Refused first")]
    OutOfTurn,
    #[error("records cannot be read: the task that reads them panicked")]
    Records,
}

impl<S: AgentStatus> Driver<S> {
    pub(super) async fn run(self) {
        let mut shutdown = self.shutdown.clone();
        let mut alive = self.alive.clone();
        tokio::select! {
            () = self.keep_connected() => (),
            // An error means that the sender is gone, which ends us as well.
            _ = shutdown.wait_for(|stop| *stop) => (),
            _ = alive.changed() => (),
        }
        self.session_over();
    }

    async fn keep_connected(&self) {
        let LinkOptions { manager, manager_name: name, security, .. } = &self.shared.options;
        let manager = *manager;
        let mut wait = RETRY_FIRST;
        let mut told = false;
        loop {
            let ended = match timeout(CONNECT_TIMEOUT, control::connect(security, manager, name, WRITE_TIMEOUT)).await {
                Ok(Ok(stream)) => self.session(stream).await,
                Ok(Err(error)) => FrameError::from(error).into(),
                Err(_) => Ended::Silent(CONNECT_TIMEOUT),
            };
            let had_been_accepted = *self.connected.borrow();
            if had_been_accepted {
                wait = RETRY_FIRST;
                told = false;
            }
            self.session_over();
            if !told {
                tracing::warn!(%manager, "manager: {ended}; trying again");
                told = true;
            }
            tokio::time::sleep(if matches!(ended, Ended::Refused(_)) { RETRY_REFUSED } else { wait }).await;
            wait = (wait * 2).min(RETRY_LONGEST);
        }
    }

    fn session_over(&self) {
        self.connected.send_replace(false);
        let mut session = self.shared.session();
        session.out = None;
        session.calls.clear();
    }

    async fn session(&self, mut stream: Box<dyn ControlStream>) -> Ended {
        let heartbeat_ms = match self.greet(&mut stream).await {
            Ok(heartbeat_ms) => heartbeat_ms,
            Err(ended) => return ended,
        };
        let (out, outgoing) = mpsc::channel(MAX_COMMANDS_IN_FLIGHT);
        self.shared.events().session_began();
        self.shared.session().out = Some(out.clone());
        self.connected.send_replace(true);
        tracing::info!(manager = %self.shared.options.manager, heartbeat_ms, "connected to the manager");
        let (reader, mut writer) = tokio::io::split(stream);
        let beat = Duration::from_millis(heartbeat_ms);
        tokio::select! {
            ended = self.read(reader, out) => ended,
            ended = self.write(&mut writer, outgoing, beat) => ended,
        }
    }

    /// Hello and its answer. -> heartbeat_ms
    async fn greet(&self, stream: &mut Box<dyn ControlStream>) -> Result<u64, Ended> {
        let status = self.status.clone();
        let (tracker, records) = tokio::task::spawn_blocking(move || (status.tracker(), status.records()))
            .await
            .map_err(|_| Ended::Records)?;
        let options = &self.shared.options;
        let hello = ToManager::Hello(AgentHello {
            control_version: CONTROL_VERSION,
            version: env!("CARGO_PKG_VERSION").into(),
            host: options.host.clone(),
            rack: options.rack.clone(),
            sync_port: options.sync_port,
            sync_ip: options.sync_ip,
            tracker,
            records,
        });
        send(stream, &hello).await?;
        match timeout(WELCOME_TIMEOUT, read_frame(stream)).await.map_err(|_| Ended::Silent(WELCOME_TIMEOUT))?? {
            Some(ToAgent::Welcome { heartbeat_ms, .. }) => {
                Ok(heartbeat_ms.clamp(*HEARTBEAT_MS_RANGE.start(), *HEARTBEAT_MS_RANGE.end()))
            }
            Some(ToAgent::Refused { reason }) => Err(Ended::Refused(reason)),
            Some(_) => Err(Ended::OutOfTurn),
            None => Err(Ended::Closed),
        }
    }

    async fn read(&self, mut reader: impl AsyncRead + Unpin, out: mpsc::Sender<ToManager>) -> Ended {
        loop {
            match read_frame(&mut reader).await {
                Ok(Some(ToAgent::Request { id, command })) => self.carry_out(id, command, &out),
                Ok(Some(ToAgent::ApiReply { id, status, body })) => {
                    if let Some(answer) = self.shared.session().calls.remove(&id) {
                        // The caller may have given up.
                        let _ = answer.send((status, body));
                    }
                }
                Ok(Some(ToAgent::EventSeen { seq })) => self.shared.events().acknowledged(seq),
                Ok(Some(ToAgent::Welcome { .. } | ToAgent::Refused { .. })) => return Ended::OutOfTurn,
                Ok(None) => return Ended::Closed,
                Err(error) => return error.into(),
            }
        }
    }

    /// Runs a command on the agent's runtime; its answer goes to this session, or nowhere when that has ended.
    fn carry_out(&self, id: u64, command: Command, out: &mpsc::Sender<ToManager>) {
        let slot = self.slots.clone().try_acquire_owned();
        let (handler, out, runtime) = (self.handler.clone(), out.clone(), self.commands_on.clone());
        let (shared, decision) = (self.shared.clone(), super::decision(&command));
        self.commands_on.spawn(async move {
            let outcome = if slot.is_err() {
                let message = format!("{MAX_COMMANDS_IN_FLIGHT} commands are worked on already");
                Outcome::Error(ApiError::new("unavailable", message))
            } else {
                let name = command_name(&command);
                match runtime.spawn(async move { handler.handle(command).await }).await {
                    Ok(Ok(done)) => {
                        shared.decided(decision);
                        Outcome::Ok(done)
                    }
                    Ok(Err(error)) => Outcome::Error(error),
                    // A panic: what was done by then is unknown, which is what no answer at all says.
                    Err(error) => return tracing::error!("command {name} panicked: {error}"),
                }
            };
            let _ = out.send(ToManager::Reply { id, outcome }).await;
        });
    }

    async fn write(
        &self,
        writer: &mut (impl AsyncWrite + Unpin),
        mut outgoing: mpsc::Receiver<ToManager>,
        beat: Duration,
    ) -> Ended {
        let mut beats = tokio::time::interval(beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seq = 0;
        let mut told = None;
        loop {
            let next_event = self.shared.events().next_to_send();
            let message = if let Some((seq, event)) = next_event {
                ToManager::Event { seq, event }
            } else {
                tokio::select! {
                    biased;
                    _ = beats.tick() => {
                        seq += 1;
                        let mut heartbeat = self.status.heartbeat();
                        heartbeat.seq = seq;
                        let newest = self.status.inventory();
                        if newest.as_ref().map(Arc::as_ptr) != told.as_ref().map(Arc::as_ptr) {
                            heartbeat.inventory = newest.as_deref().cloned();
                            told = newest;
                        }
                        ToManager::Heartbeat(heartbeat)
                    }
                    () = self.shared.event_added.notified() => continue,
                    message = outgoing.recv() => match message {
                        Some(message) => message,
                        None => return Ended::Closed,
                    },
                }
            };
            if let Err(ended) = send(writer, &message).await {
                return ended;
            }
        }
    }
}

async fn send(to: &mut (impl AsyncWrite + Unpin), message: &ToManager) -> Result<(), Ended> {
    Ok(timeout(WRITE_TIMEOUT, write_frame(to, message)).await.map_err(|_| Ended::Silent(WRITE_TIMEOUT))??)
}

fn command_name(command: &Command) -> String {
    let value = serde_json::to_value(command).unwrap_or_default();
    value.get("do").and_then(|name| name.as_str()).unwrap_or("?").to_owned()
}

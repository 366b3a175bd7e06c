//! The manager role: a thin driver around [`placement::guardian`].
//!
//! ```text
//! agents --TCP--> session --+                        +--> Store (durable first)
//! probes, orders' outcomes -+--> core (one thread) --+--> links: orders to agents
//! REST calls ---------------+     Guardian::step     +--> answers
//! ```
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use placement::fleet::{FileError, Topology};
use placement::guardian::{Reply, Request, Settings};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;

pub mod api;
mod core;
mod links;
mod planner;
mod probe;
mod scrub;
mod session;
mod store;
#[cfg(test)]
mod tests;
mod translate;
mod views;

use self::core::{Core, Input, State};
use self::links::Links;
pub use self::store::StoreError;
use crate::api::types::ApiError;
use crate::config::Config;
use crate::transport::Security;

/// Name of the database in the state directory.
pub const DATABASE: &str = "manager.sqlite";
const TICK: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("control port {addr}: {source}")]
    Listen { addr: SocketAddr, source: std::io::Error },
    #[error("manager's database: {0}")]
    Store(#[from] StoreError),
    #[error("manager's thread: {0}")]
    Thread(std::io::Error),
    #[error("topology file {path}: {source}")]
    Topology { path: PathBuf, source: std::io::Error },
    #[error("topology file {path}, {error}")]
    BadTopology { path: PathBuf, error: FileError },
}

/// What a manager is started with.
#[derive(Debug, Clone)]
pub struct Options {
    pub listen: SocketAddr,
    pub database: PathBuf,
    pub heartbeat_ms: u64,
    pub settings: Settings,
    /// Of the site; none: hosts tell their racks.
    pub topology: Option<PathBuf>,
    /// How often each guest's shadows are compared with it; zero: only when asked for.
    pub compare_every: Duration,
    pub security: Security,
}

impl Options {
    pub fn from_config(config: &Config, security: Security) -> Self {
        let manager = &config.manager;
        Self {
            listen: manager.listen,
            database: config.state_dir.join(DATABASE),
            heartbeat_ms: manager.heartbeat_ms,
            settings: Settings {
                suspect_ms: manager.suspect_ms,
                confirm_ms: manager.confirm_ms,
                cpu_overcommit: manager.cpu_overcommit,
                ..Settings::default()
            },
            topology: manager.topology.clone(),
            compare_every: Duration::from_secs(manager.compare_hours * 3_600),
            security,
        }
    }
}

/// Handle of a running manager; clones share it.
#[derive(Clone)]
pub struct Manager {
    inputs: mpsc::Sender<(Instant, Input)>,
    links: Links,
    newest_event: watch::Receiver<u64>,
    heartbeat_ms: u64,
    settings: Settings,
    security: Security,
    listens: SocketAddr,
}

impl Manager {
    /// Opens the database, listens for agents and goes on where the last manager ended. Ends with `shutdown`.
    pub async fn start(options: Options, shutdown: watch::Receiver<bool>) -> Result<Self, StartError> {
        let topology = options.topology.as_deref().map(read_topology).transpose()?;
        let listen_error = |source| StartError::Listen { addr: options.listen, source };
        let listener = TcpListener::bind(options.listen).await.map_err(listen_error)?;
        let listens = listener.local_addr().map_err(listen_error)?;
        let (inputs, taken) = mpsc::channel(core::MAX_INPUTS);
        let (newest_event, newest_event_seen) = watch::channel(0);
        let links = Links::default();
        let core = Core {
            path: options.database,
            settings: options.settings,
            topology,
            links: links.clone(),
            runtime: tokio::runtime::Handle::current(),
            inputs: inputs.downgrade(),
            newest_event,
            began: Instant::now(),
        };
        let state = core.open(0)?;
        std::thread::Builder::new()
            .name("manager".into())
            .spawn(move || core.run(state, taken))
            .map_err(StartError::Thread)?;
        let manager = Self {
            inputs,
            links,
            newest_event: newest_event_seen,
            heartbeat_ms: options.heartbeat_ms,
            settings: options.settings,
            security: options.security,
            listens,
        };
        tokio::spawn(tick(manager.inputs.clone(), shutdown.clone()));
        if !options.compare_every.is_zero() {
            tokio::spawn(scrub::run(manager.clone(), options.compare_every, shutdown.clone()));
        }
        tokio::spawn(session::accept(manager.clone(), listener, shutdown));
        tracing::info!(%listens, "manager: listening for agents");
        Ok(manager)
    }

    fn security(&self) -> &Security {
        &self.security
    }
    /// The control port, as bound.
    pub fn listens(&self) -> SocketAddr {
        self.listens
    }

    fn links(&self) -> &Links {
        &self.links
    }
    fn heartbeat_ms(&self) -> u64 {
        self.heartbeat_ms
    }
    fn settings(&self) -> &Settings {
        &self.settings
    }

    async fn tell(&self, input: Input) {
        // The core is gone only when all is shut down.
        let _ = self.inputs.send((Instant::now(), input)).await;
    }

    /// Looks at the state between two steps.
    async fn read<T: Send + 'static>(&self, look: impl FnOnce(&State) -> T + Send + 'static) -> Result<T, ApiError> {
        let (answer, answered) = oneshot::channel();
        self.tell(Input::Read(Box::new(move |state| {
            let _ = answer.send(look(state));
        })))
        .await;
        answered.await.map_err(|_| gone())
    }

    async fn request(&self, request: Request, timeout: Duration) -> Result<Reply, ApiError> {
        let (answer, answered) = oneshot::channel();
        self.tell(Input::Request { request, answer }).await;
        match tokio::time::timeout(timeout, answered).await {
            Ok(Ok(result)) => result.map_err(translate::api_error),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(ApiError::new(
                "unavailable",
                format!(
                    "not finished after {} s; it goes on, follow it with `virt-shadow events --follow`",
                    timeout.as_secs()
                ),
            )),
        }
    }
}

fn read_topology(path: &Path) -> Result<Topology, StartError> {
    let text = std::fs::read_to_string(path).map_err(|source| StartError::Topology { path: path.into(), source })?;
    Topology::parse(&text).map_err(|error| StartError::BadTopology { path: path.into(), error })
}

fn gone() -> ApiError {
    ApiError::new("unavailable", "the manager's database cannot be written or it shuts down; see its log and try again")
}

async fn tick(inputs: mpsc::Sender<(Instant, Input)>, mut shutdown: watch::Receiver<bool>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let input = tokio::select! {
            _ = ticks.tick() => Input::Tick,
            _ = shutdown.wait_for(|stop| *stop) => Input::Stop,
        };
        let last = matches!(input, Input::Stop);
        if inputs.send((Instant::now(), input)).await.is_err() || last {
            return;
        }
    }
}

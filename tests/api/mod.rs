//! A manager with its REST socket, and agents that only pretend: they speak the control protocol over real sockets and
//! do as they are told in a table. They prove what the manager does, not what hosts do.
#![allow(dead_code, reason = "each test uses its part")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use placement::guardian::Settings;
use serde_json::Value;
use tokio::sync::watch;
use virt_shadow::api::client::Client;
use virt_shadow::api::control::{
    Command, Done, GuestEvent, GuestNeeds, GuestRecord, Heartbeat, Inventory, PeerStatus, PrimaryStatus, Role,
    ShadowStatus,
};
use virt_shadow::api::link::{AgentLink, AgentStatus, CommandHandler, LinkOptions, StartRefusal};
use virt_shadow::api::server::{self, Backend};
use virt_shadow::api::types::{
    ApiError, CaptureStats, DoctorReport, KeptEpoch, ShadowState, VerifyReport, VerifyShadow,
};
use virt_shadow::manager::{Manager, Options};
use virt_shadow::transport::{PeerName, Security};

pub const UUID: &str = "0d8f9bd2-0000-4000-8000-000000000001";

/// A manager in this process.
pub struct Daemon {
    pub client: Client,
    pub control: SocketAddr,
    pub socket: PathBuf,
    dir: PathBuf,
    stop: watch::Sender<bool>,
}

impl Daemon {
    pub async fn start(dir: &Path, control: SocketAddr) -> Self {
        Self::start_as(dir, control, Security::Plain).await
    }

    pub async fn start_as(dir: &Path, control: SocketAddr, security: Security) -> Self {
        Self::start_comparing(dir, control, security, Duration::ZERO).await
    }

    /// Compares each guest's shadows with it so often.
    pub async fn start_comparing(dir: &Path, control: SocketAddr, security: Security, compare_every: Duration) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let (stop, shutdown) = watch::channel(false);
        let settings = Settings {
            suspect_ms: 300,
            confirm_ms: 150,
            replace_after_ms: 2_000,
            explain_ms: 300,
            ..Settings::default()
        };
        let file = dir.join("topology.toml");
        let topology = file.exists().then_some(file);
        let database = dir.join("manager.sqlite");
        let options =
            Options { listen: control, database, heartbeat_ms: 50, settings, topology, compare_every, security };
        let began = Instant::now();
        let manager = loop {
            // The last one may not have let go of the file yet.
            match Manager::start(options.clone(), shutdown.clone()).await {
                Ok(manager) => break manager,
                Err(error) if began.elapsed() > Duration::from_secs(10) => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let control = manager.listens();
        let socket = dir.join("api.sock");
        let listener = server::listen(&socket).await.unwrap();
        let backend = Backend { host: "manager".into(), manager: Some(manager), agent: None };
        tokio::spawn(server::serve(listener, backend, shutdown));
        Self { client: Client::new(&socket), control, socket, dir: dir.into(), stop }
    }

    /// Ends it, and starts another on the same database and port after `pause`.
    pub async fn restart(self, pause: Duration) -> Self {
        self.stop.send_replace(true);
        tokio::time::sleep(pause).await;
        Self::start(&self.dir, self.control).await
    }

    /// The same, with one that compares each guest's shadows with it so often.
    pub async fn restart_comparing(self, every: Duration) -> Self {
        self.stop.send_replace(true);
        Self::start_comparing(&self.dir, self.control, Security::Plain, every).await
    }

    pub async fn get(&self, path: &str) -> Value {
        self.client.get(path).await.unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    /// Status and body, whatever they are.
    pub async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.client.call(method, path, Some(body)).await.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// Waits until `path` answers something that `is` says yes to.
    pub async fn until(&self, path: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let last = self.client.call("GET", path, None).await;
            if let Ok((200, value)) = &last
                && is(value)
            {
                return value.clone();
            }
            assert!(began.elapsed() < Duration::from_secs(15), "never {what}: {last:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn event_kinds(&self) -> Vec<String> {
        let events = self.get("/v1/events").await;
        events.as_array().unwrap().iter().map(|event| event["kind"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// What a pretended host is and has been told.
#[derive(Default)]
pub struct Table {
    pub roles: BTreeMap<String, (Role, u64)>,
    /// UUIDs of guests that run.
    pub runs: Vec<String>,
    /// Names of domains that it would describe, with what stands against protecting them.
    pub domains: BTreeMap<String, Vec<String>>,
    pub targets: Vec<String>,
    /// Kept with the definition of `web`, and what that needs.
    pub policy: String,
    pub needs: GuestNeeds,
    pub inventory: Option<Arc<Inventory>>,
    pub committed: u64,
    /// Epochs that a shadow here could go back to.
    pub kept: Vec<u64>,
    pub commands: Vec<Command>,
    /// Hosts that do not answer it as a witness.
    pub unreachable: bool,
    /// Takes promotions and never answers.
    pub mute_promotion: bool,
}

pub struct FakeAgent {
    pub name: String,
    pub table: Mutex<Table>,
    link: Mutex<Option<AgentLink>>,
    security: Security,
    manager_name: PeerName,
    stop: watch::Sender<bool>,
    /// Its sync port; when it accepts no more and its queue is full, the host looks dead.
    sync: socket2::Socket,
    fillers: Mutex<Vec<socket2::Socket>>,
    sync_addr: SocketAddr,
}

impl FakeAgent {
    pub fn start(name: &str, rack: &str, manager: SocketAddr) -> Arc<Self> {
        Self::start_as(name, rack, manager, Security::Plain, PeerName::Address(manager.ip()))
    }

    pub fn start_as(
        name: &str,
        rack: &str,
        manager: SocketAddr,
        security: Security,
        manager_name: PeerName,
    ) -> Arc<Self> {
        let sync = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        sync.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        sync.listen(1).unwrap();
        let sync_addr = sync.local_addr().unwrap().as_socket().unwrap();
        let stop = watch::channel(false).0;
        let agent = Arc::new(Self {
            name: name.into(),
            table: Mutex::new(Table { committed: 100, ..Table::default() }),
            link: Mutex::new(None),
            security,
            manager_name,
            stop,
            sync,
            fillers: Mutex::default(),
            sync_addr,
        });
        agent.connect(rack, manager);
        agent
    }

    pub fn connect(self: &Arc<Self>, rack: &str, manager: SocketAddr) {
        let options = LinkOptions {
            manager,
            manager_name: self.manager_name.clone(),
            security: self.security.clone(),
            host: self.name.clone(),
            rack: rack.into(),
            sync_port: self.sync_addr.port(),
            sync_ip: None,
        };
        let link = AgentLink::start(options, self.clone(), self.clone(), self.stop.subscribe()).unwrap();
        *self.link.lock().unwrap() = Some(link);
    }

    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap()
    }

    pub fn event(&self, event: GuestEvent) {
        self.link.lock().unwrap().as_ref().unwrap().event(event);
    }

    pub fn link(&self) -> AgentLink {
        self.link.lock().unwrap().clone().unwrap()
    }

    /// The agent ends; its host answers on.
    pub fn kill(&self) {
        self.link.lock().unwrap().take();
    }

    /// The host ends: no agent, and nobody answers at its address.
    pub fn power_cut(&self) {
        self.kill();
        self.table().runs.clear();
        // A listener whose queue is full drops what comes, as a host without power does.
        let mut fillers = self.fillers.lock().unwrap();
        loop {
            let filler = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            let connected = filler.connect_timeout(&self.sync_addr.into(), Duration::from_millis(100));
            fillers.push(filler);
            if connected.is_err() {
                return;
            }
        }
    }

    /// The sync port, so that it lives as long as the host.
    pub fn sync_addr(&self) -> SocketAddr {
        self.sync.local_addr().unwrap().as_socket().unwrap()
    }

    pub fn runs(&self) -> bool {
        self.table().runs.iter().any(|uuid| uuid == UUID)
    }

    pub fn promotions(&self) -> Vec<u64> {
        let table = self.table();
        let term = |command: &Command| match command {
            Command::Promote { term, .. } => Some(*term),
            _ => None,
        };
        table.commands.iter().filter_map(term).collect()
    }
}

impl AgentStatus for FakeAgent {
    fn tracker(&self) -> String {
        "pretended".into()
    }
    fn records(&self) -> Vec<GuestRecord> {
        let table = self.table();
        let record = |(uuid, (role, term)): (&String, &(Role, u64))| GuestRecord {
            uuid: uuid.clone(),
            domain: "web".into(),
            term: *term,
            role: *role,
            primary: None,
            keep: Default::default(),
            active: table.runs.contains(uuid),
        };
        table.roles.iter().map(record).collect()
    }
    fn inventory(&self) -> Option<Arc<Inventory>> {
        self.table().inventory.clone()
    }
    fn heartbeat(&self) -> Heartbeat {
        let table = self.table();
        let mut heartbeat = Heartbeat { seq: 0, memory_total_mib: 8192, memory_free_mib: 4096, ..Heartbeat::default() };
        for (uuid, (role, term)) in &table.roles {
            match role {
                Role::Primary if table.runs.contains(uuid) => heartbeat.primaries.push(PrimaryStatus {
                    uuid: uuid.clone(),
                    term: *term,
                    running: true,
                    memory_bytes: 1 << 30,
                    problem: String::new(),
                    stats: CaptureStats { epoch: 101, epochs_total: 101, ..CaptureStats::default() },
                    peers: table.targets.iter().map(|host| following(host)).collect(),
                }),
                Role::Shadow => heartbeat.shadows.push(shadow(uuid, *term, table.committed)),
                Role::Primary | Role::Retired => (),
            }
        }
        heartbeat
    }
}

fn following(host: &str) -> PeerStatus {
    PeerStatus {
        host: host.into(),
        state: ShadowState::Following,
        reason: String::new(),
        committed_epoch: 100,
        lag_ms: 42,
        lag_peak_ms: Default::default(),
        wire_bytes_per_s: 1_000,
        pending_pages: 0,
    }
}

fn shadow(uuid: &str, term: u64, committed_epoch: u64) -> ShadowStatus {
    let (uuid, problem) = (uuid.into(), String::new());
    ShadowStatus { uuid, term, committed_epoch, committed_term: term, connected: true, problem }
}

fn kept(epoch: u64) -> KeptEpoch {
    KeptEpoch { epoch, term: 1, age_ms: 100, bytes: 5_000 }
}

impl CommandHandler for FakeAgent {
    async fn handle(&self, command: Command) -> Result<Done, ApiError> {
        let mute = self.table().mute_promotion && matches!(command, Command::Promote { .. });
        let done = self.obey(command);
        if mute {
            std::future::pending::<()>().await;
        }
        done
    }

    fn may_start(&self, uuid: &str) -> Result<(), StartRefusal> {
        match self.table().roles.get(uuid) {
            Some((Role::Retired, _)) => Err(StartRefusal::never("it runs elsewhere".into())),
            _ => Ok(()),
        }
    }
}

impl FakeAgent {
    fn obey(&self, command: Command) -> Result<Done, ApiError> {
        let mut table = self.table();
        table.commands.push(command.clone());
        match command {
            Command::Describe { domain } => {
                let running = table.runs.iter().any(|uuid| uuid == UUID);
                let by_uuid = domain == UUID && running;
                let Some(refusals) = table.domains.get(&domain).cloned().or(by_uuid.then(Vec::new)) else {
                    return Err(ApiError::new("not-found", format!("no domain {domain} on {}", self.name)));
                };
                let domain = if by_uuid { "web".into() } else { domain };
                Ok(Done::Described {
                    uuid: UUID.into(),
                    domain,
                    memory_bytes: 1 << 30,
                    running,
                    refusals,
                    output_refusals: Vec::new(),
                    needs: table.needs.clone(),
                    policy: table.policy.clone(),
                })
            }
            Command::SetPolicy { policy, .. } => {
                table.policy = policy;
                Ok(Done::Nothing)
            }
            Command::Protect { uuid, term, shadows, policy, .. } => {
                table.policy = policy;
                table.targets = shadows.iter().map(|target| target.host.clone()).collect();
                table.roles.insert(uuid, (Role::Primary, term));
                Ok(Done::Nothing)
            }
            Command::AcceptShadow { uuid, term, .. } => {
                table.roles.insert(uuid, (Role::Shadow, term));
                Ok(Done::Nothing)
            }
            Command::Release { uuid } | Command::DropShadow { uuid } => {
                table.roles.remove(&uuid);
                Ok(Done::Nothing)
            }
            Command::Retire { uuid, term } => {
                table.runs.retain(|running| *running != uuid);
                table.roles.insert(uuid, (Role::Retired, term));
                Ok(Done::Nothing)
            }
            Command::Epochs { .. } => {
                Ok(Done::Epochs { epochs: table.kept.iter().map(|epoch| kept(*epoch)).collect() })
            }
            Command::HoldEpoch { epoch, .. } if !table.kept.contains(&epoch) => {
                Err(ApiError::new("not-found", format!("epoch {epoch} is not kept")))
            }
            Command::HoldEpoch { .. } | Command::DistrustShadow { .. } => Ok(Done::Nothing),
            Command::Promote { uuid, term, back_to, .. } => {
                if !matches!(table.roles.get(&uuid), Some((Role::Shadow, _)))
                    && table.roles.get(&uuid) != Some(&(Role::Primary, term))
                {
                    return Err(ApiError::new("not-found", "no shadow here"));
                }
                table.roles.insert(uuid.clone(), (Role::Primary, term));
                if !table.runs.contains(&uuid) {
                    table.runs.push(uuid);
                }
                Ok(Done::Promoted { epoch: back_to.unwrap_or(table.committed), took_us: 1_000 })
            }
            Command::FinalCut { .. } => Ok(Done::FinalCut { epoch: 102, paused_for_us: 2_000 }),
            Command::UndoFinalCut { .. } => Ok(Done::Nothing),
            Command::Verify { .. } => {
                let equal = |host: &String| VerifyShadow {
                    host: host.clone(),
                    equal: true,
                    pages_compared: 262_144,
                    difference: String::new(),
                };
                let shadows = table.targets.iter().map(equal).collect();
                Ok(Done::Verified(VerifyReport { domain: "web".into(), epoch: 103, shadows }))
            }
            Command::Witness { .. } => {
                let stream_silent_ms = Some(if table.unreachable { 10_000 } else { 10 });
                Ok(Done::Witnessed { answers: !table.unreachable, stream_silent_ms })
            }
            Command::ShadowStatus { uuid } => {
                let status = table.roles.get(&uuid).map(|(_, term)| shadow(&uuid, *term, table.committed));
                Ok(Done::Shadow { status })
            }
            Command::Doctor => Ok(Done::Doctor(DoctorReport {
                host: self.name.clone(),
                primary: true,
                standby: true,
                tracker: "pretended".into(),
                checks: Vec::new(),
            })),
        }
    }
}

/// A directory of this test, removed with it.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("virt-shadow-{name}-{}", std::process::id()));
        // What an earlier test with the same process id has left.
        let _ = std::fs::remove_dir_all(&dir);
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

//! The host agent: a thin driver around `vmsync` for primaries and shadows, and the link to the manager.
//!
//! ```text
//! manager <--- AgentLink ---> Agent (commands) --+--> Primary sessions (guests that run here)
//!                                                +--> Shadows (guests of other hosts, ready to run)
//! libvirtd <--- Libvirt ----- events ------------+
//! guard process <-- GuardKeeper
//! ```

mod commands;
mod doctor;
mod guards;
mod inventory;
mod libvirt;
mod primary;
mod records;
mod shadows;
mod stats;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::watch;

use crate::api::control::{GuestEvent, GuestRecord, Heartbeat, Inventory, Role};
use crate::api::link::{AgentLink, AgentStatus, LinkOptions, StartRefusal};
use crate::capture::priority;
use crate::config::{Config, PriorityChoice};
use crate::hypervisor::{HypervisorEvent, Lifecycle, Started};
use crate::transport::Security;

use guards::GuardKeeper;
pub(crate) use inventory::only_switch;
use libvirt::Libvirt;
use primary::{Primary, PrimaryContext};
use records::Records;
use shadows::Shadows;

/// After the manager accepted this host, how long it has to say which guests must not run here.
const SETTLE_AFTER_WELCOME: Duration = Duration::from_secs(1);

/// One host's agent.
pub struct Agent {
    config: Config,
    records: Arc<Records>,
    libvirt: Arc<Libvirt>,
    context: Arc<PrimaryContext>,
    shadows: Arc<Shadows>,
    primaries: Mutex<BTreeMap<String, Primary>>,
    link: Arc<OnceLock<AgentLink>>,
    welcomed_at: Mutex<Option<Instant>>,
    inventory: inventory::Shared,
    tracker: &'static str,
}

/// Starts the agent role. Its threads end when `shutdown` turns true and the last handle is dropped.
pub fn start(
    config: &Config,
    security: Security,
    shutdown: watch::Receiver<bool>,
) -> anyhow::Result<(Arc<Agent>, AgentLink)> {
    let options = LinkOptions::from_config(config, security.clone()).context("agent.manager is not configured")?;
    // Before anything starts a thread or a process that would hurry.
    if config.agent.priority == PriorityChoice::Usual {
        priority::forbid();
    }
    std::fs::create_dir_all(&config.run_dir).with_context(|| format!("cannot create {}", config.run_dir.display()))?;
    let records = Arc::new(Records::open(&config.state_dir)?);
    let link: Arc<OnceLock<AgentLink>> = Arc::default();
    let report_link = Arc::clone(&link);
    // What is found before there is a link is told when there is one, which is soon.
    let report: Arc<dyn Fn(GuestEvent) + Send + Sync> = Arc::new(move |event| report_link.wait().event(event));
    let others = Arc::clone(&report);
    let libvirt = Libvirt::start(&config.agent.libvirt_uri, Arc::new(move |event| unclaimed(event, &*others)))?;
    let guards = Arc::new(GuardKeeper::default());
    guards.get().context("cannot start the guard process")?;
    let shadows =
        Shadows::start(config, security.clone(), Arc::clone(&libvirt), Arc::clone(&records), Arc::clone(&report))?;
    let context = Arc::new(PrimaryContext {
        host: config.host.clone(),
        security,
        libvirt: Arc::clone(&libvirt),
        records: Arc::clone(&records),
        guards,
        tracker: config.agent.tracker,
        watchdog: Duration::from_millis(config.agent.watchdog_ms),
        run_dir: config.run_dir.clone(),
        disk_dir: config.agent.disk_dir.clone(),
        disk_copy_mib_per_s: config.agent.disk_copy_mib_per_s,
        record_dir: config.agent.record_dir.clone(),
        report,
    });
    let (tracker, why) = doctor::tracker(config.agent.tracker);
    tracing::info!(host = config.host, rack = config.rack, tracker, why, "agent starts");
    let agent = Arc::new(Agent {
        config: config.clone(),
        records,
        libvirt,
        context,
        shadows,
        primaries: Mutex::default(),
        link: Arc::clone(&link),
        welcomed_at: Mutex::default(),
        inventory: inventory::Shared::default(),
        tracker,
    });
    let shared = Arc::clone(&agent.inventory);
    tokio::spawn(inventory::keep(config.clone(), Arc::clone(&agent.libvirt), shared, shutdown.clone()));
    let started = AgentLink::start(options, Arc::clone(&agent), Arc::clone(&agent), shutdown)?;
    let _ = link.set(started.clone());
    tokio::spawn(note_welcome(Arc::clone(&agent), started.connected()));
    Ok((agent, started))
}

/// Remembers since when the manager knows this host.
async fn note_welcome(agent: Arc<Agent>, mut connected: watch::Receiver<bool>) {
    loop {
        // Cut off, this host cannot know any more whether its guests still are its own to start.
        let since = connected.borrow_and_update().then(Instant::now);
        *lock(&agent.welcomed_at) = since;
        if connected.changed().await.is_err() {
            return;
        }
    }
}

/// Events of guests that no session listens to: the manager may know one of them.
fn unclaimed(event: &HypervisorEvent, report: &dyn Fn(GuestEvent)) {
    if let HypervisorEvent::Lifecycle { uuid, name, event: Lifecycle::Started(how) } = event
        && !matches!(how, Started::Wakeup)
    {
        report(GuestEvent::Started { uuid: uuid.clone(), domain: name.clone() });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl AgentStatus for Agent {
    fn tracker(&self) -> String {
        self.tracker.into()
    }

    fn records(&self) -> Vec<GuestRecord> {
        let mut records = self.records.all();
        let hypervisor = self.libvirt.get().ok();
        for record in &mut records {
            let domain = hypervisor.as_ref().and_then(|h| h.lookup_uuid(&record.uuid).ok());
            record.active = domain.is_some_and(|domain| domain.is_active().unwrap_or(false));
        }
        records
    }

    fn heartbeat(&self) -> Heartbeat {
        let (memory_total_mib, memory_free_mib) = doctor::memory_mib();
        Heartbeat {
            seq: 0,
            memory_total_mib,
            memory_free_mib,
            inventory: None,
            primaries: lock(&self.primaries).values().filter(|p| p.is_running()).map(Primary::status).collect(),
            shadows: self.shadows.statuses(),
        }
    }

    fn inventory(&self) -> Option<Arc<Inventory>> {
        lock(&self.inventory).clone()
    }
}

impl Agent {
    /// May libvirt start this guest here? Asked by the hook.
    fn start_allowed(&self, uuid: &str) -> Result<(), StartRefusal> {
        let Some(record) = self.records.get(uuid) else { return Ok(()) };
        let name = &record.domain;
        match record.role {
            Role::Retired => Err(StartRefusal::never(format!(
                "guest {name} was taken over by another host (term {term}); look with `virt-shadow info {name}`. To bring \
                 it back have a shadow of it made here with `virt-shadow enable {name} --on {host}`, then `virt-shadow \
                 switchover {name} --to {host}`",
                term = record.term,
                host = self.config.host
            ))),
            Role::Shadow => Err(StartRefusal::never(format!(
                "this host keeps the shadow of guest {name}, whose primary runs elsewhere; \
                 `virt-shadow switchover {name} --to {}` moves it here",
                self.config.host
            ))),
            Role::Primary => match *lock(&self.welcomed_at) {
                Some(at) if at.elapsed() >= SETTLE_AFTER_WELCOME => Ok(()),
                _ => Err(StartRefusal::not_yet(format!(
                    "guest {name} is protected and the manager has not yet said that this host may still run it; \
                     start the manager, then start the guest again"
                ))),
            },
        }
    }
}

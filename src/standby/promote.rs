//! Promotion: a waiting shadow becomes the guest.
//!
//! ```text
//! check state, record ──> write the stream ──> QEMU loads ──> guest runs ──> verify ──> announce, define, clean up
//!                     `── nothing can be taken back from here on: a QEMU loads once
//! ```
//! Never is success reported without QEMU's word that it loaded: a QEMU told to run before it has anything to run
//! says yes, and libvirt then shows it running.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::announce::announce;
use super::error::{Result, StandbyError};
use super::feed;
use super::record::{self, Phase, Record};
use super::shadow::{Adopted, Shadow, WAITING};
use crate::hypervisor::xml::{GuestDefinition, Interface, clean_persistent_xml};
use crate::hypervisor::{Domain, DomainState, Hypervisor, XmlKind};

/// How long a load may take; the slowest ones seen took half a second on a busy host.
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pauses between two looks at libvirt's state, short at first.
const FIRST_LOOKS: Duration = Duration::from_micros(200);
const LATER_LOOKS: Duration = Duration::from_millis(2);
const LOOKS_GROW_AFTER: Duration = Duration::from_millis(60);
/// How often QEMU itself is asked while it loads; asking waits for its main loop.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// A guest that runs (or is paused, as it was) where its shadow waited.
#[derive(Debug, Clone, Default)]
pub struct Promotion {
    pub uuid: String,
    pub name: String,
    pub timings: Timings,
    /// What did not work although the guest is there: announcement, persistent definition.
    pub warnings: Vec<String>,
}

/// Spans in microseconds. All but `announce_us`, `define_us` and `total_us` count from the start of the promotion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Until the whole stream had been handed to QEMU.
    pub written_us: u64,
    /// Until libvirt showed the guest running (or QEMU said that a paused one is loaded).
    pub running_us: u64,
    /// Until QEMU had confirmed the load.
    pub verified_us: u64,
    pub announce_us: u64,
    pub define_us: u64,
    pub total_us: u64,
}

impl Shadow {
    /// Starts the guest from the image and `device_state`, the bytes QEMU's `xen-save-devices-state` wrote at the
    /// same cut. With `running` false it stays paused, as it was when it was cut.
    ///
    /// `hypervisor` is the connection of this moment. If this fails before anything was written the shadow still
    /// waits and [`Shadow::adopt`] finds it; after [`StandbyError::NotLoaded`] it is of no more use and
    /// [`Shadow::remove`] clears it away.
    pub fn promote(mut self, hypervisor: &Arc<Hypervisor>, device_state: &[u8], running: bool) -> Result<Promotion> {
        let began = Instant::now();
        let elapsed_us = || micros(began.elapsed());
        let name = self.record.name.clone();
        let stream = feed::incoming_stream(device_state, &self.machine)
            .map_err(|reason| StandbyError::DeviceState { guest: name.clone(), reason })?;
        if !Arc::ptr_eq(hypervisor, &self.hypervisor) {
            self.domain = hypervisor.lookup_uuid(&self.record.uuid)?;
        }
        if let Some(reason) = self.problem() {
            return Err(StandbyError::NotWaiting { guest: name, reason });
        }
        if !running {
            feed::disarm_start(&self.domain)?;
        }
        self.record.phase = Phase::Promoting;
        self.write_record()?;
        let Self { domain, record, run_dir, image, feed, interfaces, .. } = self;

        feed.send(&stream)
            .map_err(|source| not_loaded(&domain, format!("its state could not be written: {source}")))?;
        let mut timings = Timings { written_us: elapsed_us(), ..Timings::default() };
        let deadline = began + LOAD_TIMEOUT;
        if running {
            timings.running_us = wait_running(&domain, &record, began, deadline)?;
        } else {
            timings.running_us = wait_loaded(&domain, &record, "paused", began, deadline)?;
        }
        timings.verified_us = elapsed_us();
        // The guest runs; from here on nothing is urgent and nothing is fatal.
        let mut promotion = finish(hypervisor, &domain, &record, &run_dir, &interfaces, timings);
        drop(image);
        promotion.timings.total_us = elapsed_us();
        Ok(promotion)
    }
}

/// Brings to an end what an agent that died left half done: a shadow whose record says that it was being promoted.
pub(super) fn complete(hypervisor: &Arc<Hypervisor>, record: Record, run_dir: &Path) -> Result<Adopted> {
    let began = Instant::now();
    let domain = match hypervisor.lookup_uuid(&record.uuid) {
        Ok(domain) if record.process.is_alive() && domain.process()? == record.process => domain,
        Err(error) if error.is_disconnect() => return Err(error.into()),
        // Its QEMU is gone, whatever it was.
        _ => {
            Shadow::remove(hypervisor, &record.uuid, run_dir)?;
            return Ok(Adopted::None);
        }
    };
    // The whole stream may have been on its way when the agent died.
    while domain.run_state()? == WAITING {
        if let Some(reason) = load_failure(&domain)? {
            tracing::error!(guest = record.name, reason, "a promotion had failed when the agent ended");
            Shadow::remove(hypervisor, &record.uuid, run_dir)?;
            return Ok(Adopted::None);
        }
        if began.elapsed() > LOAD_TIMEOUT {
            tracing::error!(guest = record.name, "a promotion was cut off in the middle of its device state");
            Shadow::remove(hypervisor, &record.uuid, run_dir)?;
            return Ok(Adopted::None);
        }
        std::thread::sleep(ASK_EVERY);
    }
    let interfaces = match GuestDefinition::parse(&domain.xml(XmlKind::Live)?) {
        Ok(definition) => definition.interfaces,
        Err(source) => return Err(StandbyError::Definition { guest: record.name, source }),
    };
    let timings = Timings { verified_us: micros(began.elapsed()), ..Timings::default() };
    Ok(Adopted::Promoted(finish(hypervisor, &domain, &record, run_dir, &interfaces, timings)))
}

/// Announces the guest, gives it its persistent definition, and forgets that it was a shadow.
fn finish(
    hypervisor: &Hypervisor,
    domain: &Domain,
    record: &Record,
    run_dir: &Path,
    interfaces: &[Interface],
    mut timings: Timings,
) -> Promotion {
    let began = Instant::now();
    let mut warnings = announce(domain, interfaces);
    timings.announce_us = micros(began.elapsed());

    let began = Instant::now();
    if let Err(reason) = define(hypervisor, record) {
        warnings.push(format!("the guest runs but has no persistent definition on this host: {reason}"));
    }
    timings.define_us = micros(began.elapsed());

    feed::forget_kept_end(domain);
    if let Err(error) = record::forget(run_dir, &record.uuid) {
        warnings.push(format!("the record of the former shadow stays in {}: {error}", run_dir.display()));
    }
    Promotion { uuid: record.uuid.clone(), name: record.name.clone(), timings, warnings }
}

fn define(hypervisor: &Hypervisor, record: &Record) -> std::result::Result<(), String> {
    let Some(inactive) = &record.inactive_xml else { return Ok(()) };
    let clean = clean_persistent_xml(&record.live_xml, Some(inactive)).map_err(|error| error.to_string())?;
    hypervisor.define_xml(&clean).map(drop).map_err(|error| error.to_string())
}

/// Waits until libvirt shows the guest running and QEMU confirms that it is; returns when libvirt did, microseconds
/// after `began`.
fn wait_running(domain: &Domain, record: &Record, began: Instant, deadline: Instant) -> Result<u64> {
    let mut asked = Instant::now();
    loop {
        let (state, _) = domain.state()?;
        if state == DomainState::Running {
            let shown_us = micros(began.elapsed());
            if is_loaded(domain, "running")? {
                return Ok(shown_us);
            }
            // An operator's resume of the waiting shadow made libvirt show it running before it is.
            return wait_loaded(domain, record, "running", began, deadline);
        }
        if asked.elapsed() > ASK_EVERY {
            asked = Instant::now();
            check_loading(domain, record, state, deadline)?;
        }
        std::thread::sleep(if began.elapsed() < LOOKS_GROW_AFTER { FIRST_LOOKS } else { LATER_LOOKS });
    }
}

/// Waits until QEMU says that the load is complete and its state is `wanted`; returns microseconds after `began`.
fn wait_loaded(domain: &Domain, record: &Record, wanted: &str, began: Instant, deadline: Instant) -> Result<u64> {
    loop {
        if is_loaded(domain, wanted)? {
            return Ok(micros(began.elapsed()));
        }
        check_loading(domain, record, DomainState::Paused, deadline)?;
        std::thread::sleep(LATER_LOOKS);
    }
}

/// Whether QEMU says that its load is complete and its state is `wanted`.
fn is_loaded(domain: &Domain, wanted: &str) -> Result<bool> {
    Ok(domain.run_state()? == wanted && migration(domain)?.0 == "completed")
}

/// An error if the load has failed or takes too long.
fn check_loading(domain: &Domain, record: &Record, state: DomainState, deadline: Instant) -> Result<()> {
    if matches!(state, DomainState::ShutOff | DomainState::Crashed) || !record.process.is_alive() {
        return Err(not_loaded(domain, "its QEMU ended".into()));
    }
    if let Some(reason) = load_failure(domain)? {
        return Err(not_loaded(domain, reason));
    }
    if Instant::now() > deadline {
        let waited = LOAD_TIMEOUT.as_secs();
        return Err(not_loaded(domain, format!("QEMU has not loaded its state within {waited} s")));
    }
    Ok(())
}

/// QEMU's reason for a failed load, if it failed.
fn load_failure(domain: &Domain) -> Result<Option<String>> {
    let (status, reason) = migration(domain)?;
    Ok((status == "failed").then(|| reason.unwrap_or_else(|| "QEMU gives no reason".into())))
}

/// Status of the incoming load, and the error if there was one.
fn migration(domain: &Domain) -> Result<(String, Option<String>)> {
    let reply = domain.qmp_call("query-migrate", Value::Null)?;
    let text = |name| reply.get(name).and_then(Value::as_str).map(str::to_owned);
    Ok((text("status").unwrap_or_default(), text("error-desc")))
}

fn not_loaded(domain: &Domain, reason: String) -> StandbyError {
    let log = PathBuf::from(format!("/var/log/libvirt/qemu/{}.log", domain.name()));
    StandbyError::NotLoaded { guest: domain.name().to_owned(), reason, log }
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

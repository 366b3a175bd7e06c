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
use super::image::Image;
use super::record::{self, Phase, Record};
use super::shadow::{Adopted, Shadow, WAITING};
use crate::capture::priority::{self, Preferred};
use crate::hypervisor::xml::{GuestDefinition, Interface, clean_persistent_xml, with_disk_files};
use crate::hypervisor::{self, Domain, DomainState, Hypervisor, HypervisorError, XmlKind};
use crate::packet::{Outcome, replay};

/// How long a load may take; the slowest ones seen took half a second on a busy host.
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pauses between two looks at libvirt's state, short at first.
const FIRST_LOOKS: Duration = Duration::from_micros(200);
const LATER_LOOKS: Duration = Duration::from_millis(2);
const LOOKS_GROW_AFTER: Duration = Duration::from_millis(60);
/// How often QEMU itself is asked while it loads; asking waits for its main loop.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// How long a libvirtd that went away after the state had been written may take to come back.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
const RECONNECT_EVERY: Duration = Duration::from_millis(20);
/// QEMU begins to read as soon as there is anything; one that has not by then got nothing.
const UNTOUCHED_AFTER: Duration = Duration::from_millis(500);

/// A guest that runs (or is paused, as it was) where its shadow waited.
#[derive(Debug, Clone, Default)]
pub struct Promotion {
    pub uuid: String,
    pub name: String,
    pub timings: Timings,
    /// Frames that had been on their way to the guest and were given to it.
    pub replayed: usize,
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

/// A promoted guest that runs, but is not announced yet, nor defined for good.
#[derive(Debug)]
pub struct Started {
    watch: LoadWatch,
    run_dir: PathBuf,
    interfaces: Vec<Interface>,
    image: Image,
    timings: Timings,
    running: bool,
}

impl Started {
    /// Gives the guest the frames that were on their way to it, announces it, gives it its persistent definition and
    /// forgets that it was a shadow. Nothing of it is fatal: the guest runs.
    pub fn finish(self, inbound: &[Vec<u8>]) -> Promotion {
        let Self { watch, run_dir, interfaces, image, timings, running } = self;
        // First of all: clients wait, and its answers announce it, too.
        let devices = interfaces.iter().filter_map(|nic| Some((&*nic.mac, nic.host_device.as_deref()?)));
        let replay = if running && !inbound.is_empty() { replay(devices, inbound) } else { Outcome::default() };
        let mut promotion = finish(&watch.hypervisor, &watch.domain, &watch.record, &run_dir, &interfaces, timings);
        // What the guest had been told to be on disk may still be in this host's memory only.
        if let Err(error) = image.sync_disks() {
            promotion.warnings.push(error.to_string());
        }
        drop(image);
        promotion.replayed = replay.replayed;
        if let Some(problem) = replay.problem {
            promotion.warnings.push(format!("not all frames that were on their way to it were replayed: {problem}"));
        }
        promotion.timings.total_us = micros(watch.began.elapsed());
        promotion
    }
}

impl Shadow {
    /// Starts the guest from the image and `device_state`, the bytes QEMU's `xen-save-devices-state` wrote at the
    /// same cut. With `running` false it stays paused, as it was when it was cut.
    ///
    /// The guest runs when this returns; what is left to do is [`Started::finish`]'s, and must be done soon.
    ///
    /// `hypervisor` is the connection of this moment. If this fails before anything was written the shadow still
    /// waits and [`Shadow::adopt`] finds it; after [`StandbyError::NotLoaded`] it is of no more use and
    /// [`Shadow::remove`] clears it away; after [`StandbyError::OutcomeUnknown`] [`Shadow::adopt`] tells what became
    /// of it.
    pub fn promote(mut self, hypervisor: &Arc<Hypervisor>, device_state: &[u8], running: bool) -> Result<Started> {
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
        // The guest stands still until QEMU has loaded: other work of this host waits.
        let _hurry = (Preferred::thread(record.process.pid), Preferred::this_thread());

        let mut watch = LoadWatch::new(Arc::clone(hypervisor), domain, record, began);
        let sent = feed.send(&stream);
        sent.map_err(|source| watch.not_loaded(format!("its state could not be written: {source}")))?;
        let mut timings = Timings { written_us: elapsed_us(), ..Timings::default() };
        timings.running_us = if running { watch.wait_running()? } else { watch.wait_loaded("paused")? };
        timings.verified_us = elapsed_us();
        Ok(Started { watch, run_dir, interfaces, image, timings, running })
    }
}

/// Brings to an end what an agent that died left half done: a shadow whose record says that it was being promoted.
pub(super) fn complete(hypervisor: &Arc<Hypervisor>, mut record: Record, run_dir: &Path) -> Result<Adopted> {
    let began = Instant::now();
    priority::usual(record.process.pid);
    let give_up = |reason: &str| {
        tracing::error!(guest = record.name, reason, "the promotion that was under way has failed");
        Shadow::clear_away(hypervisor, &record.uuid, run_dir).map(|()| Adopted::None)
    };
    let domain = match hypervisor.lookup_uuid(&record.uuid) {
        Ok(domain) if record.process.is_alive() && domain.process()? == record.process => domain,
        Err(error) if error.is_disconnect() => return Err(error.into()),
        _ => return give_up("its QEMU has ended"),
    };
    loop {
        let state = domain.run_state()?;
        if state != WAITING {
            break;
        }
        let (status, reason) = migration(&domain)?;
        match status.as_str() {
            "failed" => return give_up(reason.as_deref().unwrap_or("QEMU gives no reason")),
            // The agent died before it wrote anything.
            "setup" if began.elapsed() > UNTOUCHED_AFTER => {
                record.phase = Phase::Waiting;
                let shadow = Shadow::reopen(hypervisor, record, run_dir)?;
                shadow.write_record()?;
                return Ok(Adopted::Waiting(Box::new(shadow)));
            }
            _ if began.elapsed() > LOAD_TIMEOUT => return give_up("its device state was written in part only"),
            _ => std::thread::sleep(ASK_EVERY),
        }
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
    Promotion { uuid: record.uuid.clone(), name: record.name.clone(), timings, replayed: 0, warnings }
}

fn define(hypervisor: &Hypervisor, record: &Record) -> std::result::Result<(), String> {
    let Some(inactive) = &record.inactive_xml else { return Ok(()) };
    let clean = clean_persistent_xml(&record.live_xml, Some(inactive))
        .and_then(|xml| with_disk_files(&xml, &record.disks))
        .map_err(|error| error.to_string())?;
    hypervisor.define_xml(&clean).map(drop).map_err(|error| error.to_string())
}

/// Watches a shadow that has got its state, through whatever connection there is: the state cannot be taken back, so
/// a libvirtd that ends in this moment must not turn a running guest into a failure.
#[derive(Debug)]
struct LoadWatch {
    hypervisor: Arc<Hypervisor>,
    domain: Domain,
    record: Record,
    began: Instant,
}

impl LoadWatch {
    fn new(hypervisor: Arc<Hypervisor>, domain: Domain, record: Record, began: Instant) -> Self {
        Self { hypervisor, domain, record, began }
    }

    /// Waits until libvirt shows the guest running and QEMU confirms that it is; returns when libvirt did,
    /// microseconds after the start.
    fn wait_running(&mut self) -> Result<u64> {
        let mut asked = Instant::now();
        loop {
            let (state, _) = self.ask(Domain::state)?;
            if state == DomainState::Running {
                let shown_us = micros(self.began.elapsed());
                if self.is_loaded("running")? {
                    return Ok(shown_us);
                }
                // An operator's resume of the waiting shadow made libvirt show it running before it is.
                return self.wait_loaded("running");
            }
            if matches!(state, DomainState::ShutOff | DomainState::Crashed) {
                return Err(self.not_loaded("its QEMU ended".into()));
            }
            if asked.elapsed() > ASK_EVERY {
                asked = Instant::now();
                self.check_loading()?;
            }
            std::thread::sleep(if self.began.elapsed() < LOOKS_GROW_AFTER { FIRST_LOOKS } else { LATER_LOOKS });
        }
    }

    /// Waits until QEMU says that the load is complete and its state is `wanted`; returns microseconds after the
    /// start.
    fn wait_loaded(&mut self, wanted: &str) -> Result<u64> {
        loop {
            if self.is_loaded(wanted)? {
                return Ok(micros(self.began.elapsed()));
            }
            self.check_loading()?;
            std::thread::sleep(LATER_LOOKS);
        }
    }

    /// Whether QEMU says that its load is complete and its state is `wanted`.
    fn is_loaded(&mut self, wanted: &str) -> Result<bool> {
        Ok(self.ask(Domain::run_state)? == wanted && self.ask(migration)?.0 == "completed")
    }

    /// An error if the load has failed or takes too long.
    fn check_loading(&mut self) -> Result<()> {
        if !self.record.process.is_alive() {
            return Err(self.not_loaded("its QEMU ended".into()));
        }
        if let (status, reason) = self.ask(migration)?
            && status == "failed"
        {
            return Err(self.not_loaded(reason.unwrap_or_else(|| "QEMU gives no reason".into())));
        }
        if self.began.elapsed() > LOAD_TIMEOUT {
            let waited = LOAD_TIMEOUT.as_secs();
            return Err(self.not_loaded(format!("QEMU has not loaded its state within {waited} s")));
        }
        Ok(())
    }

    /// Asks libvirt or QEMU something, connecting again as long as there is time.
    fn ask<T>(&mut self, question: impl Fn(&Domain) -> hypervisor::Result<T>) -> Result<T> {
        let mut outcome = question(&self.domain);
        while let Err(error) = &outcome {
            // While libvirtd finds its domains again after a start, ours may not be among them yet.
            let passing = error.is_disconnect() || matches!(error, HypervisorError::NotFound { .. });
            if !passing || !self.record.process.is_alive() {
                break;
            }
            if self.began.elapsed() > CONNECT_TIMEOUT {
                let guest = self.record.name.clone();
                return Err(StandbyError::OutcomeUnknown { guest, reason: error.to_string() });
            }
            std::thread::sleep(RECONNECT_EVERY);
            outcome = Hypervisor::connect(self.hypervisor.uri()).and_then(|connected| {
                self.domain = connected.lookup_uuid(&self.record.uuid)?;
                self.hypervisor = connected;
                question(&self.domain)
            });
        }
        match outcome {
            Err(_) if !self.record.process.is_alive() => Err(self.not_loaded("its QEMU ended".into())),
            outcome => Ok(outcome?),
        }
    }

    fn not_loaded(&self, reason: String) -> StandbyError {
        let guest = self.record.name.clone();
        let log = PathBuf::from(format!("/var/log/libvirt/qemu/{guest}.log"));
        StandbyError::NotLoaded { guest, reason, log }
    }
}

/// Status of the incoming load, and the error if there was one.
fn migration(domain: &Domain) -> hypervisor::Result<(String, Option<String>)> {
    let reply = domain.qmp_call("query-migrate", Value::Null)?;
    let text = |name| reply.get(name).and_then(Value::as_str).map(str::to_owned);
    Ok((text("status").unwrap_or_default(), text("error-desc")))
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

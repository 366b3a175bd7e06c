//! The peer: QEMU's own migration of the guest, multifd with zstd, to a reader that throws all away.
//!
//! Without a return path a migration stream goes one way only, so anybody who accepts its connections will do. The guest
//! is stopped for it: then all that QEMU's process does is migrate, each page goes once, and QEMU's passes over a running
//! guest, which send less at each look, are spared it. Pages and bytes are those that QEMU tells, zero pages left out;
//! processor time is that of QEMU's process. Then the guest goes on.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::{Bench, cpu_s_in};
use crate::hypervisor::{Domain, Hypervisor, HypervisorError};
use crate::lab::error::{LabError, Result};
use crate::lab::{Lab, namespace};

const THROUGH_WITHIN: Duration = Duration::from_secs(120);
const CANCELLED_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(50);
const CHANNELS: u32 = 2;
/// Never the limit here.
const BANDWIDTH: u64 = 10_000_000_000;

/// What QEMU made of a guest's memory.
pub(super) struct Migrated {
    /// Gigabytes of pages that are not zero, a second of processor time.
    pub(super) gb_s: f64,
    pub(super) ratio: f64,
}

pub(super) fn migrate(bench: &Bench, lab: &Lab, host: &str, guest: &str) -> Result<Migrated> {
    bench.say(&format!("{guest}: migrated by QEMU into nothing, with multifd and zstd"))?;
    let hypervisor = Hypervisor::connect(&lab.libvirt_uri(host)).map_err(failed)?;
    let domain = hypervisor.lookup(guest).map_err(failed)?;
    let sink = Sink::open(lab, host)?;
    let call = |execute: &str, arguments: Value| domain.qmp_call(execute, arguments).map_err(failed);
    call("migrate-set-capabilities", multifd(true))?;
    let parameters = json!({"multifd-channels": CHANNELS, "multifd-compression": "zstd", "multifd-zstd-level": 1,
                            "max-bandwidth": BANDWIDTH});
    call("migrate-set-parameters", parameters)?;
    call("stop", Value::Null)?;
    let cpu_before = cpu_s(lab, host, guest);
    let started = call("migrate", json!({"uri": format!("tcp:{}:{}", Ipv4Addr::LOCALHOST, sink.port)}));
    let state = started.and_then(|_| wait(bench, &domain));
    let cpu_after = cpu_s(lab, host, guest);
    // Whatever came of it, the guest goes on.
    let restored = restore(&domain);
    let (state, cpu) = (state?, cpu_after? - cpu_before?);
    restored.map_err(failed)?;
    let number = |name: &str| state["ram"][name].as_u64().unwrap_or(0);
    let (raw, sent) = (number("normal") * vmsync::units::PAGE_SIZE_U64, number("transferred"));
    if raw == 0 || sent == 0 || cpu <= 0.0 {
        return Err(LabError::Product(format!("QEMU tells nothing of its migration: {state}")));
    }
    Ok(Migrated { gb_s: raw as f64 / 1e9 / cpu, ratio: raw as f64 / sent as f64 })
}

fn failed(error: HypervisorError) -> LabError {
    LabError::Product(format!("migration by QEMU: {error}"))
}

fn multifd(on: bool) -> Value {
    json!({"capabilities": [{"capability": "multifd", "state": on}]})
}

/// Waits until all memory has gone; what QEMU tells of it then.
fn wait(bench: &Bench, domain: &Domain) -> Result<Value> {
    let began = Instant::now();
    loop {
        let state = domain.qmp_call("query-migrate", Value::Null).map_err(failed)?;
        match state["status"].as_str() {
            Some("completed") => return Ok(state),
            Some("setup" | "active" | "device") if began.elapsed() < THROUGH_WITHIN => bench.sleep(LOOK_EVERY)?,
            _ => return Err(LabError::Product(format!("the migration by QEMU went wrong: {state}"))),
        }
    }
}

/// Processor time of the guest's QEMU so far, of threads that have ended, too.
fn cpu_s(lab: &Lab, host: &str, guest: &str) -> Result<f64> {
    let script = format!("cat /proc/$(cat /run/libvirt/qemu/{guest}.pid)/stat");
    let output = lab.exec(host, &["sh", "-c", &script])?;
    let text = String::from_utf8_lossy(&output.stdout);
    cpu_s_in(&text).ok_or_else(|| LabError::Product(format!("no QEMU of {guest} runs")))
}

/// Ends the migration if it is under way, takes back what was set for it, and has the guest run.
fn restore(domain: &Domain) -> Result<(), HypervisorError> {
    let began = Instant::now();
    domain.qmp_call("migrate_cancel", Value::Null)?;
    while began.elapsed() < CANCELLED_WITHIN {
        let state = domain.qmp_call("query-migrate", Value::Null)?;
        if !matches!(state["status"].as_str(), Some("setup" | "active" | "device" | "cancelling")) {
            break;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let taken_back = domain.qmp_call("migrate-set-capabilities", multifd(false));
    domain.qmp_call("cont", Value::Null)?;
    taken_back.map(drop)
}

/// Accepts what connects within the host's network, and throws away what comes.
struct Sink {
    port: u16,
    stop: Arc<AtomicBool>,
}

impl Sink {
    fn open(lab: &Lab, host: &str) -> Result<Self> {
        let netns = namespace::netns_path(&lab.name, host);
        let listener = namespace::enter(&netns, || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?
            .map_err(LabError::system("listen for a migration"))?;
        let port = listener.local_addr().map_err(LabError::system("listen for a migration"))?.port();
        listener.set_nonblocking(true).map_err(LabError::system("listen for a migration"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    // Each ends when QEMU closes it.
                    Ok((stream, _)) => drop(std::thread::spawn(move || discard(stream))),
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            }
        });
        Ok(Self { port, stop })
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn discard(mut stream: std::net::TcpStream) {
    let mut buffer = vec![0; 1 << 20];
    // An accepted connection blocks, whatever its listener does.
    if stream.set_nonblocking(false).is_ok() {
        while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}
    }
}

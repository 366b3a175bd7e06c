//! The peer: QEMU's own migration of the running guest, multifd with zstd, to a reader that throws all away.
//!
//! Without a return path a migration stream goes one way only, so anybody who accepts its connections will do. The first
//! pass over all memory is not counted: it has nothing to do with epochs. Of the passes after it QEMU tells pages and
//! bytes, and `/proc` the processor time of QEMU's migration threads. Then the migration is cancelled, and the guest
//! goes on.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::Bench;
use crate::hypervisor::{Domain, Hypervisor, HypervisorError};
use crate::lab::error::{LabError, Result};
use crate::lab::{Lab, namespace};

const FIRST_PASS_WITHIN: Duration = Duration::from_secs(60);
const MEASURE_FOR: Duration = Duration::from_secs(15);
const CANCELLED_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
const CHANNELS: u32 = 2;
/// Never the limit here.
const BANDWIDTH: u64 = 10_000_000_000;
/// QEMU never gets this little into its last pause, so the migration of a guest that works goes on.
const DOWNTIME_MS: u32 = 1;

/// What QEMU made of a guest's dirty pages.
pub(super) struct Migrated {
    /// Pages, zero ones too, in gigabytes a second of processor time.
    pub(super) gb_s: f64,
    pub(super) ratio: f64,
    pub(super) passes: u64,
}

/// `None`: the guest changes so little that it was through before there was anything to measure.
pub(super) fn migrate(bench: &Bench, lab: &Lab, host: &str, guest: &str) -> Result<Option<Migrated>> {
    bench.say(&format!("{guest}: migrated by QEMU into nothing, with multifd and zstd"))?;
    let failed = |error: HypervisorError| LabError::Product(format!("migration by QEMU: {error}"));
    let hypervisor = Hypervisor::connect(&lab.libvirt_uri(host)).map_err(failed)?;
    let domain = hypervisor.lookup(guest).map_err(failed)?;
    let call = |execute: &str, arguments: Value| domain.qmp_call(execute, arguments).map_err(failed);
    let sink = Sink::open(lab, host)?;
    let capability = json!({"capabilities": [{"capability": "multifd", "state": true}]});
    call("migrate-set-capabilities", capability)?;
    call(
        "migrate-set-parameters",
        json!({"multifd-channels": CHANNELS, "multifd-compression": "zstd", "multifd-zstd-level": 1,
               "max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME_MS}),
    )?;
    call("migrate", json!({"uri": format!("tcp:{}:{}", Ipv4Addr::LOCALHOST, sink.port)}))?;
    let result = measure(bench, &domain, &Place { lab, host, guest });
    // Whatever came of it, the guest goes on.
    let restored = restore(&domain);
    let migrated = result?;
    restored.map_err(failed)?;
    Ok(migrated)
}

fn measure(bench: &Bench, domain: &Domain, place: &Place<'_>) -> Result<Option<Migrated>> {
    let failed = |error: HypervisorError| LabError::Product(format!("migration by QEMU: {error}"));
    let began = Instant::now();
    let look = || domain.qmp_call("query-migrate", Value::Null).map_err(failed);
    let first = loop {
        let state = look()?;
        if state["status"] == "completed" {
            return Ok(None);
        }
        if !is_active(&state) {
            return Err(LabError::Product(format!("the migration by QEMU ended: {state}")));
        }
        if number(&state, "dirty-sync-count") >= 2 {
            break Sample::of(&state, place)?;
        }
        if began.elapsed() > FIRST_PASS_WITHIN {
            return Err(LabError::Product(format!("QEMU's first pass over the memory takes too long: {state}")));
        }
        bench.sleep(LOOK_EVERY)?;
    };
    let (began, mut last) = (Instant::now(), first);
    while began.elapsed() < MEASURE_FOR {
        bench.sleep(SAMPLE_EVERY)?;
        let state = look()?;
        if !is_active(&state) {
            break;
        }
        last = Sample::of(&state, place)?;
    }
    let (pages, bytes) = (last.pages.saturating_sub(first.pages), last.bytes.saturating_sub(first.bytes));
    let raw = pages as f64 * vmsync::PAGE_SIZE as f64;
    Ok((last.cpu_s > first.cpu_s && pages > 0).then(|| Migrated {
        gb_s: raw / 1e9 / (last.cpu_s - first.cpu_s),
        ratio: raw / bytes.max(1) as f64,
        passes: last.passes.saturating_sub(first.passes),
    }))
}

#[derive(Clone, Copy)]
struct Sample {
    pages: u64,
    bytes: u64,
    passes: u64,
    cpu_s: f64,
}

impl Sample {
    fn of(state: &Value, place: &Place<'_>) -> Result<Self> {
        Ok(Self {
            pages: number(state, "normal") + number(state, "duplicate"),
            bytes: number(state, "transferred"),
            passes: number(state, "dirty-sync-count"),
            cpu_s: place.migration_cpu_s()?,
        })
    }
}

fn number(state: &Value, name: &str) -> u64 {
    state["ram"][name].as_u64().unwrap_or(0)
}

fn is_active(state: &Value) -> bool {
    matches!(state["status"].as_str(), Some("setup" | "active" | "device"))
}

/// A guest, and the host it is on.
struct Place<'a> {
    lab: &'a Lab,
    host: &'a str,
    guest: &'a str,
}

impl Place<'_> {
    /// Processor time of QEMU's threads that migrate, and of no others: not the guest's own.
    fn migration_cpu_s(&self) -> Result<f64> {
        // "live_migration" and "multifdsend_0" in older ones, "mig/src/main" and "mig/src/send_0" in newer ones.
        // Nanoseconds on a processor come first.
        let script = format!(
            "for t in /proc/$(cat /run/libvirt/qemu/{}.pid)/task/*; do read -r name < $t/comm || continue; \
             case \"$name\" in live_migr*|multifd*|mig/*) cut -d' ' -f1 $t/schedstat;; esac; done",
            self.guest
        );
        let output = self.lab.exec(self.host, &["sh", "-c", &script])?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(|line| line.parse::<f64>().ok()).sum::<f64>() / 1e9)
    }
}

/// Ends the migration, takes back what was set for it, and has the guest run.
fn restore(domain: &Domain) -> Result<(), HypervisorError> {
    let began = Instant::now();
    domain.qmp_call("migrate_cancel", Value::Null)?;
    let status = loop {
        let state = domain.qmp_call("query-migrate", Value::Null)?;
        let status = state["status"].as_str().unwrap_or_default().to_owned();
        if !matches!(status.as_str(), "setup" | "active" | "device" | "cancelling")
            || began.elapsed() > CANCELLED_WITHIN
        {
            break status;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let off = json!({"capabilities": [{"capability": "multifd", "state": false}]});
    let taken_back = domain.qmp_call("migrate-set-capabilities", off);
    if status == "completed" {
        // An idle guest got through; it waits for its copy, which nobody made.
        domain.qmp_call("cont", Value::Null)?;
    }
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

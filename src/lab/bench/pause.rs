//! What a cut costs the guest: its pause, as QEMU's STOP and RESUME events tell it, and the work it gets done.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Bench, Row, memcpy_ms, percentile};
use crate::hypervisor::{Hypervisor, HypervisorError, HypervisorEvent};
use crate::lab::error::{LabError, Result};
use crate::lab::fleet::Fleet;
use crate::lab::{GuestClient, GuestOptions, Lab};

const INTERVAL: Duration = Duration::from_millis(50);
/// Cuts by QEMU alone: ten seconds.
const CUTS_ALONE: u32 = 200;
const MEASURE_FOR: Duration = Duration::from_secs(20);
const SIZES_GIB: [u32; 3] = [1, 2, 4];
const FILLED_WITHIN: Duration = Duration::from_secs(400);
/// A guest that computes, rewrites 4,000 pages a second and checks them.
const WORKLOAD: &str = "busy:4000";

/// Units of CPU work a second of the guest's own clock.
fn work_rate(bench: &Bench, client: &mut GuestClient) -> Result<f64> {
    let failed = LabError::system::<std::io::Error>;
    let first = client.status().map_err(failed("ask the guest"))?;
    bench.sleep(MEASURE_FOR)?;
    let last = client.status().map_err(failed("ask the guest"))?;
    Ok((last.work - first.work) as f64 * 1000.0 / (last.uptime_ms - first.uptime_ms).max(1) as f64)
}

pub(super) fn run(bench: &Bench) -> Result<()> {
    let lab = bench.lab(3)?;
    let fleet = Fleet::of(&lab)?;
    fleet.wait_hosts(3, Duration::from_secs(30))?;
    bench.say("a guest of 1 GiB boots; first it works unprotected")?;
    let guest = bench.guest(&lab, "busy", "host1", 1024, WORKLOAD)?;
    let mut client = lab.guest_client(guest.ip)?;
    let unprotected = work_rate(bench, &mut client)?;

    fleet.enable("busy", "host1", 1, INTERVAL)?;
    fleet.wait_protected("busy", Duration::from_secs(120))?;
    // From here on a fresh set of pauses: those of the first copy are shown by the maximum.
    bench.say("now protected, an epoch every 50 ms")?;
    let protected = work_rate(bench, &mut client)?;
    let view = fleet.info("busy")?;
    let pause = view.capture.pause_us;
    let ms = |us: u64| us as f64 / 1e3;
    let copy_ms = memcpy_ms(view.capture.dirty_pages.mean as usize);
    bench.print(&Row::new("dirty pages an epoch", view.capture.dirty_pages.mean, "pages"));
    let share = protected / unprotected * 100.0;
    let row = Row::new("guest's own work while protected", share, "%").at_least(95.0);
    bench.print(&row.beside("units/s unprotected", unprotected));
    fleet.disable("busy")?;
    bench.sleep(Duration::from_secs(1))?;
    let again = work_rate(bench, &mut client)?;
    let (alone_p50, alone_p99) = qemu_alone(bench, &lab, "busy")?;
    let row = Row::new("pause p50, 1 GiB, 50 ms", ms(pause.p50), "ms").at_most(1.5);
    bench.print(&row.beside("ms QEMU alone: state to /dev/null", alone_p50));
    let row = Row::new("pause p99", ms(pause.p99), "ms").at_most(4.0);
    bench.print(&row.beside("ms QEMU alone", alone_p99));
    bench.print(&Row::new("memcpy of the same pages, the limit of a copy", copy_ms, "ms"));
    let row = Row::new("unprotected again (drift of the machine)", again / unprotected * 100.0, "%");
    bench.print(&row.beside("units/s", again));
    drop(client);
    peers(bench, &lab, guest.ip)?;
    drop(lab);
    sizes(bench)
}

/// Pauses of guests of several sizes that have written all of their memory and go on writing all over it: what grows is
/// the search for the pages written since the cut before.
fn sizes(bench: &Bench) -> Result<()> {
    let lab = bench.lab(2)?;
    let fleet = Fleet::of(&lab)?;
    fleet.wait_hosts(2, Duration::from_secs(30))?;
    let mut medians = Vec::new();
    for gib in SIZES_GIB {
        bench.say(&format!("a guest of {gib} GiB"))?;
        let (name, mib) = (format!("of{gib}gib"), gib * 1024);
        // The guest's system needs more for what tells of more pages.
        let system_mib = 128 + mib / 16;
        let workload = format!("dirty:2000:{}", mib - system_mib).parse().map_err(LabError::Product)?;
        let options = GuestOptions { memory_mib: mib, workload, balloon: false, ..GuestOptions::new(&name, "host1") };
        let guest = lab.guest(&options, false)?;
        // It answers when it has written all of its region once.
        let filled_by = Instant::now() + FILLED_WITHIN;
        while let Err(error) = lab.guest_client(guest.ip) {
            if Instant::now() >= filled_by {
                return Err(error);
            }
            bench.sleep(Duration::from_millis(500))?;
        }
        let (alone, _) = qemu_alone(bench, &lab, &name)?;
        fleet.enable(&name, "host1", 1, INTERVAL)?;
        fleet.wait_protected(&name, Duration::from_secs(300))?;
        bench.sleep(MEASURE_FOR)?;
        let pause = fleet.info(&name)?.capture.pause_us;
        let p50 = pause.p50 as f64 / 1e3;
        bench.print(
            &Row::new(format!("pause p50, {gib} GiB written all over"), p50, "ms").beside("ms QEMU alone", alone),
        );
        bench.print(&Row::new(format!("pause p99, {gib} GiB"), pause.p99 as f64 / 1e3, "ms"));
        medians.push((f64::from(gib), p50 - alone));
        fleet.disable(&name)?;
        lab.virsh("host1", &["destroy", &name])?;
    }
    let [(least, first), .., (most, last)] = medians[..] else { return Ok(()) };
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let each = (last - first) / (most - least);
    let row = Row::new("a GiB more adds to the pause", each, "ms");
    bench.print(&row.beside("ms times threads that search", each * threads));
    Ok(())
}

/// Pauses of the guests of one host, as QEMU's STOP and RESUME events tell them, whoever cuts.
pub(super) struct Watched {
    pub(super) hypervisor: Arc<Hypervisor>,
    seen: Arc<Mutex<(Option<u64>, Vec<u64>)>>,
}

impl Watched {
    pub(super) fn start(lab: &Lab, host: &str) -> std::result::Result<Self, HypervisorError> {
        let hypervisor = Hypervisor::connect(&lab.libvirt_uri(host))?;
        let seen: Arc<Mutex<(Option<u64>, Vec<u64>)>> = Arc::default();
        let sink = Arc::clone(&seen);
        hypervisor.subscribe(Arc::new(move |event| {
            if let HypervisorEvent::Monitor { event, time_us, .. } = event {
                let mut seen = sink.lock().unwrap_or_else(PoisonError::into_inner);
                match event.as_str() {
                    "STOP" => seen.0 = Some(time_us),
                    "RESUME" => {
                        let stopped = seen.0.take();
                        seen.1.extend(stopped.map(|at| time_us.saturating_sub(at)));
                    }
                    _ => {}
                }
            }
        }))?;
        Ok(Self { hypervisor, seen })
    }

    /// Those since the last call, in microseconds.
    pub(super) fn take(&self) -> Vec<u64> {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner).1)
    }
}

/// p50 and p99 of pauses in microseconds, in milliseconds.
pub(super) fn p50_and_p99(pauses: &[u64]) -> Result<(f64, f64)> {
    if pauses.is_empty() {
        return Err(LabError::Product("QEMU told of no pause".into()));
    }
    let pauses_ms: Vec<f64> = pauses.iter().map(|us| *us as f64 / 1e3).collect();
    Ok((percentile(&pauses_ms, 50), percentile(&pauses_ms, 99)))
}

/// The floor under every cut: how long QEMU itself stops the guest to write its device state, with nobody scanning or
/// copying. p50 and p99 in milliseconds.
pub(super) fn qemu_alone(bench: &Bench, lab: &Lab, guest: &str) -> Result<(f64, f64)> {
    let failed = |error: HypervisorError| LabError::Product(format!("the guest without protection: {error}"));
    bench.say("the same cuts by QEMU alone")?;
    let watched = Watched::start(lab, "host1").map_err(failed)?;
    let domain = watched.hypervisor.lookup(guest).map_err(failed)?;
    for _ in 0..CUTS_ALONE {
        let arguments = serde_json::json!({"filename": "/dev/null", "live": false});
        domain.qmp_call("xen-save-devices-state", arguments).map_err(failed)?;
        bench.sleep(INTERVAL)?;
    }
    p50_and_p99(&watched.take())
}

/// What libvirt itself offers to get a guest's state out: how long does the guest stand still?
fn peers(bench: &Bench, lab: &Lab, ip: std::net::Ipv4Addr) -> Result<()> {
    bench.say("the same guest saved and restored, and migrated, by virsh")?;
    let client = lab.watch(ip, Duration::from_millis(5))?;
    bench.sleep(Duration::from_secs(1))?;
    let from = Instant::now();
    lab.virsh("host1", &["save", "busy", "/var/lib/libvirt/busy.save"])?;
    lab.virsh("host1", &["restore", "/var/lib/libvirt/busy.save"])?;
    client.wait_answer_after(Instant::now(), Duration::from_secs(30));
    let saved = client.longest_silence(from, Instant::now());
    bench.print(&Row::new("peer: virsh save and restore, silence", saved.as_secs_f64() * 1e3, "ms"));
    let from = Instant::now();
    let (here, there) = (lab.libvirt_uri("host1"), lab.libvirt_uri("host2"));
    let output = std::process::Command::new("virsh")
        .args(["-c", &here, "migrate", "--live", "--persistent", "busy", &there, "--migrateuri", "tcp://10.77.1.2"])
        .output()
        .map_err(LabError::system("run virsh"))?;
    if !output.status.success() {
        bench.say(&format!("no migration: {}", String::from_utf8_lossy(&output.stderr).trim()))?;
        return Ok(());
    }
    client.wait_answer_after(Instant::now(), Duration::from_secs(30));
    let (took, silent) = (from.elapsed(), client.longest_silence(from, Instant::now()));
    let row = Row::new("peer: virsh migrate --live, silence", silent.as_secs_f64() * 1e3, "ms");
    bench.print(&row.beside("s for all of it", took.as_secs_f64()));
    Ok(())
}

//! What the mirroring of a disk costs the guest: synced writes a second, sequential throughput, and the requests of a Redis
//! that syncs each write, beside the same guests in the same run without protection; and what a power cut costs then.
//!
//! Machines drift: each figure of a protected guest is compared with the mean of the unprotected phases right before and
//! after it. Of Redis two more phases are measured between unprotected ones: what QEMU itself takes to mirror the disk and
//! to be cut as often, with nothing of ours; and what a program costs that takes as much processor time as the standby's
//! host does, which here is the same machine.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::pause::{Watched, p50_and_p99};
use super::qemu_mirror::Alone;
use super::workloads::cpu_s;
use super::{Bench, Row, answers_per_s};
use crate::capture::priority::thread_cpu;
use crate::hypervisor::HypervisorError;
use crate::lab::error::{LabError, Result};
use crate::lab::fleet::Fleet;
use crate::lab::{GuestClient, GuestDisk, GuestOptions, Lab, StartedGuest};

const INTERVAL: Duration = Duration::from_millis(50);
const GUEST: &str = "disk";
const DISK_MIB: u32 = 512;
const SEQUENTIAL_MIB: u32 = 128;
const SYNCED_FOR_S: u32 = 5;
const WITHIN: Duration = Duration::from_secs(120);
const REDIS: &str = "redis";
const REDIS_PORT: u16 = 6379;
const CONNECTIONS: usize = 50;
const REQUESTS_FOR: Duration = Duration::from_secs(4);
const ROUNDS: usize = 3;

/// Synced writes a second, MB/s written and read.
#[derive(Debug, Clone, Copy)]
struct Measured {
    fsyncs: f64,
    write: f64,
    read: f64,
}

fn measure(client: &mut GuestClient) -> Result<Measured> {
    let answer = client
        .ask(&format!("disk-bench {SEQUENTIAL_MIB} {SYNCED_FOR_S}"))
        .map_err(LabError::system("ask the guest"))?;
    parse(&answer).ok_or_else(|| LabError::Product(format!("the guest measured nothing: {answer}")))
}

fn parse(answer: &str) -> Option<Measured> {
    let value = |name: &str| {
        let field = answer.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
        field?.parse::<f64>().ok()
    };
    Some(Measured { fsyncs: value("fsyncs_per_s")?, write: value("write_mb_per_s")?, read: value("read_mb_per_s")? })
}

pub(super) fn run(bench: &Bench) -> Result<()> {
    let lab = bench.lab(2)?;
    let fleet = Fleet::of(&lab)?;
    fleet.wait_hosts(2, WITHIN)?;
    let disks = vec![GuestDisk { mib: DISK_MIB, qcow2: false }];
    let options = GuestOptions { memory_mib: 512, disks: disks.clone(), ..GuestOptions::new(GUEST, "host1") };
    let guest = lab.guest(&options, true)?;
    bench.say("a guest with a disk of 512 MiB works unprotected")?;
    let mut client = lab.guest_client(guest.ip)?;
    measure(&mut client)?; // the first allocates the file system's blocks
    let alone = measure(&mut client)?;

    let protect = || {
        fleet.enable(GUEST, "host1", 1, INTERVAL)?;
        fleet.wait_protected(GUEST, WITHIN)
    };
    protect()?;
    bench.say("now protected, an epoch every 50 ms")?;
    let watched = Watched::start(&lab, "host1").map_err(watching)?;
    let protected = measure(&mut client)?;
    let pauses = watched.take();
    fleet.disable(GUEST)?;
    bench.say("unprotected again, then mirrored and cut by QEMU alone")?;
    let again = measure(&mut client)?;
    let mirrored = Alone::start(&lab, "host1", GUEST, INTERVAL)?;
    let by_qemu = measure(&mut client)?;
    let pauses_by_qemu = mirrored.end()?;
    let at_last = measure(&mut client)?;
    let row = |name: &str, of: fn(&Measured) -> f64, unit: &str| {
        compared(name, of(&protected), (of(&alone), of(&again)), unit)
    };
    bench.print(&row("synced writes while protected", |m| m.fsyncs, "/s").at_least(50.0));
    bench.print(&row("sequential write while protected", |m| m.write, "MB/s").at_least(50.0));
    bench.print(&row("sequential read while protected", |m| m.read, "MB/s").at_least(80.0));
    bench.print(&compared(
        "synced writes, mirrored and cut by QEMU alone",
        by_qemu.fsyncs,
        (again.fsyncs, at_last.fsyncs),
        "/s",
    ));
    print_pauses(bench, "pause", &pauses, &pauses_by_qemu)?;

    protect()?;
    power_cut(bench, &lab, &fleet, &guest)?;
    drop(client);
    fleet.disable(GUEST)?;
    lab.remove_guest(GUEST)?;

    lab.power_on("host1")?;
    fleet.wait_hosts(2, WITHIN)?;
    let workload = REDIS.parse().map_err(LabError::Product)?;
    let redis = GuestOptions { memory_mib: 384, workload, disks, ..GuestOptions::new(REDIS, "host1") };
    let redis = lab.guest(&redis, true)?;
    bench.say("redis, each write synced, fifty connections outside: unprotected, protected, cut by QEMU alone, ...")?;
    redis_phases(bench, &lab, &fleet, &redis)
}

fn watching(error: HypervisorError) -> LabError {
    LabError::Product(format!("watching the guest's pauses: {error}"))
}

/// Pauses of a protected guest beside those of the same guest mirrored and cut by QEMU alone, in microseconds.
fn print_pauses(bench: &Bench, name: &str, ours: &[u64], by_qemu: &[u64]) -> Result<()> {
    let (ours, by_qemu) = (p50_and_p99(ours)?, p50_and_p99(by_qemu)?);
    for (which, ours, by_qemu) in [("p50", ours.0, by_qemu.0), ("p99", ours.1, by_qemu.1)] {
        let row = Row::new(format!("{name} {which}, disk mirrored"), ours, "ms");
        bench.print(&row.beside("ms mirrored and cut by QEMU alone", by_qemu));
    }
    Ok(())
}

/// Percent of the mean of what was measured right before and after.
fn compared(name: &str, now: f64, (before, after): (f64, f64), unit: &str) -> Row {
    let mean = (before + after) / 2.0;
    Row::new(name, now / mean.max(1e-9) * 100.0, "%")
        .beside(format!("{unit} unprotected ({before:.1} before, {after:.1} after), {now:.1} now"), mean)
}

fn redis_phases(bench: &Bench, lab: &Lab, fleet: &Fleet, guest: &StartedGuest) -> Result<()> {
    let pid = |node, service| {
        let missing = || LabError::Product(format!("no {service} runs on {node}"));
        lab.service_pid(node, service)?.ok_or_else(missing)
    };
    let of_host1 = [pid("host1", "virtshadowd")?, pid("host1", "libvirtd")?];
    let of_standby = [pid("host2", "virtshadowd")?, pid("host2", "libvirtd")?];
    let cpu_of = |pids: [i32; 2]| pids.iter().map(|pid| cpu_s(*pid)).sum::<Result<f64>>();
    let ask = || requests(lab, guest);
    let (mut unprotected, mut protected, mut alone, mut beside) = (vec![ask()?], vec![], vec![], vec![]);
    let mut shares = (0.0, 0.0);
    let watched = Watched::start(lab, "host1").map_err(watching)?;
    let (mut pauses, mut pauses_by_qemu) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        fleet.enable(REDIS, "host1", 1, INTERVAL)?;
        fleet.wait_protected(REDIS, WITHIN)?;
        let (began, before) = (Instant::now(), (cpu_of(of_host1)?, cpu_of(of_standby)?));
        watched.take();
        protected.push(ask()?);
        pauses.extend(watched.take());
        let elapsed_s = began.elapsed().as_secs_f64();
        shares.0 += (cpu_of(of_host1)? - before.0) / elapsed_s / ROUNDS as f64;
        let standby = (cpu_of(of_standby)? - before.1) / elapsed_s;
        shares.1 += standby / ROUNDS as f64;
        fleet.disable(REDIS)?;
        unprotected.push(ask()?);
        let mirrored = Alone::start(lab, "host1", REDIS, INTERVAL)?;
        alone.push(ask()?);
        pauses_by_qemu.extend(mirrored.end()?);
        unprotected.push(ask()?);
        beside.push(while_busy(standby, ask)?);
        unprotected.push(ask()?);
        bench.check_interrupt()?;
    }
    // Each phase stands between two unprotected ones, three in a round.
    let row = |name: &str, phases: &[f64], first: usize| {
        let of = |at: usize| (0..ROUNDS).map(|round| unprotected[round * 3 + first + at]).sum::<f64>() / ROUNDS as f64;
        compared(name, phases.iter().sum::<f64>() / ROUNDS as f64, (of(0), of(1)), "/s")
    };
    bench.print(&row("redis: synced SETs while protected", &protected, 0).at_least(90.0));
    bench.print(&row("redis: mirrored and cut by QEMU alone", &alone, 1));
    bench.print(&row("redis: beside as much work as the standby's", &beside, 2));
    print_pauses(bench, "redis: pause", &pauses, &pauses_by_qemu)?;
    let percent = |name: &str, share: f64| Row::new(name, share * 100.0, "%");
    bench.print(&percent("a processor, by agent and libvirtd here", shares.0));
    bench.print(&percent("a processor, by the same of the standby", shares.1));
    Ok(())
}

/// Runs `measure` beside a thread that takes this share of a processor, as often as epochs come.
fn while_busy<T: Send>(share: f64, measure: impl FnOnce() -> Result<T>) -> Result<T> {
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let began = thread_cpu();
                while thread_cpu() - began < INTERVAL.mul_f64(share.min(1.0)) {
                    std::hint::spin_loop();
                }
                std::thread::sleep(INTERVAL.mul_f64(1.0 - share.min(1.0)));
            }
        });
        let measured = measure();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        measured
    })
}

/// Cuts the power; what the guest had told to be on disk may be undone by the lag that was shown, not by more.
fn power_cut(bench: &Bench, lab: &Lab, fleet: &Fleet, guest: &StartedGuest) -> Result<()> {
    let mut client = lab.guest_client(guest.ip)?;
    let mut ask = || client.status().map_err(LabError::system("ask the guest"));
    let first = ask()?;
    bench.sleep(Duration::from_secs(1))?;
    let told = ask()?;
    let per_ms = (told.records - first.records) as f64 / (told.uptime_ms - first.uptime_ms).max(1) as f64;
    let cut = lab.power_cut("host1")?;
    // What the manager shows grows by the age of what it heard last, until the guest runs elsewhere.
    let mut lag_ms = 0;
    loop {
        let view = fleet.info(GUEST)?;
        if view.primary.host != "host1" {
            break;
        }
        lag_ms = view.shadows.first().map_or(lag_ms, |shadow| shadow.lag_ms);
        if cut.elapsed() > WITHIN {
            return Err(LabError::Product("the guest is not promoted after the power cut".into()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let watch = lab.watch(guest.ip, Duration::from_millis(5))?;
    let silence = watch.wait_answer_after(cut + Duration::from_millis(60), WITHIN);
    let silence = silence.ok_or_else(|| LabError::Product("the guest does not answer after the power cut".into()))?;
    let mut client = lab.guest_client(guest.ip)?;
    let back = client.status().map_err(LabError::system("ask the guest"))?;
    client.records().map_err(LabError::system("check the guest's records"))?;
    // It has gone on since it was promoted, so this may be less than was lost for a moment.
    let lost = told.records.saturating_sub(back.records) as f64;
    bench.print(&Row::new("power cut: first answer after", silence.as_secs_f64() * 1e3, "ms"));
    let row = Row::new("records told and lost, as time", lost / per_ms.max(1e-9), "ms").at_most(lag_ms as f64);
    bench.print(&row.beside("records lost; target: the lag shown", lost));
    Ok(())
}

/// SETs a second on fifty connections, each of which waits for its answers.
fn requests(lab: &Lab, guest: &StartedGuest) -> Result<f64> {
    let failed = LabError::system::<std::io::Error>;
    let client = |number| {
        let stream = lab.connect_from_client(guest.ip, REDIS_PORT)?;
        stream.set_read_timeout(Some(WITHIN)).map_err(failed("ask redis"))?;
        Ok((number, 0u64, BufReader::new(stream)))
    };
    let clients = (0..CONNECTIONS).map(client).collect::<Result<Vec<_>>>()?;
    let ask = |(number, count, reader): &mut (usize, u64, BufReader<TcpStream>)| {
        reader.get_mut().write_all(format!("SET bench:{number} {count}\r\n").as_bytes())?;
        *count += 1;
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line != "+OK\r\n" {
            return Err(std::io::Error::other(format!("redis answered {line:?}")));
        }
        Ok(())
    };
    answers_per_s(clients, REQUESTS_FOR, ask).map_err(failed("ask redis"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_answer_is_read() {
        let measured = parse("disk fsyncs_per_s=12.5 write_mb_per_s=100.0 read_mb_per_s=7.0").unwrap();
        assert_eq!((measured.fsyncs, measured.write, measured.read), (12.5, 100.0, 7.0));
        assert!(parse("error: no space").is_none());
    }
}

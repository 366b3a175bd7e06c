//! What the mirroring of a disk costs the guest: synced writes a second, sequential throughput, beside the same guest in
//! the same run without protection, and what a power cut costs then.

use std::time::Duration;

use super::{Bench, Row};
use crate::lab::error::{LabError, Result};
use crate::lab::fleet::Fleet;
use crate::lab::{GuestClient, GuestDisk, GuestOptions};

const INTERVAL: Duration = Duration::from_millis(50);
const GUEST: &str = "disk";
const DISK_MIB: u32 = 512;
const SEQUENTIAL_MIB: u32 = 128;
const SYNCED_FOR_S: u32 = 5;
const WITHIN: Duration = Duration::from_secs(120);

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
    let options = GuestOptions {
        memory_mib: 512,
        disks: vec![GuestDisk { mib: DISK_MIB, qcow2: false }],
        ..GuestOptions::new(GUEST, "host1")
    };
    let guest = lab.guest(&options, true)?;
    bench.say("a guest with a disk of 512 MiB works unprotected")?;
    let mut client = lab.guest_client(guest.ip)?;
    measure(&mut client)?; // the first allocates the file system's blocks
    let alone = measure(&mut client)?;

    fleet.enable(GUEST, "host1", 1, INTERVAL)?;
    fleet.wait_protected(GUEST, WITHIN)?;
    bench.say("now protected, an epoch every 50 ms")?;
    let protected = measure(&mut client)?;
    let view = fleet.info(GUEST)?;
    fleet.wait_protected(GUEST, WITHIN)?;
    let records = client.records().map_err(LabError::system("check the guest's records"))?;
    let percent = |now: f64, before: f64| now / before.max(1e-9) * 100.0;
    let row = |name: &str, now: f64, before: f64, unit: &str| {
        Row::new(name, percent(now, before), "%").beside(format!("{unit} unprotected"), before)
    };
    bench.print(&row("synced writes while protected", protected.fsyncs, alone.fsyncs, "/s").at_least(50.0));
    bench.print(&row("sequential write while protected", protected.write, alone.write, "MB/s").at_least(50.0));
    bench.print(&row("sequential read while protected", protected.read, alone.read, "MB/s").at_least(80.0));
    bench.print(&Row::new("pause p50", view.capture.pause_us.p50 as f64 / 1e3, "ms"));
    bench.print(&Row::new("pause p99", view.capture.pause_us.p99 as f64 / 1e3, "ms"));

    let cut = lab.power_cut("host1")?;
    let watch = lab.watch(guest.ip, Duration::from_millis(5))?;
    let silence = watch.wait_answer_after(cut + Duration::from_millis(60), WITHIN);
    let silence = silence.ok_or_else(|| LabError::Product("the guest does not answer after the power cut".into()))?;
    let mut client = lab.guest_client(guest.ip)?;
    let after = client.records().map_err(LabError::system("check the guest's records"))?;
    let lost = records.durable.saturating_sub(after.durable);
    bench.print(&Row::new("power cut: first answer after", silence.as_secs_f64() * 1e3, "ms"));
    bench.print(&Row::new("records checked before the cut and lost", lost as f64, "records").at_most(0.0));
    drop(client);
    fleet.disable(GUEST)?;
    bench.say("unprotected again")?;
    let again = measure(&mut lab.guest_client(guest.ip)?)?;
    bench.print(&row("unprotected again (drift): synced writes", again.fsyncs, alone.fsyncs, "/s"));
    bench.print(&row("unprotected again: sequential write", again.write, alone.write, "MB/s"));
    Ok(())
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

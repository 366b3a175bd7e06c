//! Real guests with two shadows each at 50 ms over TLS: what cuts cost them, how old their shadows are, what is sent, and
//! what the agent on the primary's host takes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::pause::qemu_alone;
use super::{Bench, Row, cpu_s_in, memcpy_ms, percentile};
use crate::api::types::{CaptureStats, GuestState, GuestView, Percentiles};
use crate::lab::error::{LabError, Result};
use crate::lab::fleet::Fleet;
use crate::lab::guest::Workload;
use crate::lab::{GuestClient, Lab, image};

const INTERVAL: Duration = Duration::from_millis(50);
pub(super) const SHADOWS: u32 = 2;
const MEMORY_MIB: u32 = 1024;
pub(super) const PRIMARY: &str = "host1";
const PROTECTED_WITHIN: Duration = Duration::from_secs(240);
/// Unprotected, for comparison.
const COMPARE_FOR: Duration = Duration::from_secs(15);
/// As many cuts as count for the percentiles, and some more, so that none of the first copy is among them.
const MEASURE_FOR: Duration = Duration::from_secs(56);
const SAMPLE_EVERY: Duration = Duration::from_millis(500);
/// How many units of work a guest must have done for a comparison to mean something.
const WORK_COMPARED_MIN: u64 = 100;
/// Resident memory of the agent beside the mirror it was given and its share of the guest's.
const AGENT_MIB: f64 = 64.0;
const AGENT_SHARE: f64 = 0.01;
/// What is recorded of each guest.
const RECORDINGS: [(Duration, Duration); 2] =
    [(INTERVAL, Duration::from_secs(30)), (Duration::from_secs(1), Duration::from_secs(60))];

/// A guest, and how long its pauses may be: median and 99th percentile, milliseconds.
pub(super) struct Case {
    pub(super) name: &'static str,
    pause_ms: Option<(f64, f64)>,
}

pub(super) static CASES: [Case; 5] = [
    Case { name: "redis", pause_ms: Some((1.5, 4.0)) },
    Case { name: "postgres", pause_ms: Some((1.0, 3.0)) },
    Case { name: "gcc", pause_ms: Some((2.0, 5.0)) },
    Case { name: "idle", pause_ms: None },
    Case { name: "random", pause_ms: None },
];

impl Case {
    pub(super) fn workload(&self) -> Result<Workload> {
        self.name.parse().map_err(LabError::Product)
    }
}

/// The cases with these names, or all.
pub(super) fn cases(names: &[String]) -> Result<Vec<&'static Case>> {
    if let Some(unknown) = names.iter().find(|name| CASES.iter().all(|case| case.name != **name)) {
        let known = CASES.each_ref().map(|case| case.name).join(", ");
        return Err(LabError::Invalid {
            what: "workload",
            value: unknown.clone(),
            reason: format!("is not one of {known}"),
        });
    }
    Ok(CASES.iter().filter(|case| names.is_empty() || names.iter().any(|n| n == case.name)).collect())
}

/// Runs the cases with these names, or all.
pub(super) fn run(bench: &Bench, names: &[String]) -> Result<()> {
    let cases = cases(names)?;
    // All downloads first: a benchmark that ends for lack of a package shall not have run for minutes.
    for case in &cases {
        image::ensure(case.workload()?.software(), false, &|line| eprintln!("bench: {line}"))?;
        bench.check_interrupt()?;
    }
    cases.iter().try_for_each(|case| match bench.record_dir {
        Some(_) => record(bench, case),
        None => measure(bench, case),
    })
}

/// A lab of its own for each guest: what an agent keeps of one must not count for the next.
pub(super) struct Stage {
    pub(super) lab: Lab,
    pub(super) fleet: Fleet,
    client: GuestClient,
}

pub(super) fn stage(bench: &Bench, case: &Case, shadows: u32) -> Result<Stage> {
    let lab = bench.lab(shadows as u8 + 1)?;
    let fleet = Fleet::of(&lab)?;
    fleet.wait_hosts(shadows as usize + 1, Duration::from_secs(30))?;
    bench.say(&format!("{}: a guest of {MEMORY_MIB} MiB boots", case.name))?;
    let guest = bench.guest(&lab, case.name, PRIMARY, MEMORY_MIB, case.name)?;
    let client = lab.guest_client(guest.ip)?;
    Ok(Stage { lab, fleet, client })
}

fn measure(bench: &Bench, case: &Case) -> Result<()> {
    let Stage { lab, fleet, mut client } = stage(bench, case, SHADOWS)?;
    let unprotected = Work::over(bench, &mut client, COMPARE_FOR, || Ok(()))?;
    let alone = qemu_alone(bench, &lab, case.name)?;
    fleet.enable(case.name, PRIMARY, SHADOWS, INTERVAL)?;
    let view = fleet.wait_protected(case.name, PROTECTED_WITHIN)?;
    bench.say(&format!("{}: protected; measuring for {} s", case.name, MEASURE_FOR.as_secs()))?;
    let agent = agent_pid(&lab)?;
    let (began, cpu_before) = (Instant::now(), cpu_s(agent)?);
    let mut samples = Samples::default();
    let protected = Work::over(bench, &mut client, MEASURE_FOR, || {
        samples.add(&fleet.info(case.name)?, resident_mib(agent)?);
        Ok(())
    })?;
    let (cpu, elapsed) = (cpu_s(agent)? - cpu_before, began.elapsed().as_secs_f64());
    let after = fleet.info(case.name)?;
    Report { case, before: &view, after: &after, elapsed_s: elapsed }.print(bench, &samples, cpu);
    print_parts(bench, case, &after.capture, alone);
    if protected.done >= WORK_COMPARED_MIN && unprotected.done > 0 {
        let share = protected.per_s / unprotected.per_s * 100.0;
        let row = Row::new(format!("{}: guest's own work while protected", case.name), share, "%");
        bench.print(&row.beside("units/s unprotected", unprotected.per_s));
    }
    Ok(())
}

/// What there is of a pause before anything of it can be ours alone: QEMU's own, and the search for which it waits. Pages are
/// copied while it goes on.
fn print_parts(bench: &Bench, case: &Case, capture: &CaptureStats, (alone_p50, alone_p99): (f64, f64)) {
    let ms = |us: u64| us as f64 / 1e3;
    let row = |name: &str, ms: f64| Row::new(format!("{}: {name}", case.name), ms, "ms");
    let search = ms(capture.search_us.p50);
    bench.print(&row("of that, QEMU alone: state to /dev/null", alone_p50).beside("ms p99", alone_p99));
    bench.print(&row("of that, finding written pages p50", search).beside("ms p99", ms(capture.search_us.p99)));
    let both = row("limit: QEMU alone and finding the pages", alone_p50 + search);
    bench.print(&both.beside("ms copying them p50, beside QEMU's writing", ms(capture.copy_us.p50)));
}

/// What a guest did, by its own clock and its own count.
struct Work {
    done: u64,
    per_s: f64,
}

impl Work {
    fn over(
        bench: &Bench,
        client: &mut GuestClient,
        span: Duration,
        mut each: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let failed = LabError::system::<std::io::Error>;
        let first = client.status().map_err(failed("ask the guest"))?;
        let until = Instant::now() + span;
        while Instant::now() < until {
            bench.sleep(SAMPLE_EVERY)?;
            each()?;
        }
        let last = client.status().map_err(failed("ask the guest"))?;
        if last.boot != first.boot || last.errors > 0 {
            return Err(LabError::Product(format!("the guest was restarted or found faults: {last:?}")));
        }
        let done = last.counter.saturating_sub(first.counter);
        Ok(Self { done, per_s: done as f64 * 1e3 / (last.uptime_ms - first.uptime_ms).max(1) as f64 })
    }
}

/// What is only seen by looking again and again.
#[derive(Default)]
struct Samples {
    resident_mib: f64,
    dirty_pages: Vec<f64>,
    /// How often all shadows followed.
    protected: usize,
    paced_by: BTreeMap<String, u32>,
}

impl Samples {
    fn add(&mut self, view: &GuestView, resident_mib: f64) {
        self.resident_mib = self.resident_mib.max(resident_mib);
        self.dirty_pages.push(view.capture.dirty_pages.last as f64);
        self.protected += usize::from(view.state == GuestState::Protected);
        *self.paced_by.entry(view.capture.paced_by.clone()).or_default() += 1;
    }
}

struct Report<'a> {
    case: &'a Case,
    before: &'a GuestView,
    after: &'a GuestView,
    elapsed_s: f64,
}

impl Report<'_> {
    fn print(&self, bench: &Bench, samples: &Samples, cpu_s: f64) {
        let (before, after) = (&self.before.capture, &self.after.capture);
        let row = |name: &str, value: f64, unit| Row::new(format!("{}: {name}", self.case.name), value, unit);
        let epochs = after.epochs_total.saturating_sub(before.epochs_total) as f64;
        let wire = after.wire_bytes_total.saturating_sub(before.wire_bytes_total) as f64;
        let looks = samples.dirty_pages.len().max(1) as f64;
        let pages = samples.dirty_pages.iter().sum::<f64>() / looks;
        // What changed, once for each epoch; also if shadows got several epochs as one.
        let raw = pages * epochs * vmsync::units::PAGE_SIZE as f64;

        let ms = |us: u64| us as f64 / 1e3;
        let (p50, p99) = (ms(after.pause_us.p50), ms(after.pause_us.p99));
        let mut rows = [row("pause p50", p50, "ms"), row("pause p99", p99, "ms")];
        if let Some((median, high)) = self.case.pause_ms {
            let [a, b] = rows;
            rows = [a.at_most(median), b.at_most(high)];
        }
        let copy_ms = memcpy_ms(pages as usize);
        for row in rows {
            bench.print(&row.beside("ms memcpy", copy_ms));
        }
        let (interval, per_s) = (INTERVAL.as_secs_f64() * 1e3, self.elapsed_s);
        let paced = samples.paced_by.iter().max_by_key(|(_, times)| **times).map_or("", |(by, _)| by);
        bench.print(&row("epochs", epochs / per_s, "/s").beside(format!("/s asked, paced by {paced}"), 1e3 / interval));
        bench.print(&row("found with all shadows following", samples.protected as f64 / looks * 100.0, "%"));
        let most = percentile(&samples.dirty_pages, 99);
        bench.print(&row("dirty pages an epoch", pages, "pages").beside("p99", most));
        let lag = |of: fn(&Percentiles) -> u64| {
            self.after.shadows.iter().map(|shadow| of(&shadow.lag_peak_ms)).max().unwrap_or(u64::MAX) as f64
        };
        bench.print(&row("lag before a commit p50", lag(|p| p.p50), "ms").at_most(interval + 20.0));
        bench.print(&row("lag before a commit p99", lag(|p| p.p99), "ms").at_most(2.0 * interval + 50.0));
        let shadows = self.after.shadows.len().max(1) as f64;
        bench.print(
            &row("sent to each shadow", wire / shadows / per_s / 1e6, "MB/s")
                .beside("MB/s of pages", raw / per_s / 1e6),
        );
        bench.print(&row("ratio, pages to all that was sent", raw * shadows / wire.max(1.0), "x"));
        let allowed = AGENT_MIB + self.after.mirror_mib as f64 + AGENT_SHARE * f64::from(MEMORY_MIB);
        bench.print(&row("agent's resident memory, most", samples.resident_mib, "MiB").at_most(allowed));
        bench.print(&row("agent's processor time", cpu_s / per_s * 100.0, "%"));
    }
}

fn record(bench: &Bench, case: &Case) -> Result<()> {
    let stage = stage(bench, case, SHADOWS)?;
    RECORDINGS.iter().try_for_each(|(interval, span)| record_at(bench, &stage, case, *interval, *span))
}

/// Protects the guest for so long; the agent records it.
pub(super) fn record_at(bench: &Bench, stage: &Stage, case: &Case, interval: Duration, span: Duration) -> Result<()> {
    stage.fleet.enable(case.name, PRIMARY, 1, interval)?;
    stage.fleet.wait_protected(case.name, PROTECTED_WITHIN)?;
    bench.say(&format!("{}: recording at {} ms for {} s", case.name, interval.as_millis(), span.as_secs()))?;
    bench.sleep(span)?;
    stage.fleet.disable(case.name)?;
    // Until the agent has written all of it.
    bench.sleep(Duration::from_secs(2))
}

/// The primary's agent.
pub(super) fn agent_pid(lab: &Lab) -> Result<i32> {
    lab.service_pid(PRIMARY, "virtshadowd")?.ok_or_else(|| LabError::Product("no agent runs".into()))
}

fn resident_mib(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).map_err(LabError::io("read", path.as_ref()))?;
    let kib =
        text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kib.map(|kib| kib / 1024.0)
        .ok_or_else(|| LabError::Corrupt { path: path.into(), reason: "no resident memory in it".into() })
}

/// Processor time of all threads of a process so far, seconds.
pub(super) fn cpu_s(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).map_err(LabError::io("read", path.as_ref()))?;
    cpu_s_in(&text).ok_or_else(|| LabError::Corrupt { path: path.into(), reason: "no times in it".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_a_workload_that_fits_its_guest() {
        for case in &CASES {
            let workload = case.workload().unwrap();
            let options = crate::lab::GuestOptions::new(case.name, PRIMARY);
            crate::lab::GuestOptions { memory_mib: MEMORY_MIB, workload, ..options }.check().unwrap();
        }
    }

    #[test]
    fn a_process_tells_its_memory_and_time() {
        let pid = std::process::id() as i32;
        assert!(resident_mib(pid).unwrap() > 1.0);
        let (before, began) = (cpu_s(pid).unwrap(), Instant::now());
        while cpu_s(pid).unwrap() < before + 0.05 {
            assert!(began.elapsed() < Duration::from_secs(30), "no time passes for a busy process");
        }
    }
}

//! `virt-shadow-lab demo`: the product's main job, end to end, on hosts made for it, with every figure it claims.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::error::{LabError, Result};
use super::fleet::{Fleet, describe};
use super::guest::Workload;
use super::{GuestOptions, Lab, LabOptions};
use crate::api::types::{GuestView, Percentiles};

const GUEST: &str = "web";
const HOSTS: u8 = 4;
const SHADOWS: u32 = 2;
const INTERVAL: Duration = Duration::from_millis(50);
const MEMORY_MIB: u32 = 1024;
const WORKLOAD: &str = "dirty:4000";
const WORK_FOR: Duration = Duration::from_secs(10);

/// What the demo shows at its end.
#[derive(Debug, Serialize)]
pub struct DemoReport {
    pub guest: String,
    pub memory_mib: u32,
    pub shadows: Vec<String>,
    pub epochs: u64,
    pub pause_us: Percentiles,
    pub lag_ms: u64,
    pub raw_bytes: u64,
    pub wire_bytes: u64,
    pub verified_pages: u64,
    pub promoted_on: String,
    /// From the power cut until the guest ran on another host.
    pub power_cut_to_running_ms: f64,
    /// From the power cut until the guest's client had an answer again.
    pub power_cut_to_answer_ms: f64,
    /// Epochs that were cut and not committed on the promoted shadow, by the manager's last knowledge.
    pub epochs_lost: u64,
    /// What the client saw undone: counts that had been told and were lost.
    pub counts_lost: u64,
    pub memory_check: String,
    pub same_boot: bool,
    /// From the power cut until two shadows followed again.
    pub redundancy_restored_s: f64,
    pub took_s: f64,
}

/// Runs it; `say` tells people what happens, a line at a time. The lab is gone when this returns.
pub fn run(lab_name: &str, interrupt: Arc<AtomicBool>, say: &dyn Fn(&str)) -> Result<DemoReport> {
    let began = Instant::now();
    let options = LabOptions { hosts: HOSTS, racks: HOSTS, owned: true, interrupt, ..LabOptions::new(lab_name) };
    let lab = Lab::up(&options)?;
    let said = |line: &str| {
        say(line);
        if options.interrupt.load(Ordering::Relaxed) { Err(LabError::Interrupted) } else { Ok(()) }
    };
    play(&lab, began, &said)
}

fn play(lab: &Lab, began: Instant, say: &dyn Fn(&str) -> Result<()>) -> Result<DemoReport> {
    let fleet = Fleet::of(lab)?;
    fleet.wait_hosts(usize::from(HOSTS), Duration::from_secs(30))?;
    say(&format!("{HOSTS} hosts in {HOSTS} racks are up, each with its own libvirtd and virtshadowd"))?;

    let workload: Workload = WORKLOAD.parse().map_err(LabError::Product)?;
    let options = GuestOptions { memory_mib: MEMORY_MIB, workload, ..GuestOptions::new(GUEST, "host1") };
    let guest = lab.guest(&options, true)?;
    say(&format!(
        "guest {GUEST} runs on host1: {MEMORY_MIB} MiB, rewriting 4,000 random pages a second; a client asks"
    ))?;
    let client = lab.watch(guest.ip, Duration::from_millis(5))?;

    fleet.enable(GUEST, "host1", SHADOWS, INTERVAL)?;
    let asked = Instant::now();
    let view = fleet.wait_protected(GUEST, Duration::from_secs(120))?;
    say(&format!(
        "protected 1:{SHADOWS} after {:.1} s, without a restart: shadows on {}",
        asked.elapsed().as_secs_f64(),
        hosts(&view).join(" and ")
    ))?;
    for _ in 0..WORK_FOR.as_secs() {
        std::thread::sleep(Duration::from_secs(1));
        say("")?;
    }
    let verified = fleet.verify(GUEST)?;
    ensure(verified.shadows.iter().all(|s| s.equal), || format!("a shadow differs from its guest: {verified:?}"))?;
    let pages = verified.shadows.first().map_or(0, |s| s.pages_compared);
    say(&format!("verified: all {pages} pages and the device state are equal on both shadows"))?;
    let before = fleet.info(GUEST)?;

    let cut_at = wall_ms();
    let cut = lab.power_cut("host1")?;
    say("host1 lost its power")?;
    let answer = client
        // What was on its way at that moment may still arrive.
        .wait_answer_after(cut + Duration::from_millis(20), Duration::from_secs(30))
        .ok_or_else(|| LabError::Product(format!("no answer within 30 s; {}", describe_or(&fleet))))?;
    let promotion = fleet.wait_promotion(GUEST, cut_at, Duration::from_secs(5))?;
    say(&format!("the client has an answer {:.0} ms later, from {}", ms(answer), promotion.host))?;

    let view = fleet.wait_protected(GUEST, Duration::from_secs(60))?;
    let restored = cut.elapsed();
    say(&format!("redundancy is back: shadows on {}", hosts(&view).join(" and ")))?;
    let seen = client.report();
    drop(client);
    let mut checker = lab.guest_client(guest.ip)?;
    checker.set_timeout(Some(Duration::from_secs(30))).map_err(LabError::system("set a time limit"))?;
    let memory_check = checker.verify().map_err(LabError::system("have the guest check its memory"))?;
    let again = fleet.verify(GUEST)?;
    ensure(again.shadows.iter().all(|s| s.equal), || format!("a new shadow differs from its guest: {again:?}"))?;
    ensure(seen.guest_errors == 0, || format!("the guest found {} faults in its memory", seen.guest_errors))?;
    Ok(DemoReport {
        guest: GUEST.into(),
        memory_mib: MEMORY_MIB,
        shadows: hosts(&before),
        epochs: before.capture.epochs_total,
        pause_us: before.capture.pause_us,
        lag_ms: before.shadows.iter().map(|s| s.lag_ms).max().unwrap_or(0),
        raw_bytes: before.capture.raw_bytes_total,
        wire_bytes: before.capture.wire_bytes_total,
        verified_pages: pages,
        promoted_on: promotion.host,
        power_cut_to_running_ms: promotion.at_ms.saturating_sub(cut_at) as f64,
        power_cut_to_answer_ms: ms(answer),
        epochs_lost: promotion.epochs_lost,
        counts_lost: seen.lost_counter_max,
        memory_check,
        same_boot: seen.boots.len() == 1,
        redundancy_restored_s: restored.as_secs_f64(),
        took_s: began.elapsed().as_secs_f64(),
    })
}

impl DemoReport {
    /// The table at the end, for people.
    pub fn to_text(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let rows = [
            ("guest", format!("{}, {} MiB, no restart, no change of its definition", self.guest, self.memory_mib)),
            ("shadows before the cut", self.shadows.join(", ")),
            ("epochs", format!("{} at {} ms", self.epochs, INTERVAL.as_millis())),
            ("pause p50 / p99", format!("{:.2} / {:.2} ms", us(self.pause_us.p50), us(self.pause_us.p99))),
            ("lag of the slower shadow", format!("{} ms", self.lag_ms)),
            ("pages changed / sent", format!("{:.0} / {:.0} MiB", mib(self.raw_bytes), mib(self.wire_bytes))),
            ("compared before the cut", format!("{} pages on each shadow, all equal", self.verified_pages)),
            ("power cut to running", format!("{:.0} ms, on {}", self.power_cut_to_running_ms, self.promoted_on)),
            ("power cut to first answer", format!("{:.0} ms", self.power_cut_to_answer_ms)),
            ("epochs lost", format!("{} ({} counts of the guest)", self.epochs_lost, self.counts_lost)),
            ("guest's own memory check", self.memory_check.clone()),
            ("same boot", if self.same_boot { "yes".into() } else { "NO: it was restarted".into() }),
            ("redundancy restored", format!("{:.1} s after the cut", self.redundancy_restored_s)),
            ("the whole demo", format!("{:.0} s", self.took_s)),
        ];
        rows.iter().map(|(name, value)| format!("{name:<26}  {value}\n")).collect()
    }
}

fn ensure(holds: bool, otherwise: impl Fn() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(LabError::Product(otherwise())) }
}

fn hosts(view: &GuestView) -> Vec<String> {
    view.shadows.iter().map(|s| format!("{} ({})", s.host, s.rack)).collect()
}

fn describe_or(fleet: &Fleet) -> String {
    fleet.info(GUEST).map_or_else(|error| error.to_string(), |view| describe(&view))
}

fn ms(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

fn us(us: u64) -> f64 {
    us as f64 / 1e3
}

fn wall_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_millis() as u64)
}

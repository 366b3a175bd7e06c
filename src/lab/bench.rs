//! `virt-shadow-lab bench`: what the product claims, measured beside a peer or a limit in the same run.
//!
//! A row is a name, a value, what it is compared with in the same run, and the target it is held to. Timing decides
//! nothing here: a missed target is shown, not failed.

mod codec;
mod disk;
mod failover;
mod fanout;
mod output;
mod pause;
mod qemu_mirror;
mod silence;
mod workloads;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::Serialize;

use super::error::{LabError, Result};
use super::guest::{Workload, memory_mib};
use super::{GuestOptions, Lab, LabOptions, StartedGuest};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Benchmark {
    /// Pause of a cut, and what protection costs the guest
    Pause,
    /// Death of QEMU and power cuts: time to the running shadow and to the client's first answer
    Failover,
    /// Planned moves: how long the guest stands still
    Switchover,
    /// Redis, PostgreSQL, gcc, an idle guest, random data, each with two shadows: pauses, lag, traffic, memory
    Workloads,
    /// What a second and a third shadow cost the primary's host
    Fanout,
    /// Holding a guest's output until it is committed: ping, requests, bulk TCP
    Output,
    /// What the mirroring of a disk costs the guest
    Disk,
    /// Coding what guests change: the delta codec beside zstd, LZ4, XBZRLE and QEMU's multifd migration
    Codec,
}

const ALL: [Benchmark; 8] = [
    Benchmark::Pause,
    Benchmark::Failover,
    Benchmark::Switchover,
    Benchmark::Workloads,
    Benchmark::Fanout,
    Benchmark::Output,
    Benchmark::Disk,
    Benchmark::Codec,
];

/// One measured figure.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    /// What it is compared with, measured in the same run; empty: nothing.
    pub peer: String,
    pub peer_value: Option<f64>,
    /// `<= x` or `>= x`.
    pub target: Option<String>,
    pub met: Option<bool>,
}

impl Row {
    fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, peer: String::new(), peer_value: None, target: None, met: None }
    }

    fn beside(mut self, peer: impl Into<String>, value: f64) -> Self {
        (self.peer, self.peer_value) = (peer.into(), Some(value));
        self
    }

    fn at_most(mut self, limit: f64) -> Self {
        (self.target, self.met) = (Some(format!("<= {limit}")), Some(self.value <= limit));
        self
    }

    fn at_least(mut self, limit: f64) -> Self {
        (self.target, self.met) = (Some(format!(">= {limit}")), Some(self.value >= limit));
        self
    }

    fn to_text(&self) -> String {
        let number = |value: f64| if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") };
        let peer = self.peer_value.map_or(String::new(), |value| format!("{} {}", number(value), self.peer));
        let met = match self.met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        };
        let (value, target) = (number(self.value), self.target.clone().unwrap_or_default());
        format!("{:<44} {value:>9} {:<8} {target:<10} {met:<7} {peer}", self.name, self.unit)
    }
}

/// What is asked of the benchmarks.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchOptions {
    /// Which benchmark; all if not given
    pub which: Option<Benchmark>,
    /// Failovers of each kind, switchovers
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub rounds: u32,
    /// Only this guest of the benchmarks "workloads" and "codec": redis, postgres, gcc, idle or random; several times for several
    #[arg(long, value_name = "WORKLOAD")]
    pub workload: Vec<String>,
    /// Record the epochs of the benchmark "workloads" into this folder instead of measuring: at 50 ms, then at 1 s
    #[arg(long, value_name = "DIR")]
    pub record: Option<PathBuf>,
    /// Measure the benchmark "codec" on a recording that was made before; several times for several
    #[arg(long, value_name = "FILE")]
    pub replay: Vec<PathBuf>,
    /// Memory of the guest of the benchmark "output", as 256M or 1G; 1G if not given
    #[arg(long, value_name = "SIZE", value_parser = memory_mib)]
    pub guest_memory: Option<u32>,
    /// Frames that its interface takes while nobody empties it: 256 (QEMU's usual), 512 or 1024; 1024 if not given
    #[arg(long, value_name = "FRAMES")]
    pub rx_queue: Option<u32>,
}

/// What a benchmark has: a lab of its own, and a way to print.
struct Bench {
    json: bool,
    interrupt: Arc<AtomicBool>,
    lab_name: String,
    record_dir: Option<PathBuf>,
}

/// Runs one benchmark or all.
pub fn run(lab_name: &str, options: &BenchOptions, json: bool, interrupt: Arc<AtomicBool>) -> Result<()> {
    let (which, rounds) = (options.which, options.rounds);
    let refuse = |what: &str, takes: &str| {
        let reason = format!("only {takes} {what}");
        Err(LabError::Invalid {
            what: "benchmark",
            value: which.map_or("all".into(), |which| format!("{which:?}").to_lowercase()),
            reason,
        })
    };
    if which != Some(Benchmark::Workloads) && options.record.is_some() {
        return refuse("--record", "the benchmark \"workloads\" takes");
    }
    if which != Some(Benchmark::Codec) && !options.replay.is_empty() {
        return refuse("--replay", "the benchmark \"codec\" takes");
    }
    if !matches!(which, Some(Benchmark::Workloads | Benchmark::Codec)) && !options.workload.is_empty() {
        return refuse("--workload", "the benchmarks \"workloads\" and \"codec\" take");
    }
    let (memory, rx_queue) = (options.guest_memory, options.rx_queue);
    for (option, given) in [("--guest-memory", memory.is_some()), ("--rx-queue", rx_queue.is_some())] {
        if given && which != Some(Benchmark::Output) {
            return refuse(option, "the benchmark \"output\" takes");
        }
    }
    let output_guest = output::guest(memory, rx_queue)?;
    let record_dir = options.record.as_deref().map(std::path::absolute).transpose();
    let record_dir = record_dir.map_err(LabError::system("find the folder to record into"))?;
    let bench = Bench { json, interrupt, lab_name: lab_name.to_owned(), record_dir };
    if !json && bench.record_dir.is_none() {
        println!("{:<44} {:>9} {:<8} {:<10} {:<7} beside, in the same run", "figure", "value", "unit", "target", "");
    }
    for benchmark in ALL.iter().filter(|b| which.is_none_or(|wanted| wanted == **b)) {
        match benchmark {
            Benchmark::Pause => pause::run(&bench)?,
            Benchmark::Failover => failover::run(&bench, rounds)?,
            Benchmark::Switchover => failover::run_switchover(&bench, rounds)?,
            Benchmark::Workloads => workloads::run(&bench, &options.workload)?,
            Benchmark::Fanout => fanout::run(&bench)?,
            Benchmark::Output => output::run(&bench, &output_guest)?,
            Benchmark::Disk => disk::run(&bench)?,
            Benchmark::Codec => codec::run(&bench, &options.workload, &options.replay)?,
        }
    }
    Ok(())
}

impl Bench {
    fn lab(&self, hosts: u8) -> Result<Lab> {
        Lab::up(&LabOptions {
            hosts,
            racks: hosts,
            owned: true,
            record_dir: self.record_dir.clone(),
            interrupt: Arc::clone(&self.interrupt),
            ..LabOptions::new(&self.lab_name)
        })
    }

    fn guest(&self, lab: &Lab, name: &str, host: &str, memory_mib: u32, workload: &str) -> Result<StartedGuest> {
        let workload: Workload = workload.parse().map_err(LabError::Product)?;
        lab.guest(&GuestOptions { memory_mib, workload, balloon: false, ..GuestOptions::new(name, host) }, true)
    }

    fn print(&self, row: &Row) {
        match serde_json::to_string(row) {
            Ok(text) if self.json => println!("{text}"),
            _ => println!("{}", row.to_text()),
        }
    }

    /// Progress, for people who wait.
    fn say(&self, line: &str) -> Result<()> {
        eprintln!("bench: {line}");
        self.check_interrupt()
    }

    fn check_interrupt(&self) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) { Err(LabError::Interrupted) } else { Ok(()) }
    }

    fn sleep(&self, span: Duration) -> Result<()> {
        let until = std::time::Instant::now() + span;
        while std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(100).min(span));
            self.check_interrupt()?;
        }
        Ok(())
    }
}

/// The limit of a pause: copying as many pages within one process, milliseconds.
fn memcpy_ms(pages: usize) -> f64 {
    let source = vec![1u8; pages.max(1) * vmsync::units::PAGE_SIZE];
    let mut target = vec![0u8; source.len()];
    let began = Instant::now();
    const TIMES: u32 = 20;
    for _ in 0..TIMES {
        target.copy_from_slice(std::hint::black_box(&source));
        std::hint::black_box(&mut target);
    }
    began.elapsed().as_secs_f64() * 1e3 / f64::from(TIMES)
}

/// How often a second these clients, a thread each, get an answer: `ask` asks once and waits for it.
fn answers_per_s<C: Send>(
    clients: Vec<C>,
    span: Duration,
    ask: impl Fn(&mut C) -> io::Result<()> + Sync,
) -> io::Result<f64> {
    let (answers, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let began = Instant::now();
    let work = |mut client: C| {
        while !stop.load(Ordering::Relaxed) {
            ask(&mut client)?;
            answers.fetch_add(1, Ordering::Relaxed);
        }
        Ok::<_, io::Error>(())
    };
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = clients.into_iter().map(|client| scope.spawn(move || work(client))).collect();
        std::thread::sleep(span);
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
    })?;
    Ok(answers.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64())
}

/// Processor time of a process and all its threads so far, in seconds, as its `/proc/PID/stat` tells.
fn cpu_s_in(stat: &str) -> Option<f64> {
    // Fields 14 and 15, counted behind the name in parentheses, in ticks of 10 ms on every Linux there is.
    let fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11).take(2);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(ticks as f64 / 100.0)
}

/// The value below which `percent` of the values lie; 0 of none.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_say_whether_a_target_is_met() {
        assert_eq!(Row::new("a", 2.0, "ms").at_most(1.5).met, Some(false));
        assert_eq!(Row::new("a", 96.0, "%").at_least(95.0).met, Some(true));
        let text = Row::new("pause p50", 1.25, "ms").at_most(1.5).beside("ms of memcpy", 0.1).to_text();
        assert!(text.contains("1.25 ms") && text.contains("<= 1.5") && text.contains("0.10 ms of memcpy"), "{text}");
    }

    #[test]
    fn percentiles_of_few_values() {
        assert_eq!(percentile(&[], 50), 0.0);
        assert_eq!(percentile(&[3.0, 1.0, 2.0], 50), 2.0);
        assert_eq!(percentile(&[3.0, 1.0, 2.0], 99), 3.0);
    }
}

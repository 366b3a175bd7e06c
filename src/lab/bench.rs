//! `virt-shadow-lab bench`: what the product claims, measured beside a peer or a limit in the same run.
//!
//! A row is a name, a value, what it is compared with in the same run, and the target it is held to. Timing decides
//! nothing here: a missed target is shown, not failed.

mod failover;
mod pause;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use super::error::{LabError, Result};
use super::guest::Workload;
use super::{GuestOptions, Lab, LabOptions, StartedGuest};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Benchmark {
    /// Pause of a cut, and what protection costs the guest
    Pause,
    /// Death of QEMU and power cuts: time to the running shadow and to the client's first answer
    Failover,
    /// Planned moves: how long the guest stands still
    Switchover,
}

const ALL: [Benchmark; 3] = [Benchmark::Pause, Benchmark::Failover, Benchmark::Switchover];

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

/// What a benchmark has: a lab of its own, and a way to print.
struct Bench {
    json: bool,
    interrupt: Arc<AtomicBool>,
    lab_name: String,
}

/// Runs one benchmark or all.
pub fn run(
    lab_name: &str,
    which: Option<Benchmark>,
    rounds: u32,
    json: bool,
    interrupt: Arc<AtomicBool>,
) -> Result<()> {
    let bench = Bench { json, interrupt, lab_name: lab_name.to_owned() };
    if !json {
        println!("{:<44} {:>9} {:<8} {:<10} {:<7} beside, in the same run", "figure", "value", "unit", "target", "");
    }
    for benchmark in ALL.iter().filter(|b| which.is_none_or(|wanted| wanted == **b)) {
        match benchmark {
            Benchmark::Pause => pause::run(&bench)?,
            Benchmark::Failover => failover::run(&bench, rounds)?,
            Benchmark::Switchover => failover::run_switchover(&bench, rounds)?,
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
            interrupt: Arc::clone(&self.interrupt),
            ..LabOptions::new(&self.lab_name)
        })
    }

    fn guest(&self, lab: &Lab, name: &str, host: &str, memory_mib: u32, workload: &str) -> Result<StartedGuest> {
        let workload: Workload = workload.parse().map_err(LabError::Product)?;
        lab.guest(&GuestOptions { memory_mib, workload, ..GuestOptions::new(name, host) }, true)
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

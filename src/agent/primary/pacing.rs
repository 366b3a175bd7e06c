//! How far apart cuts are made: the interval that was asked for, or what a budget allows.

use std::time::{Duration, Instant};

use vmsync::pace::{Binding, Cost, Limits, Pacer};

use crate::api::types::Budget;
use crate::capture::priority::thread_cpu;

/// With a budget that cannot be kept: an honest lag, but not without bound.
const LONGEST_INTERVAL: Duration = Duration::from_secs(2);

pub(super) struct Pacing {
    pacer: Pacer,
    /// When the newest cut was told, and this thread's processor time and all bytes for the wire then.
    last: (Instant, Duration, u64),
}

impl Pacing {
    pub fn new(shortest: Duration, budget: Budget) -> Self {
        let pacer = Pacer::new(limits(budget), shortest, LONGEST_INTERVAL);
        Self { pacer, last: (Instant::now(), thread_cpu(), 0) }
    }

    pub fn set(&mut self, shortest: Duration, budget: Budget) {
        self.pacer.set(limits(budget), shortest, LONGEST_INTERVAL);
    }

    pub fn interval(&self) -> Duration {
        self.pacer.interval()
    }

    /// What keeps cuts as far apart as they are.
    pub fn paced_by(&self) -> &'static str {
        match self.pacer.binding() {
            Binding::Interval => "interval",
            Binding::Pause => "pause",
            Binding::Wire => "wire",
            Binding::Cpu => "cpu",
        }
    }

    /// Takes note of what an epoch cost: this thread encodes, the cutter's thread scans and copies for `cutting`.
    /// `wire_bytes`: all so far, to `peers` shadows.
    pub fn cut(&mut self, pause: Duration, cutting: Duration, wire_bytes: u64, peers: usize) {
        let (now, cpu) = (Instant::now(), thread_cpu());
        let (last, cpu_before, wire_before) = std::mem::replace(&mut self.last, (now, cpu, wire_bytes));
        let wire_bytes = wire_bytes.saturating_sub(wire_before) / peers.max(1) as u64;
        let cpu = cpu.saturating_sub(cpu_before) + cutting;
        self.pacer.cut(Cost { pause, wire_bytes, cpu }, now - last);
    }
}

fn limits(budget: Budget) -> Limits {
    let some = |value: f64| (value > 0.0).then_some(value);
    Limits {
        pause: some(f64::from(budget.pause_permille) / 1e3),
        wire: some(budget.wire_kbit as f64 * 1e3 / 8.0),
        cpu: some(f64::from(budget.cpu_percent) / 1e2),
    }
}

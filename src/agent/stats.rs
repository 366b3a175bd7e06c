//! Figures of one protected guest: pauses as QEMU's own events tell them, dirty pages, totals.

use crate::api::types::{DirtyPages, Percentiles};

/// The last pauses, for percentiles; a ring of fixed size.
const PAUSES_KEPT: usize = 2048;

/// Pauses in microseconds.
#[derive(Debug, Default)]
pub struct Pauses {
    ring: Vec<u32>,
    next: usize,
    max_us: u64,
    /// Time of the last STOP that a RESUME has not answered, microseconds.
    stopped_at_us: Option<u64>,
}

impl Pauses {
    /// QEMU's STOP event, in its own clock.
    pub fn stopped(&mut self, at_us: u64) {
        self.stopped_at_us = Some(at_us);
    }

    /// QEMU's RESUME event: the pause since the STOP before.
    pub fn resumed(&mut self, at_us: u64) {
        if let Some(stopped) = self.stopped_at_us.take() {
            self.record(at_us.saturating_sub(stopped));
        }
    }

    /// Forgets an open STOP: somebody else stops the guest for long (suspend, migration), which is no pause of ours.
    pub fn ignore_current(&mut self) {
        self.stopped_at_us = None;
    }

    pub fn record(&mut self, pause_us: u64) {
        let value = u32::try_from(pause_us).unwrap_or(u32::MAX);
        if self.ring.len() < PAUSES_KEPT {
            self.ring.push(value);
        } else {
            self.ring[self.next] = value;
            self.next = (self.next + 1) % PAUSES_KEPT;
        }
        self.max_us = self.max_us.max(pause_us);
    }

    /// Percentiles over the last pauses, maximum over all.
    pub fn percentiles(&self) -> Percentiles {
        if self.ring.is_empty() {
            return Percentiles::default();
        }
        let mut sorted = self.ring.clone();
        sorted.sort_unstable();
        let at = |percent: usize| u64::from(sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]);
        Percentiles { p50: at(50), p99: at(99), max: self.max_us }
    }
}

/// Bytes per second over about the last second.
#[derive(Debug, Default)]
pub struct Rate {
    since_ms: u64,
    since_bytes: u64,
    per_s: u64,
}

impl Rate {
    pub fn update(&mut self, now_ms: u64, total_bytes: u64) -> u64 {
        let elapsed_ms = now_ms.saturating_sub(self.since_ms);
        if elapsed_ms >= 1000 {
            self.per_s = total_bytes.saturating_sub(self.since_bytes) * 1000 / elapsed_ms;
            self.since_ms = now_ms;
            self.since_bytes = total_bytes;
        }
        self.per_s
    }
}

/// Pages written per cut.
#[derive(Debug, Default)]
pub struct Dirty {
    last: u64,
    total: u64,
    cuts: u64,
}

impl Dirty {
    pub fn record(&mut self, pages: u64) {
        self.last = pages;
        self.total += pages;
        self.cuts += 1;
    }

    pub fn view(&self) -> DirtyPages {
        let mean = if self.cuts == 0 { 0.0 } else { self.total as f64 / self.cuts as f64 };
        DirtyPages { last: self.last, mean: (mean * 10.0).round() / 10.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_last_pauses_and_the_maximum_of_all() {
        let mut pauses = Pauses::default();
        pauses.record(1_000_000);
        for us in 0..PAUSES_KEPT as u64 {
            pauses.stopped(us * 10_000);
            pauses.resumed(us * 10_000 + 100 + us % 100);
        }
        let Percentiles { p50, p99, max } = pauses.percentiles();
        assert!((145..=155).contains(&p50) && (197..=199).contains(&p99), "{p50} {p99}");
        assert_eq!(max, 1_000_000);
    }

    #[test]
    fn a_resume_without_a_stop_is_no_pause() {
        let mut pauses = Pauses::default();
        pauses.stopped(5);
        pauses.ignore_current();
        pauses.resumed(500_000);
        assert_eq!(pauses.percentiles(), Percentiles::default());
    }
}

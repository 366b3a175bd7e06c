//! Figures of one protected guest: pauses as QEMU's own events tell them, dirty pages, totals.

use crate::api::types::{DirtyPages, Percentiles};

/// So many of the newest values count for percentiles; a ring of fixed size.
const VALUES_KEPT: usize = 1024;
/// Percentiles are looked at far more often than they change: every so many new values is enough.
const VALUES_BETWEEN: usize = 16;

/// The newest values of something, and its maximum.
#[derive(Debug, Default)]
pub struct Recent {
    ring: Vec<u32>,
    next: usize,
    max: u64,
    percentiles: Percentiles,
    /// Values since the percentiles were taken.
    since: usize,
}

impl Recent {
    pub fn record(&mut self, value: u64) {
        let kept = u32::try_from(value).unwrap_or(u32::MAX);
        if self.ring.len() < VALUES_KEPT {
            self.ring.push(kept);
        } else {
            self.ring[self.next] = kept;
            self.next = (self.next + 1) % VALUES_KEPT;
        }
        self.max = self.max.max(value);
        self.since += 1;
    }

    /// Percentiles over the newest values, maximum over all.
    pub fn percentiles(&mut self) -> Percentiles {
        let few = self.ring.len() <= VALUES_BETWEEN;
        if self.since >= VALUES_BETWEEN || (few && self.since > 0) {
            self.since = 0;
            let mut sorted = self.ring.clone();
            sorted.sort_unstable();
            let at = |percent: usize| u64::from(sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]);
            (self.percentiles.p50, self.percentiles.p99) = (at(50), at(99));
        }
        Percentiles { max: self.max, ..self.percentiles }
    }
}

/// Pauses in microseconds.
#[derive(Debug, Default)]
pub struct Pauses {
    recent: Recent,
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
        self.recent.record(pause_us);
    }

    pub fn percentiles(&mut self) -> Percentiles {
        self.recent.percentiles()
    }
}

/// How old a shadow's newest committed epoch has become each time the next one was committed, milliseconds: what a
/// failure at the worst moment would have lost.
#[derive(Debug, Default)]
pub struct PeakLags {
    recent: Recent,
    /// The newest committed epoch, and when it was cut.
    committed: Option<(u64, u64)>,
}

impl PeakLags {
    /// What the shadow has now: its newest committed epoch and that epoch's age.
    pub fn observe(&mut self, now_ms: u64, committed: Option<(u64, u64)>) -> Percentiles {
        let committed = committed.map(|(epoch, lag_ms)| (epoch, now_ms.saturating_sub(lag_ms)));
        if let (Some((before, cut_at_ms)), Some((epoch, _))) = (self.committed, committed)
            && before != epoch
        {
            self.recent.record(now_ms.saturating_sub(cut_at_ms));
        }
        self.committed = committed;
        self.recent.percentiles()
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
        for us in 0..VALUES_KEPT as u64 {
            pauses.stopped(us * 10_000);
            pauses.resumed(us * 10_000 + 100 + us % 100);
        }
        let Percentiles { p50, p99, max } = pauses.percentiles();
        assert!((145..=155).contains(&p50) && (197..=199).contains(&p99), "{p50} {p99}");
        assert_eq!(max, 1_000_000);
    }

    #[test]
    fn a_peak_lag_is_the_age_at_which_an_epoch_was_followed_by_the_next() {
        let mut lags = PeakLags::default();
        assert_eq!(lags.observe(1000, None), Percentiles::default());
        // Cut at 990; nothing is known of the time before it.
        assert_eq!(lags.observe(1000, Some((1, 10))).max, 0);
        assert_eq!(lags.observe(1040, Some((1, 50))).max, 0);
        // The next one, cut at 1040, is committed when the first is 65 ms old.
        assert_eq!(lags.observe(1055, Some((2, 15))), Percentiles { p50: 65, p99: 65, max: 65 });
        // A shadow that is away keeps what it has; its lag shows when it is back.
        assert_eq!(lags.observe(1100, Some((2, 60))).max, 65);
        assert_eq!(lags.observe(3000, Some((9, 10))).max, 1960);
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

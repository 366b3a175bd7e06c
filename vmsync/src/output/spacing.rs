//! When to cut because output waits.
//!
//! At once, if the guest has run for long enough since the last cut: at least [`SHORTEST`], and as long as it stood still.
//! With many frames of data a cut it runs for longer: then it is throughput that counts, and what a cut takes is taken from
//! that. Bare acknowledgements are no data: who sends to the guest has no more on its way than the guest's receive window,
//! and waits for them. Not while as many cuts are on their way as their commits can use: a further one would not leave
//! earlier.

use std::time::Duration;

/// Less than this apart, cuts cost more than they bring.
pub const SHORTEST: Duration = Duration::from_millis(1);
/// However long pauses are, output does not wait longer for its cut.
pub const LONGEST: Duration = Duration::from_millis(20);
/// The guest runs so many times as long as it stands still; with many frames of data a cut.
const RUNS: u32 = 1;
const RUNS_BUSY: u32 = 5;
/// Frames of data a cut that are many, and no longer many.
const MANY_FRAMES: u64 = 4;
const FEW_FRAMES: u64 = 2;
/// Cuts whose output waits for its commit.
const ON_THEIR_WAY: usize = 2;
/// Weight of the newest pause, in percent.
const NEWEST: u32 = 20;

#[derive(Debug, Clone, Default)]
pub struct OnDemand {
    /// Smoothed.
    pause: Duration,
    last_cut_ended: Option<Duration>,
    busy: bool,
    cuts: u64,
}

impl OnDemand {
    /// Time from the end of a cut to the next one.
    pub fn spacing(&self) -> Duration {
        (self.pause * if self.busy { RUNS_BUSY } else { RUNS }).clamp(SHORTEST, LONGEST)
    }

    /// A cut ended, which had stopped the guest for `pause`.
    pub fn cut(&mut self, now: Duration, pause: Duration) {
        self.cuts += 1;
        let pause = pause.min(LONGEST);
        self.pause = match self.last_cut_ended {
            None => pause,
            Some(_) => (self.pause * (100 - NEWEST) + pause * NEWEST) / 100,
        };
        self.last_cut_ended = Some(now);
    }

    /// So many frames of data have left since this was told last: all but bare acknowledgements.
    pub fn left(&mut self, frames: u64) {
        let cuts = std::mem::take(&mut self.cuts);
        self.busy = frames > cuts * if self.busy { FEW_FRAMES } else { MANY_FRAMES };
    }

    /// When to cut for output that waits; `uncommitted`: cuts whose output does. `None`: not before one has its
    /// commit.
    pub fn due(&self, uncommitted: usize) -> Option<Duration> {
        (uncommitted < ON_THEIR_WAY).then(|| self.last_cut_ended.map_or(Duration::ZERO, |at| at + self.spacing()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn the_spacing_follows_the_pauses_within_its_bounds() {
        let mut on_demand = OnDemand::default();
        assert_eq!(on_demand.due(0), Some(Duration::ZERO));
        on_demand.cut(us(1_000), us(300));
        assert_eq!(on_demand.due(0), Some(us(2_000)));
        assert_eq!(on_demand.due(2), None);
        (0..50).for_each(|_| on_demand.cut(us(1_000), us(5_000)));
        assert!(on_demand.spacing() > us(4_900) && on_demand.spacing() <= us(5_000), "{:?}", on_demand.spacing());
        (0..50).for_each(|_| on_demand.cut(us(1_000), Duration::from_secs(9)));
        assert!(on_demand.spacing() > us(19_900) && on_demand.spacing() <= LONGEST, "{:?}", on_demand.spacing());
        (0..50).for_each(|_| on_demand.cut(us(1_000), us(100)));
        assert_eq!(on_demand.spacing(), SHORTEST);
    }

    #[test]
    fn with_much_data_a_cut_the_guest_runs_for_longer() {
        let mut on_demand = OnDemand::default();
        let mut a_while = |frames| {
            (0..100).for_each(|_| on_demand.cut(us(1_000), us(800)));
            on_demand.left(frames);
            on_demand.spacing()
        };
        assert_eq!(a_while(100), SHORTEST);
        assert!(a_while(1_000) > us(3_900));
        assert!(a_while(300) > us(3_900));
        assert_eq!(a_while(150), SHORTEST);
    }
}

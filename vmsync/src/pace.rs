//! How long to wait between two cuts so that protection costs no more than it may.
//!
//! ```text
//! each cut: pause, bytes for the wire, processor time ──> shares of the interval, smoothed ──┐
//!                                                                                            v
//! interval x (dearest share / its limit)^1/2, at most a quarter at a time, within its bounds <┘
//! ```
//! A guest rewrites the same pages again and again, so a longer interval costs more at each cut, but less a second.
//! Where it does not (a guest that streams through its memory), the interval goes to its longest and the limit is not
//! kept, which [`Pacer::binding`] tells.

use std::time::Duration;

/// Limits on what protection may cost; none of them set: the interval stays the shortest.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Limits {
    /// Share of the guest's time that pauses may take, 0 to 1.
    pub pause: Option<f64>,
    /// Bytes a second towards one shadow.
    pub wire: Option<f64>,
    /// Processors that capture and encoding may use; 0.5 is half of one.
    pub cpu: Option<f64>,
}

impl Limits {
    /// Whether there is any.
    pub fn any(&self) -> bool {
        self.pause.or(self.wire).or(self.cpu).is_some()
    }
}

/// What one cut cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    pub pause: Duration,
    pub wire_bytes: u64,
    pub cpu: Duration,
}

/// What the interval depends on at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// Nothing: the interval is the shortest one asked for.
    Interval,
    Pause,
    Wire,
    Cpu,
}

/// Weight of the newest cut in the smoothed costs.
const NEWEST: f64 = 0.2;
/// The interval changes by this factor at most from one cut to the next.
const STEP: f64 = 1.25;
/// Differences that are not worth a change; without it the interval would never rest.
const SLACK: f64 = 0.05;

/// Chooses the time until the next cut.
#[derive(Debug, Clone)]
pub struct Pacer {
    limits: Limits,
    shortest: Duration,
    longest: Duration,
    interval: Duration,
    /// Smoothed shares: guest's time, bytes a second, processors.
    shares: Option<[f64; 3]>,
}

impl Pacer {
    /// `longest` counts as `shortest` if it is below that.
    pub fn new(limits: Limits, shortest: Duration, longest: Duration) -> Self {
        Self { limits, shortest, longest: longest.max(shortest), interval: shortest, shares: None }
    }

    /// Goes on with other wishes, from the present interval if they allow it.
    pub fn set(&mut self, limits: Limits, shortest: Duration, longest: Duration) {
        let interval = if limits.any() { self.interval } else { shortest };
        *self = Self { shares: self.shares, ..Self::new(limits, shortest, longest) };
        self.interval = interval.clamp(self.shortest, self.longest);
    }

    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// What keeps the interval from being shorter.
    pub fn binding(&self) -> Binding {
        match self.dearest() {
            Some((_, binding)) if self.interval > self.shortest => binding,
            _ => Binding::Interval,
        }
    }

    /// Takes note of a cut that followed the one before it after `since_last`.
    pub fn cut(&mut self, cost: Cost, since_last: Duration) {
        let seconds = since_last.max(Duration::from_millis(1)).as_secs_f64();
        let newest =
            [cost.pause.as_secs_f64(), cost.wire_bytes as f64, cost.cpu.as_secs_f64()].map(|cost| cost / seconds);
        let smoothed = match self.shares {
            None => newest,
            Some(known) => std::array::from_fn(|at| known[at] + NEWEST * (newest[at] - known[at])),
        };
        self.shares = Some(smoothed);
        let Some((ratio, _)) = self.dearest() else { return };
        if (ratio - 1.0).abs() <= SLACK {
            return;
        }
        let step = ratio.sqrt().clamp(1.0 / STEP, STEP);
        self.interval = self.interval.mul_f64(step).clamp(self.shortest, self.longest);
    }

    /// The cost that is highest in relation to its limit.
    fn dearest(&self) -> Option<(f64, Binding)> {
        let shares = self.shares?;
        let limits =
            [(self.limits.pause, Binding::Pause), (self.limits.wire, Binding::Wire), (self.limits.cpu, Binding::Cpu)];
        let ratio = |(share, (limit, binding)): (f64, (Option<f64>, Binding))| Some((share / limit?, binding));
        let ratios = shares.into_iter().zip(limits).filter_map(ratio).filter(|(ratio, _)| ratio.is_finite());
        ratios.max_by(|one, other| one.0.total_cmp(&other.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORTEST: Duration = Duration::from_millis(20);
    const LONGEST: Duration = Duration::from_secs(2);

    /// A guest with a hot set of pages, written evenly, and a stream through the rest.
    struct Guest {
        hot_pages: f64,
        writes_a_second: f64,
        streamed_a_second: f64,
    }

    impl Guest {
        fn dirty(&self, interval: f64) -> f64 {
            let hot = self.hot_pages * (1.0 - (-self.writes_a_second * interval / self.hot_pages).exp());
            hot + self.streamed_a_second * interval
        }

        fn cost(&self, interval: Duration) -> Cost {
            let pages = self.dirty(interval.as_secs_f64());
            Cost {
                pause: Duration::from_secs_f64(0.7e-3 + pages * 1.2e-6),
                wire_bytes: (pages * 400.0) as u64,
                cpu: Duration::from_secs_f64(0.5e-3 + pages * 4e-6),
            }
        }

        fn run(&self, pacer: &mut Pacer, cuts: usize) -> (f64, f64) {
            let (mut paused, mut passed) = (0.0, 0.0);
            for cut in 0..cuts {
                let interval = pacer.interval();
                let cost = self.cost(interval);
                pacer.cut(cost, interval);
                assert!((SHORTEST..=LONGEST).contains(&pacer.interval()));
                if cut >= cuts / 2 {
                    paused += cost.pause.as_secs_f64();
                    passed += interval.as_secs_f64();
                }
            }
            (paused / passed, pacer.interval().as_secs_f64())
        }
    }

    const BUSY: Guest = Guest { hot_pages: 5_000.0, writes_a_second: 200_000.0, streamed_a_second: 500.0 };
    const IDLE: Guest = Guest { hot_pages: 50.0, writes_a_second: 300.0, streamed_a_second: 0.0 };

    #[test]
    fn the_share_of_pauses_settles_at_its_limit() {
        for limit in [0.01, 0.02, 0.05] {
            let mut pacer = Pacer::new(Limits { pause: Some(limit), ..Limits::default() }, SHORTEST, LONGEST);
            let (share, interval) = BUSY.run(&mut pacer, 200);
            assert!((share / limit - 1.0).abs() < 0.1, "{share} for {limit}");
            assert_eq!(pacer.binding(), Binding::Pause);
            let (_, later) = BUSY.run(&mut pacer, 50);
            assert!((later / interval - 1.0).abs() < 0.1, "it rests: {interval} {later}");
        }
    }

    #[test]
    fn it_follows_the_guest_both_ways_and_is_short_for_an_idle_one() {
        let limits = Limits { pause: Some(0.05), wire: None, cpu: Some(0.2) };
        let mut pacer = Pacer::new(limits, SHORTEST, LONGEST);
        let (_, busy) = BUSY.run(&mut pacer, 100);
        let (_, idle) = IDLE.run(&mut pacer, 100);
        let (_, again) = BUSY.run(&mut pacer, 100);
        assert!(busy > 2.0 * idle && (again / busy - 1.0).abs() < 0.1, "{busy} {idle} {again}");
        assert!((idle - SHORTEST.as_secs_f64()).abs() < 1e-3);
    }

    #[test]
    fn the_dearest_of_several_limits_counts() {
        let limits = Limits { pause: Some(0.9), wire: Some(2e6), cpu: Some(9.0) };
        let mut pacer = Pacer::new(limits, SHORTEST, LONGEST);
        BUSY.run(&mut pacer, 200);
        assert_eq!(pacer.binding(), Binding::Wire);
        let interval = pacer.interval();
        let rate = BUSY.cost(interval).wire_bytes as f64 / interval.as_secs_f64();
        assert!((rate / 2e6 - 1.0).abs() < 0.1, "{rate}");
    }

    #[test]
    fn a_limit_that_cannot_be_kept_gives_the_longest_interval_and_no_limit_the_shortest() {
        let mut pacer = Pacer::new(Limits { wire: Some(1.0), ..Limits::default() }, SHORTEST, LONGEST);
        BUSY.run(&mut pacer, 100);
        assert_eq!((pacer.interval(), pacer.binding()), (LONGEST, Binding::Wire));
        pacer.set(Limits::default(), SHORTEST, LONGEST);
        assert_eq!((pacer.interval(), pacer.binding()), (SHORTEST, Binding::Interval));
        BUSY.run(&mut pacer, 20);
        assert_eq!(pacer.interval(), SHORTEST);
        pacer.cut(Cost { pause: Duration::MAX, wire_bytes: u64::MAX, cpu: Duration::MAX }, Duration::ZERO);
        assert_eq!(pacer.interval(), SHORTEST);
    }
}

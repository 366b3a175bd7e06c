//! Rates from counters that only rise, except when they start over.

/// Turns readings of a counter into a rate a second.
#[derive(Debug, Clone, Default)]
pub struct Counter {
    last: Option<(u64, u64)>,
    /// Largest plausible rate a second; a jump beyond it is no traffic. `None`: all are plausible.
    most: Option<f64>,
}

impl Counter {
    /// `most`: largest plausible rate a second, such as a link's capacity.
    pub fn new(most: Option<f64>) -> Self {
        Self { last: None, most }
    }

    /// The rate since the last reading. `None` for the first one, for time that stands still, and for a jump that is
    /// not plausible. A counter that fell has started over: what it shows has come since then, at least.
    pub fn rate(&mut self, at_ms: u64, reading: u64) -> Option<f64> {
        let (before_ms, before) = self.last.replace((at_ms, reading))?;
        if at_ms <= before_ms {
            return None;
        }
        let delta = if reading >= before { reading - before } else { reading };
        let rate = delta as f64 * 1000.0 / (at_ms - before_ms) as f64;
        (rate <= self.most.unwrap_or(f64::INFINITY)).then_some(rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_no_negative_rate_and_a_jump_no_traffic() {
        let mut counter = Counter::new(Some(1e6));
        let readings =
            [(0, 500), (1_000, 1_500), (2_000, 300), (2_000, 400), (3_000, u64::MAX / 2), (4_000, u64::MAX / 2 + 7)];
        let rates: Vec<Option<f64>> = readings.into_iter().map(|(at, v)| counter.rate(at, v)).collect();
        assert_eq!(rates, [None, Some(1000.0), Some(300.0), None, None, Some(7.0)]);
    }
}

//! Forecasts before anything is learnt: the last value, with intervals as wide as ignorance asks.

use crate::history::History;
use crate::quantiles::{LEVEL_COUNT, Quantiles};

/// Normal quantiles of the levels.
const NORMAL: Quantiles = [-1.645, -1.282, -0.674, 0.0, 0.674, 1.282, 1.645];
/// Samples looked at.
const SAMPLES: usize = 64;

/// A random walk from the newest sample, its step as large as the moves seen, and the larger the fewer were seen. With
/// a single sample anything from nothing to the double is likely.
pub fn forecast(history: &History, horizon: usize) -> Vec<Quantiles> {
    let Some(&last) = history.values().last() else { return vec![[0.0; LEVEL_COUNT]; horizon] };
    let values = &history.values()[history.len().saturating_sub(SAMPLES)..];
    let moves = values.windows(2).map(|w| (w[1] - w[0]) * (w[1] - w[0])).sum::<f64>();
    let count = (values.len() - 1) as f64;
    // As if one more move had been seen, of a third of the value's size.
    let prior = (last / 3.0) * (last / 3.0);
    let step = ((moves + prior) / (count + 1.0)).sqrt() * (1.0 + 2.0 / (1.0 + count));
    let (low, high) = values.iter().fold((last, last), |(l, h), &v| (l.min(v), h.max(v)));
    let range = (high - low).max(last.abs() * 0.5 / (1.0 + count));
    (1..=horizon)
        .map(|h| {
            // Most series of machines come back: the walk grows no wider than what was seen allows.
            let width = (step * (h as f64).sqrt()).min(step + range);
            NORMAL.map(|z| last + z * width)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ShapeError;
    use crate::history::Shape;

    #[test]
    fn intervals_narrow_as_samples_come() -> Result<(), ShapeError> {
        let mut history = History::new(Shape::new(60, 1440, 5)?);
        let mut widths = Vec::new();
        for i in 0..40 {
            history.push(Some(100.0 + f64::from(i % 3)));
            let steps = forecast(&history, 5);
            widths.push(steps[0][LEVEL_COUNT - 1] - steps[0][0]);
            assert!(steps.iter().flatten().all(|v| v.is_finite()));
        }
        assert!(widths[0] > 100.0 && widths[39] < widths[5] && widths[5] < widths[0], "{widths:?}");
        Ok(())
    }
}

//! A forecast: for every step ahead, the quantiles of what may come.

/// Probability levels every model forecasts, rising.
pub const LEVELS: [f64; LEVEL_COUNT] = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95];
/// Number of [`LEVELS`].
pub const LEVEL_COUNT: usize = 7;
/// Index of the median in [`LEVELS`].
pub const MEDIAN: usize = 3;

/// One value per level of [`LEVELS`], in the series' own unit.
pub type Quantiles = [f64; LEVEL_COUNT];

/// Quantiles for steps 1, 2, ... ahead; `steps()[0]` is one step ahead. Quantiles of a step never cross.
#[derive(Debug, Clone, PartialEq)]
pub struct Forecast {
    steps: Vec<Quantiles>,
}

impl Forecast {
    /// Sorts each step's quantiles; a value that is not finite becomes the nearest finite one of its step (0 if none).
    pub fn new(mut steps: Vec<Quantiles>) -> Self {
        for step in &mut steps {
            make_rising(step);
        }
        Self { steps }
    }

    /// Quantiles by step; index 0 is one step ahead.
    pub fn steps(&self) -> &[Quantiles] {
        &self.steps
    }

    /// Number of steps ahead.
    pub fn horizon(&self) -> usize {
        self.steps.len()
    }

    /// Value at `level` (0..1) `step` steps ahead (1-based); `None` beyond the horizon.
    pub fn at(&self, step: usize, level: f64) -> Option<f64> {
        self.steps.get(step.checked_sub(1)?).map(|q| value_at(q, level))
    }

    /// Probability that the value `step` steps ahead (1-based) is above `threshold`; `None` beyond the horizon.
    pub fn exceedance(&self, step: usize, threshold: f64) -> Option<f64> {
        self.steps.get(step.checked_sub(1)?).map(|q| 1.0 - probability_below(q, threshold))
    }
}

/// Loss of forecasting `value` for quantile `level` when `actual` came.
pub fn pinball(level: f64, value: f64, actual: f64) -> f64 {
    let error = actual - value;
    (level * error).max((level - 1.0) * error)
}

/// Value at `level` (clamped to 0.001..0.999): linear between levels, beyond the outermost ones an exponential tail
/// with the slope of the outermost pair.
pub fn value_at(quantiles: &Quantiles, level: f64) -> f64 {
    let level = level.clamp(0.001, 0.999);
    let (first, last) = (LEVELS[0], LEVELS[LEVEL_COUNT - 1]);
    if level < first {
        let scale = (quantiles[1] - quantiles[0]) / (LEVELS[1] / first).ln();
        return quantiles[0] - scale * (first / level).ln();
    }
    if level > last {
        let scale = (quantiles[LEVEL_COUNT - 1] - quantiles[LEVEL_COUNT - 2])
            / ((1.0 - LEVELS[LEVEL_COUNT - 2]) / (1.0 - last)).ln();
        return quantiles[LEVEL_COUNT - 1] + scale * ((1.0 - last) / (1.0 - level)).ln();
    }
    let upper = LEVELS.iter().position(|&l| l >= level).unwrap_or(LEVEL_COUNT - 1).max(1);
    let share = (level - LEVELS[upper - 1]) / (LEVELS[upper] - LEVELS[upper - 1]);
    quantiles[upper - 1] + share * (quantiles[upper] - quantiles[upper - 1])
}

/// Probability that a value below `threshold` comes: the inverse of [`value_at`].
pub fn probability_below(quantiles: &Quantiles, threshold: f64) -> f64 {
    let (first, last) = (LEVELS[0], LEVELS[LEVEL_COUNT - 1]);
    if threshold < quantiles[0] {
        let scale = (quantiles[1] - quantiles[0]) / (LEVELS[1] / first).ln();
        return if scale > 0.0 { first * (-(quantiles[0] - threshold) / scale).exp() } else { 0.0 };
    }
    if threshold > quantiles[LEVEL_COUNT - 1] {
        let (low, high) = (quantiles[LEVEL_COUNT - 2], quantiles[LEVEL_COUNT - 1]);
        let scale = (high - low) / ((1.0 - LEVELS[LEVEL_COUNT - 2]) / (1.0 - last)).ln();
        return if scale > 0.0 { 1.0 - (1.0 - last) * (-(threshold - high) / scale).exp() } else { 1.0 };
    }
    for upper in 1..LEVEL_COUNT {
        let (low, high) = (quantiles[upper - 1], quantiles[upper]);
        if threshold <= high {
            let share = if high > low { (threshold - low) / (high - low) } else { 1.0 };
            return LEVELS[upper - 1] + share * (LEVELS[upper] - LEVELS[upper - 1]);
        }
    }
    1.0
}

/// Makes quantiles finite and rising, in place.
pub fn make_rising(quantiles: &mut Quantiles) {
    if quantiles.iter().any(|v| !v.is_finite()) {
        let middle = quantiles.iter().copied().find(|v| v.is_finite()).unwrap_or(0.0);
        for value in quantiles.iter_mut().filter(|v| !v.is_finite()) {
            *value = middle;
        }
    }
    quantiles.sort_unstable_by(f64::total_cmp);
}

/// Quantile `level` of rising values, linear between neighbours; 0 for none.
pub fn quantile_of_sorted(sorted: &[f64], level: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = level.clamp(0.0, 1.0) * last as f64;
    let low = at as usize;
    let high = (low + 1).min(last);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

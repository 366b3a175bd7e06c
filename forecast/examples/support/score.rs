//! Scores of forecasts against the last value with the quantiles of its own residuals.

use forecast::quantiles::{pinball, quantile_of_sorted};

use super::Entry;

/// Levels that are scored.
pub const SCORED: [f64; 4] = [0.1, 0.5, 0.9, 0.95];
/// "Near" are steps up to this one.
const NEAR: usize = 3;

/// One forecast: origin, step ahead, values at [`SCORED`].
pub type Issued = (usize, usize, [f64; 4]);

/// Means over the forecasts of one series.
#[derive(Debug, Clone, Copy, Default)]
pub struct Losses {
    pub pinball_near: f64,
    pub pinball: f64,
    pub error_near: f64,
    pub error: f64,
    pub p95: f64,
    pub cover80: f64,
    pub cover95: f64,
}

/// One series: own losses and those of the last value.
pub struct Score {
    pub own: Losses,
    pub naive: Losses,
    pub mase_scale: f64,
}

impl Score {
    pub fn of(y: &[f64], entry: &Entry, issued: &[Issued]) -> Self {
        let horizon = issued.iter().map(|(_, step, _)| *step).max().unwrap_or(0);
        let start = entry.season.max(entry.train_end.saturating_sub(14 * entry.season));
        let table: Vec<[f64; 4]> = (1..=horizon)
            .map(|step| {
                let mut moves: Vec<f64> = (start..entry.train_end - step).map(|t| y[t + step] - y[t]).collect();
                moves.sort_unstable_by(f64::total_cmp);
                let mut row = SCORED.map(|level| quantile_of_sorted(&moves, level));
                row[1] = 0.0;
                row
            })
            .collect();
        let naive: Vec<Issued> =
            issued.iter().map(|&(o, step, _)| (o, step, table[step - 1].map(|r| y[o] + r))).collect();
        // As in the manifests that say it: the mean error of the seasonal naive forecaster within the training part.
        let training = &y[..entry.train_end];
        let seasonal = training.iter().skip(entry.season).zip(training).map(|(now, then)| (now - then).abs());
        let scale = seasonal.sum::<f64>() / training.len().saturating_sub(entry.season).max(1) as f64;
        let mase_scale = entry.mase_scale.unwrap_or(scale).max(f64::MIN_POSITIVE);
        Self { own: losses(y, issued), naive: losses(y, &naive), mase_scale }
    }

    /// Loss against the last value's; below 1 is better.
    pub fn relative(&self, of: impl Fn(&Losses) -> f64) -> f64 {
        of(&self.own).max(1e-12) / of(&self.naive).max(1e-12)
    }
}

fn losses(y: &[f64], issued: &[Issued]) -> Losses {
    let mut sum = Losses::default();
    let near = issued.iter().filter(|(_, step, _)| *step <= NEAR).count().max(1) as f64;
    let all = issued.len().max(1) as f64;
    for (origin, step, values) in issued {
        let actual = y[origin + step];
        let loss: f64 = (0..3).map(|k| pinball(SCORED[k], values[k], actual)).sum::<f64>() / 3.0;
        let error = (actual - values[1]).abs();
        if *step <= NEAR {
            sum.pinball_near += loss / near;
            sum.error_near += error / near;
        }
        sum.pinball += loss / all;
        sum.error += error / all;
        sum.p95 += pinball(0.95, values[3], actual) / all;
        sum.cover80 += f64::from(u8::from(values[0] <= actual && actual <= values[2])) / all;
        sum.cover95 += f64::from(u8::from(actual <= values[3])) / all;
    }
    sum
}

/// The summary over all series, as the scorer prints it.
pub fn summary(scores: &[&Score]) -> String {
    let Means { near, all, p95, mase_near, mase, cover80, cover80_error, cover95, better } = means(scores);
    let count = scores.len();
    format!(
        "SUMMARY series {count} relPinball_1_3 {near:.3} relPinball_1_12 {all:.3} relP95 {p95:.3} MASE_1_3 {mase_near:.3} \
         MASE_1_12 {mase:.3} cov80 {cover80:.3} cov80_abserr {cover80_error:.3} cov95 {cover95:.3} \
         better_than_naive {better}/{count}"
    )
}

/// Over all series, as the scorer takes them.
pub struct Means {
    pub near: f64,
    pub all: f64,
    pub p95: f64,
    pub mase_near: f64,
    pub mase: f64,
    pub cover80: f64,
    pub cover80_error: f64,
    pub cover95: f64,
    /// Series better than the last value.
    pub better: usize,
}

/// Geometric means of relative losses, medians of MASE, means of coverage.
pub fn means(scores: &[&Score]) -> Means {
    let count = scores.len().max(1) as f64;
    let geometric =
        |of: &dyn Fn(&Losses) -> f64| (scores.iter().map(|s| s.relative(of).ln()).sum::<f64>() / count).exp();
    let mean = |of: &dyn Fn(&Score) -> f64| scores.iter().map(|s| of(s)).sum::<f64>() / count;
    let median = |of: &dyn Fn(&Score) -> f64| {
        let mut all: Vec<f64> = scores.iter().map(|s| of(s)).collect();
        all.sort_unstable_by(f64::total_cmp);
        quantile_of_sorted(&all, 0.5)
    };
    Means {
        near: geometric(&|l| l.pinball_near),
        all: geometric(&|l| l.pinball),
        p95: geometric(&|l| l.p95),
        mase_near: median(&|s| s.own.error_near / s.mase_scale),
        mase: median(&|s| s.own.error / s.mase_scale),
        cover80: mean(&|s| s.own.cover80),
        cover80_error: mean(&|s| (s.own.cover80 - 0.8).abs()),
        cover95: mean(&|s| s.own.cover95),
        better: scores.iter().filter(|s| s.own.pinball < s.naive.pinball).count(),
    }
}

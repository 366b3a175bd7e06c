//! A rolling-origin backtest of one series. It is preloaded up to its train_end and learnt; from there on samples come
//! one by one, as they would in life, and the forecaster learns again when it is due. A forecast is made after the
//! sample of its origin and before the next.

use forecast::{Hybrid, Shape};

use super::score::{Issued, SCORED, Score};
use super::{Entry, Failure, cpu_s, filled, plot};

pub struct Outcome {
    pub issued: Vec<Issued>,
    pub score: Score,
    /// Losses of the seasonal naive expert, which learnt and was asked beside the hybrid.
    pub seasonal: Score,
    pub line: String,
    pub plot: String,
}

/// Index of the seasonal naive expert.
const SEASONAL: usize = 1;

pub fn run(samples: &[Option<f64>], entry: &Entry, horizon: usize) -> Result<Outcome, Failure> {
    let (id, count) = (&entry.id, samples.len());
    let mut origins = entry.origins.clone();
    origins.sort_unstable();
    let (Some(&first), Some(&last)) = (origins.first(), origins.last()) else {
        return Err(format!("{id}: no origins").into());
    };
    if entry.train_end <= horizon || entry.train_end > count || last + horizon >= count {
        return Err(format!(
            "{id}: {count} samples; train_end is to be more than the horizon ({horizon}) and at most that, and a horizon \
             is to follow the last origin ({last})"
        )
        .into());
    }
    // An origin before train_end must not know what is between.
    let train_end = entry.train_end.min(first + 1);
    let started = cpu_s();
    let mut hybrid = Hybrid::new(Shape::new(entry.step_s, entry.season, horizon)?);
    let (mut issued, mut seasonal) = (Vec::new(), Vec::new());
    let mut origins = origins.into_iter().peekable();
    for (index, sample) in samples.iter().enumerate() {
        if index < train_end {
            hybrid.preload([*sample]);
        } else {
            hybrid.push(*sample);
        }
        if index + 1 >= train_end {
            hybrid.learn();
        }
        while origins.next_if(|&o| o == index).is_some() {
            let forecast = hybrid.forecast();
            let panel = hybrid.panel();
            for step in 1..=horizon {
                issued.push((index, step, SCORED.map(|level| forecast.at(step, level).unwrap_or(f64::NAN))));
                let naive = panel.as_ref().map(|p| p[SEASONAL][step - 1]);
                seasonal.push((index, step, naive.map_or([f64::NAN; 4], |q| [q[1], q[3], q[5], q[6]])));
            }
        }
    }
    let y = filled(samples);
    let score = Score::of(&y, entry, &issued);
    let status = hybrid.status();
    let weights: Vec<String> = status.weights.iter().map(|(n, w)| format!("{n} {w:.2}")).collect();
    let line = format!(
        "{id:44} pinball {:.3} {:.3} p95 {:.3} cov80 {:.3} cov95 {:.3}  {:4.1} s CPU, {} fits, {} changes, {} kB  {}",
        score.relative(|l| l.pinball_near),
        score.relative(|l| l.pinball),
        score.relative(|l| l.p95),
        score.own.cover80,
        score.own.cover95,
        cpu_s() - started,
        status.fits,
        status.changes,
        status.bytes / 1000,
        weights.join(" ")
    );
    let seasonal = Score::of(&y, entry, &seasonal);
    Ok(Outcome { plot: last_forecast(id, &y, &issued), issued, score, seasonal, line })
}

/// The last origin with what was before and came after.
fn last_forecast(id: &str, y: &[f64], issued: &[Issued]) -> String {
    const BEFORE: usize = 90;
    let Some(&(origin, ..)) = issued.last() else { return String::new() };
    let first = origin.saturating_sub(BEFORE);
    let last = issued.iter().filter(|(o, ..)| *o == origin).map(|(_, step, _)| origin + step).max().unwrap_or(origin);
    let bands: Vec<Option<(f64, f64, f64)>> = (first..=last)
        .map(|slot| {
            issued.iter().find(|(o, step, _)| *o == origin && o + step == slot).map(|(.., v)| (v[0], v[1], v[2]))
        })
        .collect();
    plot::plot(&format!("{id}: what came (*), forecast 80 % (:) and median (-)"), &y[first..=last], &bands)
}

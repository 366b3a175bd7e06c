//! Rolling-origin backtest over a manifest of series; prints all scores, writes the forecasts for a scorer.
//!
//!   backtest --data DIR --manifest FILE --out preds.csv [--threads N] [--plots N]
//!
//! A series is preloaded up to its train_end and learnt; from there on samples come one by one, as they would in life,
//! and the forecaster learns again when it is due. A forecast is made after the sample of its origin and before the next.

// An example acts: it reads files and the clock, which the crate itself may not.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod support;

use std::fmt::Write as _;
use std::path::Path;

use forecast::{Hybrid, Shape};
use support::score::{Issued, SCORED, Score, summary};
use support::{Entry, Failure, Manifest, Options, cpu_s, filled, in_parallel, plot, read_column};

struct Outcome {
    issued: Vec<Issued>,
    score: Score,
    line: String,
    plot: String,
}

fn main() -> Result<(), Failure> {
    let options = Options::read()?;
    let data = Path::new(options.text("--data")?);
    let manifest = Manifest::read(options.text("--manifest")?)?;
    let out = options.text("--out")?;
    let plots = options.number("--plots", 2usize)?;
    let outcomes =
        in_parallel(&manifest.series, options.number("--threads", 2)?, |entry| run(data, entry, manifest.horizon))?;
    let mut text = String::from("series,origin,h,q10,q50,q90,q95\n");
    for (entry, outcome) in manifest.series.iter().zip(&outcomes) {
        for (origin, step, [q10, q50, q90, q95]) in &outcome.issued {
            writeln!(text, "{},{origin},{step},{q10},{q50},{q90},{q95}", entry.id)?;
        }
    }
    std::fs::write(out, text).map_err(|e| format!("{out}: {e}"))?;
    outcomes.iter().take(plots).for_each(|o| println!("{}", o.plot));
    outcomes.iter().for_each(|o| println!("{}", o.line));
    let scores: Vec<Score> = outcomes.into_iter().map(|o| o.score).collect();
    println!("{}", summary(&scores));
    Ok(())
}

fn run(data: &Path, entry: &Entry, horizon: usize) -> Result<Outcome, Failure> {
    let started = cpu_s();
    let samples = read_column(data, &entry.id)?;
    let mut hybrid = Hybrid::new(Shape::new(entry.step_s, entry.season, horizon)?);
    let mut issued = Vec::new();
    let mut origins = entry.origins.iter().peekable();
    for (index, sample) in samples.iter().enumerate() {
        if index < entry.train_end {
            hybrid.preload([*sample]);
        } else {
            hybrid.push(*sample);
        }
        if index + 1 >= entry.train_end {
            hybrid.learn();
        }
        while origins.next_if(|&&o| o == index).is_some() {
            let forecast = hybrid.forecast();
            for step in 1..=horizon {
                let values = SCORED.map(|level| forecast.at(step, level).unwrap_or(f64::NAN));
                issued.push((index, step, values));
            }
        }
    }
    let y = filled(&samples);
    let score = Score::of(&y, entry, &issued);
    let status = hybrid.status();
    let weights: Vec<String> = status.weights.iter().map(|(n, w)| format!("{n} {w:.2}")).collect();
    let line = format!(
        "{:44} pinball {:.3} {:.3} p95 {:.3} cov80 {:.3} cov95 {:.3}  {:4.1} s CPU, {} fits, {} changes, {} kB  {}",
        entry.id,
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
    Ok(Outcome { plot: last_forecast(&entry.id, &y, &issued), issued, score, line })
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

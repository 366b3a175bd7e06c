//! What forecasts cost and are worth: learning, forecasts, updates, memory, 1,000 series on two cores; quality on made
//! series, and on measured ones where they are given. Rows as those of `virt-shadow-lab bench`.
//!
//!   bench [--format text|json] [--series 1000] [--minutes 10] [--threads 2]
//!         [--data DIR [--manifest DIR/manifest.json] [--links file/column,...]]
//!
//! All times are CPU time of the thread that does the work. A missed target is shown, not failed: timing decides nothing.

// An example acts: it reads files and the clock, which the crate itself may not.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod support;

use std::path::Path;

use forecast::random::Random;
use forecast::{Hybrid, Shape};
use support::rows::{Row, Rows};
use support::score::{Score, means};
use support::world::{FORECASTERS, PARTS, SEASON, TRAIN, events_and_shifts, load, made_series};
use support::{Failure, Manifest, Options, cpu_s, in_parallel, onsets, read_column, rolling};

/// What a series of 5-minute samples may hold for ever.
const MOST_KB: f64 = 1024.0;
/// Seeds of the series with events and shifts.
const SEEDS: [u64; 3] = [1, 2, 3];

fn main() -> Result<(), Failure> {
    let options = Options::read()?;
    let rows = Rows::new(options.text("--format").unwrap_or("text"))?;
    let threads = options.number("--threads", 2usize)?;
    one_series(&rows)?;
    many_series(&rows, &options, threads)?;

    let made = made_series();
    let outcomes = in_parallel(&made, threads, |(entry, samples)| rolling::run(samples, entry, 12))?;
    quality(&rows, "6 made series", &outcomes, false)?;
    events(&rows, threads)?;
    if let Ok(data) = options.text("--data") {
        measured(&rows, &options, Path::new(data), threads)?;
    }
    Ok(())
}

/// Costs of one series of 14 days at 5 minutes.
fn one_series(rows: &Rows) -> Result<(), Failure> {
    let mut random = Random::new(1);
    let mut hybrid = Hybrid::new(Shape::new(300, SEASON, 12)?);
    hybrid.preload((0..TRAIN).map(|i| Some(load(i, SEASON, &mut random))));
    let (start, mut longest) = (cpu_s(), 0.0f64);
    while hybrid.wants_learning() {
        let before = cpu_s();
        hybrid.learn_slice();
        longest = longest.max(cpu_s() - before);
    }
    let name = "train, 14 days of 5 minutes, both passes";
    rows.print(Row::new(name, cpu_s() - start, "s").beside("ms, its longest slice", longest * 1e3).at_most(2.0))?;

    const FORECASTS: u32 = 2000;
    let (start, mut sum) = (cpu_s(), 0.0);
    for _ in 0..FORECASTS {
        sum += std::hint::black_box(&hybrid).forecast().at(1, 0.5).unwrap_or(f64::NAN);
    }
    let forecast_us = (cpu_s() - start) / f64::from(FORECASTS) * 1e6;
    assert!(sum.is_finite());
    rows.print(Row::new("forecast, 12 steps x 7 quantiles", forecast_us, "us").at_most(1000.0))?;

    // The kernel counts CPU time by ticks: the median of batches of many of them.
    const BATCH: usize = 4000;
    let mut live = hybrid.clone();
    let mut batches: Vec<f64> = (0..9)
        .map(|batch| {
            let samples: Vec<f64> = (0..BATCH).map(|i| load(TRAIN + batch * BATCH + i, SEASON, &mut random)).collect();
            let start = cpu_s();
            samples.into_iter().for_each(|v| live.push(Some(v)));
            (cpu_s() - start) * 1e6 / BATCH as f64
        })
        .collect();
    batches.sort_unstable_by(f64::total_cmp);
    rows.print(
        Row::new("online update", batches[4], "us").beside("us, slowest of 9 batches", batches[8]).at_most(50.0),
    )?;

    for i in 0..SEASON {
        hybrid.push(Some(load(TRAIN + i, SEASON, &mut random)));
    }
    let (bytes, saved) = (hybrid.status().bytes, hybrid.save().len());
    rows.print(
        Row::new("memory a series, 15 days of 5 minutes", bytes as f64 / 1e3, "kB")
            .beside("kB, saved", saved as f64 / 1e3),
    )?;
    for i in 0..60 * SEASON {
        hybrid.push(Some(load(TRAIN + SEASON + i, SEASON, &mut random)));
    }
    hybrid.learn();
    let later = hybrid.status().bytes as f64 / 1e3;
    for i in 0..60 * SEASON {
        hybrid.push(Some(load(TRAIN + SEASON + i, SEASON, &mut random)));
    }
    hybrid.learn();
    let latest = hybrid.status().bytes as f64 / 1e3;
    rows.print(
        Row::new("memory a series after 135 days", latest, "kB").beside("kB, after 75 days", later).at_most(MOST_KB),
    )
}

/// Whether two cores keep up with 1,000 series of a sample a minute, on which all forecast and learn.
fn many_series(rows: &Rows, options: &Options, threads: usize) -> Result<(), Failure> {
    const DAY: usize = 1440;
    let (series, minutes) = (options.number("--series", 1000usize)?, options.number("--minutes", 10usize)?.max(1));
    let mut random = Random::new(1);
    let mut hybrid = Hybrid::new(Shape::new(60, DAY, 12)?);
    hybrid.preload((0..5 * DAY).map(|i| Some(load(i, DAY, &mut random))));
    hybrid.learn();
    for i in 5 * DAY..6 * DAY {
        hybrid.push(Some(load(i, DAY, &mut random)));
    }
    let start = cpu_s();
    hybrid.learn();
    let learn_s = cpu_s() - start;
    let shares: Vec<usize> = (0..threads).map(|t| series / threads + usize::from(t < series % threads)).collect();
    // All start as one that has learnt; each then lives its own life. Of its minute every one that is due learns anew.
    let spent = in_parallel(&shares, threads, |&share| {
        let mut all: Vec<Hybrid> = vec![hybrid.clone(); share];
        let mut random = Random::new(share as u64);
        let start = cpu_s();
        for minute in 0..minutes {
            for one in &mut all {
                one.push(Some(load(6 * DAY + minute, DAY, &mut random)));
                std::hint::black_box(one.forecast());
            }
        }
        Ok(cpu_s() - start)
    })?;
    let live = spent.into_iter().fold(0.0, f64::max) / minutes as f64;
    let learning = series as f64 * learn_s / DAY as f64 / threads as f64;
    let name = format!("{series} series of 1 minute on {threads} cores, of a minute");
    rows.print(Row::new(name, live + learning, "s").beside("s of it: each learns once a day", learning).at_most(60.0))?;
    let bytes = hybrid.status().bytes as f64;
    rows.print(
        Row::new("memory a series, 6 days of 1 minute", bytes / 1e3, "kB")
            .beside("MB, all of them", bytes * series as f64 / 1e6),
    )
}

/// Relative losses, coverage and how many series are better; with the targets for measured series.
fn quality(rows: &Rows, what: &str, outcomes: &[rolling::Outcome], targets: bool) -> Result<(), Failure> {
    let own = means(&outcomes.iter().map(|o| &o.score).collect::<Vec<&Score>>());
    let seasonal = means(&outcomes.iter().map(|o| &o.seasonal).collect::<Vec<&Score>>());
    let at_most = |row: Row, limit: f64| if targets { row.at_most(limit) } else { row };
    let at_least = |row: Row, limit: f64| if targets { row.at_least(limit) } else { row };
    let relative = [
        ("pinball, steps 1-3", own.near, seasonal.near, 0.49),
        ("pinball, steps 1-12", own.all, seasonal.all, 0.47),
        ("loss of the P95", own.p95, seasonal.p95, 0.52),
    ];
    for (name, value, peer, limit) in relative {
        let row = Row::new(format!("{what}: {name}"), value, "x naive").beside("x naive, seasonal naive", peer);
        rows.print(at_most(row, limit))?;
    }
    for (name, value, peer, limit) in
        [("1-3", own.mase_near, seasonal.mase_near, 0.33), ("1-12", own.mase, seasonal.mase, 0.44)]
    {
        let row = Row::new(format!("{what}: MASE, steps {name}"), value, "").beside("seasonal naive", peer);
        rows.print(at_most(row, limit))?;
    }
    let cover80 = Row::new(format!("{what}: within the 80 % interval, off .80"), (own.cover80 - 0.8).abs(), "");
    rows.print(at_most(cover80.beside("within it", own.cover80), 0.02))?;
    let error = Row::new(format!("{what}: the same, mean of each series"), own.cover80_error, "");
    rows.print(at_most(error.beside("seasonal naive", seasonal.cover80_error), 0.04))?;
    let cover95 = Row::new(format!("{what}: below the P95, off .95"), (own.cover95 - 0.95).abs(), "");
    rows.print(at_most(cover95.beside("below it", own.cover95), 0.01))?;
    let better = Row::new(format!("{what}: better than the last value"), own.better as f64, "series");
    let count = outcomes.len() as f64;
    rows.print(at_least(better.beside("series", count), count))
}

/// Scheduled events and level shifts.
fn events(rows: &Rows, threads: usize) -> Result<(), Failure> {
    let all = in_parallel(&SEEDS, threads, |&seed| events_and_shifts(seed))?;
    for (part, name) in PARTS.iter().enumerate() {
        let relative = |k: usize| {
            let logs = all.iter().map(|l| (l.mean[part][k] / l.mean[part][0]).ln());
            (logs.sum::<f64>() / all.len() as f64).exp()
        };
        for told in [3, 2] {
            let row = Row::new(format!("{}: {name}", FORECASTERS[told]), relative(told), "x naive");
            let row = row.beside("x naive, seasonal naive", relative(1));
            // Events that nobody tells of are not to be foreseen.
            rows.print(if told == 3 { row.at_most(1.0) } else { row })?;
        }
    }
    Ok(())
}

/// Series of a manifest, and alarms on links.
fn measured(rows: &Rows, options: &Options, data: &Path, threads: usize) -> Result<(), Failure> {
    let default = data.join("manifest.json");
    let path = options.text("--manifest").map_or(default.as_path(), Path::new);
    let manifest = Manifest::read(&path.display().to_string())?;
    let outcomes = in_parallel(&manifest.series, threads, |entry| {
        rolling::run(&read_column(data, &entry.id)?, entry, manifest.horizon)
    })?;
    quality(rows, &format!("{} measured series", outcomes.len()), &outcomes, true)?;
    let Ok(links) = options.text("--links") else { return Ok(()) };
    let links: Vec<&str> = links.split(',').collect();
    let (step_s, season) = (options.number("--step", 300)?, options.number("--season", 288)?);
    let asked = onsets::Asked::read(options)?;
    let outcomes = in_parallel(&links, threads, |id| {
        let shape = Shape::new(step_s, season, onsets::HORIZON)?;
        onsets::run(&read_column(data, id)?, shape, &asked).map_err(|e| format!("{id}: {e}").into())
    })?;
    let totals = onsets::totals(&outcomes);
    let (naive, own) = (&totals[0], &totals[2]);
    let figures = [
        ("precision", own.precision(), naive.precision(), 0.45),
        ("recall", own.recall(), naive.recall(), 0.75),
        ("mean lead, steps", own.mean_lead(), naive.mean_lead(), 2.5),
    ];
    for (name, value, peer, limit) in figures {
        let row = Row::new(format!("alarms on {} links: {name}", links.len()), value, "");
        rows.print(row.beside("last value, its q90", peer).at_least(limit))?;
    }
    Ok(())
}

//! Rolling-origin backtest over a manifest of series; writes the forecasts for a scorer.
//!
//!   backtest --data DIR --manifest FILE --out preds.csv [--threads N] [--only TEXT]

// An example acts: it reads files and the clock, which the crate itself may not.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use forecast::{Hybrid, Shape};
use serde::Deserialize;

#[derive(Deserialize)]
struct Manifest {
    horizon: usize,
    series: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    id: String,
    step_s: u32,
    season: usize,
    train_end: usize,
    origins: Vec<usize>,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut options: BTreeMap<String, String> = BTreeMap::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        options.insert(name, value);
    }
    let get = |name: &str| options.get(name).ok_or_else(|| format!("give {name}"));
    let data = PathBuf::from(get("--data")?);
    let manifest: Manifest = serde_json::from_str(&std::fs::read_to_string(get("--manifest")?)?)?;
    let threads: usize = options.get("--threads").map_or(Ok(2), |t| t.parse())?;
    let only = options.get("--only").cloned().unwrap_or_default();
    let chosen: Vec<&Entry> = manifest.series.iter().filter(|s| s.id.contains(&only)).collect();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(vec![String::new(); chosen.len()]);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| -> Result<(), Failure> {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(entry) = chosen.get(at) else { return Ok(()) };
                        let text = run(&data, entry, manifest.horizon).map_err(|e| format!("{}: {e}", entry.id))?;
                        results.lock().map_err(|_| "a worker failed")?[at] = text;
                    }
                })
            })
            .collect();
        workers.into_iter().try_for_each(|w| w.join().map_err(|_| Failure::from("a worker panicked"))?)
    })?;
    let mut out = String::from("series,origin,h,q10,q50,q90,q95\n");
    for text in results.into_inner()? {
        out.push_str(&text);
    }
    std::fs::write(get("--out")?, out)?;
    Ok(())
}

fn run(data: &Path, entry: &Entry, horizon: usize) -> Result<String, Failure> {
    let started = cpu_s();
    let (file, column) = entry.id.split_once('/').ok_or("an id is file/column")?;
    let samples = read_column(&data.join(format!("{file}.csv")), column)?;
    let mut hybrid = Hybrid::new(Shape::new(entry.step_s, entry.season, horizon)?);
    let mut out = String::new();
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
            for h in 1..=horizon {
                let at = |level| forecast.at(h, level).ok_or("beyond the horizon");
                writeln!(out, "{},{index},{h},{},{},{},{}", entry.id, at(0.1)?, at(0.5)?, at(0.9)?, at(0.95)?)?;
            }
        }
    }
    let status = hybrid.status();
    let weights: Vec<String> = status.weights.iter().map(|(n, w)| format!("{n} {w:.2}")).collect();
    println!(
        "{:44} {:6.1} s {} fits {} changes {:.2} fallback {} kB  {}",
        entry.id,
        cpu_s() - started,
        status.fits,
        status.changes,
        status.fallback_share,
        status.bytes / 1000,
        weights.join(" ")
    );
    Ok(out)
}

/// CPU seconds of this thread so far, from the kernel's own count; 0 where there is none.
fn cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

/// Samples of one column; an empty field is a gap.
fn read_column(path: &Path, column: &str) -> Result<Vec<Option<f64>>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut lines = text.lines();
    let header = lines.next().ok_or("an empty file")?;
    let at = header.split(',').position(|n| n.trim() == column).ok_or_else(|| format!("no column {column}"))?;
    lines
        .filter(|l| !l.trim().is_empty())
        .map(|line| {
            let field = line.split(',').nth(at).ok_or("a row is too short")?.trim();
            if field.is_empty() { Ok(None) } else { Ok(Some(field.parse::<f64>()?)) }
        })
        .collect()
}

//! What the examples share: arguments, CSV columns, the clock of a thread, scores and plots.

// Every example uses a part of it.
#![allow(dead_code)]

pub mod onsets;
pub mod plot;
pub mod rolling;
pub mod rows;
pub mod score;
pub mod world;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// `--name value` arguments.
pub struct Options(BTreeMap<String, String>);

impl Options {
    pub fn read() -> Result<Self, Failure> {
        let mut options = BTreeMap::new();
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
            options.insert(name, value);
        }
        Ok(Self(options))
    }

    pub fn text(&self, name: &str) -> Result<&str, Failure> {
        Ok(self.0.get(name).ok_or_else(|| format!("give {name}"))?)
    }

    pub fn number<T: std::str::FromStr>(&self, name: &str, default: T) -> Result<T, Failure> {
        match self.0.get(name) {
            Some(text) => text.parse().map_err(|_| format!("{name} {text}: not a number it can be").into()),
            None => Ok(default),
        }
    }
}

/// Series to backtest.
#[derive(Deserialize)]
pub struct Manifest {
    pub horizon: usize,
    pub series: Vec<Entry>,
}

/// One of them; `id` is file/column.
#[derive(Deserialize)]
pub struct Entry {
    pub id: String,
    pub step_s: u32,
    pub season: usize,
    pub train_end: usize,
    /// Worked out where it is not given.
    pub mase_scale: Option<f64>,
    pub origins: Vec<usize>,
}

impl Manifest {
    pub fn read(path: &str) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
        Ok(serde_json::from_str(&text).map_err(|e| format!("{path}: {e}"))?)
    }
}

/// Samples of the column `id` = file/column; an empty field is a gap, and so is NaN.
pub fn read_column(data: &Path, id: &str) -> Result<Vec<Option<f64>>, Failure> {
    let (file, column) = id.split_once('/').ok_or_else(|| format!("{id}: an id is file/column"))?;
    let path = data.join(format!("{file}.csv"));
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut lines = text.lines();
    let header = lines.next().ok_or("an empty file")?;
    let at = header.split(',').position(|n| n.trim() == column).ok_or_else(|| format!("{id}: no such column"))?;
    lines
        .filter(|line| !line.trim().is_empty())
        .enumerate()
        .map(|(row, line)| {
            let field = line.split(',').nth(at).ok_or_else(|| format!("{id}: row {row} is too short"))?.trim();
            if field.is_empty() {
                return Ok(None);
            }
            let value: f64 = field.parse().map_err(|e| format!("{id}: row {row}: {e}"))?;
            Ok(Some(value).filter(|v| v.is_finite()))
        })
        .collect()
}

/// Gaps carried forward; a leading one takes the first value.
pub fn filled(samples: &[Option<f64>]) -> Vec<f64> {
    let mut last = samples.iter().flatten().copied().next().unwrap_or(0.0);
    samples
        .iter()
        .map(|sample| {
            last = sample.unwrap_or(last);
            last
        })
        .collect()
}

/// CPU seconds of this thread so far, from the kernel's own count; 0 where there is none.
pub fn cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

/// Runs `work` on all items with so many threads; results in the order of the items.
pub fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> Result<R, Failure> + Sync,
) -> Result<Vec<R>, Failure> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let run = || -> Result<Vec<(usize, R)>, Failure> {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(item) = items.get(at) else { return Ok(done) };
            done.push((at, work(item)?));
        }
    };
    let mut results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(run)).collect();
        workers.into_iter().try_fold(Vec::new(), |mut all, worker| -> Result<_, Failure> {
            all.extend(worker.join().map_err(|_| "a worker panicked")??);
            Ok(all)
        })
    })?;
    results.sort_by_key(|(at, _)| *at);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

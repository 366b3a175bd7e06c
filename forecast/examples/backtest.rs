//! Rolling-origin backtest over a manifest of series; prints all scores, writes the forecasts for a scorer.
//!
//!   backtest --data DIR --manifest FILE --out preds.csv [--threads N] [--plots N]

// An example acts: it reads files and the clock, which the crate itself may not.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod support;

use std::fmt::Write as _;
use std::path::Path;

use support::score::{Score, summary};
use support::{Failure, Manifest, Options, in_parallel, read_column, rolling};

fn main() -> Result<(), Failure> {
    let options = Options::read()?;
    let data = Path::new(options.text("--data")?);
    let manifest = Manifest::read(options.text("--manifest")?)?;
    let out = options.text("--out")?;
    let plots = options.number("--plots", 2usize)?;
    let outcomes = in_parallel(&manifest.series, options.number("--threads", 2)?, |entry| {
        rolling::run(&read_column(data, &entry.id)?, entry, manifest.horizon)
    })?;
    let mut text = String::from("series,origin,h,q10,q50,q90,q95\n");
    for (entry, outcome) in manifest.series.iter().zip(&outcomes) {
        for (origin, step, [q10, q50, q90, q95]) in &outcome.issued {
            writeln!(text, "{},{origin},{step},{q10},{q50},{q90},{q95}", entry.id)?;
        }
    }
    std::fs::write(out, text).map_err(|e| format!("{out}: {e}"))?;
    outcomes.iter().take(plots).for_each(|o| println!("{}", o.plot));
    outcomes.iter().for_each(|o| println!("{}", o.line));
    let scores: Vec<&Score> = outcomes.iter().map(|o| &o.score).collect();
    println!("{}", summary(&scores));
    Ok(())
}

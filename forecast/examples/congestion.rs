//! Alarms ahead of congestion: how many are right, how many onsets they catch, how early.
//!
//!   congestion --data DIR --series file/column,file/column,... [--step 300] [--season 288] [--within 3] [--level 0.18]
//!              [--from 0.8] [--to 1]
//!
//! Scored is the share `from`..`to` of a series' samples, the last fifth if nothing else is said; learning begins with
//! 40 %. How is told in `support/onsets.rs`.

// An example acts: it reads files and the clock, which the crate itself may not.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod support;

use std::path::Path;

use forecast::Shape;
use support::onsets::{Asked, HORIZON, NAMES, totals};
use support::{Failure, Options, in_parallel, onsets, read_column};

fn main() -> Result<(), Failure> {
    let options = Options::read()?;
    let data = Path::new(options.text("--data")?);
    let ids: Vec<&str> = options.text("--series")?.split(',').collect();
    let (step_s, season) = (options.number("--step", 300)?, options.number("--season", 288)?);
    let asked = Asked::read(&options)?;
    let outcomes = in_parallel(&ids, options.number("--threads", 2)?, |id| {
        onsets::run(&read_column(data, id)?, Shape::new(step_s, season, HORIZON)?, &asked)
            .map_err(|e| format!("{id}: {e}").into())
    })?;
    for (id, outcome) in ids.iter().zip(&outcomes) {
        for (name, tally) in NAMES.iter().zip(&outcome.tallies) {
            println!("{id:40} {name:22} {}", tally.line());
        }
    }
    let totals = totals(&outcomes);
    let scored = outcomes.iter().map(|o| o.scored).sum::<usize>().max(1) as f64;
    println!(
        "samples scored {scored}, positive {:.4}, mean probability said {:.4}",
        totals[0].positive as f64 / scored,
        outcomes.iter().map(|o| o.said).sum::<f64>() / scored
    );
    for (name, total) in NAMES.iter().zip(&totals) {
        println!("TOTAL {name:22} {}", total.line());
    }
    Ok(())
}

//! Series with scheduled events and level shifts: what the hybrid finds that naive forecasters cannot.
//!
//!   synthetic [--seed 1]

// An example acts: it prints, and reads its arguments.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod support;

use support::world::{FORECASTERS, PARTS, events_and_shifts};
use support::{Failure, Options};

fn main() -> Result<(), Failure> {
    let losses = events_and_shifts(Options::read()?.number("--seed", 1)?)?;
    println!("{}", losses.plot);
    println!("mean loss over all levels and steps; in brackets relative to the last value");
    println!("{:24} {:>18} {:>26} {:>26} {:>22}", "", PARTS[0], PARTS[1], PARTS[2], PARTS[3]);
    for (k, name) in FORECASTERS.iter().enumerate() {
        let cell =
            |part: usize| format!("{:.2} ({:.2})", losses.mean[part][k], losses.mean[part][k] / losses.mean[part][0]);
        println!("{name:24} {:>18} {:>26} {:>26} {:>22}", cell(0), cell(1), cell(2), cell(3));
    }
    println!("changes found: {}; fits: {}", losses.changes, losses.fits);
    Ok(())
}

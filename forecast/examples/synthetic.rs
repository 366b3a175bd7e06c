//! Series with scheduled events and level shifts: what the hybrid finds that naive forecasters cannot.
//!
//!   synthetic [--seed 1]

// An example acts: it prints, and reads its arguments.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod support;

use forecast::events::Event;
use forecast::quantiles::{LEVELS, MEDIAN, pinball};
use forecast::random::Random;
use forecast::{Hybrid, Shape};
use support::{Failure, Options, plot};

const SEASON: usize = 288;
const HORIZON: usize = 12;
const DAYS: usize = 21;
const TRAIN: usize = 14 * SEASON;

struct World {
    values: Vec<f64>,
    events: Vec<Event>,
    shift: usize,
}

/// A daily cycle; events of two kinds at irregular times; one lasting level shift in the scored week.
fn world(seed: u64) -> World {
    let mut random = Random::new(seed);
    let shift = TRAIN + 3 * SEASON + (random.unit() * SEASON as f64) as usize;
    let mut events = Vec::new();
    let mut at = 100.0;
    while (at as usize) < DAYS * SEASON - 50 {
        let kind = if random.unit() < 0.5 { 1 } else { 2 };
        let size = if kind == 1 { 1.0 } else { (1.0 + 3.0 * random.unit()).round() };
        events.push(Event { start: at as u64, length: if kind == 1 { 18 } else { 9 }, kind, size: Some(size) });
        at += (0.5 + 1.2 * random.unit()) * SEASON as f64;
    }
    let mut noise = 0.0;
    let values = (0..DAYS * SEASON)
        .map(|i| {
            noise = 0.7 * noise + 2.0 * random.normal();
            let day = 60.0 + 20.0 * (i as f64 / SEASON as f64 * std::f64::consts::TAU).sin();
            let of = |e: &&Event| (e.start..e.start + u64::from(e.length)).contains(&(i as u64));
            let event: f64 =
                events.iter().filter(of).map(|e| if e.kind == 1 { 45.0 } else { 20.0 * e.size.unwrap_or(1.0) }).sum();
            day + event + noise + if i >= shift { 30.0 } else { 0.0 }
        })
        .collect();
    World { values, events, shift }
}

fn main() -> Result<(), Failure> {
    let world = world(Options::read()?.number("--seed", 1)?);
    let shape = Shape::new(300, SEASON, HORIZON)?;
    let mut informed = Hybrid::new(shape);
    world.events.iter().for_each(|&e| informed.schedule(e));
    let mut ignorant = Hybrid::new(shape);
    let y = &world.values;
    for hybrid in [&mut informed, &mut ignorant] {
        hybrid.preload(y[..TRAIN].iter().map(|&v| Some(v)));
        hybrid.learn();
    }
    // Sums of losses: last value, seasonal naive (both points), hybrid without and with events.
    const NAMES: [&str; 4] = ["last value", "seasonal naive", "hybrid, events untold", "hybrid, events told"];
    let mut sums = [[0.0f64; 4]; 3];
    let mut counts = [0.0f64; 3];
    let mut drawn = String::new();
    for t in TRAIN..y.len() - HORIZON {
        for hybrid in [&mut informed, &mut ignorant] {
            hybrid.push(Some(y[t]));
            hybrid.learn();
        }
        let (told, untold) = (informed.forecast(), ignorant.forecast());
        for step in 1..=HORIZON {
            let actual = y[t + step];
            let loss = |q: &[f64]| LEVELS.iter().zip(q).map(|(&l, &v)| pinball(l, v, actual)).sum::<f64>();
            let point = |v: f64| loss(&[v; LEVELS.len()]);
            let row = [
                point(y[t]),
                point(y[t + step - SEASON]),
                loss(&untold.steps()[step - 1]),
                loss(&told.steps()[step - 1]),
            ];
            let target = (t + step) as u64;
            let starts = world
                .events
                .iter()
                .any(|e| (e.start..e.start + u64::from(e.length)).contains(&target) && e.start > t as u64);
            let shifted = (world.shift..world.shift + SEASON).contains(&t);
            for (part, wanted) in [true, starts, shifted].into_iter().enumerate() {
                if wanted {
                    counts[part] += 1.0;
                    sums[part].iter_mut().zip(row).for_each(|(s, r)| *s += r);
                }
            }
        }
        let next = world.events.iter().find(|e| e.start == t as u64 + 6);
        if let (Some(_), true) = (next, drawn.is_empty()) {
            let first = t - 60;
            let bands: Vec<Option<(f64, f64, f64)>> = (first..=t + HORIZON)
                .map(|i| {
                    i.checked_sub(t + 1).map(|s| (told.steps()[s][1], told.steps()[s][MEDIAN], told.steps()[s][5]))
                })
                .collect();
            drawn = plot::plot("an event that is scheduled and has not begun", &y[first..=t + HORIZON], &bands);
        }
    }
    println!("{drawn}");
    println!("mean loss over all levels, steps 1-{HORIZON}; in brackets relative to the last value");
    println!("{:24} {:>18} {:>26} {:>26}", "", "all of 7 days", "events yet to begin", "the day after the shift");
    for (k, name) in NAMES.iter().enumerate() {
        let cell = |part: usize| {
            format!("{:.2} ({:.2})", sums[part][k] / counts[part].max(1.0), sums[part][k] / sums[part][0])
        };
        println!("{name:24} {:>18} {:>26} {:>26}", cell(0), cell(1), cell(2));
    }
    let status = informed.status();
    println!("changes found: {}; fits: {}", status.changes, status.fits);
    Ok(())
}

//! Series that are made, not measured: for benchmarks that need no data, and for events and shifts, which public series
//! do not come with.

use forecast::events::Event;
use forecast::quantiles::{LEVELS, pinball};
use forecast::random::Random;
use forecast::{Hybrid, Shape};

use super::{Entry, Failure, plot};

/// Samples a season, at 5 minutes.
pub const SEASON: usize = 288;
const HORIZON: usize = 12;
const DAYS: usize = 21;
/// Samples learnt from before any are scored.
pub const TRAIN: usize = 14 * SEASON;

fn day(index: usize) -> f64 {
    (index as f64 / SEASON as f64 * std::f64::consts::TAU).sin()
}

/// A daily load with noise and bursts, `season` samples a day.
pub fn load(index: usize, season: usize, random: &mut Random) -> f64 {
    let day = (index as f64 / season as f64 * std::f64::consts::TAU).sin();
    let burst = if random.unit() < 0.01 { 40.0 * random.unit() } else { 0.0 };
    40.0 + 25.0 * day + 4.0 * random.normal() + burst
}

/// Six kinds of load, 21 days each, with 96 origins in the last seven.
pub fn made_series() -> Vec<(Entry, Vec<Option<f64>>)> {
    type Kind = fn(usize, &mut f64, &mut Random) -> f64;
    let kinds: [(&str, Kind); 6] = [
        ("daily", |i, noise, random| {
            *noise = 0.7 * *noise + 2.0 * random.normal();
            60.0 + 20.0 * day(i) + *noise
        }),
        ("job-every-half-hour", |i, _, random| {
            10.0 + 2.0 * random.normal() + if i % 6 == 2 { 60.0 + 5.0 * random.normal() } else { 0.0 }
        }),
        ("weekdays", |i, noise, random| {
            *noise = 0.9 * *noise + random.normal();
            let working = (i / SEASON) % 7 < 5;
            20.0 + if working { 30.0 * day(i).max(0.0) } else { 0.0 } + *noise
        }),
        ("wandering", |_, level, random| {
            *level += 0.02 * (50.0 - *level) + 2.0 * random.normal();
            *level
        }),
        ("requests", |i, _, random| {
            let rate = 30.0 * (1.2 + day(i));
            (rate + rate.sqrt() * random.normal()).round().max(0.0)
        }),
        ("bursts", |_, left, random| {
            if *left < 1.0 && random.unit() < 0.03 {
                *left = 4.0 + 8.0 * random.unit();
            }
            *left = (*left - 1.0).max(0.0);
            5.0 + random.normal() + if *left > 0.0 { 40.0 } else { 0.0 }
        }),
    ];
    let made = kinds.into_iter().enumerate().map(|(seed, (name, kind))| {
        let (mut random, mut state) = (Random::new(seed as u64 + 1), 0.0);
        let samples = (0..DAYS * SEASON).map(|i| Some(kind(i, &mut state, &mut random))).collect();
        let origins = (0..96).map(|k| TRAIN + k * (DAYS * SEASON - TRAIN - HORIZON - 1) / 95).collect();
        let id = format!("made/{name}");
        (Entry { id, step_s: 300, season: SEASON, train_end: TRAIN, mase_scale: None, origins }, samples)
    });
    made.collect()
}

/// A daily cycle; events of two kinds at irregular times; one lasting level shift in the scored week.
struct World {
    values: Vec<f64>,
    events: Vec<Event>,
    shift: usize,
}

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
            let of = |e: &&Event| (e.start..e.start + u64::from(e.length)).contains(&(i as u64));
            let event: f64 =
                events.iter().filter(of).map(|e| if e.kind == 1 { 45.0 } else { 20.0 * e.size.unwrap_or(1.0) }).sum();
            60.0 + 20.0 * day(i) + event + noise + if i >= shift { 30.0 } else { 0.0 }
        })
        .collect();
    World { values, events, shift }
}

/// Who forecasts in [`events_and_shifts`]. Both naive forecasters have the quantiles of their own errors.
pub const FORECASTERS: [&str; 4] = ["last value", "seasonal naive", "hybrid, events untold", "hybrid, events told"];
/// What is told apart there.
pub const PARTS: [&str; 4] = ["all of 7 days", "events yet to begin", "the day after the shift", "its first two hours"];

/// Mean losses over all levels and steps.
pub struct EventLosses {
    /// `[part][forecaster]`.
    pub mean: [[f64; 4]; 4],
    /// An event that was scheduled and had not begun.
    pub plot: String,
    pub changes: u64,
    pub fits: u64,
}

/// Lives through the last week of a made series, once with its events told and once without.
pub fn events_and_shifts(seed: u64) -> Result<EventLosses, Failure> {
    let world = world(seed);
    let shape = Shape::new(300, SEASON, HORIZON)?;
    let (mut informed, mut ignorant) = (Hybrid::new(shape), Hybrid::new(shape));
    world.events.iter().for_each(|&e| informed.schedule(e));
    let y = &world.values;
    for hybrid in [&mut informed, &mut ignorant] {
        hybrid.preload(y[..TRAIN].iter().map(|&v| Some(v)));
        hybrid.learn();
    }
    let mut sums = [[0.0f64; 4]; 4];
    let mut counts = [0.0f64; 4];
    let mut drawn = String::new();
    for t in TRAIN..y.len() - HORIZON {
        for hybrid in [&mut informed, &mut ignorant] {
            hybrid.push(Some(y[t]));
            hybrid.learn();
        }
        let (told, untold) = (informed.forecast(), ignorant.forecast());
        let naive = ignorant.panel().ok_or("nothing was learnt")?;
        for (step, (untold, told)) in untold.steps().iter().zip(told.steps()).enumerate() {
            let target = (t + 1 + step) as u64;
            let loss = |q: &[f64]| LEVELS.iter().zip(q).map(|(&l, &v)| pinball(l, v, y[target as usize])).sum::<f64>();
            let all = [&naive[0][step], &naive[1][step], untold, told];
            let covers = |e: &Event| e.start > t as u64 && (e.start..e.start + u64::from(e.length)).contains(&target);
            let shifted = |samples: usize| (world.shift..world.shift + samples).contains(&t);
            let parts = [true, world.events.iter().any(covers), shifted(SEASON), shifted(SEASON / 12)];
            for (part, wanted) in parts.into_iter().enumerate() {
                if wanted {
                    counts[part] += 1.0;
                    sums[part].iter_mut().zip(all).for_each(|(sum, q)| *sum += loss(q));
                }
            }
        }
        if drawn.is_empty() && world.events.iter().any(|e| e.start == t as u64 + 6) {
            let first = t - 60;
            let band = |i: usize| i.checked_sub(t + 1).map(|s| told.steps()[s]).map(|q| (q[1], q[3], q[5]));
            let bands: Vec<_> = (first..=t + HORIZON).map(band).collect();
            drawn = plot::plot("an event that is scheduled and has not begun", &y[first..=t + HORIZON], &bands);
        }
    }
    let mut mean = sums;
    mean.iter_mut().zip(counts).for_each(|(row, count)| row.iter_mut().for_each(|v| *v /= count.max(1.0)));
    let status = informed.status();
    Ok(EventLosses { mean, plot: drawn, changes: status.changes, fits: status.fits })
}

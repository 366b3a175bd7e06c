//! Alarms ahead of congestion: how many are right, how many onsets they catch, how early.
//!
//!   congestion --data DIR --series file/column,file/column,... [--step 300] [--season 288] [--within 3] [--recall 0.765]
//!
//! The threshold of a series is the 90th percentile of its first 80 %; the rest is scored. A sample below the threshold
//! is positive if one of the next `within` reaches it. The lead is that of the first
//! alarm within reach, over the onsets that came after `within` quiet samples or more.

// An example acts: it reads files and the clock, which the crate itself may not.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod support;

use std::path::Path;

use forecast::derived::congestion::{Congestion, Rule};
use forecast::quantiles::quantile_of_sorted;
use forecast::{Hybrid, Shape};
use support::{Failure, Options, filled, in_parallel, read_column};

const HORIZON: usize = 12;
const NAMES: [&str; 3] = ["last value, q90", "hybrid, q90", "hybrid, learnt level"];

#[derive(Default, Clone)]
struct Tally {
    right: usize,
    alarms: usize,
    positive: usize,
    caught: usize,
    onsets: usize,
    seen: usize,
    lead: usize,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.right += other.right;
        self.alarms += other.alarms;
        self.positive += other.positive;
        self.caught += other.caught;
        self.onsets += other.onsets;
        self.seen += other.seen;
        self.lead += other.lead;
    }

    fn line(&self) -> String {
        let share = |a: usize, b: usize| a as f64 / b.max(1) as f64;
        format!(
            "precision {:.3} recall {:.3} (onsets {:.3} of {}) mean lead {:.2} alarms {}",
            share(self.right, self.alarms),
            share(self.caught, self.positive),
            share(self.seen, self.onsets),
            self.onsets,
            share(self.lead, self.seen),
            self.alarms
        )
    }
}

fn main() -> Result<(), Failure> {
    let options = Options::read()?;
    let data = Path::new(options.text("--data")?);
    let ids: Vec<&str> = options.text("--series")?.split(',').collect();
    let (step_s, season) = (options.number("--step", 300)?, options.number("--season", 288)?);
    let (within, recall) = (options.number("--within", 3)?, options.number("--recall", 0.765)?);
    let results = in_parallel(&ids, options.number("--threads", 2)?, |id| {
        run(data, id, Shape::new(step_s, season, HORIZON)?, within, recall)
    })?;
    let mut totals = vec![Tally::default(); NAMES.len()];
    let mut scored = 0;
    for (id, (tallies, count)) in ids.iter().zip(&results) {
        for ((name, tally), total) in NAMES.iter().zip(tallies).zip(&mut totals) {
            println!("{id:40} {name:22} {}", tally.line());
            total.add(tally);
        }
        scored += count;
    }
    println!("samples scored {scored}, positive {:.3}", totals[0].positive as f64 / scored.max(1) as f64);
    for (name, total) in NAMES.iter().zip(&totals) {
        println!("TOTAL {name:22} {}", total.line());
    }
    Ok(())
}

fn run(data: &Path, id: &str, shape: Shape, within: usize, recall: f64) -> Result<(Vec<Tally>, usize), Failure> {
    let samples = read_column(data, id)?;
    let y = filled(&samples);
    let train_end = y.len() * 8 / 10;
    let mut sorted = y[..train_end].to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let threshold = quantile_of_sorted(&sorted, 0.9);
    let naive: Vec<f64> = (1..=within)
        .map(|step| {
            let mut moves: Vec<f64> = (0..train_end - step).map(|t| y[t + step] - y[t]).collect();
            moves.sort_unstable_by(f64::total_cmp);
            quantile_of_sorted(&moves, 0.9)
        })
        .collect();
    let mut hybrid = Hybrid::new(shape);
    let mut congestion = Congestion::new(Rule { threshold, within, recall, memory: 0.995 });
    let begin = y.len() * 4 / 10;
    hybrid.preload(samples[..begin].iter().copied());
    let mut alarms: Vec<[bool; NAMES.len()]> = vec![[false; NAMES.len()]; y.len()];
    for index in begin..y.len() {
        hybrid.learn();
        hybrid.push(samples[index]);
        let forecast = hybrid.forecast();
        let outlook = congestion.observe(y[index], &forecast);
        let by_last = naive.iter().any(|q| y[index] + q >= threshold);
        let by_hybrid = (1..=within).any(|step| forecast.at(step, 0.9).is_some_and(|q| q >= threshold));
        alarms[index] = [by_last, by_hybrid, outlook.alarm];
    }
    let tallies = (0..NAMES.len()).map(|k| tally(&y, train_end, threshold, within, |t| alarms[t][k])).collect();
    Ok((tallies, (train_end..y.len() - within).filter(|&t| y[t] < threshold).count()))
}

fn tally(y: &[f64], from: usize, threshold: f64, within: usize, alarm: impl Fn(usize) -> bool) -> Tally {
    let mut tally = Tally::default();
    for t in from..y.len() - within {
        if y[t] >= threshold {
            continue;
        }
        let positive = y[t + 1..=t + within].iter().any(|&v| v >= threshold);
        tally.positive += usize::from(positive);
        tally.alarms += usize::from(alarm(t));
        tally.right += usize::from(positive && alarm(t));
        tally.caught += usize::from(positive && alarm(t));
        let quiet = t + 1 >= within + from && y[t + 1 - within..=t].iter().all(|&v| v < threshold);
        if y[t + 1] >= threshold && quiet {
            tally.onsets += 1;
            if let Some(lead) = (1..=within).rev().find(|&lead| alarm(t + 1 - lead)) {
                tally.seen += 1;
                tally.lead += lead;
            }
        }
    }
    tally
}

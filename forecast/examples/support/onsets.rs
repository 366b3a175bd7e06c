//! Alarms ahead of congestion on one series, scored.
//!
//! The threshold is the 90th percentile of the first 80 % of the samples. A sample below it is positive if one of the
//! next `within` reaches it. The lead is that of the first alarm within reach, over the onsets that came after `within`
//! quiet samples or more.

use forecast::derived::congestion::Rule;
use forecast::quantiles::quantile_of_sorted;
use forecast::{Hybrid, Shape};

use super::{Failure, Options, filled};

pub const HORIZON: usize = 12;
pub const NAMES: [&str; 3] = ["last value, q90", "hybrid, q90", "hybrid, probability"];

/// Alarms of one kind.
#[derive(Default, Clone)]
pub struct Tally {
    right: usize,
    alarms: usize,
    pub positive: usize,
    onsets: usize,
    seen: usize,
    lead: usize,
}

fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// What is asked of all series.
pub struct Asked {
    pub within: usize,
    pub level: f64,
    pub from: f64,
    pub to: f64,
}

impl Asked {
    pub fn read(options: &Options) -> Result<Self, Failure> {
        Ok(Self {
            within: options.number("--within", 3)?,
            level: options.number("--level", Rule::USUAL_LEVEL)?,
            from: options.number("--from", 0.8)?,
            to: options.number("--to", 1.0)?,
        })
    }
}

/// Sums over all series, in the order of [`NAMES`].
pub fn totals(outcomes: &[Outcome]) -> Vec<Tally> {
    let mut totals = vec![Tally::default(); NAMES.len()];
    for outcome in outcomes {
        totals.iter_mut().zip(&outcome.tallies).for_each(|(total, tally)| total.add(tally));
    }
    totals
}

/// One series: how each kind of alarm did, and what the probabilities were worth.
pub struct Outcome {
    pub tallies: Vec<Tally>,
    pub scored: usize,
    pub said: f64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.right += other.right;
        self.alarms += other.alarms;
        self.positive += other.positive;
        self.onsets += other.onsets;
        self.seen += other.seen;
        self.lead += other.lead;
    }

    pub fn line(&self) -> String {
        format!(
            "precision {:.3} recall {:.3} (onsets {:.3} of {}) mean lead {:.2} alarms {}",
            self.precision(),
            self.recall(),
            share(self.seen, self.onsets),
            self.onsets,
            self.mean_lead(),
            self.alarms
        )
    }

    pub fn precision(&self) -> f64 {
        share(self.right, self.alarms)
    }

    pub fn recall(&self) -> f64 {
        share(self.right, self.positive)
    }

    /// Steps from the first alarm to the onset.
    pub fn mean_lead(&self) -> f64 {
        share(self.lead, self.seen)
    }
}

pub fn run(samples: &[Option<f64>], shape: Shape, asked: &Asked) -> Result<Outcome, Failure> {
    let y = filled(samples);
    let (train_end, within) = (y.len() * 8 / 10, asked.within);
    let (begin, from) = (y.len() * 4 / 10, (y.len() as f64 * asked.from) as usize);
    let to = ((y.len() as f64 * asked.to) as usize).min(y.len().saturating_sub(within));
    if train_end <= within || from < begin || to <= from {
        return Err("too short a series, or --from is before 0.4 or after --to".into());
    }
    let mut sorted = y[..train_end].to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let rule = Rule { threshold: quantile_of_sorted(&sorted, 0.9), within, level: asked.level };
    let naive: Vec<f64> = (1..=within)
        .map(|step| {
            let mut moves: Vec<f64> = (0..train_end - step).map(|t| y[t + step] - y[t]).collect();
            moves.sort_unstable_by(f64::total_cmp);
            quantile_of_sorted(&moves, 0.9)
        })
        .collect();
    let mut hybrid = Hybrid::new(shape);
    hybrid.preload(samples[..begin].iter().copied());
    let mut alarms: Vec<[bool; NAMES.len()]> = vec![[false; NAMES.len()]; y.len()];
    let (mut scored, mut said) = (0, 0.0);
    for index in begin..to {
        hybrid.learn();
        hybrid.push(samples[index]);
        let forecast = hybrid.forecast();
        let outlook = rule.outlook(y[index], &forecast);
        let by_last = naive.iter().any(|q| y[index] + q >= rule.threshold);
        let by_hybrid = (1..=within).any(|step| forecast.at(step, 0.9).is_some_and(|q| q >= rule.threshold));
        alarms[index] = [by_last, by_hybrid, outlook.alarm];
        if index >= from && !outlook.congested {
            scored += 1;
            said += outlook.probability;
        }
    }
    let tallies = (0..NAMES.len()).map(|k| tally(&y, from..to, &rule, |t| alarms[t][k])).collect();
    Ok(Outcome { tallies, scored, said })
}

fn tally(y: &[f64], scored: std::ops::Range<usize>, rule: &Rule, alarm: impl Fn(usize) -> bool) -> Tally {
    let (threshold, within) = (rule.threshold, rule.within);
    let mut tally = Tally::default();
    for t in scored.clone() {
        if y[t] >= threshold {
            continue;
        }
        let positive = y[t + 1..=t + within].iter().any(|&v| v >= threshold);
        tally.positive += usize::from(positive);
        tally.alarms += usize::from(alarm(t));
        tally.right += usize::from(positive && alarm(t));
        let quiet = t + 1 >= within + scored.start && y[t + 1 - within..=t].iter().all(|&v| v < threshold);
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

//! Demand in whole instances: never negative, often none.
//!
//! Demand that mostly is 0 is described by how often it comes and how much comes then, both followed by exponential
//! smoothing and learnt a part of the season (Teunter, Syntetos and Babai, with seasons). Denser demand takes the
//! hybrid's forecast, rounded.

use crate::codec::{Format, Reader, Writer};
use crate::error::DecodeError;
use crate::quantiles::{Forecast, value_at};

/// Parts of a season.
const PARTS: usize = 24;
/// Weight of the newest sample.
const RATE: f64 = 0.02;
/// Samples of a part that weigh as much as all others together.
const PRIOR: f64 = 12.0;
/// Largest count that is told apart.
const MOST: usize = 4096;
/// Longest season, in samples.
const MOST_SEASON: usize = 1 << 20;

const FORMAT: Format = Format { what: "counts", magic: *b"VSFI", oldest: 1, newest: 1 };

/// Probabilities of 0, 1, 2, ... instances.
#[derive(Debug, Clone, PartialEq)]
pub struct CountDistribution {
    /// Rises to 1.
    at_most: Vec<f64>,
}

impl CountDistribution {
    /// From a forecast's step (1-based), rounded to whole counts; `None` beyond its horizon.
    pub fn from_forecast(forecast: &Forecast, step: usize) -> Option<Self> {
        let quantiles = forecast.steps().get(step.checked_sub(1)?)?;
        let top = (value_at(quantiles, 0.999).ceil().max(0.0) as usize).min(MOST);
        let below = |count: f64| crate::quantiles::probability_below(quantiles, count + 0.5);
        let mut at_most: Vec<f64> = (0..=top).map(|count| below(count as f64)).collect();
        if let Some(last) = at_most.last_mut() {
            *last = 1.0;
        }
        Some(Self { at_most })
    }

    /// Smallest count that is enough with probability `level`.
    pub fn enough(&self, level: f64) -> usize {
        self.at_most.iter().position(|&p| p >= level).unwrap_or(self.at_most.len().saturating_sub(1))
    }

    /// Probability that at most `count` are asked for.
    pub fn probability_at_most(&self, count: usize) -> f64 {
        self.at_most.get(count).copied().unwrap_or(1.0)
    }

    /// Expected count.
    pub fn mean(&self) -> f64 {
        self.at_most.iter().map(|p| 1.0 - p).sum()
    }
}

/// How often and how much, a part of the season.
#[derive(Debug, Clone, Copy, Default)]
struct Part {
    seen: f64,
    came: f64,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Intermittent {
    season: usize,
    parts: [Part; PARTS],
    /// Share of samples with demand, recent.
    chance: f64,
    /// Mean and variance of the size when there is demand.
    size: f64,
    variance: f64,
    seen: u64,
}

impl Intermittent {
    /// `season` in samples, brought within 1 and a million.
    pub fn new(season: usize) -> Self {
        let parts = [Part::default(); PARTS];
        Self { season: season.clamp(1, MOST_SEASON), parts, chance: 0.0, size: 1.0, variance: 0.0, seen: 0 }
    }

    fn part(&self, slot: u64) -> usize {
        ((slot % self.season as u64) as usize * PARTS / self.season).min(PARTS - 1)
    }

    /// Takes in the demand of sample number `slot`; what is negative or not finite counts as none.
    pub fn push(&mut self, slot: u64, demand: f64) {
        let count = if demand.is_finite() { demand.round().clamp(0.0, MOST as f64) } else { 0.0 };
        let came = if count > 0.0 { 1.0 } else { 0.0 };
        self.seen += 1;
        let rate = RATE.max(1.0 / self.seen as f64);
        self.chance += rate * (came - self.chance);
        let part = self.part(slot);
        let part = &mut self.parts[part];
        // Old seasons are forgotten slowly.
        part.seen = 0.998 * part.seen + 1.0;
        part.came = 0.998 * part.came + came;
        if count > 0.0 {
            let off = count - self.size;
            self.size += (3.0 * rate).min(1.0) * off;
            self.variance += (3.0 * rate).min(1.0) * (off * off - self.variance);
        }
    }

    /// Whether most samples are 0, so that this model and not the hybrid's forecast should be asked.
    pub fn is_intermittent(&self) -> bool {
        self.chance < 0.5
    }

    /// Chance of any demand in sample number `slot`.
    pub fn chance(&self, slot: u64) -> f64 {
        let part = self.parts[self.part(slot)];
        ((part.came + PRIOR * self.chance) / (part.seen + PRIOR)).clamp(0.0, 1.0)
    }

    /// Demand summed over `steps` samples from number `slot` on.
    pub fn forecast(&self, slot: u64, steps: usize) -> CountDistribution {
        let size = self.sizes();
        let mut sum = vec![1.0];
        for step in 0..steps {
            let chance = self.chance(slot + step as u64);
            let mut next = vec![0.0; (sum.len() + size.len()).min(MOST + 1)];
            let top = next.len() - 1;
            for (have, p) in sum.iter().enumerate() {
                next[have] += p * (1.0 - chance);
                for (more, q) in size.iter().enumerate() {
                    next[(have + more + 1).min(top)] += p * chance * q;
                }
            }
            sum = next;
            while sum.len() > 1 && sum.last().is_some_and(|&p| p < 1e-9) {
                sum.pop();
            }
        }
        let mut total = 0.0;
        let mut at_most: Vec<f64> = sum
            .iter()
            .map(|p| {
                total += p;
                total.min(1.0)
            })
            .collect();
        if let Some(last) = at_most.last_mut() {
            *last = 1.0;
        }
        CountDistribution { at_most }
    }

    /// For storage.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.count(self.season);
        for part in &self.parts {
            out.f64(part.seen);
            out.f64(part.came);
        }
        [self.chance, self.size, self.variance].into_iter().for_each(|v| out.f64(v));
        out.u64(self.seen);
        out.seal(FORMAT)
    }

    /// Reads what [`Intermittent::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut from = Reader::open(bytes, FORMAT)?;
        let season = from.u32("season")? as usize;
        let mut model = Self::new(season);
        for part in &mut model.parts {
            (part.seen, part.came) = (from.f64("part")?, from.f64("part")?);
        }
        (model.chance, model.size, model.variance) = (from.f64("chance")?, from.f64("size")?, from.f64("variance")?);
        model.seen = from.u64("seen")?;
        let most = MOST as f64;
        // Decay bounds what a part has seen: 1 / (1 - 0.998).
        let sane = |p: &Part| (0.0..=501.0).contains(&p.seen) && (0.0..=p.seen).contains(&p.came);
        if season != model.season
            || !model.parts.iter().all(sane)
            || !(0.0..=1.0).contains(&model.chance)
            || !(1.0..=most).contains(&model.size)
            || !(0.0..=most * most).contains(&model.variance)
            || model.seen > u64::MAX / 2
        {
            return Err(from.range("counts"));
        }
        from.end()?;
        Ok(model)
    }

    /// Probabilities of sizes 1, 2, ...: 1 plus a negative binomial of the same mean and variance (Poisson at least).
    fn sizes(&self) -> Vec<f64> {
        let mean = (self.size - 1.0).max(1e-6);
        let variance = self.variance.max(mean * 1.0001);
        let success = mean / variance;
        let shape = mean * success / (1.0 - success);
        let mut p = (shape * success.ln()).exp();
        let (mut out, mut total) = (Vec::new(), 0.0);
        for k in 0..MOST {
            out.push(p);
            total += p;
            if total > 1.0 - 1e-7 && k as f64 >= mean {
                break;
            }
            p *= (shape + k as f64) / (k as f64 + 1.0) * (1.0 - success);
        }
        if total > 0.0 {
            out.iter_mut().for_each(|p| *p /= total);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn rare_demand_at_working_hours_is_described() {
        let mut model = Intermittent::new(288);
        let mut random = Random::new(9);
        let busy = |slot: u64| (96..192).contains(&(slot % 288));
        let demand = |slot: u64, random: &mut Random| {
            if busy(slot) && random.unit() < 0.3 { 1.0 + (random.unit() * 3.0).floor() } else { 0.0 }
        };
        for slot in 0..288 * 20 {
            let count = demand(slot, &mut random);
            model.push(slot, count);
        }
        assert!(model.is_intermittent());
        let read = Intermittent::decode(&model.encode());
        assert_eq!(read.map(|m| m.forecast(288 * 20 + 140, 12)), Ok(model.forecast(288 * 20 + 140, 12)));
        let (noon, night) = (model.forecast(288 * 20 + 140, 12), model.forecast(288 * 20 + 10, 12));
        assert!((noon.mean() - 12.0 * 0.3 * 2.0).abs() < 2.0, "{}", noon.mean());
        assert!(night.mean() < 1.0, "{}", night.mean());
        // What is said to be enough in 90 % of cases is enough in about 90 %.
        let enough = noon.enough(0.9) as f64;
        let hits = (0..2000).filter(|_| (0..12).map(|s| demand(140 + s, &mut random)).sum::<f64>() <= enough).count();
        assert!((0.84..0.97).contains(&(hits as f64 / 2000.0)), "{hits}");
    }

    #[test]
    fn a_forecast_becomes_whole_numbers_that_are_never_negative() {
        let forecast = Forecast::new(vec![[-2.0, -1.0, 0.2, 1.4, 2.6, 3.9, 5.0]]);
        let counts = CountDistribution::from_forecast(&forecast, 1);
        let levels = counts.as_ref().map(|c| [0.05, 0.5, 0.9, 0.95].map(|l| c.enough(l)));
        assert_eq!(levels, Some([0, 1, 4, 5]));
        assert!(counts.as_ref().is_some_and(|c| c.probability_at_most(5) > 0.95 && c.probability_at_most(0) < 0.35));
        assert!(CountDistribution::from_forecast(&forecast, 2).is_none());
    }

    #[test]
    fn nothing_seen_and_nonsense_are_survived() {
        let mut model = Intermittent::new(0);
        assert_eq!(model.forecast(0, 5).enough(0.99), 0);
        for value in [f64::NAN, -5.0, f64::INFINITY, 1e300] {
            model.push(0, value);
        }
        assert!(model.forecast(0, 3).mean().is_finite());
    }
}

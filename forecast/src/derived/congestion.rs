//! Will a path (or a host) be congested soon, from when on, and is that worth an alarm?
//!
//! The forecast's own probability of passing the threshold is refined by a small logistic model that learns online from
//! what came, since an onset is rarer and sharper than what a quantile forecast is trained for. The level at which an
//! alarm is raised follows the recall that is wanted: it is the highest that would have caught that share of late.

use crate::quantiles::Forecast;

/// Inputs of the logistic model, constant included.
const INPUTS: usize = 8;
/// Classes of the probability by which the alarm level is chosen.
const CLASSES: usize = 100;

/// Probabilities that were followed by congestion, before any was seen.
const PRIOR: [f64; 12] = [0.08, 0.15, 0.22, 0.28, 0.33, 0.38, 0.43, 0.5, 0.58, 0.66, 0.75, 0.85];

/// When to speak of congestion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// At or above this value it is congested.
    pub threshold: f64,
    /// Steps ahead that are looked at; at least 1.
    pub within: usize,
    /// Share of the samples before an onset (within `within` steps of it) at which an alarm shall stand, 0..1.
    pub recall: f64,
    /// Share of what was learnt about the alarm level that is kept a sample.
    pub memory: f64,
}

/// What is to be expected.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// Probability a step ahead that the threshold is passed, from the forecast alone.
    pub by_step: Vec<f64>,
    /// Calibrated probability that it is passed within the rule's steps.
    pub probability: f64,
    /// Most likely first step above the threshold (1-based), if it is passed at all.
    pub onset: usize,
    /// Already congested: nothing to foresee.
    pub congested: bool,
    /// Worth an alarm.
    pub alarm: bool,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Congestion {
    rule: Rule,
    weights: [f64; INPUTS],
    squares: [f64; INPUTS],
    recent: Vec<f64>,
    /// Outlooks that wait for what comes: inputs, probability, samples still to wait.
    waiting: Vec<Waiting>,
    /// Decayed counts of probabilities, by class, that were followed by congestion.
    followed: Vec<f64>,
}

#[derive(Debug, Clone)]
struct Waiting {
    inputs: [f64; INPUTS],
    probability: f64,
    left: usize,
}

impl Congestion {
    pub fn new(rule: Rule) -> Self {
        let mut weights = [0.0; INPUTS];
        // At first the forecast is believed.
        weights[1] = 1.0;
        // And as if a dozen onsets had been seen, foretold about as well as on links of a backbone.
        let mut followed = vec![0.0; CLASSES];
        PRIOR.into_iter().for_each(|p| followed[class_of(p)] += 1.0);
        Self {
            rule: Rule {
                within: rule.within.max(1),
                recall: rule.recall.clamp(0.0, 1.0),
                memory: rule.memory.clamp(0.0, 1.0),
                ..rule
            },
            weights,
            squares: [1.0; INPUTS],
            recent: Vec::new(),
            waiting: Vec::new(),
            followed,
        }
    }

    /// The rule, as it is followed.
    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Takes in the newest sample and the forecast made after it; says what is to be expected.
    pub fn observe(&mut self, sample: f64, forecast: &Forecast) -> Outlook {
        if sample.is_finite() {
            self.mature(sample);
            self.recent.push(sample);
            if self.recent.len() > 4 {
                self.recent.remove(0);
            }
        }
        let within = self.rule.within.min(forecast.horizon());
        let by_step: Vec<f64> =
            (1..=within).filter_map(|step| forecast.exceedance(step, self.rule.threshold)).collect();
        let inputs = self.inputs(forecast, &by_step);
        let congested = self.recent.last().is_some_and(|&v| v >= self.rule.threshold);
        let probability = logistic(self.weights.iter().zip(&inputs).map(|(w, x)| w * x).sum());
        // The first step at which half of what is ever likely is likely.
        let most = by_step.iter().copied().fold(0.0, f64::max);
        let onset = by_step.iter().position(|&p| p >= 0.5 * most).map_or(1, |i| i + 1);
        let alarm = !congested && probability >= self.level();
        if !congested && !by_step.is_empty() {
            self.waiting.push(Waiting { inputs, probability, left: self.rule.within });
        }
        Outlook { by_step, probability, onset, congested, alarm }
    }

    /// Probability from which on an alarm is raised.
    pub fn level(&self) -> f64 {
        let total: f64 = self.followed.iter().sum();
        let mut caught = 0.0;
        for class in (0..CLASSES).rev() {
            caught += self.followed[class];
            if caught >= self.rule.recall * total {
                return probability_of(class);
            }
        }
        0.0
    }

    fn inputs(&self, forecast: &Forecast, by_step: &[f64]) -> [f64; INPUTS] {
        let most = by_step.iter().copied().fold(0.0, f64::max);
        let none: f64 = by_step.iter().map(|p| 1.0 - p).product();
        let step = |q| forecast.at(self.rule.within.min(forecast.horizon()), q).unwrap_or(0.0);
        let spread = (step(0.9) - step(0.1)).abs().max(self.rule.threshold.abs() * 1e-9).max(1e-300);
        let last = self.recent.last().copied().unwrap_or(0.0);
        let margin = ((self.rule.threshold - last) / spread).clamp(-5.0, 5.0);
        let slope = self.recent.first().map_or(0.0, |first| (last - first) / spread).clamp(-3.0, 3.0);
        let last_slope =
            self.recent.iter().rev().nth(1).map_or(0.0, |before| (last - before) / spread).clamp(-3.0, 3.0);
        let drift = ((step(0.5) - last) / spread).clamp(-3.0, 3.0);
        let (all, most) = (logit(1.0 - none), logit(most));
        [1.0, 0.5 * all + 0.5 * most, all - most, margin, slope, last_slope, drift, (margin * margin).min(4.0)]
    }

    fn mature(&mut self, sample: f64) {
        let congested = sample >= self.rule.threshold;
        let waiting = std::mem::take(&mut self.waiting);
        for mut outlook in waiting {
            outlook.left -= 1;
            if congested || outlook.left == 0 {
                self.learn(&outlook, congested);
            } else {
                self.waiting.push(outlook);
            }
        }
    }

    fn learn(&mut self, outlook: &Waiting, came: bool) {
        let error =
            logistic(self.weights.iter().zip(&outlook.inputs).map(|(w, x)| w * x).sum()) - f64::from(u8::from(came));
        for ((weight, square), x) in self.weights.iter_mut().zip(&mut self.squares).zip(outlook.inputs) {
            let gradient = error * x;
            *square += gradient * gradient;
            *weight -= 0.1 * gradient / square.sqrt();
        }
        if came {
            self.followed.iter_mut().for_each(|f| *f *= self.rule.memory);
            self.followed[class_of(outlook.probability)] += 1.0;
        }
    }
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn logit(p: f64) -> f64 {
    let p = p.clamp(1e-3, 1.0 - 1e-3);
    (p / (1.0 - p)).ln()
}

/// Classes are even in the logit, where rare probabilities differ.
fn class_of(p: f64) -> usize {
    let place = (logit(p) + 7.0) / 14.0 * CLASSES as f64;
    (place.max(0.0) as usize).min(CLASSES - 1)
}

/// Lower end of a class.
fn probability_of(class: usize) -> f64 {
    logistic(class as f64 / CLASSES as f64 * 14.0 - 7.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    const RULE: Rule = Rule { threshold: 100.0, within: 3, recall: 0.8, memory: 0.999 };

    fn flat(centre: f64) -> Forecast {
        Forecast::new(vec![[-8.0, -6.0, -3.0, 0.0, 3.0, 6.0, 8.0].map(|d| centre + d); 3])
    }

    #[test]
    fn what_is_far_below_is_quiet_and_what_rises_is_seen_coming() {
        let mut congestion = Congestion::new(RULE);
        assert!(!congestion.observe(20.0, &flat(20.0)).alarm);
        let rising = Forecast::new(
            (0..3).map(|h| [-4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 4.0].map(|d| 96.0 + 4.0 * f64::from(h) + d)).collect(),
        );
        let outlook = congestion.observe(92.0, &rising);
        assert!(outlook.alarm && !outlook.congested);
        assert!(outlook.by_step[0] < outlook.by_step[1] && outlook.by_step[1] < outlook.by_step[2]);
        assert_eq!(outlook.onset, 2);
        assert!(congestion.observe(104.0, &rising).congested);
    }

    #[test]
    fn the_alarm_level_follows_the_recall_wanted() {
        let mut congestion = Congestion::new(RULE);
        let mut random = Random::new(4);
        let (mut value, mut before, mut caught, mut alarms) = (80.0, 0, 0, 0);
        // Of the last samples: whether an alarm stood, or none was due as it was congested.
        let mut last = [None; 3];
        for t in 0..20_000 {
            value += 0.1 * (85.0 - value) + 4.0 * random.normal();
            let congested = value >= RULE.threshold;
            if congested && t > 5_000 {
                before += last.iter().flatten().count();
                caught += last.iter().flatten().filter(|a| **a).count();
            }
            let outlook = congestion.observe(value, &flat(value + 0.2 * (85.0 - value)));
            last = if congested { [None; 3] } else { [last[1], last[2], Some(outlook.alarm)] };
            alarms += usize::from(t > 5_000 && outlook.alarm);
        }
        let recall = caught as f64 / before as f64;
        assert!((0.7..0.9).contains(&recall), "{recall} of {before}");
        assert!(alarms < 5 * before, "{alarms} alarms for {before}");
    }
}

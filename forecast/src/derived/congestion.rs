//! Will a path (or a host) be congested soon, from when on, and is that worth an alarm?
//!
//! The forecast's own quantiles say it, if what they say of single steps is put together rightly: steps are neither
//! independent nor one and the same event, and half-way between the two is what comes true. A classifier learnt on top
//! of that (slopes, margins, earlier congestion) ranked no better on any links tried, so there is none.

use crate::quantiles::Forecast;

/// When to speak of congestion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// At or above this value it is congested.
    pub threshold: f64,
    /// Steps ahead that are looked at; at least 1.
    pub within: usize,
    /// Probability from which on an alarm is raised. Right by price: an alarm in vain over the sum of that and of a
    /// congestion that was not foreseen.
    pub level: f64,
}

impl Rule {
    /// An overlooked congestion costs some five alarms in vain. Of development links, this caught 77 % of the samples
    /// before an onset.
    pub const USUAL_LEVEL: f64 = 0.18;

    /// What `forecast` says, made after a sample of value `newest`.
    pub fn outlook(&self, newest: f64, forecast: &Forecast) -> Outlook {
        let within = self.within.max(1).min(forecast.horizon());
        let by_step: Vec<f64> = (1..=within).filter_map(|step| forecast.exceedance(step, self.threshold)).collect();
        let (mut quiet, mut most) = (1.0, 0.0f64);
        let passed_by: Vec<f64> = by_step
            .iter()
            .map(|p| {
                quiet *= 1.0 - p;
                most = most.max(*p);
                0.5 * (1.0 - quiet) + 0.5 * most
            })
            .collect();
        let probability = passed_by.last().copied().unwrap_or(0.0);
        let onset = passed_by.iter().position(|&p| p >= 0.5 * probability).map_or(1, |i| i + 1);
        let congested = newest >= self.threshold;
        Outlook { by_step, probability, onset, congested, alarm: !congested && probability >= self.level }
    }
}

/// What is to be expected.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// Probability a step ahead that it is congested then.
    pub by_step: Vec<f64>,
    /// Probability that it is congested at any of the rule's steps.
    pub probability: f64,
    /// First step ahead (1-based) by which congestion is as likely as not to have begun, if it comes at all: the lead
    /// that an alarm raised now gives.
    pub onset: usize,
    /// Already congested: nothing to foresee.
    pub congested: bool,
    /// Worth an alarm.
    pub alarm: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    const RULE: Rule = Rule { threshold: 100.0, within: 3, level: Rule::USUAL_LEVEL };

    fn flat(centre: f64) -> Forecast {
        Forecast::new(vec![[-8.0, -6.0, -3.0, 0.0, 3.0, 6.0, 8.0].map(|d| centre + d); 3])
    }

    #[test]
    fn what_is_far_below_is_quiet_and_what_rises_is_seen_coming() {
        assert!(!RULE.outlook(20.0, &flat(20.0)).alarm);
        let rising = Forecast::new(
            (0..3).map(|h| [-4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 4.0].map(|d| 96.0 + 4.0 * f64::from(h) + d)).collect(),
        );
        let outlook = RULE.outlook(92.0, &rising);
        assert!(outlook.alarm && !outlook.congested);
        assert!(outlook.by_step[0] < outlook.by_step[1] && outlook.by_step[1] < outlook.by_step[2]);
        assert_eq!(outlook.onset, 2);
        let now = RULE.outlook(104.0, &rising);
        assert!(now.congested && !now.alarm);
    }

    #[test]
    fn probabilities_come_true_on_a_wandering_load_and_dearer_alarms_are_rarer_and_better() {
        // A load that is drawn back to its mean; the forecast is the true distribution of each single step.
        let (mean, back, noise) = (85.0, 0.1, 4.0);
        let foretold = |value: f64| {
            let (mut centre, mut variance) = (value, 0.0f64);
            let steps = (0..3).map(|_| {
                centre += back * (mean - centre);
                variance = (1.0 - back) * (1.0 - back) * variance + noise * noise;
                [-1.645, -1.282, -0.674, 0.0, 0.674, 1.282, 1.645].map(|z| centre + z * variance.sqrt())
            });
            Forecast::new(steps.collect())
        };
        let mut random = Random::new(4);
        let mut values = vec![mean];
        for t in 0..40_000 {
            values.push(values[t] + back * (mean - values[t]) + noise * random.normal());
        }
        let (mut said, mut came, mut alarms, mut right) = (0.0, 0.0, [0usize; 2], [0usize; 2]);
        for window in values.windows(4) {
            let outlook = RULE.outlook(window[0], &foretold(window[0]));
            if outlook.congested {
                continue;
            }
            let comes = window[1..].iter().any(|&v| v >= RULE.threshold);
            said += outlook.probability;
            came += f64::from(u8::from(comes));
            for (k, level) in [RULE.level, 0.5].into_iter().enumerate() {
                let alarm = Rule { level, ..RULE }.outlook(window[0], &foretold(window[0])).alarm;
                alarms[k] += usize::from(alarm);
                right[k] += usize::from(alarm && comes);
            }
        }
        assert!((said / came - 1.0).abs() < 0.15, "{said} said, {came} came");
        assert!(alarms[1] > 0 && alarms[1] < alarms[0] / 2, "{alarms:?}");
        assert!(right[1] * alarms[0] > right[0] * alarms[1] * 5 / 4, "{right:?} of {alarms:?}");
    }

    #[test]
    fn a_rule_of_no_step_and_a_forecast_of_none_say_nothing_wild() {
        let outlook = Rule { within: 0, ..RULE }.outlook(f64::NAN, &flat(99.0));
        assert_eq!((outlook.by_step.len(), outlook.onset, outlook.congested), (1, 1, false));
        let nothing = RULE.outlook(1.0, &Forecast::new(Vec::new()));
        assert_eq!((nothing.probability, nothing.alarm), (0.0, false));
    }
}

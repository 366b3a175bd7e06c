//! How much to hold ready: the amount of least expected cost under a forecast, a newsvendor who also pays for changing
//! his mind.

use crate::quantiles::{Forecast, value_at};

/// Points at which a distribution is integrated.
const POINTS: usize = 40;
/// Amounts that are tried.
const CANDIDATES: usize = 60;

/// Prices, all in one currency.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prices {
    /// One unit that is held and not used, a step.
    pub idle: f64,
    /// One unit that is asked for and not held, a step.
    pub shortage: f64,
    /// Any change of the amount.
    pub change: f64,
    /// One unit more, and one less.
    pub raise: f64,
    pub lower: f64,
}

/// What may be held and how often it may change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    pub least: f64,
    pub most: f64,
    /// Amounts are multiples of this; 0: any.
    pub unit: f64,
    /// Steps that an amount is kept before it may fall. It may rise at any time: a shortage does not wait.
    pub hold_steps: u64,
    /// A change must save this share of what keeping costs.
    pub least_saving: f64,
}

/// What to do, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    pub amount: f64,
    /// Expected cost of the amount over the forecast's steps, the change included.
    pub cost: f64,
    /// Expected cost of keeping what is held.
    pub cost_of_keeping: f64,
    pub why: Reason,
}

/// Why an amount was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It is the cheapest, and other than what is held.
    Cheaper,
    /// What is held is the cheapest.
    KeptAsCheapest,
    /// Another amount would be cheaper, but by less than the saving asked for.
    KeptForSmallSaving,
    /// Less would be cheaper, but the last change is too recent.
    KeptForHolding,
}

/// Decides on an amount, step by step.
#[derive(Debug, Clone)]
pub struct Allocator {
    prices: Prices,
    limits: Limits,
    held: f64,
    since_change: u64,
}

impl Allocator {
    /// Starts with `held`. Prices below 0 or not finite count as 0; limits are put in order.
    pub fn new(prices: Prices, limits: Limits, held: f64) -> Self {
        let fine = |v: f64| if v.is_finite() { v.max(0.0) } else { 0.0 };
        let prices = Prices {
            idle: fine(prices.idle),
            shortage: fine(prices.shortage),
            change: fine(prices.change),
            raise: fine(prices.raise),
            lower: fine(prices.lower),
        };
        let least = fine(limits.least);
        let most = if limits.most.is_finite() { limits.most.max(least) } else { f64::MAX };
        let limits = Limits { least, most, unit: fine(limits.unit), least_saving: fine(limits.least_saving), ..limits };
        let mut allocator = Self { prices, limits, held: 0.0, since_change: u64::MAX };
        allocator.held = allocator.allowed(fine(held));
        allocator
    }

    /// What is held.
    pub fn held(&self) -> f64 {
        self.held
    }

    /// Decides for the forecast's steps and holds the amount from now on; called once a step.
    pub fn decide(&mut self, forecast: &Forecast) -> Decision {
        self.since_change = self.since_change.saturating_add(1);
        let keeping = self.expected_cost(self.held, forecast);
        let may_fall = self.since_change >= self.limits.hold_steps;
        let (mut best, mut barred) = ((self.held, keeping), false);
        for amount in self.candidates(forecast) {
            let cost = self.expected_cost(amount, forecast) + self.cost_of_change(amount);
            if cost >= best.1 {
                continue;
            }
            if amount < self.held && !may_fall {
                barred = true;
            } else {
                best = (amount, cost);
            }
        }
        let why = match best.0 == self.held {
            true if barred => Reason::KeptForHolding,
            true => Reason::KeptAsCheapest,
            false if keeping - best.1 < self.limits.least_saving * keeping => Reason::KeptForSmallSaving,
            false => Reason::Cheaper,
        };
        if why != Reason::Cheaper {
            return Decision { amount: self.held, cost: keeping, cost_of_keeping: keeping, why };
        }
        self.held = best.0;
        self.since_change = 0;
        Decision { amount: best.0, cost: best.1, cost_of_keeping: keeping, why }
    }

    /// Expected cost of idle and missing units over all steps if `amount` is held.
    pub fn expected_cost(&self, amount: f64, forecast: &Forecast) -> f64 {
        let at = |q| (0..POINTS).map(move |k| value_at(q, (k as f64 + 0.5) / POINTS as f64).max(0.0));
        let cost = |demand: f64| {
            if demand > amount {
                self.prices.shortage * (demand - amount)
            } else {
                self.prices.idle * (amount - demand)
            }
        };
        forecast.steps().iter().map(|q| at(q).map(cost).sum::<f64>() / POINTS as f64).sum()
    }

    fn cost_of_change(&self, amount: f64) -> f64 {
        let Prices { change, raise, lower, .. } = self.prices;
        let by = amount - self.held;
        if by == 0.0 { 0.0 } else { change + if by > 0.0 { raise * by } else { -lower * by } }
    }

    fn candidates(&self, forecast: &Forecast) -> Vec<f64> {
        let ends = forecast.steps().iter().map(|q| (value_at(q, 0.01), value_at(q, 0.999)));
        let (low, high) = ends.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), (a, b)| (l.min(a), h.max(b)));
        if !(low.is_finite() && high.is_finite()) {
            return Vec::new();
        }
        let at = |k: usize| self.allowed(low + (high - low) * k as f64 / (CANDIDATES - 1) as f64);
        let mut all: Vec<f64> = (0..CANDIDATES).map(at).collect();
        all.dedup();
        all
    }

    fn allowed(&self, amount: f64) -> f64 {
        let Limits { least, most, unit, .. } = self.limits;
        let whole = if unit > 0.0 { (amount / unit).ceil() * unit } else { amount };
        whole.clamp(least, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRICES: Prices = Prices { idle: 1.0, shortage: 9.0, change: 0.0, raise: 0.0, lower: 0.0 };
    const FREE: Limits = Limits { least: 0.0, most: 1e6, unit: 0.0, hold_steps: 0, least_saving: 0.0 };

    fn around(centre: f64) -> Forecast {
        Forecast::new(vec![[-16.45, -12.82, -6.74, 0.0, 6.74, 12.82, 16.45].map(|d| centre + d); 4])
    }

    #[test]
    fn without_switching_costs_it_is_the_newsvendors_quantile() {
        let mut allocator = Allocator::new(PRICES, FREE, 0.0);
        let amount = allocator.decide(&around(100.0)).amount;
        assert!((amount - 112.8).abs() < 2.0, "{amount}");
        let cheap = Prices { shortage: 1.0, ..PRICES };
        let amount = Allocator::new(cheap, FREE, 0.0).decide(&around(100.0)).amount;
        assert!((amount - 100.0).abs() < 2.0, "{amount}");
    }

    #[test]
    fn a_price_of_change_makes_small_moves_not_worth_it() {
        let costly = Prices { change: 60.0, ..PRICES };
        let mut allocator = Allocator::new(costly, FREE, 112.0);
        assert_eq!(allocator.decide(&around(102.0)).why, Reason::KeptAsCheapest);
        assert_eq!(allocator.decide(&around(160.0)).why, Reason::Cheaper);
    }

    #[test]
    fn holding_bars_the_fall_and_not_the_rise() {
        let mut allocator = Allocator::new(PRICES, Limits { hold_steps: 3, ..FREE }, 50.0);
        assert_eq!(allocator.decide(&around(100.0)).why, Reason::Cheaper);
        assert_eq!(allocator.decide(&around(40.0)).why, Reason::KeptForHolding);
        assert_eq!(allocator.decide(&around(200.0)).why, Reason::Cheaper);
        let reasons: Vec<Reason> = (0..3).map(|_| allocator.decide(&around(40.0)).why).collect();
        assert_eq!(reasons, [Reason::KeptForHolding, Reason::KeptForHolding, Reason::Cheaper]);
    }

    #[test]
    fn amounts_are_whole_units_within_limits_and_small_savings_are_left() {
        let mut allocator = Allocator::new(PRICES, Limits { unit: 8.0, most: 96.0, ..FREE }, 10.0);
        assert_eq!(allocator.held(), 16.0);
        assert_eq!(allocator.decide(&around(70.0)).amount, 80.0);
        assert!(allocator.expected_cost(80.0, &around(70.0)) < allocator.expected_cost(88.0, &around(70.0)));
        assert_eq!(allocator.decide(&around(500.0)).amount, 96.0);
        let mut lazy = Allocator::new(PRICES, Limits { least_saving: 0.5, ..FREE }, 105.0);
        assert_eq!(lazy.decide(&around(100.0)).why, Reason::KeptForSmallSaving);
    }
}

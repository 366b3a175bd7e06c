//! The hybrid: all experts, mixed by their matured losses, calibrated online, learning anew in slices.
//!
//! ```text
//! sample -> history -> experts (features -> panel of quantiles) -> mix -> guard -> conformal -> forecast
//!              |           ^                                        ^       ^         ^
//!              +-> learning (slices) -> new experts                 +-------+---------+-- matured losses
//! ```
//! [`Hybrid::push`] is cheap and never learns; [`Hybrid::learn_slice`] does a few milliseconds of learning whenever
//! [`Hybrid::wants_learning`], so that who calls decides what time may be spent.

mod cold;
pub mod conformal;
pub mod drift;
pub mod experts;
pub mod guard;
mod learning;
pub mod mix;
mod store;
mod tracking;

use crate::events::Event;
use crate::history::{History, Shape};
use crate::quantiles::Forecast;
use experts::{Experts, Panel};
use learning::Learning;
use tracking::Tracking;

/// Samples before the first learning.
const FIRST_FIT: usize = 256;
/// After that, learning is due when the history grew by this share, at the latest after a season.
const GROWTH: f64 = 0.25;
/// After a change was found, learning is due when this share of a season came.
const AFTER_CHANGE: f64 = 0.125;

/// What a slice of learning left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing was to be learnt.
    Idle,
    /// There is more.
    Working,
    /// The new experts forecast from now on.
    Done,
}

/// Where a hybrid stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// Mean weight of each expert.
    pub weights: Vec<(&'static str, f64)>,
    /// Share of the last value because the mix does worse at present.
    pub fallback_share: f64,
    /// Changes of the series found.
    pub changes: u64,
    /// Times learnt.
    pub fits: u64,
    /// Heap bytes held outside of learning.
    pub bytes: usize,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Hybrid {
    history: History,
    /// `None` until first learnt.
    experts: Option<Experts>,
    tracking: Tracking,
    learning: Option<Box<Learning>>,
    fits: u64,
    /// Number of the sample at which learning is due.
    due: u64,
    changes_seen: u64,
}

impl Hybrid {
    pub fn new(shape: Shape) -> Self {
        Self {
            history: History::new(shape),
            experts: None,
            tracking: Tracking::new(shape.horizon),
            learning: None,
            fits: 0,
            due: FIRST_FIT.max(8 * shape.horizon) as u64,
            changes_seen: 0,
        }
    }

    /// A forecaster for a new series like `sibling`'s: another guest of the same template. It takes over what the
    /// sibling learnt, its weights, calibration and season profile, and forecasts with them from its first sample on,
    /// until it has learnt from its own. Siblings of another step, season or horizon give nothing.
    pub fn warm_start(shape: Shape, sibling: &Self) -> Self {
        let mut young = Self::new(shape);
        let theirs = sibling.history.shape();
        let alike = (theirs.step_s, theirs.season, theirs.horizon) == (shape.step_s, shape.season, shape.horizon);
        if alike && young.history.adopt_profile(&sibling.history) {
            young.experts = sibling.experts.clone();
            young.tracking = sibling.tracking.successor();
        }
        young
    }

    /// What was seen.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Makes an event known; it may be past or to come.
    pub fn schedule(&mut self, event: Event) {
        self.history.schedule(event);
    }

    /// Takes an event out of the schedule; false if it was not there.
    pub fn cancel(&mut self, event: &Event) -> bool {
        self.history.cancel(event)
    }

    /// Fills an empty history without forecasting on the way; learning is due afterwards if there is enough.
    pub fn preload(&mut self, samples: impl IntoIterator<Item = Option<f64>>) {
        for sample in samples {
            self.history.push(sample);
            if let (Some(experts), Some(newest)) = (&mut self.experts, self.history.len().checked_sub(1)) {
                experts.advance(&self.history, newest);
            }
        }
        self.due = self.due.min(self.history.seen());
    }

    /// Takes one sample in; `None` is a gap, and so is what is not finite.
    pub fn push(&mut self, sample: Option<f64>) {
        self.history.push(sample);
        let Some(index) = self.history.len().checked_sub(1) else { return };
        let Some(experts) = &mut self.experts else { return };
        experts.advance(&self.history, index);
        let now = self.history.dropped() + index as u64;
        if self.history.is_measured(index) {
            self.tracking.mature(now, self.history.values()[index]);
        }
        if tracking::is_tracked(now) {
            self.tracking.issue(now, experts.panel(&self.history, index));
        }
        if self.tracking.drift.changes() > self.changes_seen {
            self.changes_seen = self.tracking.drift.changes();
            let soon = (self.history.shape().season as f64 * AFTER_CHANGE).max(24.0) as u64;
            self.due = self.due.min(self.history.seen() + soon);
        }
    }

    /// Whether there is something to learn.
    pub fn wants_learning(&self) -> bool {
        let enough = self.history.len() >= FIRST_FIT.max(8 * self.history.shape().horizon);
        self.learning.is_some() || (enough && self.history.seen() >= self.due)
    }

    /// Does a few milliseconds of learning, if there is something to learn.
    pub fn learn_slice(&mut self) -> Progress {
        if !self.wants_learning() {
            return Progress::Idle;
        }
        let learning = self.learning.get_or_insert_with(|| {
            // Own samples teach what weights and calibration are worth the first time.
            let untaught = (self.fits == 0).then(|| Tracking::new(self.history.shape().horizon));
            Box::new(Learning::new(&self.history, untaught, self.experts.as_ref()))
        });
        if !learning.slice() {
            return Progress::Working;
        }
        if let Some(learning) = self.learning.take() {
            self.adopt(*learning);
        }
        Progress::Done
    }

    /// Learns all that there is to learn.
    pub fn learn(&mut self) {
        while self.learn_slice() == Progress::Working {}
    }

    fn adopt(&mut self, learning: Learning) {
        let from = learning.seen();
        let (mut experts, tracking) = learning.finish();
        // Samples that came while it learnt.
        let missed = (self.history.seen() - from) as usize;
        for index in self.history.len().saturating_sub(missed)..self.history.len() {
            experts.advance(&self.history, index);
        }
        self.experts = Some(experts);
        if let Some(tracking) = tracking {
            self.changes_seen = tracking.drift.changes();
            self.tracking = tracking;
        }
        self.fits += 1;
        let grown = (self.history.len() as f64 * GROWTH) as u64;
        self.due = self.history.seen() + grown.clamp(1, self.history.shape().season as u64);
    }

    /// What comes after the newest sample. Without samples all is 0; before anything was learnt, the last value with
    /// intervals as wide as ignorance asks.
    pub fn forecast(&self) -> Forecast {
        match self.panel() {
            Some(panel) => Forecast::new(self.tracking.calibrated(&panel)),
            None => Forecast::new(cold::forecast(&self.history, self.history.shape().horizon)),
        }
    }

    /// All experts' forecasts after the newest sample; `None` before anything was learnt.
    pub fn panel(&self) -> Option<Panel> {
        let origin = self.history.len().checked_sub(1)?;
        Some(self.experts.as_ref()?.panel(&self.history, origin))
    }

    /// Where it stands, for people and metrics.
    pub fn status(&self) -> Status {
        let names = self.experts.iter().flat_map(|e| e.all().map(|m| m.name()));
        Status {
            weights: names.zip(self.tracking.mix.mean_weights()).collect(),
            fallback_share: self.tracking.guard.share(),
            changes: self.tracking.drift.changes(),
            fits: self.fits,
            bytes: self.history.bytes() + self.tracking.bytes() + self.experts.as_ref().map_or(0, Experts::bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ShapeError;

    fn wave(i: usize) -> f64 {
        100.0 + 50.0 * (i as f64 / 24.0 * std::f64::consts::TAU).sin() + ((i * 7919) % 13) as f64
    }

    fn learnt(count: usize) -> Result<Hybrid, ShapeError> {
        let mut hybrid = Hybrid::new(Shape::new(3600, 24, 6)?);
        hybrid.preload((0..count).map(|i| Some(wave(i))));
        hybrid.learn();
        Ok(hybrid)
    }

    #[test]
    fn a_daily_wave_is_forecast_better_than_by_its_last_value() -> Result<(), ShapeError> {
        let mut hybrid = learnt(600)?;
        let (mut own, mut naive) = (0.0, 0.0);
        for i in 600..700 {
            hybrid.push(Some(wave(i)));
            let forecast = hybrid.forecast();
            own += (forecast.at(6, 0.5).unwrap_or(f64::NAN) - wave(i + 6)).abs();
            naive += (wave(i) - wave(i + 6)).abs();
        }
        assert!(own < 0.2 * naive, "{own} against {naive}");
        Ok(())
    }

    #[test]
    fn learning_beside_new_samples_ends_where_learning_at_once_does() -> Result<(), ShapeError> {
        let (mut at_once, mut sliced) = (learnt(500)?, learnt(500)?);
        let mut interleaved = 0;
        for i in 500..640 {
            at_once.push(Some(wave(i)));
            at_once.learn();
            sliced.push(Some(wave(i)));
            for _ in 0..100 {
                interleaved += usize::from(sliced.learn_slice() == Progress::Working);
            }
        }
        assert!(interleaved > 100);
        assert!(sliced.status().fits >= at_once.status().fits - 1 && at_once.status().fits > 3);
        Ok(())
    }

    #[test]
    fn a_sibling_forecasts_a_new_guest_at_once_and_better_than_ignorance() -> Result<(), ShapeError> {
        let old = learnt(600)?;
        let mut young = Hybrid::warm_start(*old.history().shape(), &old);
        let mut cold = Hybrid::new(*old.history().shape());
        let (mut warm_loss, mut cold_loss) = (0.0, 0.0);
        for i in 0..48 {
            young.push(Some(wave(i)));
            cold.push(Some(wave(i)));
            let miss = |h: &Hybrid| (h.forecast().at(4, 0.5).unwrap_or(f64::NAN) - wave(i + 4)).abs();
            warm_loss += miss(&young);
            cold_loss += miss(&cold);
        }
        assert!(warm_loss < 0.5 * cold_loss, "{warm_loss} against {cold_loss}");
        Ok(())
    }
}

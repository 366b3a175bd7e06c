//! Learning in slices of a few milliseconds, beside a live forecaster.
//!
//! ```text
//! first time:  rows -> experts learn the older 70 % -> they forecast the newer 30 %, which teaches weights and
//!              calibration what each is worth -> rows -> experts learn all -> done
//! later:       rows -> experts learn all -> done (weights and calibration live on)
//! ```

use super::experts::{EXPERTS, Experts, LINEAR};
use super::tracking::Tracking;
use crate::features::{ROW_FEATURES, Row, View};
use crate::history::History;
use crate::models::Sample;

/// Origins that teach; older ones are left out.
const MOST_ORIGINS: usize = 8192;
/// Share of the history the experts see before they are judged on the rest.
const JUDGED_FROM: f64 = 0.7;
/// Origins judged in one slice.
const ORIGINS_A_SLICE: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Rows { step: usize },
    Expert { index: usize, slice: usize },
    Medians { step: usize },
    Judge { next: usize },
    Done,
}

/// Learning under way.
#[derive(Debug, Clone)]
pub(super) struct Learning {
    snapshot: History,
    experts: Experts,
    /// Weights and calibration taught by the first pass; `None` where those that exist live on.
    judged: Option<Tracking>,
    /// Samples `..end` teach in this pass.
    end: usize,
    first: usize,
    rows: Vec<Vec<Row>>,
    linear: Vec<Vec<f32>>,
    phase: Phase,
}

impl Learning {
    /// Starts on a copy of `history`. `untaught`: weights and calibration to be taught; `old`: experts to start from.
    pub(super) fn new(history: &History, untaught: Option<Tracking>, old: Option<&Experts>) -> Self {
        let (shape, len) = (history.shape(), history.len());
        let end = if untaught.is_some() { (len as f64 * JUDGED_FROM) as usize } else { len };
        let view = View::of(history, end);
        let experts = old.map_or_else(|| Experts::new(shape.horizon, shape.season, view), |old| old.seen_through(view));
        let mut learning = Self {
            snapshot: history.clone(),
            experts,
            judged: untaught,
            end,
            first: 0,
            rows: Vec::new(),
            linear: Vec::new(),
            phase: Phase::Done,
        };
        learning.start_pass(end);
        learning
    }

    /// Samples ever pushed when the snapshot was taken.
    pub(super) fn seen(&self) -> u64 {
        self.snapshot.seen()
    }

    /// Experts, and weights and calibration if these were taught too.
    pub(super) fn finish(self) -> (Experts, Option<Tracking>) {
        (self.experts, self.judged)
    }

    /// Does one slice; true when all is learnt.
    pub(super) fn slice(&mut self) -> bool {
        let horizon = self.snapshot.shape().horizon;
        self.phase = match self.phase {
            Phase::Rows { step } => {
                self.add_rows(step);
                if step + 1 < horizon { Phase::Rows { step: step + 1 } } else { Phase::Expert { index: 0, slice: 0 } }
            }
            Phase::Expert { index, slice } => match (self.learn(index, slice), index) {
                (false, _) => Phase::Expert { index, slice: slice + 1 },
                (true, LINEAR) => Phase::Medians { step: 0 },
                (true, index) if index + 1 < EXPERTS => Phase::Expert { index: index + 1, slice: 0 },
                (true, _) if self.end < self.snapshot.len() => Phase::Judge { next: self.end },
                (true, _) => Phase::Done,
            },
            Phase::Medians { step } => {
                let medians = self.experts.linear_medians(&self.rows[step], step);
                self.linear.push(medians);
                let next = if step + 1 < horizon { None } else { Some(Phase::Expert { index: LINEAR + 1, slice: 0 }) };
                next.unwrap_or(Phase::Medians { step: step + 1 })
            }
            Phase::Judge { next } => {
                let until = (next + ORIGINS_A_SLICE).min(self.snapshot.len());
                (next..until).for_each(|index| self.judge(index));
                if until < self.snapshot.len() {
                    Phase::Judge { next: until }
                } else {
                    self.experts = self.experts.seen_through(View::of(&self.snapshot, until));
                    self.start_pass(until);
                    self.phase
                }
            }
            Phase::Done => Phase::Done,
        };
        self.phase == Phase::Done
    }

    fn start_pass(&mut self, end: usize) {
        let season = self.snapshot.shape().season;
        // Until a few seasons are there, most rows know nothing of earlier ones.
        let warm = if end > 3 * season { season } else { end / 4 };
        self.end = end;
        self.first = warm.max(end.saturating_sub(MOST_ORIGINS));
        self.rows.clear();
        self.linear.clear();
        self.phase = Phase::Rows { step: 0 };
    }

    fn add_rows(&mut self, step: usize) {
        let view = *self.experts.view();
        let count = self.end.saturating_sub(self.first + step + 1);
        // The features of the origin are the same for all steps.
        let mut rows = match self.rows.first() {
            Some(nearest) => nearest[..count.min(nearest.len())].to_vec(),
            None => {
                let mut rows = vec![[0.0; ROW_FEATURES]; count];
                for (k, row) in rows.iter_mut().enumerate() {
                    view.origin(&self.snapshot, self.first + k, row);
                }
                rows
            }
        };
        for (k, row) in rows.iter_mut().enumerate() {
            view.target(&self.snapshot, self.first + k, step + 1, row);
        }
        self.rows.push(rows);
    }

    fn learn(&mut self, index: usize, slice: usize) -> bool {
        let view = *self.experts.view();
        let sample = Sample {
            history: &self.snapshot,
            end: self.end,
            view: &view,
            first: self.first,
            rows: &self.rows,
            linear: &self.linear,
        };
        self.experts.learn(index, &sample, slice)
    }

    fn judge(&mut self, index: usize) {
        let Some(tracking) = &mut self.judged else { return };
        self.experts.advance(&self.snapshot, index);
        let now = self.snapshot.dropped() + index as u64;
        if self.snapshot.is_measured(index) {
            tracking.mature(now, self.snapshot.values()[index]);
        }
        tracking.issue(now, self.experts.panel(&self.snapshot, index));
    }
}

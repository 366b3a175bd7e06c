//! The hybrid: all experts, mixed by their matured losses, calibrated online.

pub mod conformal;
pub mod mix;

use std::collections::VecDeque;

use crate::history::{History, Shape};
use crate::models::Model;
use crate::models::gbdt::{Base, Gbdt, Params};
use crate::models::linear::Linear;
use crate::models::naive::{Naive, Repeat};
use crate::quantiles::{Forecast, LEVEL_COUNT, Quantiles};
use conformal::{Conformal, ConformalParams};
use mix::{Mix, MixParams};

/// Forecast of every expert, `[expert][step]`.
pub type Panel = Vec<Vec<Quantiles>>;

/// A forecast that waits for what comes.
struct Pending {
    origin: u64,
    panel: Panel,
    issued: Vec<Quantiles>,
}

/// See the module's text.
pub struct Hybrid {
    history: History,
    experts: Vec<Box<dyn Model + Send>>,
    mix: Mix,
    conformal: Conformal,
    pending: VecDeque<Pending>,
    fitted: bool,
}

impl Hybrid {
    pub fn new(shape: Shape) -> Self {
        let h = shape.horizon;
        let experts: Vec<Box<dyn Model + Send>> = vec![
            Box::new(Naive::new(Repeat::Last, h)),
            Box::new(Naive::new(Repeat::Season, h)),
            Box::new(Naive::new(Repeat::Profile, h)),
            Box::new(Linear::new(h)),
            Box::new(Gbdt::new(h, Base::Last, Params::default())),
            Box::new(Gbdt::new(h, Base::Linear, Params { seed: 2, ..Params::default() })),
        ];
        Self {
            history: History::new(shape),
            mix: Mix::new(experts.len(), h, MixParams::default()),
            conformal: Conformal::new(h, ConformalParams::default()),
            experts,
            pending: VecDeque::new(),
            fitted: false,
        }
    }

    pub fn history(&self) -> &History {
        &self.history
    }

    pub fn expert_names(&self) -> Vec<&'static str> {
        self.experts.iter().map(|e| e.name()).collect()
    }

    pub fn weights(&self) -> Vec<f64> {
        self.mix.mean_weights()
    }

    /// Takes one sample in; `None` is a gap.
    pub fn push(&mut self, sample: Option<f64>) {
        self.history.push(sample);
        if self.history.is_empty() || !self.fitted {
            return;
        }
        let index = self.history.len() - 1;
        for expert in &mut self.experts {
            expert.advance(&self.history, index);
        }
        if self.history.is_measured(index) {
            self.mature(index);
        }
        self.track(index);
    }

    /// Learns from all samples: once on the older part to see how experts do on the newer, then on all.
    pub fn fit(&mut self) {
        let len = self.history.len();
        let held = (len as f64 * 0.7) as usize;
        if !self.fitted {
            for expert in &mut self.experts {
                expert.fit(&self.history, held);
            }
            self.fitted = true;
            for index in held..len {
                for expert in &mut self.experts {
                    expert.advance(&self.history, index);
                }
                self.mature(index);
                self.track(index);
            }
        }
        for expert in &mut self.experts {
            expert.fit(&self.history, len);
        }
    }

    /// All experts' forecasts after `origin`.
    pub fn panel(&self, origin: usize) -> Panel {
        let horizon = self.history.shape().horizon;
        self.experts
            .iter()
            .map(|e| {
                let mut out = vec![[0.0; LEVEL_COUNT]; horizon];
                e.forecast(&self.history, origin, &mut out);
                out
            })
            .collect()
    }

    /// What comes after the newest sample.
    pub fn forecast(&self) -> Forecast {
        let panel = self.panel(self.history.len() - 1);
        let mut steps = self.mix.combine(&panel);
        self.conformal.apply(&mut steps);
        Forecast::new(steps)
    }

    fn track(&mut self, index: usize) {
        let panel = self.panel(index);
        let mut issued = self.mix.combine(&panel);
        self.conformal.apply(&mut issued);
        let origin = self.history.dropped() + index as u64;
        self.pending.push_back(Pending { origin, panel, issued });
    }

    fn mature(&mut self, index: usize) {
        let now = self.history.dropped() + index as u64;
        let actual = self.history.values()[index];
        let horizon = self.history.shape().horizon as u64;
        while self.pending.front().is_some_and(|p| p.origin + horizon < now) {
            self.pending.pop_front();
        }
        for pending in &self.pending {
            let step = (now - pending.origin - 1) as usize;
            self.mix.mature(&pending.panel, step, actual);
            self.conformal.mature(&pending.issued[step], step, actual);
        }
        self.mix.settle();
    }
}

impl Hybrid {
    /// Learns anew from all samples; weights and calibration stay.
    pub fn refit(&mut self) {
        let len = self.history.len();
        for expert in &mut self.experts {
            expert.fit(&self.history, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(i: usize) -> f64 {
        100.0 + 50.0 * (i as f64 / 24.0 * std::f64::consts::TAU).sin() + ((i * 7919) % 13) as f64
    }

    #[test]
    fn a_panel_does_not_see_what_comes_after_its_origin() -> Result<(), crate::error::ShapeError> {
        let shape = Shape::new(3600, 24, 6)?;
        let mut known = Hybrid::new(shape);
        let mut changed = Hybrid::new(shape);
        for i in 0..600 {
            known.push(Some(wave(i)));
            changed.push(Some(wave(i)));
        }
        known.fit();
        changed.fit();
        let origin = known.history.len() - 1;
        for i in 600..640 {
            known.history.push(Some(wave(i)));
            changed.history.push(Some(-1e6));
        }
        assert_eq!(known.panel(origin), changed.panel(origin));
        assert_ne!(known.panel(origin + 20), changed.panel(origin + 20));
        Ok(())
    }
}

//! All models of one series, fitted to one view of it.

use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::features::{Row, View};
use crate::history::History;
use crate::models::ets::Ets;
use crate::models::gbdt::{Base, Gbdt, Params};
use crate::models::linear::Linear;
use crate::models::lstm::{self, Lstm};
use crate::models::naive::{Naive, Repeat};
use crate::models::{Input, Model, Sample};
use crate::quantiles::{LEVEL_COUNT, Quantiles};

/// Number of experts.
pub const EXPERTS: usize = 8;
/// Index of the last-value forecaster.
pub const LAST_VALUE: usize = 0;
/// Index of the linear model, on whose medians others build.
pub const LINEAR: usize = 3;

/// Forecast of every expert, `[expert][step]`.
pub type Panel = Vec<Vec<Quantiles>>;

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Experts {
    horizon: usize,
    view: View,
    last: Naive,
    season: Naive,
    profile: Naive,
    linear: Linear,
    trees: Gbdt,
    linear_trees: Gbdt,
    ets: Ets,
    lstm: Lstm,
}

impl Experts {
    /// Experts that have learnt nothing.
    pub fn new(horizon: usize, season: usize, view: View) -> Self {
        let (trees, linear_trees) = (tree_params(1), tree_params(2));
        Self {
            horizon,
            view,
            last: Naive::new(Repeat::Last, horizon),
            season: Naive::new(Repeat::Season, horizon),
            profile: Naive::new(Repeat::Profile, horizon),
            linear: Linear::new(horizon),
            trees: Gbdt::new(Base::Last, trees),
            linear_trees: Gbdt::new(Base::Linear, linear_trees),
            ets: Ets::new(horizon, season),
            lstm: Lstm::new(horizon, lstm::Params::default()),
        }
    }

    /// How the series was seen when they learnt.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// In the order of panels and weights.
    pub fn all(&self) -> [&dyn Model; EXPERTS] {
        [&self.last, &self.season, &self.profile, &self.linear, &self.trees, &self.linear_trees, &self.ets, &self.lstm]
    }

    fn expert(&mut self, index: usize) -> &mut dyn Model {
        match index {
            0 => &mut self.last,
            1 => &mut self.season,
            2 => &mut self.profile,
            3 => &mut self.linear,
            4 => &mut self.trees,
            5 => &mut self.linear_trees,
            6 => &mut self.ets,
            _ => &mut self.lstm,
        }
    }

    /// One slice of one expert's learning; true when that expert has learnt all.
    pub fn learn(&mut self, expert: usize, sample: &Sample, slice: usize) -> bool {
        self.expert(expert).learn(sample, slice)
    }

    /// The same experts, about to learn anew from another view of the series.
    pub fn seen_through(&self, view: View) -> Self {
        Self { view, ..self.clone() }
    }

    /// The linear model's medians for rows of one step (0-based).
    pub fn linear_medians(&self, rows: &[Row], step: usize) -> Vec<f32> {
        rows.iter().map(|row| self.linear.median(row, step)).collect()
    }

    /// Lets those that keep a state take notice of sample `index`.
    pub fn advance(&mut self, history: &History, index: usize) {
        let view = self.view;
        for expert in 0..EXPERTS {
            self.expert(expert).advance(history, &view, index);
        }
    }

    /// All forecasts after `origin`, the newest sample that they were advanced to.
    pub fn panel(&self, history: &History, origin: usize) -> Panel {
        let rows = self.view.rows(history, origin);
        let inputs = self.linear.inputs(&rows);
        let linear = self.linear.medians(&inputs);
        let input = Input { history, origin, view: &self.view, rows: &rows, inputs: &inputs, linear: &linear };
        let forecast = |model: &dyn Model| {
            let mut out = vec![[0.0; LEVEL_COUNT]; self.horizon];
            model.forecast(&input, &mut out);
            out
        };
        self.all().into_iter().map(forecast).collect()
    }

    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        self.all().iter().map(|m| m.bytes()).sum()
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        self.view.encode(out);
        self.last.encode(out);
        self.season.encode(out);
        self.profile.encode(out);
        self.linear.encode(out);
        self.trees.encode(out);
        self.linear_trees.encode(out);
        self.ets.encode(out);
        self.lstm.encode(out);
    }

    pub(crate) fn decode(horizon: usize, season: usize, from: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self {
            horizon,
            view: View::decode(from)?,
            last: Naive::decode(Repeat::Last, horizon, from)?,
            season: Naive::decode(Repeat::Season, horizon, from)?,
            profile: Naive::decode(Repeat::Profile, horizon, from)?,
            linear: Linear::decode(horizon, from)?,
            trees: Gbdt::decode(Base::Last, tree_params(1), horizon, from)?,
            linear_trees: Gbdt::decode(Base::Linear, tree_params(2), horizon, from)?,
            ets: Ets::decode(horizon, season, from)?,
            lstm: Lstm::decode(horizon, lstm::Params::default(), from)?,
        })
    }
}

fn tree_params(seed: u64) -> Params {
    Params { seed, ..Params::default() }
}

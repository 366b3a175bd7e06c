//! An LSTM with heads for all quantiles of all steps ahead.
//!
//! It is trained on streams of the history cut into chunks (truncated back-propagation through time, state carried
//! over), every moment of which has a loss, and lives on with its state: a new sample costs one step of the cell.
//! Outputs are relative to the linear model's median, in units of the usual error at that step.

mod adam;
mod net;

pub use adam::Adam;
pub use net::{BLOCKS, Net, Sizes, State};

use ndarray::{Array2, ArrayView2, Axis, aview1};

use super::{Input, Model, Sample};
use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::features::{ORIGIN_FEATURES, ROW_FEATURES, Row, View, column};
use crate::history::History;
use crate::quantiles::{LEVEL_COUNT, LEVELS, Quantiles, quantile_of_sorted};

/// Sines and cosines of the day and the hour.
const WAVES: usize = 4;
const INPUTS: usize = ORIGIN_FEATURES + WAVES;
/// What is known of a target, relative to the newest value.
const KNOWN: [usize; 5] = [column::PROFILE, column::YESTERDAY, column::WEEK, column::PERIOD, column::EVENT_EFFECT];
/// The linear model's median comes beside them.
const KNOWN_A_STEP: usize = KNOWN.len() + 1;

/// What training may spend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Params {
    pub hidden: usize,
    pub head: usize,
    /// Parallel streams the history is cut into.
    pub streams: usize,
    /// Moments a chunk.
    pub moments: usize,
    /// Chunks of training from nothing, and from what was learnt before.
    pub chunks: usize,
    pub chunks_again: usize,
    pub rate: f32,
    pub seed: u64,
}

impl Default for Params {
    fn default() -> Self {
        Self { hidden: 20, head: 32, streams: 8, moments: 24, chunks: 240, chunks_again: 80, rate: 6e-3, seed: 5 }
    }
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Lstm {
    horizon: usize,
    params: Params,
    net: Net<f32>,
    /// Usual size of the target a step; empty before anything was learnt.
    units: Vec<f32>,
    state: State<f32>,
    training: Option<Box<Training>>,
}

#[derive(Debug, Clone)]
struct Training {
    inputs: Array2<f32>,
    known: Array2<f32>,
    /// Targets a step; NaN where none.
    targets: Array2<f32>,
    adam: Adam,
    state: State<f32>,
    /// Moments a stream.
    length: usize,
    chunks: usize,
}

impl Lstm {
    pub fn new(horizon: usize, params: Params) -> Self {
        let sizes = Sizes {
            inputs: INPUTS,
            hidden: params.hidden,
            known: KNOWN_A_STEP * horizon,
            head: params.head,
            outputs: horizon * LEVEL_COUNT,
        };
        let net = Net::new(sizes, params.seed);
        let state = net.rest(1);
        Self { horizon, params, net, units: Vec::new(), state, training: None }
    }

    fn start(&mut self, sample: &Sample) -> bool {
        self.training = None;
        let (streams, moments) = (self.params.streams, self.params.moments);
        let rows = sample.rows.first().map_or(0, Vec::len);
        let length = rows / streams;
        if length < 2 * moments || sample.linear.len() != self.horizon {
            self.units.clear();
            return false;
        }
        let again = !self.units.is_empty();
        let mut targets = Array2::from_elem((rows, self.horizon), f32::NAN);
        for (step, (all, medians)) in sample.rows.iter().zip(sample.linear).enumerate() {
            for k in 0..all.len() {
                let (origin, target) = (sample.first + k, sample.first + k + step + 1);
                if sample.history.is_measured(target) {
                    targets[[k, step]] = sample.scaled(target) - sample.scaled(origin) - medians[k];
                }
            }
        }
        let measured = |step: usize| targets.column(step).into_iter().copied().filter(|t| !t.is_nan());
        self.units = (0..self.horizon)
            .map(|step| (measured(step).map(f32::abs).sum::<f32>() / measured(step).count().max(1) as f32).max(1e-6))
            .collect();
        if !again {
            self.net = Net::new(self.net.sizes(), self.params.seed);
            for step in 0..self.horizon {
                let mut own: Vec<f64> = measured(step).map(f64::from).collect();
                own.sort_unstable_by(f64::total_cmp);
                for (level, tau) in LEVELS.into_iter().enumerate() {
                    let start = quantile_of_sorted(&own, tau) as f32 / self.units[step];
                    self.net.output_bias_mut()[[0, step * LEVEL_COUNT + level]] = start;
                }
            }
        }
        let mut inputs = Array2::zeros((rows, INPUTS));
        let mut known = Array2::zeros((rows, KNOWN_A_STEP * self.horizon));
        for k in 0..rows {
            fill_inputs(&sample.rows[0][k], inputs.row_mut(k).as_slice_mut().unwrap_or_default());
            // The newest origins have no row for the farthest steps; their targets are unknown too.
            let row = |step: usize| sample.rows[step].get(k).map(|row| (row, sample.linear[step][k]));
            fill_known(self.horizon, row, known.row_mut(k).as_slice_mut().unwrap_or_default());
        }
        let chunks = if again { self.params.chunks_again } else { self.params.chunks };
        let adam = Adam::new(self.net.blocks());
        let state = self.net.rest(streams);
        self.training = Some(Box::new(Training { inputs, known, targets, adam, state, length, chunks }));
        true
    }

    /// Trains on chunk number `chunk`.
    fn train(&mut self, training: &mut Training, chunk: usize) {
        let (streams, moments) = (self.params.streams, self.params.moments);
        let a_pass = training.length / moments;
        let pass = chunk / a_pass;
        if chunk.is_multiple_of(a_pass) {
            training.state = self.net.rest(streams);
        }
        // Every pass cuts elsewhere.
        let shift = (pass * 7) % moments.min(training.length - a_pass * moments + 1);
        let start = shift + (chunk % a_pass) * moments;
        let rows: Vec<usize> = (0..moments)
            .flat_map(|t| (0..streams).map(move |b| (b, start + t)))
            .map(|(b, t)| b * training.length + t)
            .collect();
        let inputs = training.inputs.select(Axis(0), &rows);
        let known = training.known.select(Axis(0), &rows);
        let trace = self.net.forward(inputs.view(), known.view(), &mut training.state);
        let scale = 1.0 / (rows.len() * self.horizon) as f32;
        let mut d_out = Array2::zeros(trace.out.dim());
        for (r, &row) in rows.iter().enumerate() {
            for step in 0..self.horizon {
                let target = training.targets[[row, step]] / self.units[step];
                if target.is_nan() {
                    continue;
                }
                for (level, tau) in LEVELS.into_iter().enumerate() {
                    let at = [r, step * LEVEL_COUNT + level];
                    let above = target > trace.out[at];
                    d_out[at] = scale * if above { -tau as f32 } else { 1.0 - tau as f32 };
                }
            }
        }
        let gradients = self.net.backward(inputs.view(), &trace, &d_out, streams);
        // Fast at first, slow at the end.
        let left = 1.0 - chunk as f32 / training.chunks as f32;
        training.adam.step(self.net.blocks_mut(), &gradients, self.params.rate * (0.05 + 0.95 * left));
    }

    /// Lets the live state take in the newest samples before `end`.
    fn catch_up(&mut self, history: &History, view: &View, end: usize) {
        let moments = 6 * self.params.moments;
        self.state = self.net.rest(1);
        for index in end.saturating_sub(moments)..end {
            self.advance(history, view, index);
        }
    }
}

impl Model for Lstm {
    fn name(&self) -> &'static str {
        "lstm"
    }

    fn learn(&mut self, sample: &Sample, slice: usize) -> bool {
        if slice == 0 {
            return !self.start(sample);
        }
        let Some(mut training) = self.training.take() else { return true };
        self.train(&mut training, slice - 1);
        if slice < training.chunks {
            self.training = Some(training);
            return false;
        }
        self.catch_up(sample.history, sample.view, sample.end);
        true
    }

    fn advance(&mut self, history: &History, view: &View, index: usize) {
        if self.units.is_empty() {
            return;
        }
        let mut row = [0.0; ROW_FEATURES];
        view.origin(history, index, &mut row);
        view.target(history, index, 1, &mut row);
        let mut inputs = [0.0; INPUTS];
        fill_inputs(&row, &mut inputs);
        let inputs: ArrayView2<f32> = aview1(&inputs).insert_axis(Axis(0));
        self.net.step(inputs, &mut self.state);
    }

    fn forecast(&self, input: &Input, out: &mut [Quantiles]) {
        let last = input.history.values()[input.origin];
        out.fill([last; LEVEL_COUNT]);
        if self.units.is_empty() {
            return;
        }
        let mut known = Array2::zeros((1, KNOWN_A_STEP * self.horizon));
        let row = |step: usize| Some((input.rows.get(step)?, *input.linear.get(step)?));
        fill_known(self.horizon, row, known.as_slice_mut().unwrap_or_default());
        let read = self.net.read(&self.state, known.view());
        for (step, (out, &unit)) in out.iter_mut().zip(&self.units).enumerate() {
            let base = input.linear.get(step).copied().unwrap_or(0.0);
            for (level, out) in out.iter_mut().enumerate() {
                let value = base + unit * read[[0, step * LEVEL_COUNT + level]];
                *out = last + input.view.scale.unit * f64::from(value);
            }
        }
    }

    fn bytes(&self) -> usize {
        4 * self.net.blocks().iter().map(Array2::len).sum::<usize>()
    }
}

/// Bounded by its logarithm, and 0 for unknown.
fn squash(value: f32) -> f32 {
    if value.is_nan() { 0.0 } else { value.signum() * value.abs().ln_1p() }
}

fn fill_inputs(row: &Row, out: &mut [f32]) {
    for (out, &value) in out.iter_mut().zip(&row[..ORIGIN_FEATURES]) {
        *out = squash(value);
    }
    let (day, hour) = (std::f32::consts::TAU * row[column::PHASE], std::f32::consts::TAU * row[column::HOUR_PHASE]);
    for (out, wave) in out[ORIGIN_FEATURES..].iter_mut().zip([day.sin(), day.cos(), hour.sin(), hour.cos()]) {
        *out = wave;
    }
}

fn fill_known<'a>(horizon: usize, row: impl Fn(usize) -> Option<(&'a Row, f32)>, out: &mut [f32]) {
    for (step, out) in out.chunks_exact_mut(KNOWN_A_STEP).enumerate().take(horizon) {
        let Some((row, linear)) = row(step) else { continue };
        let last = row[column::LAST];
        for (out, &feature) in out.iter_mut().zip(&KNOWN) {
            // An effect is a difference already.
            let base = if feature == column::EVENT_EFFECT { 0.0 } else { last };
            *out = squash(row[feature] - base);
        }
        out[KNOWN.len()] = squash(linear);
    }
}

impl Lstm {
    pub(crate) fn encode(&self, out: &mut Writer) {
        out.f32s(&self.units);
        if self.units.is_empty() {
            return;
        }
        self.net.blocks().iter().flatten().for_each(|&v| out.f32(v));
        self.state.hidden.iter().chain(&self.state.cell).for_each(|&v| out.f32(v));
    }

    pub(crate) fn decode(horizon: usize, params: Params, from: &mut Reader) -> Result<Self, DecodeError> {
        let mut model = Self::new(horizon, params);
        model.units = from.f32s("units")?;
        if model.units.is_empty() {
            return Ok(model);
        }
        if model.units.len() != horizon {
            return Err(from.range("units"));
        }
        for value in model.net.blocks_mut().iter_mut().flatten() {
            *value = from.f32("a weight of the LSTM")?;
        }
        for value in model.state.hidden.iter_mut().chain(&mut model.state.cell) {
            *value = from.f32("the state of the LSTM")?;
        }
        Ok(model)
    }
}

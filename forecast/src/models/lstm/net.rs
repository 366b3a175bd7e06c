//! The network: an LSTM over the samples and a small head that sees its state beside what is known of the targets.
//!
//! ```text
//! input [D] -> LSTM [H] -> state --+
//!                                  +--> tanh [U] -> out [steps x levels]
//! known of the targets [A] --------+
//! ```
//! Batches are rows. A chunk is `T` moments of `B` streams, stored moment by moment: row `t * B + b`.

use ndarray::{Array2, ArrayView2, Axis, NdFloat, Slice};

use crate::random::Random;

/// Sizes of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    pub inputs: usize,
    pub hidden: usize,
    pub known: usize,
    pub head: usize,
    pub outputs: usize,
}

/// Parameter blocks, in the order of [`Net::blocks`]; a bias is one row.
const INPUT: usize = 0;
const RECURRENT: usize = 1;
const GATE_BIAS: usize = 2;
const HEAD: usize = 3;
const HEAD_BIAS: usize = 4;
const OUT: usize = 5;
const OUT_BIAS: usize = 6;
const ROWS: Axis = Axis(0);
const COLUMNS: Axis = Axis(1);
/// Number of parameter blocks.
pub const BLOCKS: usize = 7;

/// Parameters. Gates lie side by side: input, forget, output, candidate.
#[derive(Debug, Clone, PartialEq)]
pub struct Net<F> {
    sizes: Sizes,
    blocks: Vec<Array2<F>>,
}

/// State of `B` streams: hidden and cell, `B x H` each.
#[derive(Debug, Clone, PartialEq)]
pub struct State<F> {
    pub hidden: Array2<F>,
    pub cell: Array2<F>,
}

/// What the forward pass keeps for the backward pass.
#[derive(Debug)]
pub struct Trace<F> {
    /// Activated gates, `TB x 4H`.
    gates: Array2<F>,
    /// tanh of the cells, `TB x H`.
    squashed: Array2<F>,
    /// Hidden state and cell before each moment.
    before: Array2<F>,
    cells_before: Array2<F>,
    /// Input and activation of the head.
    seen: Array2<F>,
    head: Array2<F>,
    /// Output, `TB x outputs`.
    pub out: Array2<F>,
}

fn number<F: NdFloat>(value: f64) -> F {
    F::from(value).unwrap_or_else(F::zero)
}

fn sigmoid<F: NdFloat>(x: F) -> F {
    F::one() / (F::one() + (-x).exp())
}

impl<F: NdFloat> Net<F> {
    /// Shapes of the parameter blocks.
    pub fn shapes(sizes: Sizes) -> [(usize, usize); BLOCKS] {
        let Sizes { inputs, hidden, known, head, outputs } = sizes;
        [
            (inputs, 4 * hidden),
            (hidden, 4 * hidden),
            (1, 4 * hidden),
            (hidden + known, head),
            (1, head),
            (head, outputs),
            (1, outputs),
        ]
    }

    /// Random parameters of usual size; the forget gates start open, the output at 0.
    pub fn new(sizes: Sizes, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let blocks = Self::shapes(sizes)
            .into_iter()
            .enumerate()
            .map(|(block, (rows, columns))| {
                let size = match block {
                    GATE_BIAS | HEAD_BIAS | OUT | OUT_BIAS => 0.0,
                    _ => 1.0 / (rows as f64).sqrt(),
                };
                Array2::from_shape_simple_fn((rows, columns), || number(size * random.normal()))
            })
            .collect();
        let mut net = Self { sizes, blocks };
        let hidden = sizes.hidden;
        net.blocks[GATE_BIAS].slice_axis_mut(COLUMNS, Slice::from(hidden..2 * hidden)).fill(F::one());
        net
    }

    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    pub fn blocks(&self) -> &[Array2<F>] {
        &self.blocks
    }

    pub fn blocks_mut(&mut self) -> &mut [Array2<F>] {
        &mut self.blocks
    }

    /// Biases of the outputs: where they start.
    pub fn output_bias_mut(&mut self) -> &mut Array2<F> {
        &mut self.blocks[OUT_BIAS]
    }

    /// A state that knows nothing.
    pub fn rest(&self, streams: usize) -> State<F> {
        let zeros = Array2::zeros((streams, self.sizes.hidden));
        State { hidden: zeros.clone(), cell: zeros }
    }

    /// One moment of the LSTM: activated gates from `gates` (input part and bias already summed), new state.
    fn moment(&self, gates: &mut Array2<F>, state: &mut State<F>) {
        let hidden = self.sizes.hidden;
        ndarray::linalg::general_mat_mul(F::one(), &state.hidden, &self.blocks[RECURRENT], F::one(), gates);
        for ((mut gates, mut h), mut c) in
            gates.rows_mut().into_iter().zip(state.hidden.rows_mut()).zip(state.cell.rows_mut())
        {
            for j in 0..hidden {
                let (input, forget) = (sigmoid(gates[j]), sigmoid(gates[hidden + j]));
                let (output, candidate) = (sigmoid(gates[2 * hidden + j]), gates[3 * hidden + j].tanh());
                (gates[j], gates[hidden + j]) = (input, forget);
                (gates[2 * hidden + j], gates[3 * hidden + j]) = (output, candidate);
                c[j] = forget * c[j] + input * candidate;
                h[j] = output * c[j].tanh();
            }
        }
    }

    /// Lets `state` take in one input row a stream.
    pub fn step(&self, inputs: ArrayView2<F>, state: &mut State<F>) {
        let mut gates = inputs.dot(&self.blocks[INPUT]) + &self.blocks[GATE_BIAS];
        self.moment(&mut gates, state);
    }

    /// Output for a state and what is known of the targets.
    pub fn read(&self, state: &State<F>, known: ArrayView2<F>) -> Array2<F> {
        let hidden = self.sizes.hidden;
        let weights = &self.blocks[HEAD];
        let mut head = state.hidden.dot(&weights.slice_axis(ROWS, Slice::from(..hidden))) + &self.blocks[HEAD_BIAS];
        head = head + known.dot(&weights.slice_axis(ROWS, Slice::from(hidden..)));
        head.mapv_inplace(F::tanh);
        head.dot(&self.blocks[OUT]) + &self.blocks[OUT_BIAS]
    }

    /// All moments of a chunk; `state` is left after the last.
    pub fn forward(&self, inputs: ArrayView2<F>, known: ArrayView2<F>, state: &mut State<F>) -> Trace<F> {
        let (rows, streams) = (inputs.nrows(), state.hidden.nrows());
        let hidden = self.sizes.hidden;
        let mut gates = inputs.dot(&self.blocks[INPUT]) + &self.blocks[GATE_BIAS];
        let zeros = || Array2::zeros((rows, hidden));
        let (mut cells, mut before, mut cells_before, mut after) = (zeros(), zeros(), zeros(), zeros());
        for at in (0..rows).step_by(streams) {
            let part = Slice::from(at..at + streams);
            before.slice_axis_mut(ROWS, part).assign(&state.hidden);
            cells_before.slice_axis_mut(ROWS, part).assign(&state.cell);
            let mut now = gates.slice_axis(ROWS, part).to_owned();
            self.moment(&mut now, state);
            gates.slice_axis_mut(ROWS, part).assign(&now);
            cells.slice_axis_mut(ROWS, part).assign(&state.cell);
            after.slice_axis_mut(ROWS, part).assign(&state.hidden);
        }
        let squashed = cells.mapv_into(F::tanh);
        let mut seen = Array2::zeros((rows, hidden + self.sizes.known));
        seen.slice_axis_mut(COLUMNS, Slice::from(..hidden)).assign(&after);
        seen.slice_axis_mut(COLUMNS, Slice::from(hidden..)).assign(&known);
        let head = (seen.dot(&self.blocks[HEAD]) + &self.blocks[HEAD_BIAS]).mapv_into(F::tanh);
        let out = head.dot(&self.blocks[OUT]) + &self.blocks[OUT_BIAS];
        Trace { gates, squashed, before, cells_before, seen, head, out }
    }

    /// Gradients of all parameters from those of the output; what came before the chunk is taken as given.
    pub fn backward(
        &self,
        inputs: ArrayView2<F>,
        trace: &Trace<F>,
        d_out: &Array2<F>,
        streams: usize,
    ) -> Vec<Array2<F>> {
        let hidden = self.sizes.hidden;
        let rows = inputs.nrows();
        let mut d_head = d_out.dot(&self.blocks[OUT].t());
        d_head.zip_mut_with(&trace.head, |d, &h| *d *= F::one() - h * h);
        let d_seen = d_head.dot(&self.blocks[HEAD].slice_axis(ROWS, Slice::from(..hidden)).t());
        let mut d_gates: Array2<F> = Array2::zeros((rows, 4 * hidden));
        let mut d_hidden: Array2<F> = Array2::zeros((streams, hidden));
        let mut d_cell: Array2<F> = Array2::zeros((streams, hidden));
        for at in (0..rows).step_by(streams).collect::<Vec<_>>().into_iter().rev() {
            d_hidden += &d_seen.slice_axis(ROWS, Slice::from(at..at + streams));
            for b in 0..streams {
                let row = at + b;
                for j in 0..hidden {
                    let [input, forget, output, candidate] = [0, 1, 2, 3].map(|g| trace.gates[[row, g * hidden + j]]);
                    let squashed = trace.squashed[[row, j]];
                    let dh = d_hidden[[b, j]];
                    let dc = d_cell[[b, j]] + dh * output * (F::one() - squashed * squashed);
                    d_gates[[row, j]] = dc * candidate * input * (F::one() - input);
                    d_gates[[row, hidden + j]] = dc * trace.cells_before[[row, j]] * forget * (F::one() - forget);
                    d_gates[[row, 2 * hidden + j]] = dh * squashed * output * (F::one() - output);
                    d_gates[[row, 3 * hidden + j]] = dc * input * (F::one() - candidate * candidate);
                    d_cell[[b, j]] = dc * forget;
                }
            }
            d_hidden = d_gates.slice_axis(ROWS, Slice::from(at..at + streams)).dot(&self.blocks[RECURRENT].t());
        }
        let sum = |d: &Array2<F>| d.sum_axis(Axis(0)).insert_axis(Axis(0));
        vec![
            inputs.t().dot(&d_gates),
            trace.before.t().dot(&d_gates),
            sum(&d_gates),
            trace.seen.t().dot(&d_head),
            sum(&d_head),
            trace.head.t().dot(d_out),
            sum(d_out),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { inputs: 3, hidden: 4, known: 2, head: 5, outputs: 6 };
    const STREAMS: usize = 2;
    const MOMENTS: usize = 7;

    fn random(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
        let mut random = Random::new(seed);
        Array2::from_shape_simple_fn((rows, columns), || random.normal())
    }

    /// A smooth loss of the outputs of a chunk that starts from rest.
    fn loss(net: &Net<f64>, inputs: &Array2<f64>, known: &Array2<f64>, target: &Array2<f64>) -> f64 {
        let trace = net.forward(inputs.view(), known.view(), &mut net.rest(STREAMS));
        (&trace.out - target).mapv(|e| 0.5 * e * e).sum()
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let mut net = Net::<f64>::new(SIZES, 1);
        // Nothing at 0, so that every path counts.
        for (k, block) in net.blocks.iter_mut().enumerate() {
            *block = random(block.nrows(), block.ncols(), 10 + k as u64) * 0.4;
        }
        let rows = STREAMS * MOMENTS;
        let (inputs, known) = (random(rows, SIZES.inputs, 2), random(rows, SIZES.known, 3));
        let target = random(rows, SIZES.outputs, 4);
        let trace = net.forward(inputs.view(), known.view(), &mut net.rest(STREAMS));
        let gradients = net.backward(inputs.view(), &trace, &(&trace.out - &target), STREAMS);
        for (block, gradient) in gradients.iter().enumerate() {
            let (height, width) = net.blocks[block].dim();
            for row in 0..height {
                for column in 0..width {
                    let at = |delta: f64| {
                        let mut moved = net.clone();
                        moved.blocks[block][[row, column]] += delta;
                        loss(&moved, &inputs, &known, &target)
                    };
                    let measured = (at(1e-5) - at(-1e-5)) / 2e-5;
                    let given = gradient[[row, column]];
                    let size = measured.abs().max(given.abs()).max(1e-3);
                    assert!((measured - given).abs() < 1e-5 * size, "{block} {row} {column}: {measured} {given}");
                }
            }
        }
    }

    #[test]
    fn one_step_at_a_time_ends_where_a_chunk_does() {
        let net = Net::<f64>::new(SIZES, 7);
        let (inputs, known) = (random(MOMENTS, SIZES.inputs, 2), random(MOMENTS, SIZES.known, 3));
        let (mut stepped, mut whole) = (net.rest(1), net.rest(1));
        let trace = net.forward(inputs.view(), known.view(), &mut whole);
        for t in 0..MOMENTS {
            net.step(inputs.slice_axis(ROWS, Slice::from(t..t + 1)), &mut stepped);
            let read = net.read(&stepped, known.slice_axis(ROWS, Slice::from(t..t + 1)));
            let apart = (&read - &trace.out.slice_axis(ROWS, Slice::from(t..t + 1))).mapv(f64::abs).sum();
            assert!(apart < 1e-12, "{apart}");
        }
        assert_eq!(stepped, whole);
    }
}

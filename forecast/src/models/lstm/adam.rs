//! Adam with gradients bounded in length.

use ndarray::Array2;

const FIRST_DECAY: f32 = 0.9;
const SECOND_DECAY: f32 = 0.99;
/// Longer gradients are shortened to this.
const LONGEST: f32 = 1.0;

/// Moments of the gradients of all parameter blocks.
#[derive(Debug, Clone)]
pub struct Adam {
    first: Vec<Array2<f32>>,
    second: Vec<Array2<f32>>,
    steps: i32,
}

impl Adam {
    pub fn new(blocks: &[Array2<f32>]) -> Self {
        let zeros = || blocks.iter().map(|b| Array2::zeros(b.dim())).collect();
        Self { first: zeros(), second: zeros(), steps: 0 }
    }

    /// Moves `blocks` against their gradients.
    pub fn step(&mut self, blocks: &mut [Array2<f32>], gradients: &[Array2<f32>], rate: f32) {
        let length = gradients.iter().flatten().map(|g| g * g).sum::<f32>().sqrt();
        if !length.is_finite() {
            return;
        }
        let shorten = if length > LONGEST { LONGEST / length } else { 1.0 };
        self.steps += 1;
        let (first_share, second_share) = (1.0 - FIRST_DECAY.powi(self.steps), 1.0 - SECOND_DECAY.powi(self.steps));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((block, gradient), (first, second)) in blocks.iter_mut().zip(gradients).zip(moments) {
            ndarray::Zip::from(block).and(gradient).and(first).and(second).for_each(|p, &g, m, v| {
                let g = g * shorten;
                *m = FIRST_DECAY * *m + (1.0 - FIRST_DECAY) * g;
                *v = SECOND_DECAY * *v + (1.0 - SECOND_DECAY) * g * g;
                *p -= rate * (*m / first_share) / ((*v / second_share).sqrt() + 1e-7);
            });
        }
    }
}

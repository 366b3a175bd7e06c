//! Weighted ridge regression by the normal equations.

use super::linear::{INPUTS, Inputs};

pub(super) fn dot(a: &Inputs, b: &Inputs) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Weights of the inputs; the constant (last input) is not penalised.
pub(super) fn ridge(x: &[Inputs], y: &[f64], weights: &[f64], penalty: f64) -> Inputs {
    let mut gram = vec![[0.0f64; INPUTS]; INPUTS];
    let mut right = [0.0; INPUTS];
    for ((x, &y), &w) in x.iter().zip(y).zip(weights) {
        for j in 0..INPUTS {
            let scaled = w * x[j];
            if scaled == 0.0 {
                continue;
            }
            right[j] += scaled * y;
            for (g, v) in gram[j][..=j].iter_mut().zip(&x[..=j]) {
                *g += scaled * v;
            }
        }
    }
    let total: f64 = weights.iter().sum();
    for (j, row) in gram.iter_mut().enumerate() {
        row[j] += 1e-9 + if j + 1 < INPUTS { penalty * total } else { 0.0 };
    }
    cholesky_solve(&mut gram, right)
}

/// Solves `gram * b = right` for a positive definite matrix given by its lower half; a vanishing pivot drops the input.
fn cholesky_solve(gram: &mut [Inputs], right: Inputs) -> Inputs {
    for j in 0..INPUTS {
        for k in 0..j {
            let factor = gram[j][k];
            for row in gram.iter_mut().skip(j) {
                row[j] -= row[k] * factor;
            }
        }
        let pivot = gram[j][j];
        let scale = if pivot > 1e-12 { 1.0 / pivot.sqrt() } else { 0.0 };
        for row in gram.iter_mut().skip(j) {
            row[j] *= scale;
        }
    }
    let mut b = right;
    for i in 0..INPUTS {
        for k in 0..i {
            b[i] -= gram[i][k] * b[k];
        }
        b[i] = if gram[i][i] > 0.0 { b[i] / gram[i][i] } else { 0.0 };
    }
    for i in (0..INPUTS).rev() {
        for k in i + 1..INPUTS {
            b[i] -= gram[k][i] * b[k];
        }
        b[i] = if gram[i][i] > 0.0 { b[i] / gram[i][i] } else { 0.0 };
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_made_the_data_are_found() {
        let mut random = crate::random::Random::new(3);
        let mut truth = [0.0; INPUTS];
        truth[4] = 2.0;
        truth[9] = -1.0;
        truth[INPUTS - 1] = 0.5;
        let x: Vec<Inputs> = (0..600)
            .map(|_| {
                let mut x = [0.0; INPUTS];
                x.iter_mut().for_each(|v| *v = random.normal());
                x[INPUTS - 1] = 1.0;
                x
            })
            .collect();
        let y: Vec<f64> = x.iter().map(|x| dot(&truth, x)).collect();
        let found = ridge(&x, &y, &vec![1.0; x.len()], 1e-9);
        for (found, truth) in found.iter().zip(truth) {
            assert!((found - truth).abs() < 1e-4, "{found} for {truth}");
        }
    }

    #[test]
    fn inputs_that_are_all_zero_get_no_weight() {
        let mut x = vec![[0.0; INPUTS]; 10];
        x.iter_mut().for_each(|x| x[INPUTS - 1] = 1.0);
        let found = ridge(&x, &[4.0; 10], &[1.0; 10], 1e-3);
        assert!((found[INPUTS - 1] - 4.0).abs() < 1e-6);
        assert!(found[..INPUTS - 1].iter().all(|&w| w == 0.0));
    }
}

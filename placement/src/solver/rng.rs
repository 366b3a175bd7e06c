//! Chance with a seed (splitmix64), and the logarithms annealing needs.

pub(super) struct Rng(u64);

impl Rng {
    /// A stream of its own for each part of the work.
    pub(super) fn of(seed: u64, part: u64) -> Self {
        let mut rng = Self(seed ^ part.wrapping_mul(0xd134_2543_de82_ef95));
        rng.next();
        rng
    }
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `n` (> 0).
    pub(super) fn below(&mut self, n: u32) -> u32 {
        (((self.next() >> 32) * u64::from(n)) >> 32) as u32
    }
}

/// `-ln` of the middles of 1,024 equal parts of 0..1: how much worse than before, in temperatures, a move may be.
pub(super) struct Patience(Vec<f64>);

impl Patience {
    pub(super) fn new() -> Self {
        Self((0..1024).map(|i| -((f64::from(i) + 0.5) / 1024.0).ln()).collect())
    }
    pub(super) fn draw(&self, rng: &mut Rng, temperature: f64) -> i64 {
        (temperature * self.0[(rng.next() >> 54) as usize]) as i64
    }
}

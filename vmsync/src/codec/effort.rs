//! How hard whole pages are compressed: as well as the link needs and the CPU can afford.
//!
//! ```text
//! coding takes more than half of the time between cuts     ->  faster, at once
//! the link does not keep up, and coding takes under a quarter  ->  smaller, after a few cuts
//! neither                                                  ->  back to the usual level, in a while
//! ```
//! Only whole pages follow the level; patches are always small.

/// zstd's levels in use, fastest first. Higher ones than 3 cost more than any link of a data centre is worth.
const LADDER: [i32; 6] = [-5, -3, -1, 1, 2, 3];
/// Parts of 1,000 of the time between cuts.
const TOO_BUSY: u64 = 500;
const FAR_TOO_BUSY: u64 = 900;
const IDLE_ENOUGH: u64 = 250;
/// Cuts in a row that must agree before compression becomes slower, or goes back to the usual.
const PATIENCE: u32 = 4;
const PATIENCE_BACK: u32 = 32;

/// How the last cut went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Time between two cuts, microseconds.
    pub interval_us: u64,
    /// How long coding the cut took.
    pub coding_us: u64,
    /// A shadow that follows had not taken what was sent to it when the next cut came.
    pub congested: bool,
}

/// Chooses a level from cut to cut.
#[derive(Debug, Clone)]
pub struct Effort {
    usual: usize,
    step: usize,
    /// Cuts in a row that asked for the same change.
    agreed: u32,
    asked: Ask,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Faster,
    Smaller,
    Back,
    Stay,
}

impl Effort {
    /// `usual`: the level while nothing is scarce. The nearest one in use is taken.
    pub fn new(usual: i32) -> Self {
        let usual = LADDER.iter().position(|level| *level >= usual).unwrap_or(LADDER.len() - 1);
        Self { usual, step: usual, agreed: 0, asked: Ask::Stay }
    }

    pub fn level(&self) -> i32 {
        LADDER[self.step]
    }

    /// Takes note of a cut; the level for the next one.
    pub fn after(&mut self, pace: Pace) -> i32 {
        let busy = pace.coding_us.saturating_mul(1000) / pace.interval_us.max(1);
        let ask = if busy > TOO_BUSY {
            Ask::Faster
        } else if pace.congested && busy < IDLE_ENOUGH {
            Ask::Smaller
        } else if !pace.congested && self.step > self.usual || self.step < self.usual && busy < IDLE_ENOUGH {
            Ask::Back
        } else {
            Ask::Stay
        };
        self.agreed = if ask == self.asked { self.agreed.saturating_add(1) } else { 1 };
        self.asked = ask;
        let due = match ask {
            Ask::Faster => true,
            Ask::Smaller => self.agreed >= PATIENCE,
            Ask::Back => self.agreed >= PATIENCE_BACK,
            Ask::Stay => false,
        };
        if due {
            self.agreed = 0;
            self.step = match ask {
                Ask::Faster if busy > FAR_TOO_BUSY => self.step.saturating_sub(2),
                Ask::Faster => self.step.saturating_sub(1),
                Ask::Smaller => (self.step + 1).min(LADDER.len() - 1),
                Ask::Back if self.step > self.usual => self.step - 1,
                Ask::Back => self.step + 1,
                Ask::Stay => self.step,
            };
        }
        self.level()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(effort: &mut Effort, cuts: u32, coding_us: u64, congested: bool) -> i32 {
        (0..cuts).map(|_| effort.after(Pace { interval_us: 50_000, coding_us, congested })).last().unwrap_or_default()
    }

    #[test]
    fn a_busy_cpu_makes_it_faster_at_once_and_an_idle_one_slowly_usual_again() {
        let mut effort = Effort::new(1);
        assert_eq!(run(&mut effort, 100, 10_000, false), 1);
        assert_eq!(run(&mut effort, 1, 30_000, false), -1);
        assert_eq!(run(&mut effort, 1, 49_000, true), -5);
        assert_eq!(run(&mut effort, 10, 100_000, true), -5);
        assert_eq!(run(&mut effort, 40, 20_000, false), -5, "neither busy nor idle");
        assert_eq!(run(&mut effort, 40, 5_000, false), -3);
        assert_eq!(run(&mut effort, 1000, 5_000, false), 1);
    }

    #[test]
    fn a_slow_link_makes_it_smaller_if_the_cpu_has_time() {
        let mut effort = Effort::new(1);
        assert_eq!(run(&mut effort, 3, 5_000, true), 1);
        assert_eq!(run(&mut effort, 1, 5_000, true), 2);
        assert_eq!(run(&mut effort, 100, 5_000, true), 3);
        assert_eq!(run(&mut effort, 100, 20_000, true), 3, "no time for more, none too little");
        assert_eq!(run(&mut effort, 100, 5_000, false), 1);
    }

    #[test]
    fn levels_that_are_not_in_use_become_the_next() {
        assert_eq!([-7, 0, 1, 19].map(|usual| Effort::new(usual).level()), [-5, 1, 1, 3]);
        assert_eq!(run(&mut Effort::new(1), 1, u64::MAX, true), -3);
        assert_eq!(Effort::new(1).after(Pace { interval_us: 0, coding_us: 0, congested: false }), 1);
    }
}

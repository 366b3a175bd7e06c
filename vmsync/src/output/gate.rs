//! The frames: which epoch each belongs to, and when it leaves.

use std::collections::VecDeque;
use std::time::Duration;

use super::Mark;

/// The bounds of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateLimits {
    /// Held frames and bytes, of all NICs together. At the limit further frames are dropped.
    pub frames: usize,
    pub bytes: usize,
    /// No frame is held longer: then the gate opens. `None`: consistency goes first, frames wait.
    pub age: Option<Duration>,
}

impl Default for GateLimits {
    fn default() -> Self {
        Self { frames: 65_536, bytes: 64 << 20, age: Some(Duration::from_millis(160)) }
    }
}

/// What becomes of a frame that has just arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Fate<F> {
    /// It may leave now.
    Leaves(F),
    /// It waits. `first_since`: it is the first since that mark; a cut would serve it.
    Waits { first_since: Option<Mark> },
    /// A limit is reached; the network lost it.
    Dropped,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GateStats {
    pub held_frames: usize,
    pub held_bytes: usize,
    /// Frames that left after they had waited; dropped ones; those that left because the gate opened by itself.
    pub released_total: u64,
    pub dropped_total: u64,
    pub leaked_total: u64,
}

#[derive(Debug)]
struct Held<F> {
    frame: F,
    bytes: usize,
    arrived: Duration,
    /// The last mark before it.
    after: Mark,
}

#[derive(Debug)]
struct Lane<F> {
    held: VecDeque<Held<F>>,
    mark: Mark,
    /// A frame has come since the mark.
    stirred: bool,
}

/// The gate of one guest: a lane for each NIC. `now` is the time since some moment of the driver's choice.
#[derive(Debug)]
pub struct Gate<F> {
    lanes: Vec<Lane<F>>,
    limits: GateLimits,
    holding: bool,
    /// All frames before this mark may leave.
    released: Mark,
    stats: GateStats,
}

impl<F> Gate<F> {
    /// Open.
    pub fn new(lanes: usize, limits: GateLimits) -> Self {
        let lane = |_| Lane { held: VecDeque::new(), mark: Mark::default(), stirred: false };
        Self {
            lanes: (0..lanes).map(lane).collect(),
            limits,
            holding: false,
            released: Mark::default(),
            stats: GateStats::default(),
        }
    }

    pub fn set_limits(&mut self, limits: GateLimits) {
        self.limits = limits;
    }

    pub fn is_holding(&self) -> bool {
        self.holding
    }

    pub fn stats(&self) -> GateStats {
        self.stats
    }

    /// From now on frames wait for their epoch.
    pub fn hold(&mut self) {
        self.holding = true;
        // The first frame of what is held tells that it waits, whatever passed since the last mark.
        self.lanes.iter_mut().for_each(|lane| lane.stirred = false);
    }

    /// A frame of `bytes` arrived on a lane. Frames of no lane leave.
    pub fn frame(&mut self, now: Duration, lane: usize, frame: F, bytes: usize) -> Fate<F> {
        let Some(lane) = self.lanes.get_mut(lane) else { return Fate::Leaves(frame) };
        // Its epoch was released before it was read here: those before it have left as well.
        if !self.holding || lane.mark < self.released {
            return Fate::Leaves(frame);
        }
        if self.stats.held_frames >= self.limits.frames || self.stats.held_bytes + bytes > self.limits.bytes {
            self.stats.dropped_total += 1;
            return Fate::Dropped;
        }
        self.stats.held_frames += 1;
        self.stats.held_bytes += bytes;
        lane.held.push_back(Held { frame, bytes, arrived: now, after: lane.mark });
        let first = !std::mem::replace(&mut lane.stirred, true);
        Fate::Waits { first_since: first.then_some(lane.mark) }
    }

    /// A mark arrived on a lane. One that does not grow says nothing.
    pub fn mark(&mut self, lane: usize, mark: Mark) {
        if let Some(lane) = self.lanes.get_mut(lane).filter(|lane| lane.mark < mark) {
            lane.mark = mark;
            lane.stirred = false;
        }
    }

    /// What is before the mark may leave; `out` takes the lane, the frame and how long it waited.
    pub fn release(&mut self, now: Duration, mark: Mark, mut out: impl FnMut(usize, F, Duration)) {
        self.released = self.released.max(mark);
        let released = self.released;
        for (number, lane) in self.lanes.iter_mut().enumerate() {
            while lane.held.front().is_some_and(|held| held.after < released)
                && let Some(held) = lane.held.pop_front()
            {
                self.stats.held_frames -= 1;
                self.stats.held_bytes -= held.bytes;
                self.stats.released_total += 1;
                out(number, held.frame, now.saturating_sub(held.arrived));
            }
        }
    }

    /// Everything may leave, and whatever comes.
    pub fn open(&mut self, mut out: impl FnMut(usize, F)) {
        self.holding = false;
        for (number, lane) in self.lanes.iter_mut().enumerate() {
            for held in lane.held.drain(..) {
                self.stats.leaked_total += 1;
                out(number, held.frame);
            }
        }
        (self.stats.held_frames, self.stats.held_bytes) = (0, 0);
    }

    /// When the gate opens by itself unless something is released until then.
    pub fn opens_at(&self) -> Option<Duration> {
        let oldest = self.lanes.iter().filter_map(|lane| lane.held.front()).map(|held| held.arrived).min()?;
        oldest.checked_add(self.limits.age?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn released(gate: &mut Gate<u32>, now: Duration, mark: u32) -> Vec<u32> {
        let mut out = Vec::new();
        gate.release(now, Mark::new(mark), |_, frame, _| out.push(frame));
        out
    }

    #[test]
    fn frames_before_the_mark_leave_with_it_and_those_behind_wait() {
        let mut gate = Gate::new(1, GateLimits::default());
        assert_eq!(gate.frame(ms(0), 0, 1, 60), Fate::Leaves(1));
        gate.hold();
        assert_eq!(gate.frame(ms(1), 0, 2, 60), Fate::Waits { first_since: Some(Mark::new(0)) });
        assert_eq!(gate.frame(ms(1), 0, 3, 60), Fate::Waits { first_since: None });
        gate.mark(0, Mark::new(1));
        assert_eq!(gate.frame(ms(2), 0, 4, 60), Fate::Waits { first_since: Some(Mark::new(1)) });
        assert_eq!(released(&mut gate, ms(3), 1), [2, 3]);
        assert_eq!(released(&mut gate, ms(3), 1), [] as [u32; 0]);
        gate.mark(0, Mark::new(2));
        gate.mark(0, Mark::new(3));
        assert_eq!(released(&mut gate, ms(3), 3), [4]);
        assert_eq!(gate.stats(), GateStats { released_total: 3, ..GateStats::default() });
    }

    #[test]
    fn a_frame_that_is_read_after_its_release_leaves_at_once() {
        let mut gate = Gate::new(1, GateLimits::default());
        gate.hold();
        assert!(released(&mut gate, ms(1), 1).is_empty());
        assert_eq!(gate.frame(ms(1), 0, 7, 60), Fate::Leaves(7));
        gate.mark(0, Mark::new(1));
        assert!(matches!(gate.frame(ms(1), 0, 8, 60), Fate::Waits { .. }));
    }

    #[test]
    fn a_lane_that_begins_later_is_held_from_its_first_frame() {
        let mut gate = Gate::new(2, GateLimits::default());
        gate.hold();
        gate.mark(0, Mark::new(7));
        assert!(released(&mut gate, ms(1), 7).is_empty());
        gate.mark(1, Mark::new(8));
        assert!(matches!(gate.frame(ms(2), 1, 1, 60), Fate::Waits { .. }));
        assert!(released(&mut gate, ms(3), 8).is_empty());
        gate.mark(1, Mark::new(9));
        assert_eq!(released(&mut gate, ms(4), 9), [1]);
    }

    #[test]
    fn each_limit_has_its_answer() {
        let limits = GateLimits { frames: 2, bytes: 100, age: Some(ms(200)) };
        let mut gate = Gate::new(2, limits);
        gate.hold();
        assert_eq!(gate.opens_at(), None);
        assert!(matches!(gate.frame(ms(5), 0, 1, 60), Fate::Waits { .. }));
        assert_eq!(gate.frame(ms(6), 1, 2, 60), Fate::Dropped);
        assert!(matches!(gate.frame(ms(7), 1, 3, 40), Fate::Waits { .. }));
        assert_eq!(gate.frame(ms(8), 1, 4, 0), Fate::Dropped);
        assert_eq!(gate.opens_at(), Some(ms(205)));
        gate.set_limits(GateLimits { age: None, ..limits });
        assert_eq!(gate.opens_at(), None);
        let mut out = Vec::new();
        gate.open(|lane, frame| out.push((lane, frame)));
        assert_eq!(out, [(0, 1), (1, 3)]);
        assert_eq!(gate.frame(ms(9), 1, 5, 1 << 20), Fate::Leaves(5));
        assert_eq!(gate.stats(), GateStats { dropped_total: 2, leaked_total: 2, ..GateStats::default() });
    }
}

//! What was told stays true: guests that send, cuts that fail, shadows that come, go and lag, and a power cut at any
//! moment, against a small model. After the power cut the shadow with the newest commit goes on; every frame that
//! left must be from before its epoch, unless the operator was told that output leaves without that.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use vmsync::output::{Cause, Committer, Effect, Fate, Gate, GateLimits, Mark, Mode, OnLoss, PeerPart, Policy, Quorum};
use vmsync::{Epoch, PeerId};

#[derive(Debug, Clone)]
enum Step {
    Sends {
        lane: usize,
    },
    Cuts {
        fails: bool,
    },
    Commits {
        peer: usize,
    },
    Away {
        peer: usize,
    },
    Back {
        peer: usize,
    },
    /// What the gate has to do arrives there, so many orders of it.
    Delivered {
        orders: usize,
    },
    Time {
        ms: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..2usize).prop_map(|lane| Step::Sends { lane }),
        4 => prop::bool::weighted(0.2).prop_map(|fails| Step::Cuts { fails }),
        6 => (0..3usize).prop_map(|peer| Step::Commits { peer }),
        1 => (0..3usize).prop_map(|peer| Step::Away { peer }),
        2 => (0..3usize).prop_map(|peer| Step::Back { peer }),
        6 => (1..4usize).prop_map(|orders| Step::Delivered { orders }),
        1 => (1..300u64).prop_map(|ms| Step::Time { ms }),
    ]
}

/// A frame: its number within its lane, and the number of the cut it came after.
type Frame = (u64, u64);

struct Model {
    gate: Gate<Frame>,
    committer: Committer,
    now: Duration,
    peers: Vec<PeerPart>,
    /// Newest epoch that is under way to a shadow.
    newest: u64,
    orders: Vec<Effect>,
    /// The gate opened or was opened: what leaves now may be undone.
    told_open: bool,
    sent: [u64; 2],
    left: [u64; 2],
    cuts: u64,
    /// Epoch of each cut that did not fail.
    epochs: BTreeMap<u64, u64>,
    quorum: usize,
}

impl Model {
    fn new(peers: usize, quorum: Quorum, on_loss: OnLoss) -> Self {
        let age = (on_loss == OnLoss::Availability).then(|| Duration::from_millis(200));
        let part = |n: usize| PeerPart {
            peer: PeerId::new(&n.to_string()),
            following: true,
            connected: true,
            committed: Some(Epoch::new(1)),
        };
        Self {
            gate: Gate::new(2, GateLimits { frames: 40, bytes: 4_000, age }),
            committer: Committer::new(Policy { quorum, on_loss }, false),
            now: Duration::ZERO,
            peers: (0..peers).map(part).collect(),
            newest: 1,
            orders: Vec::new(),
            told_open: true,
            sent: [0; 2],
            left: [0; 2],
            cuts: 0,
            epochs: BTreeMap::new(),
            quorum: quorum.needs(peers),
        }
    }

    fn look(&mut self) {
        self.committer.peers(self.now, &self.peers, &mut self.orders);
        if self.committer.mode() != &Mode::Holding {
            self.told_open = true;
        }
    }

    /// So many shadows as the quorum has, the newest first: the epoch that any of them goes on from at least.
    fn safe_epoch(&self) -> u64 {
        let mut committed: Vec<u64> = self.peers.iter().map(|p| p.committed.map_or(0, Epoch::get)).collect();
        committed.sort_unstable_by(|a, b| b.cmp(a));
        committed.get(self.quorum - 1).copied().unwrap_or(0)
    }

    fn leaves(&mut self, lane: usize, (number, after_cut): Frame, strict: bool) {
        assert!(number >= self.left[lane], "lane {lane}: {number} after {}", self.left[lane]);
        self.left[lane] = number + 1;
        if strict {
            // The first cut behind it that became an epoch.
            let epoch = self.epochs.range(after_cut + 1..).next().map_or(u64::MAX, |(_, epoch)| *epoch);
            assert!(epoch <= self.safe_epoch(), "a frame of epoch {epoch} left; safe is {}", self.safe_epoch());
        }
    }

    fn strict(&self) -> bool {
        self.gate.is_holding() && !self.told_open
    }

    fn step(&mut self, step: &Step, available: bool) {
        match *step {
            Step::Sends { lane } => {
                let frame = (self.sent[lane], self.cuts);
                self.sent[lane] += 1;
                let strict = self.strict();
                match self.gate.frame(self.now, lane, frame, 100) {
                    Fate::Leaves(frame) => self.leaves(lane, frame, strict),
                    Fate::Waits { first_since: Some(mark) } => self.committer.waits(mark),
                    Fate::Waits { first_since: None } | Fate::Dropped => {}
                }
            }
            Step::Cuts { fails } => {
                self.cuts += 1;
                (0..2).for_each(|lane| self.gate.mark(lane, Mark::new(self.cuts as u32)));
                if !fails {
                    self.newest += 1;
                    self.epochs.insert(self.cuts, self.newest);
                    self.committer.cut(Epoch::new(self.newest), Mark::new(self.cuts as u32));
                }
            }
            Step::Commits { peer } => {
                let newest = self.newest;
                if let Some(peer) = self.peers.get_mut(peer).filter(|peer| peer.following) {
                    let next = peer.committed.map_or(0, Epoch::get) + 1;
                    peer.committed = Some(Epoch::new(next.min(newest)));
                }
                self.look();
            }
            Step::Away { peer } => {
                if let Some(peer) = self.peers.get_mut(peer) {
                    (peer.following, peer.connected) = (false, false);
                }
                self.look();
            }
            Step::Back { peer } => {
                if let Some(peer) = self.peers.get_mut(peer) {
                    (peer.following, peer.connected) = (true, true);
                }
                self.look();
            }
            Step::Time { ms } => {
                self.now += Duration::from_millis(ms);
                if self.gate.opens_at().is_some_and(|at| at <= self.now) {
                    assert!(available, "with consistency first no frame is too old");
                    self.open();
                    self.committer.gate_opened(self.now, Cause::TooOld, &mut self.orders);
                }
                self.look();
            }
            Step::Delivered { orders } => {
                for _ in 0..orders.min(self.orders.len()) {
                    match self.orders.remove(0) {
                        Effect::Hold => {
                            self.gate.hold();
                            self.told_open = self.committer.mode() != &Mode::Holding;
                        }
                        Effect::Open => self.open(),
                        Effect::Release(mark) => {
                            let strict = self.strict();
                            let mut out = Vec::new();
                            self.gate.release(self.now, mark, |lane, frame, _| out.push((lane, frame)));
                            out.into_iter().for_each(|(lane, frame)| self.leaves(lane, frame, strict));
                        }
                        Effect::Opened(_) | Effect::Closed => {}
                        // With less than the quorum, what leaves may be undone; this was told.
                        Effect::Quorum { following, needed } => self.told_open |= available && following < needed,
                    }
                }
            }
        }
    }

    fn open(&mut self) {
        self.told_open = true;
        let mut out = Vec::new();
        self.gate.open(|lane, frame| out.push((lane, frame)));
        out.into_iter().for_each(|(lane, frame)| self.leaves(lane, frame, false));
    }
}

fn quorum() -> impl Strategy<Value = Quorum> {
    prop_oneof![Just(Quorum::Any), Just(Quorum::All), (1..4u32).prop_map(Quorum::Count)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn what_was_told_stays_true(
        peers in 1..4usize,
        quorum in quorum(),
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let mut model = Model::new(peers, quorum, OnLoss::Consistency);
        model.look();
        for step in &steps {
            model.step(step, false);
            // Open only until the quorum is there for the first time.
            prop_assert!(model.quorum > peers || model.committer.mode() == &Mode::Holding);
            let stats = model.gate.stats();
            prop_assert!(stats.held_frames <= 40 && stats.held_bytes <= 4_000);
        }
    }

    #[test]
    fn with_availability_first_it_stays_true_until_the_operator_is_told_otherwise(
        peers in 1..4usize,
        quorum in quorum(),
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let mut model = Model::new(peers, quorum, OnLoss::Availability);
        model.quorum = model.quorum.min(peers);
        model.look();
        for step in &steps {
            model.step(step, true);
            // Nothing is held for longer than the limit, whatever happens to the shadows.
            if let (Step::Time { .. }, Some(at)) = (step, model.gate.opens_at()) {
                prop_assert!(at > model.now);
            }
        }
    }
}

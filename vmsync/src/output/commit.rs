//! Which epochs' output may leave, and what to do when the quorum is lost.
//!
//! ```text
//!            the quorum follows, and has what was cut meanwhile
//!   Open --------------------------------------------------------> Holding
//!     ^                                                              |
//!     +---- availability: nobody follows, or a frame grew too old ---+
//! ```
//! With availability first, a quorum that cannot be had in full is had from those who follow, loudly; with
//! consistency first, output waits for all of it. After the gate has opened because frames grew too old, it is tried
//! again after a while that doubles each time.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Mark, OnLoss, Quorum};
use crate::units::{Epoch, PeerId};

/// Cuts whose output waits; beyond, the oldest are forgotten, as a later one releases theirs too.
const MAX_CUTS: usize = 1024;
/// Until the gate is closed again after frames grew too old.
const CALM: Duration = Duration::from_secs(1);
const CALM_MAX: Duration = Duration::from_secs(30);
/// Shadows that are all away for so long are lost. Less is a connection that is made anew.
const LOST_AFTER: Duration = Duration::from_millis(100);
/// After so long without trouble the next one counts as the first.
const FORGIVEN_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    pub quorum: Quorum,
    pub on_loss: OnLoss,
}

/// A wanted shadow, as far as this is about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerPart {
    pub peer: PeerId,
    /// Gets each epoch.
    pub following: bool,
    /// There is a connection to its host.
    pub connected: bool,
    /// Newest epoch it has committed.
    pub committed: Option<Epoch>,
}

/// Why the gate is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The guest is not protected yet, or not again.
    NotProtected,
    /// No shadow follows any more.
    ShadowsLost,
    /// Frames waited longer than they may: the shadows, the network or this host are too slow.
    TooOld,
    /// The gate heard nothing of its driver for too long.
    Unheard,
}

impl Cause {
    /// The gate opened by itself: it is closed again only after a while, and when commits come.
    fn is_slowness(&self) -> bool {
        matches!(self, Self::TooOld | Self::Unheard)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    Open(Cause),
    Holding,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Tell the gate to hold.
    Hold,
    /// Tell it to let everything go.
    Open,
    Release(Mark),
    /// Tell the operator: output leaves from now on though a failover could undo it.
    Opened(Cause),
    /// Tell the operator: it waits again.
    Closed,
    /// So many shadows of those needed follow; all of the needed ones, if equal. With availability first, output leaves
    /// with what there is.
    Quorum {
        following: usize,
        needed: usize,
    },
}

/// Decides for one guest. `now` is the time since some moment of the driver's choice.
#[derive(Debug)]
pub struct Committer {
    policy: Policy,
    mode: Mode,
    /// Cuts whose output waits, oldest first.
    cuts: VecDeque<(Epoch, Mark)>,
    last_mark: Mark,
    waits_since: Option<Mark>,
    released: Mark,
    /// Number of shadows and of those needed when that was last told as too few.
    short: Option<(usize, usize)>,
    /// Newest epoch when the gate opened: later ones show that commits come again.
    opened_after: Epoch,
    newest: Epoch,
    close_at: Duration,
    calm: Duration,
    opened_at: Option<Duration>,
    /// Since when no shadow is connected.
    alone_since: Option<Duration>,
}

impl Committer {
    /// `holding`: an earlier agent left the gate so, and consistency goes first.
    pub fn new(policy: Policy, holding: bool) -> Self {
        let mode = if holding { Mode::Holding } else { Mode::Open(Cause::NotProtected) };
        Self {
            policy,
            mode,
            cuts: VecDeque::new(),
            last_mark: Mark::default(),
            waits_since: None,
            released: Mark::default(),
            short: None,
            opened_after: Epoch::NONE,
            newest: Epoch::NONE,
            close_at: Duration::ZERO,
            calm: CALM,
            opened_at: None,
            alone_since: None,
        }
    }

    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    pub fn mode(&self) -> &Mode {
        &self.mode
    }

    /// A cut brought an epoch, and all output before `mark` is from before it.
    pub fn cut(&mut self, epoch: Epoch, mark: Mark) {
        self.newest = epoch;
        self.last_mark = self.last_mark.max(mark);
        if self.cuts.len() >= MAX_CUTS {
            self.cuts.pop_front();
        }
        self.cuts.push_back((epoch, mark));
    }

    /// The gate says that output waits that came after that mark.
    pub fn waits(&mut self, since: Mark) {
        self.waits_since = Some(since);
    }

    /// Whether a cut now would serve output.
    pub fn wants_cut(&self) -> bool {
        self.mode == Mode::Holding && self.waits_since.is_some_and(|since| since >= self.last_mark)
    }

    /// Cuts whose output still waits for its commit.
    pub fn uncommitted(&self) -> usize {
        self.cuts.len()
    }

    /// The guest is captured anew: epochs that were cut will not be committed as they were, their frames go with later
    /// ones.
    pub fn attached_anew(&mut self) {
        self.cuts.clear();
    }

    /// The gate opened by itself.
    pub fn gate_opened(&mut self, now: Duration, cause: Cause, effects: &mut Vec<Effect>) {
        self.open(now, cause, effects);
    }

    /// The gate is another one now, and open.
    pub fn gate_replaced(&mut self, effects: &mut Vec<Effect>) {
        (self.last_mark, self.released, self.waits_since) = (Mark::default(), Mark::default(), None);
        self.cuts.clear();
        if self.mode == Mode::Holding {
            effects.push(Effect::Hold);
        }
    }

    fn open(&mut self, now: Duration, cause: Cause, effects: &mut Vec<Effect>) {
        if self.mode != Mode::Holding {
            return;
        }
        if cause.is_slowness() {
            let forgiven = self.opened_at.is_none_or(|at| now > at + self.calm + FORGIVEN_AFTER);
            self.calm = if forgiven { CALM } else { (self.calm * 2).min(CALM_MAX) };
            self.close_at = now + self.calm;
            self.opened_at = Some(now);
        }
        self.mode = Mode::Open(cause.clone());
        self.opened_after = self.newest;
        self.waits_since = None;
        self.cuts.clear();
        effects.extend([Effect::Open, Effect::Opened(cause)]);
    }

    /// Looks at the wanted shadows, whenever something may have changed.
    pub fn peers(&mut self, now: Duration, peers: &[PeerPart], effects: &mut Vec<Effect>) {
        let holds_copy = |peer: &&PeerPart| peer.committed.is_some();
        let following = peers.iter().filter(holds_copy).filter(|peer| peer.following).count();
        let needed = self.policy.quorum.needs(peers.len());
        let available = self.policy.on_loss == OnLoss::Availability;
        if peers.iter().filter(holds_copy).any(|peer| peer.connected) {
            self.alone_since = None;
        } else {
            let since = *self.alone_since.get_or_insert(now);
            if available && now >= since + LOST_AFTER {
                self.open(now, Cause::ShadowsLost, effects);
            }
        }
        let needs = if available { needed.min(following.max(1)) } else { needed };
        let mut closed = false;
        let committed = |epoch: Epoch| peers.iter().filter(|peer| peer.committed >= Some(epoch)).count();
        if let Mode::Open(cause) = &self.mode {
            // What was cut since the gate opened has its commits: they come as they should.
            let level = self.newest > self.opened_after || !cause.is_slowness();
            let level = level && self.cuts.back().is_none_or(|(epoch, _)| committed(*epoch) >= needs);
            if following < needs || now < self.close_at || !level {
                // Nothing waits: only the newest cut is of interest.
                self.cuts.drain(..self.cuts.len().saturating_sub(1));
                return;
            }
            self.cuts.clear();
            self.mode = Mode::Holding;
            closed = true;
            effects.extend([Effect::Hold, Effect::Closed]);
        }
        // With none left it opens in a moment, and says that.
        if following > 0 || !available {
            self.tell_quorum(following, needed, closed, effects);
        }
        let mut release = None;
        while let Some((epoch, mark)) = self.cuts.front().copied()
            && committed(epoch) >= needs
        {
            release = Some(mark);
            self.cuts.pop_front();
        }
        if let Some(mark) = release.filter(|mark| *mark > self.released) {
            self.released = mark;
            effects.push(Effect::Release(mark));
        }
    }

    /// `closed`: the operator has just been told that output waits; that it waits for less than the quorum, if so, was told
    /// before the gate opened, and is told again.
    fn tell_quorum(&mut self, following: usize, needed: usize, closed: bool, effects: &mut Vec<Effect>) {
        let short = (following < needed).then_some((following, needed));
        if short != self.short || closed && short.is_some() {
            effects.push(Effect::Quorum { following: following.min(needed), needed });
        }
        self.short = short;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, committed: u64) -> PeerPart {
        PeerPart { peer: name.into(), following: true, connected: true, committed: Some(Epoch::new(committed)) }
    }

    fn away(name: &str, committed: u64) -> PeerPart {
        PeerPart { following: false, connected: false, ..peer(name, committed) }
    }

    struct Case {
        committer: Committer,
        now_ms: u64,
    }

    impl Case {
        fn new(quorum: Quorum, on_loss: OnLoss) -> Self {
            Self { committer: Committer::new(Policy { quorum, on_loss }, false), now_ms: 0 }
        }
        fn cut(&mut self, number: u64) {
            self.committer.cut(Epoch::new(number), Mark::new(number as u32));
        }
        fn look(&mut self, after_ms: u64, peers: &[PeerPart]) -> Vec<Effect> {
            self.now_ms += after_ms;
            let mut effects = Vec::new();
            self.committer.peers(Duration::from_millis(self.now_ms), peers, &mut effects);
            effects
        }
    }

    #[test]
    fn it_closes_when_the_quorum_follows_and_releases_what_the_quorum_has() {
        let mut case = Case::new(Quorum::All, OnLoss::Availability);
        let mut strict = Case::new(Quorum::All, OnLoss::Consistency);
        assert_eq!(strict.look(0, &[peer("a", 1), away("b", 1)]), []);
        assert_eq!(strict.look(0, &[peer("a", 1), peer("b", 1)]), [Effect::Hold, Effect::Closed]);
        assert_eq!(case.look(0, &[away("a", 1), away("b", 1)]), []);
        assert_eq!(case.look(1, &[peer("a", 1), peer("b", 1)]), [Effect::Hold, Effect::Closed]);
        (2..5).for_each(|epoch| case.cut(epoch));
        assert_eq!(case.look(1, &[peer("a", 4), peer("b", 1)]), []);
        assert_eq!(case.look(1, &[peer("a", 4), peer("b", 3)]), [Effect::Release(Mark::new(3))]);
        assert_eq!(case.look(1, &[peer("a", 4), peer("b", 3)]), []);
        assert_eq!(case.committer.uncommitted(), 1);
        let less = Effect::Quorum { following: 1, needed: 2 };
        assert_eq!(case.look(1, &[peer("a", 4), away("b", 3)]), [less, Effect::Release(Mark::new(4))]);
        assert_eq!(case.look(1, &[peer("a", 4), peer("b", 4)]), [Effect::Quorum { following: 2, needed: 2 }]);
    }

    #[test]
    fn with_all_shadows_lost_it_opens_or_waits_as_was_asked() {
        let mut case = Case::new(Quorum::Any, OnLoss::Availability);
        case.look(0, &[peer("a", 1)]);
        case.cut(2);
        assert_eq!(case.look(1, &[away("a", 1)]), []);
        let opened = [Effect::Open, Effect::Opened(Cause::ShadowsLost)];
        assert_eq!(case.look(100, &[away("a", 1)]), opened);
        assert_eq!(case.look(1, &[peer("a", 1)]), [Effect::Hold, Effect::Closed]);
        let mut case = Case::new(Quorum::Any, OnLoss::Consistency);
        case.look(0, &[peer("a", 1)]);
        case.cut(2);
        assert_eq!(case.look(5_000, &[away("a", 1)]), [Effect::Quorum { following: 0, needed: 1 }]);
        let back = [Effect::Quorum { following: 1, needed: 1 }, Effect::Release(Mark::new(2))];
        assert_eq!(case.look(1, &[peer("a", 2)]), back);
    }

    #[test]
    fn after_frames_grew_too_old_it_is_tried_again_later_each_time() {
        let mut case = Case::new(Quorum::Any, OnLoss::Availability);
        case.look(0, &[peer("a", 1)]);
        let mut waited = Vec::new();
        for round in 0..7 {
            let mut effects = Vec::new();
            let cause = if round % 2 == 0 { Cause::TooOld } else { Cause::Unheard };
            case.committer.gate_opened(Duration::from_millis(case.now_ms), cause.clone(), &mut effects);
            assert_eq!(effects, [Effect::Open, Effect::Opened(cause)]);
            let opened_ms = case.now_ms;
            case.cut(10 + round);
            // As long as what was cut meanwhile is not committed, it stays open.
            assert_eq!(case.look(40_000, &[peer("a", 9 + round)]), []);
            case.now_ms = opened_ms;
            while case.look(100, &[peer("a", 10 + round)]).is_empty() {}
            waited.push(case.now_ms - opened_ms);
        }
        assert_eq!(waited, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
    }

    #[test]
    fn a_quorum_that_is_short_is_told_again_when_it_closes() {
        let mut case = Case::new(Quorum::All, OnLoss::Availability);
        let short = Effect::Quorum { following: 1, needed: 2 };
        assert_eq!(case.look(0, &[peer("a", 1), peer("b", 1)]), [Effect::Hold, Effect::Closed]);
        assert_eq!(case.look(1, &[away("a", 1), peer("b", 1)]), std::slice::from_ref(&short));
        case.committer.gate_opened(Duration::from_millis(2), Cause::TooOld, &mut Vec::new());
        case.cut(2);
        assert_eq!(case.look(999, &[peer("a", 1), peer("b", 2)]), []);
        assert_eq!(case.look(10, &[away("a", 1), peer("b", 2)]), [Effect::Hold, Effect::Closed, short]);
    }

    #[test]
    fn output_asks_for_one_cut() {
        let mut case = Case::new(Quorum::Any, OnLoss::Availability);
        case.committer.waits(Mark::new(0));
        assert!(!case.committer.wants_cut());
        case.look(0, &[peer("a", 1)]);
        assert!(case.committer.wants_cut());
        case.cut(2);
        assert!(!case.committer.wants_cut());
        case.committer.waits(Mark::new(2));
        assert!(case.committer.wants_cut());
    }
}

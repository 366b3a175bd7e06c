//! Frames on their way to the guest: what a shadow keeps of them is modelled beside it, and what a promoted one hands out
//! is compared with the model.

use vmsync::inbound::{MAX_FRAME_BYTES, MAX_SENT_BYTES};
use vmsync::message::SourceBody;
use vmsync::source::SourceEvent;
use vmsync::target::{Promotion, TargetEvent};
use vmsync::units::{Epoch, Term};

use super::{Ev, Rng, World};

/// A frame's lineage and number.
type Frame = (u64, u64);

/// How often frames come. With a source of chance of its own: worlds without frames are what they always were.
pub struct Traffic {
    rng: Rng,
    /// At one moment; 0: never any.
    most: u64,
    every_ms: u64,
}

impl Traffic {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(!seed);
        let most = [0, 2, 8, 40][rng.below(4) as usize];
        let every_ms = [4, 10, 30][rng.below(3) as usize];
        Self { rng, most, every_ms }
    }

    pub fn none() -> Self {
        Self { most: 0, ..Self::new(0) }
    }

    fn len(&mut self) -> u64 {
        let most = MAX_FRAME_BYTES as u64;
        match self.rng.below(100) {
            0 => self.rng.between(most + 1, 70_000),
            1 => most,
            2..10 => self.rng.between(70, most),
            _ => self.rng.between(16, 70),
        }
    }
}

/// What one shadow has of the newest stream that it accepted.
#[derive(Default)]
pub struct Heard {
    /// Connection that greets just now.
    greets: Option<u64>,
    stream: Option<u64>,
    /// What comes is of that stream still.
    open: bool,
    /// Since the last commit was made up, lost or doubted.
    frames: Vec<Frame>,
    /// The newest order to promote names an epoch: if it is carried out, none of them are due.
    names_an_epoch: bool,
}

impl Heard {
    pub fn nothing(&mut self) {
        self.frames.clear();
    }

    pub fn ordered(&mut self, back_to: Option<Epoch>) {
        self.names_an_epoch = back_to.is_some();
    }

    pub fn ended(&mut self, link: u64) {
        self.open &= self.stream != Some(link);
        self.greets = self.greets.filter(|greets| *greets != link);
    }
}

fn bytes((lineage, number): Frame, len: u64) -> Vec<u8> {
    let mut frame = vec![number as u8; len as usize];
    frame[..8].copy_from_slice(&lineage.to_le_bytes());
    frame[8..16].copy_from_slice(&number.to_le_bytes());
    frame
}

fn parse(frame: &[u8]) -> Frame {
    let number = |at: usize| u64::from_le_bytes(frame[at..at + 8].try_into().unwrap());
    let found = (number(0), number(8));
    assert_eq!(frame, bytes(found, frame.len() as u64), "a frame that nobody sent");
    found
}

impl World {
    pub fn frames_come(&mut self, primary: usize) {
        if !self.primaries[primary].alive || self.traffic.most == 0 {
            return;
        }
        self.tell_frames(primary);
        let after = self.traffic.rng.between(1, self.traffic.every_ms);
        self.at(after, Ev::FramesCome { primary });
    }

    /// Between a cut's plan and the cut itself, some times.
    pub fn frames_come_meanwhile(&mut self, primary: usize) {
        if self.traffic.most > 0 && self.traffic.rng.chance(300) {
            self.tell_frames(primary);
        }
    }

    fn tell_frames(&mut self, primary: usize) {
        let rare = self.traffic.rng.chance(5);
        let count = if rare { 400 } else { self.traffic.rng.between(1, self.traffic.most) };
        let (p, traffic) = (&mut self.primaries[primary], &mut self.traffic);
        let frames = (1..=count).map(|nth| bytes((p.lineage, p.frames + nth), traffic.len())).collect();
        p.frames += count;
        self.source_event(primary, SourceEvent::Inbound { frames });
    }

    /// Before the target has the message.
    pub fn hears(&mut self, node: usize, link: u64, body: &SourceBody) {
        let n = &mut self.nodes[node];
        match body {
            SourceBody::Hello(_) => n.heard.greets = Some(link),
            SourceBody::Inbound(frames) => {
                assert!(frames.iter().all(|frame| frame.len() <= MAX_FRAME_BYTES));
                let committed = n.target.as_ref().is_some_and(|target| target.committed().is_some());
                if committed && n.heard.open && n.heard.stream == Some(link) {
                    n.heard.frames.extend(frames.iter().map(|frame| parse(frame)));
                }
            }
            _ => {}
        }
    }

    /// The greeting was not refused: a new stream.
    pub fn greeted(&mut self, node: usize) {
        let heard = &mut self.nodes[node].heard;
        if let Some(link) = heard.greets.take() {
            *heard = Heard { stream: Some(link), open: true, ..Heard::default() };
        }
    }

    /// Some operators first ask for an epoch that nobody keeps. That changes nothing.
    pub fn ask_in_vain(&mut self, node: usize, term: Term) {
        if self.traffic.most > 0 && self.traffic.rng.chance(300) {
            self.seen.refused_with_frames += u64::from(!self.nodes[node].heard.frames.is_empty());
            let back_to = Some(Epoch::new(88_888));
            self.target_event(node, TargetEvent::Promote { term, after_epoch: Epoch::NONE, back_to });
        }
    }

    /// What the driver gives to the guest that was promoted.
    pub fn check_frames(&mut self, node: usize, promotion: &Promotion) {
        let key = (promotion.commit.lineage.get(), promotion.commit.epoch.get());
        let planned = self.history[&key].frames;
        let n = &mut self.nodes[node];
        let target = n.target.as_mut().expect("a target");
        let taken = target.take_inbound();
        assert!(target.take_inbound().is_empty(), "frames that are handed out twice");
        assert!(taken.iter().all(|frame| frame.len() <= MAX_FRAME_BYTES));
        assert!(taken.iter().map(Vec::len).sum::<usize>() as u64 <= MAX_SENT_BYTES);
        let taken: Vec<Frame> = taken.iter().map(|frame| parse(frame)).collect();
        let went_back = promotion.newest != promotion.commit.epoch;
        assert!(!went_back || taken.is_empty(), "node {node} went back, and would be given what came since");
        assert!(taken.is_sorted_by(|a, b| a.1 < b.1), "out of order, or twice: {taken:?}");
        for frame in &taken {
            assert!(frame.0 == key.0 && frame.1 > planned, "{frame:?}, but {key:?} has all up to {planned}");
        }
        // And all that came is there.
        let frames = std::mem::take(&mut n.heard.frames);
        let is_due = |(lineage, number): &Frame| *lineage == key.0 && *number > planned && !n.heard.names_an_epoch;
        let due: Vec<Frame> = frames.into_iter().filter(is_due).collect();
        assert_eq!(taken, due, "node {node}, promoted from {key:?}, which has all up to {planned}");
        self.seen.frames_replayed += taken.len() as u64;
        self.seen.replays += u64::from(!taken.is_empty());
    }
}

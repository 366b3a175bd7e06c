//! A guest's output in `output-commit`: the gate, and what the session tells it.
//!
//! ```text
//! cut thread --place()--> mark in the streams (guest stands still)
//! session: cuts, peers' commits, the gate's news --> vmsync::output::Committer --> hold, open, release, events
//!          output waits --> vmsync::output::OnDemand --> the next cut earlier
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vmsync::output::{Cause, Committer, Effect, Mark, Mode, OnDemand, OnLoss, PeerPart, Policy, Quorum};
use vmsync::source::{PeerState, PeerView};
use vmsync::units::Epoch;

use super::PrimaryContext;
use super::session::Input;
use crate::agent::libvirt::LiveDomain;
use crate::api::control::GuestEvent;
use crate::api::types::{self, Consistency, OutputStats, Percentiles};
use crate::capture::cutter::AtStop;
use crate::hypervisor::xml::OutputNic;
use crate::output::{self, Figures, Gate, GateError, Marker, News, Plugged, Setting};

/// With availability first no frame is held longer.
const AGE: Duration = Duration::from_millis(160);
/// While output is held with availability first, a cut does not take longer: an agent that is stopped in the middle of one
/// must not keep the guest silent for long.
const CUT_AT_MOST: Duration = Duration::from_millis(120);
/// A gate that could not be put in place, or was lost, is tried again so much later.
const AGAIN_AFTER: Duration = Duration::from_secs(2);
/// Output that leaves uncommitted is told at most this often; it is counted always.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// A cut as far as output is about it.
#[derive(Debug, Clone, Copy)]
pub(super) struct CutMark {
    pub epoch: u64,
    pub mark: Option<Mark>,
    pub pause: Duration,
}

/// Gives marks their numbers, which grow over all gates of a session.
#[derive(Default)]
struct Marks {
    marker: Option<Marker>,
    last: Mark,
}

pub(super) struct Output {
    guest: String,
    uuid: String,
    consistency: Consistency,
    committer: Committer,
    on_demand: OnDemand,
    gate: Option<Gate>,
    marks: Arc<Mutex<Marks>>,
    /// Marks up to this one went into a gate that is no more.
    marks_of_former: Mark,
    /// Tells the news of gates apart.
    generation: u64,
    started: Instant,
    try_at: Instant,
    problem: String,
    /// Which NICs the gate stands before has changed since that was asked.
    nics_changed: bool,
    /// NICs that it does not stand before, and why; looked at again then.
    not_held: Vec<String>,
    look_at: Option<Instant>,
    figures: Figures,
    opened_total: u64,
    told_at: Option<Instant>,
    effects: Vec<Effect>,
    /// The operator asked for the end of protection: what is held may leave.
    flush_at_end: Arc<AtomicBool>,
    report: Arc<dyn Fn(GuestEvent) + Send + Sync>,
}

fn policy(consistency: &Consistency) -> Policy {
    Policy {
        quorum: match consistency.quorum {
            types::Quorum::Any => Quorum::Any,
            types::Quorum::All => Quorum::All,
            types::Quorum::Count(count) => Quorum::Count(count),
        },
        on_loss: match consistency.on_loss {
            types::OnLoss::Availability => OnLoss::Availability,
            types::OnLoss::Consistency => OnLoss::Consistency,
        },
    }
}

fn setting(consistency: &Consistency) -> Setting {
    let bounded = consistency.on_loss == types::OnLoss::Availability;
    Setting { age_ms: bounded.then_some(AGE.as_millis() as u64) }
}

fn lock(marks: &Mutex<Marks>) -> MutexGuard<'_, Marks> {
    marks.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Output {
    pub(super) fn new(
        context: &PrimaryContext,
        guest: &str,
        uuid: &str,
        consistency: Consistency,
        flush_at_end: Arc<AtomicBool>,
    ) -> Self {
        let now = Instant::now();
        Self {
            guest: guest.into(),
            uuid: uuid.into(),
            consistency,
            committer: Committer::new(policy(&consistency), false),
            on_demand: OnDemand::default(),
            gate: None,
            marks: Arc::default(),
            marks_of_former: Mark::default(),
            generation: 0,
            started: now,
            try_at: now,
            problem: String::new(),
            not_held: Vec::new(),
            nics_changed: false,
            look_at: None,
            figures: Figures::default(),
            opened_total: 0,
            told_at: None,
            effects: Vec::new(),
            flush_at_end,
            report: Arc::clone(&context.report),
        }
    }

    /// What the cutter calls while the guest stands still.
    pub(super) fn at_stop(&self) -> AtStop {
        let marks = Arc::clone(&self.marks);
        Arc::new(move || {
            let mut marks = lock(&marks);
            let next = marks.last.checked_next()?;
            let placed = marks.marker.as_ref()?.mark(next);
            marks.last = next;
            placed.then_some(next)
        })
    }

    /// The operator may have chosen another mode.
    pub(super) fn set(&mut self, consistency: Consistency) {
        if consistency == self.consistency {
            return;
        }
        self.consistency = consistency;
        self.committer.set_policy(policy(&consistency));
        self.try_at = Instant::now();
        match &self.gate {
            Some(gate) if consistency.is_output_commit() => gate.set(setting(&consistency)),
            _ => self.take_out(true),
        }
    }

    /// The guest has been attached, perhaps with other NICs.
    pub(super) fn attached(&mut self, domain: &LiveDomain) {
        self.committer.attached_anew();
        self.try_at = Instant::now();
        let Ok(domain) = domain.get() else { return };
        if self.gate.is_some() {
            self.follow_nics();
        } else if !self.consistency.is_output_commit() && output::left_behind(&domain).unwrap_or(false) {
            tracing::warn!(guest = self.guest, "taking out a gate that an earlier agent left");
            if let Err(error) = output::remove(&domain, None, || ()) {
                tracing::error!(guest = self.guest, %error, "cannot take it out");
            }
        }
    }

    /// NICs may have come or gone: those that came are held at once, before the guest has set them up.
    pub(super) fn follow_nics(&mut self) {
        let Some(gate) = self.gate.as_mut().filter(|_| self.problem.is_empty()) else { return };
        self.look_at = None;
        let followed = match gate.follow() {
            Ok(followed) => followed,
            // What is held is held without libvirtd, too.
            Err(GateError::Hypervisor(error)) if error.is_disconnect() => {
                self.look_at = Some(Instant::now() + AGAIN_AFTER);
                return;
            }
            Err(error) => {
                tracing::info!(guest = self.guest, %error, "its output gets another gate");
                self.forget_marks();
                // Stays in place until the new one stands.
                self.problem = "replaced".into();
                return;
            }
        };
        self.nics_changed |= !followed.plugged.is_empty() || !followed.unplugged.is_empty();
        for Plugged { mac, left_before } in &followed.plugged {
            let (level, what) = match left_before {
                Some(0) => ("info", "before it sent anything".to_owned()),
                Some(frames) => ("warning", format!("{frames} frames of it had left before")),
                None => ("warning", "what it sent before is not known".to_owned()),
            };
            self.tell_at_once(level, "output-interface", &format!("output of interface {mac} is held, {what}"));
        }
        for mac in &followed.unplugged {
            self.tell_at_once(
                "info",
                "output-interface",
                &format!("interface {mac} is gone, and all that held its output"),
            );
        }
        if !followed.not_held.is_empty() {
            self.look_at = Some(Instant::now() + AGAIN_AFTER);
            if self.not_held != followed.not_held {
                let why = followed.not_held.join("; ");
                tracing::warn!(guest = self.guest, why, "a part of its output is not held");
                self.tell_at_once("alarm", "output-open", &format!("a part of the output leaves uncommitted: {why}"));
            }
        }
        self.not_held = followed.not_held;
    }

    /// Puts a gate in place if there should be one; called while the guest is attached.
    pub(super) fn keep_gate(&mut self, context: &Arc<PrimaryContext>, inputs: &Sender<Input>) {
        if self.look_at.is_some_and(|at| Instant::now() >= at) {
            self.follow_nics();
        }
        let missing = self.gate.is_none() || !self.problem.is_empty();
        if !self.consistency.is_output_commit() || !missing || Instant::now() < self.try_at {
            return;
        }
        self.try_at = Instant::now() + AGAIN_AFTER;
        let live = LiveDomain::new(Arc::clone(&context.libvirt), &self.uuid);
        let holding = self.holds_from_the_start(&live);
        self.generation += 1;
        let (generation, inputs) = (self.generation, Mutex::new(inputs.clone()));
        let news = move |news| {
            let input = Input::Output { generation, news };
            let _ = inputs.lock().unwrap_or_else(|p| p.into_inner()).send(input);
        };
        match Gate::start(Arc::new(move || live.get()), setting(&self.consistency), holding, news) {
            Ok(gate) => {
                self.problem.clear();
                self.forget_marks();
                lock(&self.marks).marker = Some(gate.marker());
                self.figures = Figures::default();
                self.not_held.clear();
                self.look_at = Some(Instant::now());
                self.gate = Some(gate);
                self.nics_changed = true;
                if holding && self.committer.mode() != &Mode::Holding {
                    self.committer = Committer::new(policy(&self.consistency), true);
                }
                self.committer.gate_replaced(&mut self.effects);
                self.carry_out();
            }
            Err(error) => {
                let error = error.to_string();
                if self.problem != error {
                    tracing::warn!(guest = self.guest, error, "its output cannot be held; trying again");
                    self.tell("warning", "output-open", &format!("output cannot be held: {error}"));
                }
                self.problem = error;
                // The one it was to replace no longer covers the guest.
                if let Some(former) = self.gate.take() {
                    self.nics_changed = true;
                    former.discard();
                }
            }
        }
    }

    /// With consistency first nothing leaves between an agent's end and the next one's quorum.
    fn holds_from_the_start(&self, domain: &LiveDomain) -> bool {
        let strict = self.consistency.on_loss == types::OnLoss::Consistency;
        let left_behind = || domain.get().and_then(|domain| output::left_behind(&domain)).unwrap_or(false);
        strict && (self.committer.mode() == &Mode::Holding || left_behind())
    }

    fn forget_marks(&mut self) {
        let mut marks = lock(&self.marks);
        marks.marker = None;
        self.marks_of_former = marks.last;
    }

    /// News of a gate.
    pub(super) fn news(&mut self, generation: u64, news: News) {
        if generation != self.generation {
            return;
        }
        match news {
            News::Waits(mark) => self.committer.waits(mark),
            News::Figures(figures) => {
                self.on_demand.left(figures.data_total.saturating_sub(self.figures.data_total));
                self.figures = figures;
            }
            News::Opened { unheard } => {
                let cause = if unheard { Cause::Unheard } else { Cause::TooOld };
                self.committer.gate_opened(self.started.elapsed(), cause, &mut self.effects);
            }
            News::Lost { removed } => {
                self.forget_marks();
                self.gate = None;
                self.nics_changed = true;
                self.try_at = Instant::now() + AGAIN_AFTER;
                self.problem = "the gate process was lost".into();
                self.opened_total += 1;
                let what =
                    if removed { "output leaves uncommitted until there is a new one" } else { "no output leaves" };
                self.tell("alarm", "output-open", &format!("the gate process was lost: {what}"));
            }
        }
        self.carry_out();
    }

    /// Takes note of cuts and of what the shadows have; when the next cut should be made for output that waits.
    pub(super) fn step(&mut self, cuts: Vec<CutMark>, peers: impl FnOnce() -> Vec<PeerView>) -> Option<Instant> {
        if !self.is_on() {
            return None;
        }
        let now = self.started.elapsed();
        for CutMark { epoch, mark, pause } in cuts {
            self.on_demand.cut(now, pause);
            if let Some(mark) = mark.filter(|mark| *mark > self.marks_of_former) {
                self.committer.cut(Epoch::new(epoch), mark);
            }
        }
        let part = |view: PeerView| PeerPart {
            following: view.state == PeerState::Following,
            connected: view.state != PeerState::Disconnected,
            peer: view.peer,
            committed: view.committed,
        };
        let peers: Vec<PeerPart> = peers().into_iter().map(part).collect();
        self.committer.peers(now, &peers, &mut self.effects);
        self.carry_out();
        let due = self.committer.wants_cut().then(|| self.on_demand.due(self.committer.uncommitted()));
        due.flatten().map(|at| self.started + at)
    }

    /// How long a cut may take, of what the operator allows.
    pub(super) fn cut_bound(&self, allowed: Duration) -> Duration {
        let available = self.consistency.on_loss == types::OnLoss::Availability;
        let holds = self.is_on() && self.committer.mode() == &Mode::Holding;
        if available && holds { allowed.min(CUT_AT_MOST) } else { allowed }
    }

    /// NICs whose output is held; none: the same as when this was asked before.
    pub(super) fn changed_nics(&mut self) -> Option<&[OutputNic]> {
        std::mem::take(&mut self.nics_changed).then(|| self.gate.as_ref().map_or(&[][..], Gate::nics))
    }

    pub(super) fn is_on(&self) -> bool {
        self.gate.is_some()
    }

    fn carry_out(&mut self) {
        for effect in std::mem::take(&mut self.effects) {
            match (effect, &self.gate) {
                (Effect::Hold, Some(gate)) => gate.hold(),
                (Effect::Open, Some(gate)) => gate.open(),
                (Effect::Release(mark), Some(gate)) => gate.release(mark),
                (Effect::Hold | Effect::Open | Effect::Release(_), None) => {}
                (Effect::Opened(cause), _) => {
                    self.opened_total += 1;
                    let why = cause_text(&cause);
                    tracing::warn!(guest = self.guest, why, "output leaves uncommitted");
                    self.tell("alarm", "output-open", &format!("output leaves uncommitted: {why}"));
                }
                (Effect::Closed, _) => {
                    tracing::info!(guest = self.guest, "output is held until it is committed");
                    self.tell("info", "output-held", "output is held until it is committed");
                }
                (Effect::Quorum { following, needed }, _) => {
                    let level = if following < needed { "warning" } else { "info" };
                    let what = match self.consistency.on_loss {
                        _ if following >= needed => "output is committed by the whole quorum",
                        types::OnLoss::Availability => "output is committed by fewer shadows than asked for",
                        types::OnLoss::Consistency => "output waits for the rest of the quorum",
                    };
                    self.tell(level, "output-quorum", &format!("{following} of {needed} shadows follow: {what}"));
                }
            }
        }
    }

    fn tell(&mut self, level: &str, name: &str, message: &str) {
        let now = Instant::now();
        if level != "info" && self.told_at.is_some_and(|at| now < at + TELL_EVERY) {
            return;
        }
        self.told_at = Some(now);
        self.tell_at_once(level, name, message);
    }

    fn tell_at_once(&self, level: &str, name: &str, message: &str) {
        let uuid = Some(self.uuid.clone());
        (self.report)(GuestEvent::Notice { uuid, level: level.into(), name: name.into(), message: message.into() });
    }

    fn take_out(&mut self, flush: bool) {
        self.forget_marks();
        self.problem.clear();
        self.generation += 1;
        self.nics_changed |= self.gate.is_some();
        match self.gate.take() {
            Some(gate) if flush => gate.remove(),
            Some(gate) => gate.discard(),
            None => {}
        }
        let on_loss = policy(&self.consistency);
        self.committer = Committer::new(on_loss, false);
    }

    /// The session ends: nothing of ours stays between the guest and its network.
    pub(super) fn end(&mut self) {
        self.take_out(self.flush_at_end.load(Ordering::Acquire));
    }

    pub(super) fn stats(&self) -> OutputStats {
        if !self.consistency.is_output_commit() {
            return OutputStats::default();
        }
        let (gate, reason) = match (&self.gate, self.committer.mode()) {
            (None, _) => ("none", self.problem.clone()),
            (Some(_), Mode::Holding) if !self.not_held.is_empty() => ("partial", self.not_held.join("; ")),
            (Some(_), Mode::Holding) => ("holding", String::new()),
            (Some(_), Mode::Open(cause)) => ("open", cause_text(cause).to_owned()),
        };
        let Figures { held_frames, held_bytes, released_total, dropped_total, hold_us: [p50, p99, max], .. } =
            self.figures;
        OutputStats {
            gate: gate.into(),
            reason,
            held_frames,
            held_bytes,
            hold_us: Percentiles { p50, p99, max },
            released_frames_total: released_total,
            dropped_frames_total: dropped_total,
            opened_total: self.opened_total,
        }
    }
}

fn cause_text(cause: &Cause) -> &'static str {
    match cause {
        Cause::NotProtected => "the guest is not protected yet",
        Cause::ShadowsLost => "no shadow follows",
        Cause::TooOld => "commits took too long",
        Cause::Unheard => "the agent stood still",
    }
}

//! Forecasts that wait for what comes, and what is learnt when it came: weights, calibration, drift.

use std::collections::VecDeque;

use super::conformal::{Conformal, ConformalParams};
use super::drift::Drift;
use super::experts::{EXPERTS, LAST_VALUE, Panel};
use super::guard::Guard;
use super::mix::{Mix, MixParams};
use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::quantiles::{LEVEL_COUNT, Quantiles};
use crate::random::Random;

/// Share of live samples after which a forecast is kept to be judged: most of the worth at less than half the cost.
const TRACKED: f64 = 0.4;

/// Whether a forecast is kept after sample number `origin`. Chosen at random (by its number, so that runs repeat): every
/// third would be blind to two thirds of the phases of a job that runs every half hour.
pub(super) fn is_tracked(origin: u64) -> bool {
    Random::new(origin).unit() < TRACKED
}

/// A forecast that waits.
#[derive(Debug, Clone)]
struct Pending {
    origin: u64,
    panel: Panel,
    mixed: Vec<Quantiles>,
    issued: Vec<Quantiles>,
    /// What the calibrated mix would have said without the guard: by this a change is told.
    expected: Vec<Quantiles>,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub(super) struct Tracking {
    horizon: usize,
    pub(super) mix: Mix,
    pub(super) conformal: Conformal,
    pub(super) guard: Guard,
    pub(super) drift: Drift,
    pending: VecDeque<Pending>,
}

impl Tracking {
    pub(super) fn new(horizon: usize) -> Self {
        Self {
            horizon,
            mix: Mix::new(EXPERTS, horizon, MixParams::default()),
            conformal: Conformal::new(horizon, ConformalParams::default()),
            guard: Guard::default(),
            drift: Drift::default(),
            pending: VecDeque::new(),
        }
    }

    /// What a like series may start with: all but the forecasts that wait.
    pub(super) fn successor(&self) -> Self {
        Self { pending: VecDeque::new(), drift: Drift::default(), ..self.clone() }
    }

    /// The mixed and calibrated forecast of a panel.
    pub(super) fn calibrated(&self, panel: &Panel) -> Vec<Quantiles> {
        self.stages(panel).1
    }

    fn stages(&self, panel: &Panel) -> (Vec<Quantiles>, Vec<Quantiles>) {
        let mixed = self.mix.combine(panel);
        let mut issued = self.guard.apply(&mixed, &panel[LAST_VALUE]);
        self.conformal.apply(&mut issued);
        (mixed, issued)
    }

    /// Keeps the forecast made after sample number `origin`.
    pub(super) fn issue(&mut self, origin: u64, panel: Panel) {
        // Also while samples are missing and nothing matures.
        while self.pending.front().is_some_and(|p| p.origin + (self.horizon as u64) < origin) {
            self.pending.pop_front();
        }
        let (mixed, issued) = self.stages(&panel);
        let expected = if self.guard.share() > 0.0 {
            let mut expected = mixed.clone();
            self.conformal.apply(&mut expected);
            expected
        } else {
            issued.clone()
        };
        self.pending.push_back(Pending { origin, panel, mixed, issued, expected });
    }

    /// Learns from sample number `now`.
    pub(super) fn mature(&mut self, now: u64, actual: f64) {
        while self.pending.front().is_some_and(|p| p.origin + (self.horizon as u64) < now) {
            self.pending.pop_front();
        }
        let (mut matured, changes) = (false, self.drift.changes());
        for pending in self.pending.iter().filter(|p| p.origin < now) {
            let step = (now - pending.origin - 1) as usize;
            let naive = &pending.panel[LAST_VALUE][step];
            self.mix.mature(&pending.panel, step, actual);
            self.guard.mature(&pending.mixed[step], naive, actual);
            self.conformal.mature(&pending.issued[step], step, actual);
            matured = true;
        }
        if let Some(newest) = self.pending.iter().rev().find(|p| p.origin < now) {
            self.drift.mature(&newest.expected[(now - newest.origin - 1) as usize], actual);
        }
        if self.drift.changes() > changes {
            // What the experts were worth before says little now.
            self.mix.forget();
            self.guard.forget();
        }
        if matured {
            self.mix.settle();
        }
    }

    /// Heap bytes held.
    pub(super) fn bytes(&self) -> usize {
        let one = (EXPERTS + 3) * self.horizon * size_of::<Quantiles>();
        self.pending.len() * one + self.mix.bytes() + self.conformal.bytes()
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        self.mix.encode(out);
        self.conformal.encode(out);
        self.guard.encode(out);
        self.drift.encode(out);
        out.count(self.pending.len());
        for pending in &self.pending {
            out.u64(pending.origin);
            let Pending { mixed, issued, expected, .. } = pending;
            let rows = pending.panel.iter().flatten().chain(mixed).chain(issued).chain(expected);
            rows.flatten().for_each(|&v| out.f64(v));
        }
    }

    pub(super) fn decode(horizon: usize, from: &mut Reader) -> Result<Self, DecodeError> {
        let mut tracking = Self::new(horizon);
        tracking.mix.decode(from)?;
        tracking.conformal.decode(from)?;
        tracking.guard = Guard::decode(from)?;
        tracking.drift = Drift::decode(from)?;
        let count = from.count(8, "pending forecasts")?;
        if count > horizon + 1 {
            return Err(from.range("pending forecasts"));
        }
        for _ in 0..count {
            let origin = from.u64("origin")?;
            if origin > u64::MAX / 2 || tracking.pending.back().is_some_and(|p: &Pending| p.origin >= origin) {
                return Err(from.range("origin"));
            }
            let mut rows = || -> Result<Vec<Quantiles>, DecodeError> {
                let mut rows = vec![[0.0; LEVEL_COUNT]; horizon];
                for value in rows.iter_mut().flatten() {
                    *value = from.f64("a pending forecast")?;
                }
                Ok(rows)
            };
            let panel = (0..EXPERTS).map(|_| rows()).collect::<Result<Panel, _>>()?;
            let (mixed, issued, expected) = (rows()?, rows()?, rows()?);
            tracking.pending.push_back(Pending { origin, panel, mixed, issued, expected });
        }
        Ok(tracking)
    }
}

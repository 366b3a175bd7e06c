//! Plans of shadows' hosts: made on threads of their own, so that nothing waits for one, and shown before they are made.

use std::collections::BTreeMap;
use std::sync::Arc;

use placement::GuestId;
use placement::fleet::{FleetError, FleetPlan, FleetRefusal, Question};
use placement::guardian::{Guest, Wish, why_not};
use placement::solver::{OneByOne, Verdict};

use super::core::State;
use crate::api::types::{ApiError, HostVerdict, PlanView, PlannedGuest, PlannedShadow};

/// Answers `question` on a thread for what takes long. Never fails to answer.
pub(super) async fn answer(question: Question) -> Result<Arc<FleetPlan>, Arc<FleetError>> {
    match tokio::task::spawn_blocking(move || question.answer(&OneByOne)).await {
        Ok(result) => result.map(Arc::new).map_err(Arc::new),
        Err(error) => Err(Arc::new(FleetError::Broken { what: error.to_string() })),
    }
}

/// A plan that is only looked at.
pub(super) struct Draft {
    question: Question,
    /// Of every host its rack, of every guest its name.
    racks: BTreeMap<String, String>,
    domains: BTreeMap<GuestId, String>,
}

impl Draft {
    pub(super) fn of(state: &State, wish: Option<Wish>) -> Self {
        let known = state.guardian.guests().map(|guest: &Guest| (guest.plan.id.clone(), guest.plan.domain.clone()));
        let wished = wish.as_ref().map(|wish| (wish.guest.clone(), wish.domain.clone()));
        let domains = known.chain(wished).collect();
        let rack = |host: &placement::guardian::Host| (host.intro.name.to_string(), host.intro.rack.clone());
        Self {
            question: state.guardian.what_if(state.now, wish),
            racks: state.guardian.hosts().map(rack).collect(),
            domains,
        }
    }

    /// Makes the plan and says what it would do: of `only` one guest, host by host if it is to `explain`.
    pub(super) async fn view(self, only: Option<GuestId>, explain: bool) -> Result<PlanView, ApiError> {
        let began = std::time::Instant::now();
        let plan = answer(self.question.clone()).await;
        let plan = plan.map_err(|error| ApiError::new("failed", format!("there is no plan: {error}")))?;
        let asked = |guest: &GuestId| only.as_ref().is_none_or(|only| only == guest);
        let facts = self.question.guests.iter().filter(|facts| asked(&facts.id));
        let guests = facts.map(|facts| self.guest(&plan, &facts.id, explain)).collect();
        Ok(PlanView {
            hosts: plan.hosts().len() as u64,
            took_ms: began.elapsed().as_secs_f64() * 1e3,
            moves: plan.moves.iter().filter(|moved| asked(&moved.guest)).count() as u64,
            unknown_hosts: plan.unknown_hosts.iter().map(ToString::to_string).collect(),
            guests,
        })
    }

    fn guest(&self, plan: &FleetPlan, id: &GuestId, explain: bool) -> PlannedGuest {
        let facts = self.question.guests.iter().find(|facts| facts.id == *id);
        let primary = facts.map(|facts| facts.primary.to_string()).unwrap_or_default();
        let hosts = plan.hosts_of(id).unwrap_or_default();
        let shadow = |(number, host): (usize, &Option<placement::HostName>)| {
            let now = facts.and_then(|facts| facts.shadows.get(number)?.as_ref());
            let refusal = plan.refusals.iter().find(|refusal| refusal.guest == *id && refusal.shadow == number);
            let nearest = refusal.and_then(|refusal| refusal.nearest.as_ref());
            PlannedShadow {
                shadow: number as u64 + 1,
                host: host.as_ref().map(ToString::to_string),
                now: now.map(ToString::to_string),
                counts: refusal.map(counts_of).unwrap_or_default(),
                nearest: nearest.map(|(host, _)| host.to_string()),
                remedy: refusal.and_then(FleetRefusal::remedy).unwrap_or_default(),
                verdicts: if explain { self.verdicts(plan, id, number) } else { Vec::new() },
            }
        };
        PlannedGuest {
            domain: self.domains.get(id).cloned().unwrap_or_default(),
            uuid: id.to_string(),
            primary,
            shadows: hosts.iter().enumerate().map(shadow).collect(),
            reason: why_not(plan, id).unwrap_or_default(),
        }
    }

    fn verdicts(&self, plan: &FleetPlan, id: &GuestId, shadow: usize) -> Vec<HostVerdict> {
        let verdict = |(host, verdict): (placement::HostName, Verdict)| HostVerdict {
            rack: self.racks.get(host.as_str()).cloned().unwrap_or_default(),
            host: host.to_string(),
            verdict: match &verdict {
                Verdict::Chosen => "chosen",
                Verdict::Possible { .. } => "possible",
                Verdict::Barred(_) => "barred",
            }
            .into(),
            reasons: match &verdict {
                Verdict::Barred(objections) => objections.iter().map(|o| o.reason.name().to_owned()).collect(),
                _ => Vec::new(),
            },
            text: verdict.to_string(),
            remedy: match &verdict {
                Verdict::Barred(objections) => join(objections),
                _ => String::new(),
            },
        };
        plan.explain(id, shadow).unwrap_or_default().into_iter().map(verdict).collect()
    }
}

fn join(objections: &[placement::solver::Objection]) -> String {
    objections.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

fn counts_of(refusal: &placement::fleet::FleetRefusal) -> BTreeMap<String, u64> {
    refusal.counts.iter().map(|(reason, hosts)| (reason.name().to_owned(), *hosts)).collect()
}

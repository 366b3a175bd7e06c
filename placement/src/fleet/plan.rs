//! Plans a fleet and says why.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::facts::{GuestFacts, HostFacts};
use super::topology::Topology;
use super::translate;
use crate::checker;
use crate::instance::{Instance, InstanceError, Level, Plan};
use crate::solver::{self, Crowded, Objection, Options, Reason, Verdict, Workers};
use crate::units::{GuestId, HostName};

/// A plan that the checker has accepted.
#[derive(Debug)]
pub struct FleetPlan {
    /// In the order of the guests asked for.
    pub placements: Vec<Placement>,
    /// What stands elsewhere afterwards.
    pub moves: Vec<Move>,
    /// What has no host, and why.
    pub refusals: Vec<FleetRefusal>,
    /// Hosts that report but that the topology does not know: they got nothing.
    pub unknown_hosts: Vec<HostName>,
    hosts: Vec<HostName>,
    instance: Instance,
    plan: Plan,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    pub guest: GuestId,
    /// In the order of the policy's shadows.
    pub hosts: Vec<Option<HostName>>,
}

/// A shadow that leaves a host that is not down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    pub guest: GuestId,
    pub shadow: usize,
    pub from: HostName,
    /// None: nowhere has it room.
    pub to: Option<HostName>,
}

/// A shadow that has no host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetRefusal {
    pub guest: GuestId,
    pub shadow: usize,
    /// Hosts by the first reason that bars each; they sum to the number of hosts.
    pub counts: BTreeMap<Reason, u64>,
    /// The host nearest to taking it, and what bars it there.
    pub nearest: Option<(HostName, Vec<Objection>)>,
    /// No host helps: all are too near to the primary or to other shadows.
    pub crowded: Option<Crowded>,
}

/// All that a plan depends on, to be answered elsewhere and later: it holds no reference to anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    pub topology: Topology,
    pub hosts: Vec<HostFacts>,
    pub guests: Vec<GuestFacts>,
    pub options: Options,
}

impl Question {
    pub fn answer(&self, workers: &dyn Workers) -> Result<FleetPlan, FleetError> {
        plan(&self.topology, &self.hosts, &self.guests, &self.options, workers)
    }
}

/// Why there is no plan at all.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    #[error("guest {guest} runs on {host}, which the topology does not know; add it there")]
    UnknownPrimary { guest: GuestId, host: HostName },
    #[error("guest {guest} is there twice")]
    SameGuest { guest: GuestId },
    #[error("{count} different labels, machine types and CPU models are asked for at once; at most 64 can be")]
    TooManyConditions { count: usize },
    #[error("{0}")]
    Instance(#[from] InstanceError),
    /// An alarm: planner and checker disagree.
    #[error("the checker refused the plan, so it is not used; please report this: {}", examples.join("; "))]
    Refused { examples: Vec<String> },
    /// An alarm: it ended without an answer.
    #[error("the planner broke down; please report this: {what}")]
    Broken { what: String },
}

/// Hosts for all shadows of `guests`. Those that stand somewhere stay there if they may; `options` says whether they may
/// be moved for others. All guests with shadows have to be given, as they share hosts and reserves.
pub fn plan(
    topology: &Topology,
    hosts: &[HostFacts],
    guests: &[GuestFacts],
    options: &Options,
    workers: &dyn Workers,
) -> Result<FleetPlan, FleetError> {
    let mut seen = BTreeSet::new();
    if let Some(twice) = guests.iter().find(|guest| !seen.insert(&guest.id)) {
        return Err(FleetError::SameGuest { guest: twice.id.clone() });
    }
    let instance = translate::instance(topology, hosts, guests)?;
    instance.validate()?;
    let outcome = solver::solve(&instance, options, workers, &mut |_| ());
    verify(&instance, &outcome.plan)?;
    let names: Vec<HostName> = topology.hosts().cloned().collect();
    let name = |host: i64| usize::try_from(host).ok().map(|host| names[host].clone());
    let placements: Vec<Placement> = guests
        .iter()
        .zip(&outcome.plan.place)
        .map(|(guest, hosts)| Placement { guest: guest.id.clone(), hosts: hosts.iter().map(|&h| name(h)).collect() })
        .collect();
    let refusals = outcome.refusals.into_iter().map(|refusal| FleetRefusal {
        guest: guests[refusal.guest].id.clone(),
        shadow: refusal.copy,
        counts: refusal.counts,
        nearest: refusal.fix.map(|fix| (names[fix.host].clone(), fix.objections)),
        crowded: refusal.crowded,
    });
    Ok(FleetPlan {
        moves: moves(guests, hosts, &placements),
        placements,
        refusals: refusals.collect(),
        unknown_hosts: hosts
            .iter()
            .map(|host| &host.name)
            .filter(|name| !topology.hosts.contains_key(name))
            .cloned()
            .collect(),
        hosts: names,
        instance,
        plan: outcome.plan,
    })
}

/// The one way from a plan to its use: the checker, which shares no code with the planner, finds no fault.
pub(super) fn verify(instance: &Instance, plan: &Plan) -> Result<(), FleetError> {
    let refused = |examples| FleetError::Refused { examples };
    let report = checker::check(instance, plan).map_err(|error| refused(vec![error.to_string()]))?;
    if report.is_feasible() { Ok(()) } else { Err(refused(report.examples)) }
}

fn moves(guests: &[GuestFacts], hosts: &[HostFacts], placements: &[Placement]) -> Vec<Move> {
    let up: BTreeSet<&HostName> =
        hosts.iter().filter(|host| host.state != crate::instance::HostState::Down).map(|host| &host.name).collect();
    let mut moves = Vec::new();
    for (guest, placement) in guests.iter().zip(placements) {
        for (shadow, (from, to)) in guest.shadows.iter().zip(&placement.hosts).enumerate() {
            if let Some(from) = from.as_ref().filter(|&from| to.as_ref() != Some(from) && up.contains(from)) {
                moves.push(Move { guest: guest.id.clone(), shadow, from: from.clone(), to: to.clone() });
            }
        }
    }
    moves
}

impl FleetPlan {
    /// Hosts of a guest's shadows.
    pub fn hosts_of(&self, guest: &GuestId) -> Option<&[Option<HostName>]> {
        self.placements.iter().find(|placement| placement.guest == *guest).map(|placement| &placement.hosts[..])
    }

    /// Hosts that the plan is about.
    pub fn hosts(&self) -> &[HostName] {
        &self.hosts
    }

    /// Of every host why it was taken for a shadow or why not, as things are with this plan; by name. None: no such
    /// shadow.
    pub fn explain(&self, guest: &GuestId, shadow: usize) -> Option<Vec<(HostName, Verdict)>> {
        let number = self.placements.iter().position(|placement| placement.guest == *guest)?;
        let verdicts = solver::explain(&self.instance, &self.plan, number, shadow)?;
        Some(self.hosts.iter().cloned().zip(verdicts).collect())
    }
}

impl fmt::Display for FleetRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: u64 = self.counts.values().sum();
        let counts: Vec<String> =
            self.counts.iter().map(|(reason, hosts)| format!("{hosts} {}", reason.describe())).collect();
        write!(f, "no host for shadow {} of guest {}; {hosts} hosts: {}", self.shadow, self.guest, counts.join(", "))?;
        match self.remedy() {
            Some(remedy) => write!(f, "; nearest remedy: {remedy}"),
            None => Ok(()),
        }
    }
}

impl FleetRefusal {
    /// What would have to be done for it to get a host. None: there are no hosts at all.
    pub fn remedy(&self) -> Option<String> {
        if let Some(Crowded { level, taken }) = self.crowded {
            let what = match level {
                Level::Switch => "switch",
                Level::Power => "power domain",
                _ => "rack",
            };
            let (nth, others, fewer) = match taken {
                1 => (nth(2), "that of the primary", ""),
                _ => (nth(taken + 1), "those of the primary and its other shadows", ", or ask for fewer shadows"),
            };
            return Some(format!("add a host in a {nth} {what}, apart from {others}{fewer}"));
        }
        let (host, objections) = self.nearest.as_ref()?;
        let remedies: Vec<String> = objections.iter().map(ToString::to_string).collect();
        Some(format!("on {host}: {}", remedies.join("; and ")))
    }
}

fn nth(number: usize) -> String {
    const WORDS: [&str; 9] = ["second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"];
    number.checked_sub(2).and_then(|at| WORDS.get(at)).map_or(format!("{number}th"), |word| (*word).to_owned())
}

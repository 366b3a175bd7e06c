//! Why a shadow was left out: every host counted by the first rule that bars it, and what is nearest to a remedy.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::board::View;
use super::problem::{NONE, Shadow, round_trip_us};
use crate::instance::{HostState, Level};

/// A rule that bars a host, in the order in which they are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Down,
    Drain,
    Gen,
    Label,
    Domain,
    Div,
    Latency,
    Sibling,
    Group,
    Mem,
    Far,
    Vf,
    Cpu,
    BwHost,
    BwRack,
    BwRoom,
    BwRegion,
    BwSrc,
}

impl Reason {
    /// Its name in plans.
    pub fn name(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Drain => "drain",
            Self::Gen => "gen",
            Self::Label => "label",
            Self::Domain => "domain",
            Self::Div => "div",
            Self::Latency => "latency",
            Self::Sibling => "sibling",
            Self::Group => "group",
            Self::Mem => "mem",
            Self::Far => "far",
            Self::Vf => "vf",
            Self::Cpu => "cpu",
            Self::BwHost => "bw_host",
            Self::BwRack => "bw_rack",
            Self::BwRoom => "bw_room",
            Self::BwRegion => "bw_region",
            Self::BwSrc => "bw_src",
        }
    }

    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Down => "down or without an agent",
            Self::Drain => "silent or draining",
            Self::Gen => "of an older generation",
            Self::Label => "without what the guest asks for (labels, CPU, machine), or refusing it",
            Self::Domain => "in the primary's rack, switch or power domain",
            Self::Div => "in the primary's room or region",
            Self::Latency => "too far away",
            Self::Sibling => "in the rack, switch or power domain of another shadow",
            Self::Group => "with a guest of the same group",
            Self::Mem => "without the memory",
            Self::Far => "without the far memory",
            Self::Vf => "without the VFs",
            Self::Cpu => "without the CPU",
            Self::BwHost => "with too busy a link",
            Self::BwRack => "in a rack with too busy a link",
            Self::BwRoom => "beyond a busy link between rooms",
            Self::BwRegion => "beyond a busy link between regions",
            Self::BwSrc => "behind the busy link of the primary's host or rack",
        }
    }

    /// What its shortage is measured in.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Latency => "us",
            Self::Mem | Self::Far => "MiB",
            Self::Vf => "VFs",
            Self::Cpu => "milli-vCPU",
            Self::BwHost | Self::BwRack | Self::BwRoom | Self::BwRegion | Self::BwSrc => "Mbit/s",
            _ => "",
        }
    }

    /// How hard it is to remedy: room is made more easily than a host, a policy changed more easily than a rack.
    fn effort(self) -> u32 {
        match self {
            Self::Mem | Self::Far | Self::Vf | Self::Cpu => 1,
            Self::BwHost | Self::BwRack | Self::BwRoom | Self::BwRegion | Self::BwSrc => 2,
            Self::Drain => 3,
            Self::Latency => 4,
            Self::Down => 5,
            Self::Label => 6,
            Self::Group | Self::Div => 8,
            Self::Gen => 12,
            Self::Sibling | Self::Domain => 16,
        }
    }
}

/// One thing that bars a shadow from a host, and by how much: MiB, milli-vCPU, VFs, Mbit/s or microseconds; 0 where
/// there is nothing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Objection {
    pub reason: Reason,
    pub lacks: i64,
}

/// The host that is nearest to taking the shadow, and what bars it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fix {
    pub host: usize,
    pub objections: Vec<Objection>,
}

/// No host is apart from the primary and the guest's other shadows: all of them share this with one or the other, so
/// that making room anywhere helps nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crowded {
    /// Rack, switch or power domain: the nearest level at which there is none left.
    pub level: Level,
    /// How many the primary and the other shadows take.
    pub taken: usize,
}

/// A shadow that has no host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub guest: usize,
    pub copy: usize,
    /// Hosts by the first reason that bars each; they sum to the number of hosts.
    pub counts: BTreeMap<Reason, u64>,
    /// None: no hosts at all.
    pub fix: Option<Fix>,
    pub crowded: Option<Crowded>,
}

impl fmt::Display for Objection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lacks = self.lacks;
        match self.reason {
            Reason::Down => f.write_str("bring it or its agent back"),
            Reason::Drain => f.write_str("have its agent report again, or end its drain"),
            Reason::Gen => f.write_str("give it a newer CPU, or the guest an older CPU model"),
            Reason::Label => f.write_str("give it the labels, CPU model and machine type that the guest asks for"),
            Reason::Domain => f.write_str("move the primary to another rack, switch and power domain than its"),
            Reason::Div => f.write_str("let the policy's apart be less than the room or region"),
            Reason::Latency => write!(f, "let the policy's latency_us be {lacks} more"),
            Reason::Sibling => f.write_str("move the guest's other shadow out of its rack, switch and power domain"),
            Reason::Group => f.write_str("move the guest of the same group off it, or take one out of the group"),
            Reason::Mem => write!(f, "free {lacks} MiB of memory"),
            Reason::Far => write!(f, "free {lacks} MiB of far memory"),
            Reason::Vf => write!(f, "free {lacks} VFs"),
            Reason::Cpu => write!(f, "free {lacks} milli-vCPU"),
            Reason::BwHost => write!(f, "free {lacks} Mbit/s into it"),
            Reason::BwRack => write!(f, "free {lacks} Mbit/s into its rack"),
            Reason::BwRoom => write!(f, "free {lacks} Mbit/s between the rooms"),
            Reason::BwRegion => write!(f, "free {lacks} Mbit/s between the regions"),
            Reason::BwSrc => write!(f, "free {lacks} Mbit/s out of the primary's host or rack"),
        }
    }
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {}: ", self.host)?;
        for (i, objection) in self.objections.iter().enumerate() {
            write!(f, "{}{objection}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// What bars shadow `id`, which is nowhere, from `host`; in the order of [`Reason`].
pub(super) fn objections(view: &View<'_>, id: u32, host: u32) -> Vec<Objection> {
    let shadow = &view.problem.shadows[id as usize];
    let mut found = Vec::new();
    by_site(view, shadow, host, &mut found);
    if view.sibling_near(id, shadow, host).is_some() {
        found.push(Objection { reason: Reason::Sibling, lacks: 0 });
    }
    if view.group_there(shadow, host) {
        found.push(Objection { reason: Reason::Group, lacks: 0 });
    }
    by_amount(view, shadow, host, &mut found);
    found
}

fn by_site(view: &View<'_>, shadow: &Shadow, host: u32, found: &mut Vec<Objection>) {
    let (site, primary) = (&view.problem.sites[host as usize], &view.problem.sites[shadow.primary as usize]);
    let same_place = match shadow.apart {
        Level::Room => site.room == primary.room,
        Level::Region => site.region == primary.region,
        _ => false,
    };
    let near = site.rack == primary.rack || site.switch == primary.switch || site.power == primary.power;
    let labels =
        site.labels & shadow.need != shadow.need || site.labels & shadow.avoid != 0 || view.problem.bars(shadow, host);
    // The primary's own host is no round trip away.
    let round_trip = if host == shadow.primary { 0 } else { round_trip_us(primary, site) };
    let late = i64::from(round_trip) - i64::from(shadow.latency_us);
    let rules = [
        (Reason::Down, site.state == HostState::Down, 0),
        (Reason::Drain, site.state == HostState::Drain && shadow.current != host, 0),
        (Reason::Gen, site.generation < shadow.generation, 0),
        (Reason::Label, labels, 0),
        (Reason::Domain, near, 0),
        (Reason::Div, same_place, 0),
        (Reason::Latency, late > 0, late),
    ];
    found.extend(rules.into_iter().filter(|rule| rule.1).map(|(reason, _, lacks)| Objection { reason, lacks }));
}

fn by_amount(view: &View<'_>, shadow: &Shadow, host: u32, found: &mut Vec<Objection>) {
    let problem = view.problem;
    let (site, primary) = (&problem.sites[host as usize], &problem.sites[shadow.primary as usize]);
    let load = view.load(host);
    let (used, peak) = load.with(shadow, problem.levels);
    let rack = &problem.racks[site.rack as usize];
    let mbit = i64::from(shadow.mbit);
    let mut lacks = |reason: Reason, lacks: i64| {
        if lacks > 0 {
            found.push(Objection { reason, lacks });
        }
    };
    lacks(Reason::Mem, used.mem + peak.mem - load.free.mem);
    lacks(Reason::Far, used.far - load.free.far);
    lacks(Reason::Vf, used.vf + peak.vf - load.free.vf);
    lacks(Reason::Cpu, used.cpu + peak.cpu - load.free.cpu);
    lacks(Reason::BwHost, used.mbit - load.free.mbit);
    lacks(Reason::BwRack, view.rack_in(site.rack) + mbit - rack.in_mbit);
    let (rooms, regions) = view.between_lack(shadow, NONE, site);
    lacks(Reason::BwRoom, rooms);
    lacks(Reason::BwRegion, regions);
    lacks(Reason::BwSrc, view.source_lack(shadow.primary, primary.rack, mbit));
}

/// Explains why shadow `id`, which is nowhere and fits nowhere, does so.
pub(super) fn explain(view: &View<'_>, id: u32) -> Refusal {
    let problem = view.problem;
    let shadow = &problem.shadows[id as usize];
    let mut counts = BTreeMap::new();
    let mut nearest = None;
    let mut open = Open::default();
    for host in view.hosts() {
        let found = objections(view, id, host);
        let Some(first) = found.first() else { continue };
        *counts.entry(first.reason).or_insert(0) += 1;
        open.look(view, id, host);
        let effort: u32 = found.iter().map(|objection| objection.reason.effort()).sum();
        let lacks: i64 = found.iter().map(|objection| objection.lacks).sum();
        let distance = (effort, found.len(), lacks, problem.original[host as usize]);
        if nearest.as_ref().is_none_or(|(least, _)| distance < *least) {
            nearest = Some((distance, found));
        }
    }
    let taken = 1 + problem.shadows_of(shadow.guest).filter(|&other| view.at(other) != NONE).count();
    Refusal {
        guest: problem.guests[shadow.guest as usize] as usize,
        copy: shadow.copy as usize,
        counts,
        fix: nearest.map(|((.., host), objections)| Fix { host: host as usize, objections }),
        crowded: open.crowded().map(|level| Crowded { level, taken }),
    }
}

/// Whether any host is in another rack than the primary and the guest's shadows, on another switch as well, and in
/// another power domain as well.
#[derive(Default)]
struct Open([bool; 3]);

impl Open {
    fn look(&mut self, view: &View<'_>, id: u32, host: u32) {
        let (problem, site) = (view.problem, &view.problem.sites[host as usize]);
        let shadow = &problem.shadows[id as usize];
        let others = problem.shadows_of(shadow.guest).map(|other| view.at(other)).filter(|&at| at != NONE);
        let mut apart = [true; 3];
        for taken in others.chain([shadow.primary]) {
            let taken = &problem.sites[taken as usize];
            apart[0] &= site.rack != taken.rack;
            apart[1] &= apart[0] && site.switch != taken.switch;
            apart[2] &= apart[1] && site.power != taken.power;
        }
        (0..3).for_each(|level| self.0[level] |= apart[level]);
    }

    fn crowded(&self) -> Option<Level> {
        let level = self.0.iter().position(|open| !open)?;
        Some([Level::Rack, Level::Switch, Level::Power][level])
    }
}

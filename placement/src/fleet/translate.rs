//! Names to numbers: a fleet as an instance of the planner's format.
//!
//! Whatever a guest asks of a host beyond room and place (labels, machine type, CPU model) becomes a bit of the instance's
//! label masks; only what some guest asks for takes one.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{Capacity, GuestFacts, HostFacts, SHADOW_OVERHEAD_MIB};
use super::plan::FleetError;
use super::topology::Topology;
use crate::instance::{Copy, FORMAT, Guest, Host, HostState, Instance, MAX_AMOUNT, Params, Rack, Region, Room};
use crate::units::HostName;

/// Price of a MiB on every host, as in [`Params::standard`].
const MEMORY_PRICE: i64 = 10;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Condition {
    Label(String),
    CpuModel(String),
    MachineType(String),
}

impl Condition {
    fn holds(&self, topology: &Topology, name: &HostName, facts: Option<&HostFacts>) -> bool {
        let usable = |models: fn(&HostFacts) -> &BTreeSet<String>, model: &str| {
            facts.is_some_and(|facts| models(facts).is_empty() || models(facts).contains(model))
        };
        match self {
            Self::Label(label) => {
                topology.hosts.get(name).is_some_and(|site| site.labels.contains(label))
                    || facts.is_some_and(|facts| facts.labels.contains(label))
            }
            Self::CpuModel(model) => usable(|facts| &facts.cpu_models, model),
            Self::MachineType(machine) => usable(|facts| &facts.machine_types, machine),
        }
    }
}

/// What a guest asks of a host to be so, and not to be so.
fn conditions(guest: &GuestFacts) -> (Vec<Condition>, Vec<Condition>) {
    let policy = &guest.policy;
    let mut need: Vec<Condition> = policy.need.iter().cloned().map(Condition::Label).collect();
    need.extend(guest.cpu_model.clone().map(Condition::CpuModel));
    need.extend(guest.machine_type.clone().map(Condition::MachineType));
    (need, policy.avoid.iter().cloned().map(Condition::Label).collect())
}

/// The instance, its hosts in the order of `topology.hosts`, its guests in that of `guests`.
pub(super) fn instance(
    topology: &Topology,
    hosts: &[HostFacts],
    guests: &[GuestFacts],
) -> Result<Instance, FleetError> {
    let facts: BTreeMap<&HostName, &HostFacts> = hosts.iter().map(|facts| (&facts.name, facts)).collect();
    let mut bits: BTreeMap<Condition, u64> = BTreeMap::new();
    for (need, avoid) in guests.iter().map(conditions) {
        for condition in need.into_iter().chain(avoid) {
            bits.entry(condition).or_insert(0);
        }
    }
    if bits.len() > u64::BITS as usize {
        return Err(FleetError::TooManyConditions { count: bits.len() });
    }
    for (number, bit) in bits.values_mut().enumerate() {
        *bit = 1 << number;
    }
    let numbers: BTreeMap<&HostName, usize> = topology.hosts.keys().zip(0..).collect();
    let groups: BTreeSet<&String> = guests.iter().filter_map(|guest| guest.policy.group.as_ref()).collect();
    let groups: BTreeMap<&String, i64> = groups.into_iter().zip(0..).collect();
    let guest = |guest: &GuestFacts| {
        let group = guest.policy.group.as_ref().and_then(|group| groups.get(group)).copied().unwrap_or(-1);
        translate_guest(guest, &numbers, &bits, group)
    };
    Ok(Instance {
        format: FORMAT.into(),
        name: "fleet".into(),
        survive: topology.survive.clone(),
        params: Params::standard(),
        regions: areas(&topology.regions, |_, latency_us, in_mbit, out_mbit| Region { latency_us, in_mbit, out_mbit }),
        rooms: areas(&topology.rooms, |region, latency_us, in_mbit, out_mbit| Room {
            region,
            latency_us,
            in_mbit,
            out_mbit,
        }),
        racks: topology
            .racks
            .iter()
            .map(|rack| Rack {
                room: rack.room,
                switch: rack.switch,
                power: rack.power,
                latency_us: rack.link.latency_us,
                in_mbit: rack.link.in_mbit,
                out_mbit: rack.link.out_mbit,
            })
            .collect(),
        hosts: topology
            .hosts
            .keys()
            .map(|name| translate_host(topology, name, facts.get(name).copied(), &bits))
            .collect(),
        vms: guests.iter().map(guest).collect::<Result<_, _>>()?,
    })
}

fn areas<T>(areas: &[super::topology::Area], make: impl Fn(usize, i64, i64, i64) -> T) -> Vec<T> {
    areas.iter().map(|area| make(area.within, area.link.latency_us, area.link.in_mbit, area.link.out_mbit)).collect()
}

fn translate_host(
    topology: &Topology,
    name: &HostName,
    facts: Option<&HostFacts>,
    bits: &BTreeMap<Condition, u64>,
) -> Host {
    let site = &topology.hosts[name];
    let labels = bits.iter().filter(|(condition, _)| condition.holds(topology, name, facts)).map(|(_, bit)| bit).sum();
    let nothing = Capacity { total: 0, free: 0 };
    let cpu = facts.map_or(nothing, |facts| facts.cpu.clamped());
    let memory = facts.map_or(nothing, |facts| facts.memory.clamped());
    Host {
        rack: site.rack,
        // A host without an agent cannot be given orders.
        state: facts.map_or(HostState::Down, |facts| facts.state),
        cpu_cap_milli: cpu.total,
        memory_cap_mib: memory.total,
        cpu_milli: cpu.free,
        memory_mib: memory.free,
        far_mib: facts.map_or(0, |facts| facts.far_mib.clamp(0, MAX_AMOUNT)),
        vfs: facts.map_or(0, |facts| facts.vfs.clamp(0, MAX_AMOUNT)),
        in_mbit: site.link.in_mbit,
        out_mbit: site.link.out_mbit,
        generation: 0,
        labels,
        mem_cost: MEMORY_PRICE,
    }
}

fn translate_guest(
    guest: &GuestFacts,
    numbers: &BTreeMap<&HostName, usize>,
    bits: &BTreeMap<Condition, u64>,
    group: i64,
) -> Result<Guest, FleetError> {
    let number = |host: &HostName| numbers.get(host).copied();
    let unknown = || FleetError::UnknownPrimary { guest: guest.id.clone(), host: guest.primary.clone() };
    let (need, avoid) = conditions(guest);
    let mask = |conditions: Vec<Condition>| conditions.iter().filter_map(|condition| bits.get(condition)).sum();
    let copy = |(k, shadow): (usize, &super::policy::ShadowPolicy)| Copy {
        tier: shadow.tier.index(),
        latency_us: shadow.latency_us.map_or(i64::from(i32::MAX), i64::from),
        apart: shadow.apart,
        mbit: guest.stream_mbit.clamp(0, MAX_AMOUNT),
        current: guest.shadows.get(k).and_then(Option::as_ref).and_then(number).map_or(-1, |host| host as i64),
    };
    Ok(Guest {
        primary: number(&guest.primary).ok_or_else(unknown)?,
        cpu_milli: guest.cpu_milli.clamp(0, MAX_AMOUNT),
        memory_mib: guest.memory_mib.saturating_add(SHADOW_OVERHEAD_MIB).clamp(0, MAX_AMOUNT),
        vfs: guest.vfs.clamp(0, MAX_AMOUNT),
        weight: i64::from(guest.policy.priority),
        generation: 0,
        need: mask(need),
        avoid: mask(avoid),
        barred: guest.excluded.iter().filter_map(number).collect(),
        group,
        copies: guest.policy.shadows.iter().enumerate().map(copy).collect(),
    })
}

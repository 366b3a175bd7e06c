//! An instance laid out for the search: hosts ordered so that each room, and each zone, is a range.
//!
//! A *zone* is the smallest set of rooms of which no switch and no power domain reaches into another room. Moves within
//! a room of one zone touch nothing that moves in another zone read or write, so zones can be searched side by side.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::instance::{HostState, Instance, Level};

/// No host, no group.
pub(super) const NONE: u32 = u32::MAX;
/// Levels that no other level of the same list implies: at most switch, power, and room or region.
const MAX_LEVELS: usize = 3;
/// Up to so many shadows a plan is improved as a whole, beyond by zones.
pub(super) const SMALL: usize = 6_000;
/// Beyond so many there is time for few moves a shadow.
const LARGE: usize = 30_000;

pub(super) struct Problem<'a> {
    pub(super) instance: &'a Instance,
    /// In search order; `original` maps back, `internal` there.
    pub(super) sites: Vec<Site>,
    pub(super) original: Vec<u32>,
    pub(super) internal: Vec<u32>,
    pub(super) racks: Vec<Rack>,
    pub(super) rooms: Vec<Room>,
    pub(super) regions: Vec<Region>,
    pub(super) zones: Vec<Zone>,
    /// For a plan from nothing by the host of the primary, so that what is searched together lies together.
    pub(super) shadows: Vec<Shadow>,
    /// First shadow of each guest, and the end; guests in the order of `guests`, their positions in the instance.
    pub(super) first: Vec<u32>,
    pub(super) guests: Vec<u32>,
    /// Shadows by room of the primary, promotable ones first, largest first; and where each stands in that.
    pub(super) by_size: Vec<u32>,
    pub(super) size_rank: Vec<u32>,
    /// Hosts of the primaries of each anti-affinity group.
    pub(super) groups: Vec<Vec<u32>>,
    /// How many of [`Shadow::domains`] count.
    pub(super) levels: usize,
    /// Price of a Mbit/s that stays in the room, leaves it, leaves the region.
    pub(super) net: [i64; 3],
    pub(super) cpu_price: i64,
    pub(super) far_price: i64,
    pub(super) balance: Balance,
    /// Cheapest MiB of any host.
    pub(super) least_mem_price: i64,
    /// Price of a milli-vCPU of [`super::strain`]; 0: it does not count.
    pub(super) strain_price: i64,
}

/// What does not change of a host.
#[derive(Clone)]
pub(super) struct Site {
    pub(super) rack: u32,
    pub(super) switch: u32,
    pub(super) power: u32,
    pub(super) room: u32,
    pub(super) region: u32,
    pub(super) generation: i32,
    pub(super) labels: u64,
    /// One way from the host to the rack's, the room's and the region's edge.
    pub(super) edge_us: [i32; 3],
    pub(super) state: HostState,
}

pub(super) struct Rack {
    pub(super) hosts: Range<u32>,
    pub(super) in_mbit: i64,
    pub(super) out_mbit: i64,
}

pub(super) struct Room {
    pub(super) hosts: Range<u32>,
    pub(super) in_mbit: i64,
    pub(super) out_mbit: i64,
}

pub(super) struct Region {
    pub(super) hosts: Vec<u32>,
    pub(super) in_mbit: i64,
    pub(super) out_mbit: i64,
}

#[derive(Default)]
pub(super) struct Zone {
    pub(super) hosts: Range<u32>,
    pub(super) racks: Range<u32>,
}

/// A copy to be placed. Amounts fit: see [`crate::instance::MAX_AMOUNT`].
#[derive(Clone)]
pub(super) struct Shadow {
    pub(super) guest: u32,
    pub(super) copy: u32,
    pub(super) primary: u32,
    /// Host it stands on, if that is not down.
    pub(super) current: u32,
    pub(super) cpu: i32,
    pub(super) mem: i32,
    pub(super) far: i32,
    pub(super) vf: i32,
    /// What a promotion adds; copy 0 only.
    pub(super) more_cpu: i32,
    pub(super) more_mem: i32,
    pub(super) more_vf: i32,
    pub(super) mbit: i32,
    pub(super) latency_us: i32,
    pub(super) generation: i32,
    pub(super) need: u64,
    pub(super) avoid: u64,
    /// Its guest bars some hosts: see [`Problem::bars`].
    pub(super) barred: bool,
    pub(super) group: u32,
    /// What fails together with the primary, one id a level.
    pub(super) domains: [u32; MAX_LEVELS],
    pub(super) promotes: bool,
    /// Power domain of the primary.
    pub(super) power: u32,
    pub(super) apart: Level,
    /// Where its host may be, seen from the primary: in its room, elsewhere in its region, in another region.
    pub(super) reach: [bool; 3],
    /// Cost of staying unplaced, without `churn`; of leaving `current`; the least anywhere.
    pub(super) unplaced: i64,
    pub(super) churn: i64,
    pub(super) least: i64,
    /// What it costs where it shares nothing: about the most that a move of it can change.
    pub(super) scale: i64,
}

/// Price of load: a convex function of the utilisation in thousandths.
pub(super) struct Balance {
    pub(super) host: i64,
    pub(super) rack: i64,
    pub(super) knots: Vec<(i64, i64)>,
    pub(super) first_knot: i64,
}

impl Balance {
    /// `phi` of `used` of `cap` (> 0).
    pub(super) fn phi(&self, used: i64, cap: i64) -> i64 {
        let permille = (1000 * used + cap - 1) / cap;
        self.knots.iter().map(|&(knot, slope)| slope * (permille - knot).max(0)).sum()
    }
    /// Up to which use of `cap` nothing is to be paid.
    pub(super) fn calm(&self, cap: i64) -> i64 {
        self.first_knot * cap / 1000
    }
}

/// Small fleets, whose plans are held to be next to the best there are, pay nothing. The largest, for which time
/// suffices for fewer moves a shadow, need a higher price for as much.
fn strain_price(shadows: usize, cpu_price: i64) -> i64 {
    let eighths = match shadows {
        n if n <= SMALL => 0,
        n if n <= LARGE => 1,
        _ => 5,
    };
    (cpu_price * eighths + 7) / 8
}

/// Round trip of two hosts that share nothing nearer than `shared` says: see SPEC of the format.
pub(super) fn round_trip_us(a: &Site, b: &Site) -> i32 {
    let edge = if a.rack == b.rack {
        return 12;
    } else if a.room == b.room {
        0
    } else if a.region == b.region {
        1
    } else {
        2
    };
    2 * (6 + a.edge_us[edge] + b.edge_us[edge])
}

impl<'a> Problem<'a> {
    pub(super) fn new(instance: &'a Instance) -> Self {
        let zone_of_room = zones_of_rooms(instance);
        let room_of = |host: usize| instance.racks[instance.hosts[host].rack].room;
        let mut original: Vec<u32> = (0..instance.hosts.len() as u32).collect();
        original.sort_by_key(|&h| {
            let room = room_of(h as usize);
            (zone_of_room[room], room, instance.hosts[h as usize].rack, h)
        });
        let mut internal = vec![0; original.len()];
        for (new, &old) in original.iter().enumerate() {
            internal[old as usize] = new as u32;
        }
        let mut rack_order: Vec<usize> = (0..instance.racks.len()).collect();
        rack_order.sort_by_key(|&r| (zone_of_room[instance.racks[r].room], instance.racks[r].room, r));
        let mut rack_id = vec![0; rack_order.len()];
        for (new, &old) in rack_order.iter().enumerate() {
            rack_id[old] = new as u32;
        }
        let sites: Vec<Site> = original.iter().map(|&h| site(instance, h as usize, &rack_id)).collect();
        let rack =
            |&r: &usize| Rack { hosts: 0..0, in_mbit: instance.racks[r].in_mbit, out_mbit: instance.racks[r].out_mbit };
        let mut racks: Vec<Rack> = rack_order.iter().map(rack).collect();
        for (host, site) in sites.iter().enumerate() {
            widen(&mut racks[site.rack as usize].hosts, host as u32);
        }
        let cost = &instance.params.cost;
        let mut problem = Self {
            instance,
            rooms: rooms(instance, &sites),
            regions: regions(instance, &sites),
            zones: zones(instance, &zone_of_room, &sites, &rack_order),
            racks,
            shadows: Vec::new(),
            first: Vec::new(),
            guests: Vec::new(),
            by_size: Vec::new(),
            size_rank: Vec::new(),
            groups: Vec::new(),
            levels: 0,
            net: [cost.net_room, cost.net_xroom, cost.net_xregion],
            cpu_price: cost.cpu,
            far_price: cost.far,
            balance: Balance {
                host: cost.bal_host,
                rack: cost.bal_rack,
                knots: cost.bal_knots.clone(),
                first_knot: cost.bal_knots.iter().map(|&(knot, _)| knot).min().unwrap_or(i64::from(u16::MAX)),
            },
            least_mem_price: instance.hosts.iter().map(|host| host.mem_cost).min().unwrap_or(0),
            sites,
            original,
            internal,
            strain_price: strain_price(instance.copies(), cost.cpu),
        };
        problem.add_shadows();
        problem
    }

    /// Whether the guest of `shadow` must not have a copy on `host`.
    pub(super) fn bars(&self, shadow: &Shadow, host: u32) -> bool {
        let vm = || &self.instance.vms[self.guests[shadow.guest as usize] as usize];
        shadow.barred && vm().barred.contains(&(self.original[host as usize] as usize))
    }

    fn add_shadows(&mut self) {
        let (domains, levels) = self.domains();
        self.levels = levels;
        let nearest = self.nearest_edges();
        let instance = self.instance;
        self.guests = (0..instance.vms.len() as u32).collect();
        // A re-plan looks at each shadow once or twice: reading the instance in its own order is what counts then.
        if !instance.is_replan() {
            self.guests.sort_by_key(|&guest| self.internal[instance.vms[guest as usize].primary]);
        }
        let mut group_ids = BTreeMap::new();
        let mut groups: Vec<Vec<u32>> = Vec::new();
        self.shadows.reserve_exact(instance.copies());
        self.first.reserve_exact(instance.vms.len() + 1);
        for guest in 0..self.guests.len() {
            let vm = &instance.vms[self.guests[guest] as usize];
            self.first.push(self.shadows.len() as u32);
            let primary = self.internal[vm.primary];
            let group = if vm.group < 0 {
                NONE
            } else {
                let id = *group_ids.entry(vm.group).or_insert_with(|| {
                    groups.push(Vec::new());
                    groups.len() as u32 - 1
                });
                groups[id as usize].push(primary);
                id
            };
            for copy in 0..vm.copies.len() {
                let mut shadow = self.shadow(guest, copy, primary, group);
                shadow.domains = domains[primary as usize];
                shadow.reach = self.reach(&shadow, &nearest);
                self.shadows.push(shadow);
            }
        }
        self.first.push(self.shadows.len() as u32);
        self.groups = groups;
        self.sort_by_size();
    }

    fn sort_by_size(&mut self) {
        // Amounts are not negative; the complement sorts the largest first.
        let largest_first = |amount: i32| u128::from(!(amount as u32));
        let key = |shadow: &Shadow| {
            let room = u128::from(self.sites[shadow.primary as usize].room);
            (room << 104 | u128::from(shadow.copy.min(255)) << 96)
                | largest_first(shadow.more_mem) << 64
                | largest_first(shadow.more_cpu) << 32
                | largest_first(shadow.mem + shadow.more_mem)
        };
        let mut by_size: Vec<(u128, u32)> = self.shadows.iter().map(key).zip(0..).collect();
        by_size.sort_unstable();
        self.by_size = by_size.into_iter().map(|(_, id)| id).collect();
        self.size_rank = vec![0; self.by_size.len()];
        for (rank, &id) in self.by_size.iter().enumerate() {
            self.size_rank[id as usize] = rank as u32;
        }
    }

    /// Least way of any host to the edge of each region's rooms, and of any region.
    fn nearest_edges(&self) -> (Vec<i32>, i32) {
        let mut edges = vec![i32::MAX / 8; self.regions.len()];
        let mut far = i32::MAX / 8;
        for site in &self.sites {
            let edge = &mut edges[site.region as usize];
            *edge = (*edge).min(site.edge_us[1]);
            far = far.min(site.edge_us[2]);
        }
        (edges, far)
    }

    fn reach(&self, shadow: &Shadow, (edges, far): &(Vec<i32>, i32)) -> [bool; 3] {
        let primary = &self.sites[shadow.primary as usize];
        let within = |way: i32, edge: usize| 2 * (6 + primary.edge_us[edge] + way) <= shadow.latency_us;
        [
            matches!(shadow.apart, Level::Rack) && within(0, 0),
            !matches!(shadow.apart, Level::Region) && within(edges[primary.region as usize], 1),
            self.regions.len() > 1 && within(*far, 2),
        ]
    }

    fn shadow(&self, guest: usize, k: usize, primary: u32, group: u32) -> Shadow {
        let cost = &self.instance.params.cost;
        let vm = &self.instance.vms[self.guests[guest] as usize];
        let copy = &vm.copies[k];
        let tier = &self.instance.params.tiers[copy.tier];
        let share = |amount: i64, permille: i64| (amount * permille + 999) / 1000;
        let (cpu, mem) = (share(vm.cpu_milli, tier.cpu_permille), share(vm.memory_mib, tier.memory_permille));
        let (far, vf) = (share(vm.memory_mib, tier.far_permille), vm.vfs * tier.vf);
        let promotes = k == 0;
        let more = |all: i64, held: i64| if promotes { (all - held) as i32 } else { 0 };
        let current = match usize::try_from(copy.current) {
            Ok(host) if self.instance.hosts[host].state != HostState::Down => self.internal[host],
            _ => NONE,
        };
        let first = if promotes { cost.unplaced_first } else { 1 };
        let dearest =
            if matches!(copy.apart, Level::Rack) { self.net.iter().min() } else { self.net[1..].iter().min() };
        Shadow {
            guest: guest as u32,
            copy: k as u32,
            primary,
            current,
            cpu: cpu as i32,
            mem: mem as i32,
            far: far as i32,
            vf: vf as i32,
            more_cpu: more(vm.cpu_milli, cpu),
            more_mem: more(vm.memory_mib, mem),
            more_vf: more(vm.vfs, vf),
            mbit: copy.mbit as i32,
            latency_us: copy.latency_us as i32,
            generation: vm.generation as i32,
            need: vm.need,
            avoid: vm.avoid,
            barred: !vm.barred.is_empty(),
            group,
            domains: [0; MAX_LEVELS],
            promotes,
            power: self.sites[primary as usize].power,
            apart: copy.apart,
            reach: [false; 3],
            unplaced: vm.weight * (cost.unplaced_fixed + cost.unplaced_mem * vm.memory_mib) * first,
            churn: if current == NONE { 0 } else { cost.moved * vm.memory_mib },
            scale: self.least_mem_price * if promotes { vm.memory_mib } else { mem }
                + cost.far * far
                + cost.cpu * if promotes { vm.cpu_milli } else { cpu }
                + copy.mbit * dearest.copied().unwrap_or(0),
            least: self.least_mem_price * mem
                + cost.far * far
                + cost.cpu * cpu
                + copy.mbit * dearest.copied().unwrap_or(0),
        }
    }

    /// Per host the domains whose loss its primaries share, as ids that differ between levels; and the number of levels.
    /// A level that another one implies (a rack is lost with its switch, at the latest) is left out.
    fn domains(&self) -> (Vec<[u32; MAX_LEVELS]>, usize) {
        let mut survive = self.instance.survive.clone();
        survive.sort();
        survive.dedup();
        let ids: Vec<Vec<u32>> = survive
            .iter()
            .map(|&level| (0..self.sites.len()).map(|host| domain(&self.sites, level, host)).collect())
            .collect();
        let needed: Vec<&Vec<u32>> = (0..ids.len())
            .filter(|&a| {
                !(0..ids.len()).any(|b| b != a && refines(&ids[a], &ids[b]) && (a < b || !refines(&ids[b], &ids[a])))
            })
            .map(|a| &ids[a])
            .collect();
        let mut domains = vec![[0; MAX_LEVELS]; self.sites.len()];
        let mut base = 0;
        for (level, ids) in needed.iter().enumerate() {
            let mut compact = BTreeMap::new();
            for (host, &id) in ids.iter().enumerate() {
                let next = base + compact.len() as u32;
                domains[host][level] = *compact.entry(id).or_insert(next);
            }
            base += compact.len() as u32;
        }
        (domains, needed.len())
    }

    pub(super) fn shadows_of(&self, guest: u32) -> Range<u32> {
        self.first[guest as usize]..self.first[guest as usize + 1]
    }
}

fn domain(sites: &[Site], level: Level, host: usize) -> u32 {
    let site = &sites[host];
    match level {
        Level::Host => host as u32,
        Level::Rack => site.rack,
        Level::Switch => site.switch,
        Level::Power => site.power,
        Level::Room => site.room,
        Level::Region => site.region,
    }
}

/// Whether hosts that share an `a` always share a `b`.
fn refines(a: &[u32], b: &[u32]) -> bool {
    let mut of = BTreeMap::new();
    a.iter().zip(b).all(|(a, b)| of.entry(a).or_insert(b) == &b)
}

fn site(instance: &Instance, host: usize, rack_id: &[u32]) -> Site {
    let host = &instance.hosts[host];
    let rack = &instance.racks[host.rack];
    let room = &instance.rooms[rack.room];
    let to_room = rack.latency_us + room.latency_us;
    Site {
        rack: rack_id[host.rack],
        switch: rack.switch,
        power: rack.power,
        room: rack.room as u32,
        region: room.region as u32,
        generation: host.generation as i32,
        labels: host.labels,
        edge_us: [rack.latency_us, to_room, to_room + instance.regions[room.region].latency_us].map(|us| us as i32),
        state: host.state,
    }
}

/// Adds `host`, which follows what is in `range`.
fn widen(range: &mut Range<u32>, host: u32) {
    if range.start == range.end {
        range.start = host;
    }
    range.end = host + 1;
}

fn rooms(instance: &Instance, sites: &[Site]) -> Vec<Room> {
    let mut rooms: Vec<Room> = instance
        .rooms
        .iter()
        .map(|room| Room { hosts: 0..0, in_mbit: room.in_mbit, out_mbit: room.out_mbit })
        .collect();
    for (host, site) in sites.iter().enumerate() {
        let room = &mut rooms[site.room as usize];
        widen(&mut room.hosts, host as u32);
    }
    rooms
}

fn regions(instance: &Instance, sites: &[Site]) -> Vec<Region> {
    let mut regions: Vec<Region> = instance
        .regions
        .iter()
        .map(|region| Region { hosts: Vec::new(), in_mbit: region.in_mbit, out_mbit: region.out_mbit })
        .collect();
    for (host, site) in sites.iter().enumerate() {
        regions[site.region as usize].hosts.push(host as u32);
    }
    regions
}

/// Zone of each room: rooms that share a switch or a power domain share it.
fn zones_of_rooms(instance: &Instance) -> Vec<usize> {
    let mut zone: Vec<usize> = (0..instance.rooms.len()).collect();
    fn find(zone: &mut [usize], mut room: usize) -> usize {
        while zone[room] != room {
            zone[room] = zone[zone[room]];
            room = zone[room];
        }
        room
    }
    let (mut by_switch, mut by_power) = (BTreeMap::new(), BTreeMap::new());
    for rack in &instance.racks {
        let others =
            [*by_switch.entry(rack.switch).or_insert(rack.room), *by_power.entry(rack.power).or_insert(rack.room)];
        for other in others {
            let (a, b) = (find(&mut zone, rack.room), find(&mut zone, other));
            zone[a.max(b)] = a.min(b);
        }
    }
    (0..zone.len()).map(|room| find(&mut zone, room)).collect()
}

fn zones(instance: &Instance, zone_of_room: &[usize], sites: &[Site], rack_order: &[usize]) -> Vec<Zone> {
    let mut zones: BTreeMap<usize, Zone> = BTreeMap::new();
    for (host, site) in sites.iter().enumerate() {
        let zone = zones.entry(zone_of_room[site.room as usize]).or_default();
        widen(&mut zone.hosts, host as u32);
    }
    for (rack, &old) in rack_order.iter().enumerate() {
        if let Some(zone) = zones.get_mut(&zone_of_room[instance.racks[old].room]) {
            widen(&mut zone.racks, rack as u32);
        }
    }
    zones.into_values().collect()
}

//! How OpenStack Nova would place them: one request after the other, all rules as filters, and the host with the most free
//! memory, CPU and bandwidth, each scaled to 0..1 over the hosts that are left, as its weighers do.

use placement::checker;
use placement::instance::{Instance, Level, Plan};

/// Sums of one host or link.
#[derive(Clone, Default)]
struct Used {
    cpu: i64,
    mem: i64,
    far: i64,
    vf: i64,
    in_mbit: i64,
    out_mbit: i64,
    /// CPU, memory, VFs of promotions for each domain that can fail.
    promoted: std::collections::BTreeMap<(Level, u64), [i64; 3]>,
}

impl Used {
    fn reserve(&self) -> [i64; 3] {
        let mut reserve = [0; 3];
        for sums in self.promoted.values() {
            for r in 0..3 {
                reserve[r] = reserve[r].max(sums[r]);
            }
        }
        reserve
    }
}

struct Scheduler<'a> {
    instance: &'a Instance,
    hosts: Vec<Used>,
    racks: Vec<(i64, i64)>,
    rooms: Vec<(i64, i64)>,
    regions: Vec<(i64, i64)>,
    place: Vec<Vec<i64>>,
    groups: std::collections::BTreeMap<i64, Vec<usize>>,
}

struct Request {
    guest: usize,
    copy: usize,
    held: [i64; 4],
    more: [i64; 3],
}

/// A plan in the order of requests: all first copies, then all second ones, and so on.
pub fn place(instance: &Instance) -> Plan {
    let mut groups = std::collections::BTreeMap::new();
    for (i, vm) in instance.vms.iter().enumerate().filter(|(_, vm)| vm.group >= 0) {
        groups.entry(vm.group).or_insert_with(Vec::new).push(i);
    }
    let mut scheduler = Scheduler {
        instance,
        hosts: vec![Used::default(); instance.hosts.len()],
        racks: vec![(0, 0); instance.racks.len()],
        rooms: vec![(0, 0); instance.rooms.len()],
        regions: vec![(0, 0); instance.regions.len()],
        place: instance.vms.iter().map(|vm| vec![-1; vm.copies.len()]).collect(),
        groups,
    };
    let most = instance.vms.iter().map(|vm| vm.copies.len()).max().unwrap_or(0);
    for copy in 0..most {
        for guest in (0..instance.vms.len()).filter(|&guest| copy < instance.vms[guest].copies.len()) {
            scheduler.schedule(guest, copy);
        }
    }
    Plan { place: scheduler.place, ..Plan::default() }
}

impl Scheduler<'_> {
    fn schedule(&mut self, guest: usize, copy: usize) {
        let demand = checker::demand(self.instance, &self.instance.vms[guest], copy);
        let request = Request { guest, copy, held: demand.held, more: demand.more };
        let mut fit: Vec<(usize, [i64; 3])> = Vec::new();
        for host in 0..self.instance.hosts.len() {
            if let Some(free) = self.filter(&request, host) {
                fit.push((host, free));
            }
        }
        let range = |r: usize| {
            let values = fit.iter().map(|(_, free)| free[r]);
            (values.clone().min().unwrap_or(0) as f64, values.max().unwrap_or(0) as f64)
        };
        let ranges = [range(0), range(1), range(2)];
        let weight = |free: &[i64; 3]| -> f64 {
            let scaled = |(r, &(low, high)): (usize, &(f64, f64))| {
                if high > low { (free[r] as f64 - low) / (high - low) } else { 0.0 }
            };
            ranges.iter().enumerate().map(scaled).sum()
        };
        let best = fit.iter().map(|(host, free)| (weight(free), *host)).reduce(|a, b| if b.0 > a.0 { b } else { a });
        if let Some((_, host)) = best {
            self.take(&request, host);
        }
    }

    fn domains(&self, guest: usize) -> impl Iterator<Item = (Level, u64)> + use<'_> {
        let primary = self.instance.vms[guest].primary;
        self.instance.survive.iter().map(move |&level| (level, checker::domain(self.instance, level, primary)))
    }

    /// What would be free of memory, CPU and bandwidth; none: a filter rejects the host.
    fn filter(&self, request: &Request, host: usize) -> Option<[i64; 3]> {
        let instance = self.instance;
        let vm = &instance.vms[request.guest];
        let copy = &vm.copies[request.copy];
        if checker::site_rule(instance, vm, copy, host).is_some() {
            return None;
        }
        let near =
            |&other: &i64| usize::try_from(other).is_ok_and(|other| checker::fail_together(instance, host, other));
        if self.place[request.guest].iter().any(near) {
            return None;
        }
        let members = self.groups.get(&vm.group).map_or(&[][..], |members| &members[..]);
        if members.iter().any(|&i| instance.vms[i].primary == host || self.place[i].contains(&(host as i64))) {
            return None;
        }
        let (there, used) = (&instance.hosts[host], &self.hosts[host]);
        let mut reserve = used.reserve();
        if request.copy == 0 {
            for domain in self.domains(request.guest) {
                let sums = used.promoted.get(&domain).copied().unwrap_or_default();
                for r in 0..3 {
                    reserve[r] = reserve[r].max(sums[r] + request.more[r]);
                }
            }
        }
        let free = [
            there.memory_mib - used.mem - request.held[1] - reserve[1],
            there.cpu_milli - used.cpu - request.held[0] - reserve[0],
            there.in_mbit - used.in_mbit - copy.mbit,
        ];
        let room = used.far + request.held[2] <= there.far_mib
            && used.vf + request.held[3] + reserve[2] <= there.vfs
            && free.iter().all(|&free| free >= 0);
        (room && self.links_carry(vm.primary, host, copy.mbit)).then_some(free)
    }

    fn links_carry(&self, from: usize, to: usize, mbit: i64) -> bool {
        let instance = self.instance;
        let rack = |host: usize| instance.hosts[host].rack;
        let room = |host: usize| instance.racks[rack(host)].room;
        let region = |host: usize| instance.rooms[room(host)].region;
        self.racks[rack(to)].0 + mbit <= instance.racks[rack(to)].in_mbit
            && self.hosts[from].out_mbit + mbit <= instance.hosts[from].out_mbit
            && self.racks[rack(from)].1 + mbit <= instance.racks[rack(from)].out_mbit
            && (room(from) == room(to)
                || (self.rooms[room(to)].0 + mbit <= instance.rooms[room(to)].in_mbit
                    && self.rooms[room(from)].1 + mbit <= instance.rooms[room(from)].out_mbit))
            && (region(from) == region(to)
                || (self.regions[region(to)].0 + mbit <= instance.regions[region(to)].in_mbit
                    && self.regions[region(from)].1 + mbit <= instance.regions[region(from)].out_mbit))
    }

    fn take(&mut self, request: &Request, host: usize) {
        let instance = self.instance;
        let vm = &instance.vms[request.guest];
        let mbit = vm.copies[request.copy].mbit;
        let domains: Vec<_> = if request.copy == 0 { self.domains(request.guest).collect() } else { Vec::new() };
        let used = &mut self.hosts[host];
        used.cpu += request.held[0];
        used.mem += request.held[1];
        used.far += request.held[2];
        used.vf += request.held[3];
        used.in_mbit += mbit;
        for domain in domains {
            let sums = used.promoted.entry(domain).or_default();
            (0..3).for_each(|r| sums[r] += request.more[r]);
        }
        self.hosts[vm.primary].out_mbit += mbit;
        let (from, to) = (instance.hosts[vm.primary].rack, instance.hosts[host].rack);
        self.racks[to].0 += mbit;
        self.racks[from].1 += mbit;
        let (from, to) = (instance.racks[from].room, instance.racks[to].room);
        if from != to {
            self.rooms[to].0 += mbit;
            self.rooms[from].1 += mbit;
            let (from, to) = (instance.rooms[from].region, instance.rooms[to].region);
            if from != to {
                self.regions[to].0 += mbit;
                self.regions[from].1 += mbit;
            }
        }
        self.place[request.guest][request.copy] = host as i64;
    }
}

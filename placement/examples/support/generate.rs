//! The benchmark's generator: size, shape and seed give the instance that its `bench.py gen` prints.

use placement::instance::{Copy, FORMAT, Guest, Host, HostState, Instance, Level, Params, Rack, Region, Room};

/// splitmix64, as the benchmark uses it.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: i64) -> i64 {
        ((u128::from(self.next()) * n as u128) >> 64) as i64
    }
    fn permille(&mut self, p: i64) -> bool {
        self.below(1000) < p
    }
    fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below(high - low + 1)
    }
    fn pick<T: std::marker::Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as i64) as usize]
    }
    fn weighted<T: std::marker::Copy>(&mut self, table: &[(T, i64)]) -> T {
        let mut t = self.below(table.iter().map(|(_, weight)| weight).sum());
        for &(item, weight) in table {
            if t < weight {
                return item;
            }
            t -= weight;
        }
        table[table.len() - 1].0
    }
}

/// vCPU and GiB of guests, per mille.
const MIX: [((i64, i64), i64); 13] = [
    ((1, 2), 80),
    ((2, 4), 180),
    ((2, 8), 110),
    ((4, 8), 190),
    ((4, 16), 110),
    ((8, 16), 80),
    ((8, 32), 110),
    ((16, 32), 50),
    ((16, 64), 45),
    ((32, 64), 25),
    ((32, 128), 15),
    ((64, 128), 3),
    ((64, 256), 2),
];
/// vCPU, GiB, generation and price of a MiB of hosts.
const CLASSES: [((i64, i64, i64, i64), i64); 3] =
    [((96, 384, 1, 10), 50), ((128, 512, 2, 10), 38), ((64, 768, 2, 6), 12)];

/// What a shape changes.
struct Shape {
    guests_per_host: Option<i64>,
    rack_mbit_pm: i64,
    host_mbit_pm: i64,
    no_far_pm: i64,
    pair: bool,
    power: bool,
    skew: bool,
    drain_pm: i64,
}

fn shape(name: &str) -> Option<Shape> {
    let base = Shape {
        guests_per_host: None,
        rack_mbit_pm: 1000,
        host_mbit_pm: 1000,
        no_far_pm: 200,
        pair: false,
        power: false,
        skew: false,
        drain_pm: 0,
    };
    Some(match name {
        "base" => base,
        "pair" => Shape { pair: true, ..base },
        "power" => Shape { power: true, ..base },
        "tight" => Shape { guests_per_host: Some(13), rack_mbit_pm: 620, no_far_pm: 350, ..base },
        "bwtight" => Shape { rack_mbit_pm: 430, host_mbit_pm: 700, ..base },
        "skew" => Shape { skew: true, ..base },
        "drain" => Shape { drain_pm: 60, ..base },
        _ => return None,
    })
}

/// Regions, rooms a region, racks a room, hosts a rack, guests a host.
fn size(name: &str) -> Option<[i64; 5]> {
    Some(match name {
        "XS" => [1, 2, 4, 1, 6],
        "S" => [1, 2, 5, 2, 10],
        "M" => [1, 2, 10, 10, 10],
        "L" => [2, 2, 25, 20, 10],
        "XL" => [2, 5, 50, 20, 10],
        _ => return None,
    })
}

/// None: there is no such size or shape.
pub fn generate(size_name: &str, shape_name: &str, seed: u64) -> Option<Instance> {
    let (dimensions, shape) = (size(size_name)?, shape(shape_name)?);
    let mut rng = Rng(seed.wrapping_mul(1_000_003).wrapping_add(17));
    let mut instance = Instance {
        format: FORMAT.into(),
        name: format!("{size_name}-{shape_name}-{seed}"),
        survive: if shape.power {
            vec![Level::Rack, Level::Switch, Level::Power]
        } else {
            vec![Level::Rack, Level::Switch]
        },
        params: Params::standard(),
        regions: Vec::new(),
        rooms: Vec::new(),
        racks: Vec::new(),
        hosts: Vec::new(),
        vms: Vec::new(),
    };
    sites(&mut instance, dimensions, &shape, &mut rng);
    hosts(&mut instance, dimensions, &shape, &mut rng);
    guests(&mut instance, dimensions, &shape, &mut rng);
    groups(&mut instance, &mut rng);
    links(&mut instance, dimensions, &shape);
    Some(instance)
}

fn sites(instance: &mut Instance, [regions, rooms, racks, ..]: [i64; 5], shape: &Shape, rng: &mut Rng) {
    for _ in 0..regions {
        instance.regions.push(Region { latency_us: rng.between(1500, 2500), in_mbit: 0, out_mbit: 0 });
    }
    for region in 0..regions as usize {
        for _ in 0..rooms {
            instance.rooms.push(Room { region, latency_us: rng.between(30, 60), in_mbit: 0, out_mbit: 0 });
        }
    }
    let mut switches = 0;
    for room in 0..instance.rooms.len() {
        for k in 0..racks as u32 {
            let switch = if shape.pair { switches + k / 2 } else { switches + k };
            let power = room as u32 * 4 + k % 4;
            instance.racks.push(Rack { room, switch, power, latency_us: rng.between(6, 12), in_mbit: 0, out_mbit: 0 });
        }
        switches += if shape.pair { (racks as u32).div_ceil(2) } else { racks as u32 };
    }
}

fn hosts(instance: &mut Instance, [.., per_rack, _]: [i64; 5], shape: &Shape, rng: &mut Rng) {
    for rack in 0..instance.racks.len() {
        let count = if shape.skew { (per_rack / 2 + rng.below(per_rack + 1)).max(1) } else { per_rack };
        let of_rack = if rng.permille(250) { 4 } else { 0 };
        for _ in 0..count {
            let (vcpus, gib, generation, mem_cost) = rng.weighted(&CLASSES);
            let labels = u64::from(rng.permille(300)) | if rng.permille(500) { 2 } else { 0 } | of_rack;
            let state = if rng.permille(shape.drain_pm) { HostState::Drain } else { HostState::Up };
            instance.hosts.push(Host {
                rack,
                state,
                cpu_cap_milli: vcpus * 1000,
                memory_cap_mib: gib * 1024,
                cpu_milli: vcpus * 1000,
                memory_mib: gib * 1024 - 16384,
                far_mib: if rng.permille(shape.no_far_pm) { 0 } else { 2 << 20 },
                vfs: rng.pick(&[16, 32, 64]),
                in_mbit: 0,
                out_mbit: 0,
                generation,
                labels,
                mem_cost,
            });
        }
    }
}

fn guests(instance: &mut Instance, dimensions: [i64; 5], shape: &Shape, rng: &mut Rng) {
    let count = instance.hosts.len() as i64;
    let target = count * shape.guests_per_host.unwrap_or(dimensions[4]);
    let share = |host: &Host| if host.mem_cost == 6 { 30 } else { 82 };
    let mut cpu: Vec<i64> = instance.hosts.iter().map(|host| host.cpu_milli * share(host) / 100).collect();
    let mut memory: Vec<i64> = instance.hosts.iter().map(|host| host.memory_mib * 60 / 100).collect();
    for _ in 0..target * 6 {
        if instance.vms.len() as i64 >= target {
            break;
        }
        let (vcpus, gib) = rng.weighted(&MIX);
        let (cpu_milli, memory_mib) = (vcpus * 1000, gib * 1024);
        let (mut primary, other) = (rng.below(count) as usize, rng.below(count) as usize);
        if cpu[other] > cpu[primary] {
            primary = other;
        }
        let vfs = rng.weighted(&[(0, 60), (1, 30), (2, 10)]);
        if cpu[primary] < cpu_milli || memory[primary] < memory_mib || instance.hosts[primary].vfs < vfs + 4 {
            continue;
        }
        cpu[primary] -= cpu_milli;
        memory[primary] -= memory_mib;
        let host = &mut instance.hosts[primary];
        host.cpu_milli -= cpu_milli;
        host.memory_mib -= memory_mib;
        host.vfs -= vfs;
        let (labels, generation) = (host.labels, host.generation);
        let copies = copies(vcpus, dimensions[0], rng);
        let mut need = 0;
        if rng.permille(120) && labels != 0 {
            let bits: Vec<u64> = [1, 2, 4].into_iter().filter(|bit| labels & bit != 0).collect();
            need = rng.pick(&bits);
        }
        let avoid = u64::from(labels & 1 == 0 && rng.permille(40));
        let weight = rng.weighted(&[(1, 70), (2, 20), (4, 10)]);
        let generation = if rng.permille(300) { generation } else { 1 };
        instance.vms.push(Guest {
            primary,
            cpu_milli,
            memory_mib,
            vfs,
            weight,
            generation,
            need,
            avoid,
            group: -1,
            barred: Vec::new(),
            copies,
        });
    }
}

fn copies(vcpus: i64, regions: i64, rng: &mut Rng) -> Vec<Copy> {
    let dirty = rng.pick(&[2, 4, 8, 12, 20, 35, 60, 120]) * vcpus.isqrt().max(1);
    let compression = rng.pick(&[2, 3, 4, 6]);
    let count = rng.weighted(&[(1, 80), (2, 15), (3, 5)]);
    let copy = |k: i64| {
        let tier = match k {
            0 => rng.weighted(&[(0, 40), (1, 45), (2, 15)]),
            1 => rng.weighted(&[(1, 50), (2, 50)]),
            _ => 2,
        };
        let mut latency_us = match tier {
            0 if rng.permille(600) => 100,
            0 => 400,
            1 => rng.pick(&[400, 1000]),
            _ => 20000,
        };
        let mut apart = Level::Rack;
        if k == 1 && rng.permille(500) {
            apart = Level::Room;
        }
        if k == 2 {
            apart = if regions > 1 { Level::Region } else { Level::Room };
        }
        match apart {
            Level::Room => latency_us = latency_us.max(400),
            Level::Region => latency_us = latency_us.max(20000),
            _ => (),
        }
        let mbit = (dirty * 8 * [10, 6, 2][tier] / (10 * compression)).max(1);
        Copy { tier, latency_us, apart, mbit, current: -1 }
    };
    (0..count).map(copy).collect()
}

/// Guests that follow each other, on hosts that differ.
fn groups(instance: &mut Instance, rng: &mut Rng) {
    let (mut group, mut i) = (0, 0);
    while i + 5 < instance.vms.len() {
        if !rng.permille(30) {
            i += 1;
            continue;
        }
        let count = rng.between(3, 5) as usize;
        let mut seen = Vec::new();
        let mut members = Vec::new();
        for number in i..i + count {
            let primary = instance.vms[number].primary;
            if !seen.contains(&primary) {
                seen.push(primary);
                members.push(number);
            }
        }
        if members.len() > 1 {
            members.into_iter().for_each(|number| instance.vms[number].group = group);
            group += 1;
        }
        i += count;
    }
}

/// Budgets of links, from what all streams take together.
fn links(instance: &mut Instance, [_, rooms, racks, hosts, _]: [i64; 5], shape: &Shape) {
    let streams = || instance.vms.iter().flat_map(|vm| &vm.copies).map(|copy| copy.mbit);
    let (all, most) = (streams().sum::<i64>(), streams().max().unwrap_or(0));
    let per_host = (all / instance.hosts.len() as i64).max(1);
    let mut in_rack = vec![0; instance.racks.len()];
    for host in &mut instance.hosts {
        host.in_mbit = (per_host * 4).max(most) * shape.host_mbit_pm / 1000;
        host.out_mbit = (per_host * 6).max(2 * most);
        in_rack[host.rack] += 1;
    }
    let small = instance.hosts.len() <= 400;
    for (rack, count) in instance.racks.iter_mut().zip(in_rack) {
        let count = if small { count } else { hosts };
        rack.in_mbit = (per_host * count * 22 / 10).max(most * 2) * shape.rack_mbit_pm / 1000;
        rack.out_mbit = (per_host * count * 4).max(most * 4);
    }
    for room in &mut instance.rooms {
        room.in_mbit = per_host * racks * hosts * 8 / 10;
        room.out_mbit = room.in_mbit;
    }
    for region in &mut instance.regions {
        region.in_mbit = per_host * racks * hosts * rooms * 3 / 10;
        region.out_mbit = region.in_mbit;
    }
}

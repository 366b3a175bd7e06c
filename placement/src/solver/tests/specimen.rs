//! Random instances: small hosts, all rules and links in play, several shapes of switches and power domains.

use super::super::rng::Rng;
use crate::instance::*;

#[derive(Clone, Copy)]
pub(super) struct Size {
    regions: u32,
    rooms: u32,
    racks: u32,
    hosts: u32,
    guests: u32,
    copies: u32,
}

impl Size {
    /// Four copies on up to five hosts: every plan can be tried.
    pub(super) const TINY: Self = Self { regions: 1, rooms: 1, racks: 5, hosts: 1, guests: 4, copies: 1 };
    pub(super) const SMALL: Self = Self { regions: 2, rooms: 2, racks: 4, hosts: 2, guests: 60, copies: 3 };
    pub(super) const LARGE: Self = Self { regions: 2, rooms: 2, racks: 10, hosts: 10, guests: 4_000, copies: 3 };
}

pub(super) fn specimen(size: Size, seed: u64) -> Instance {
    let mut rng = Rng::of(seed, 0);
    let mut pick = |from: &[i64]| from[rng.below(from.len() as u32) as usize];
    let survive = match pick(&[0, 1, 2, 3]) {
        0 => vec![Level::Rack, Level::Switch],
        1 => vec![Level::Rack, Level::Switch, Level::Power],
        2 => vec![Level::Host],
        _ => vec![Level::Power, Level::Room],
    };
    let (wide_switches, wide_power) = (pick(&[0, 1]) == 1, pick(&[1, 2, 4]));
    let mut instance = Instance {
        format: FORMAT.into(),
        name: format!("specimen {seed}"),
        survive,
        params: Params::standard(),
        regions: Vec::new(),
        rooms: Vec::new(),
        racks: Vec::new(),
        hosts: Vec::new(),
        vms: Vec::new(),
    };
    let per_host = i64::from(size.guests / (size.regions * size.rooms * size.racks * size.hosts).max(1) + 1);
    for region in 0..size.regions {
        let mbit = 100 * per_host * i64::from(size.racks * size.hosts);
        instance.regions.push(Region { latency_us: 2_000, in_mbit: mbit, out_mbit: mbit });
        for _ in 0..size.rooms {
            let room = instance.rooms.len();
            instance.rooms.push(Room { region: region as usize, latency_us: 40, in_mbit: mbit, out_mbit: mbit });
            for _ in 0..size.racks {
                let rack = instance.racks.len();
                let switch = if wide_switches { rack / 2 } else { rack } as u32;
                instance.racks.push(Rack {
                    room,
                    switch,
                    // Domains that reach over rooms are allowed, too.
                    power: (rack as i64 / wide_power) as u32,
                    latency_us: pick(&[6, 8, 12]),
                    in_mbit: pick(&[150, 300, 600]) * per_host * i64::from(size.hosts),
                    out_mbit: 400 * per_host * i64::from(size.hosts),
                });
                for _ in 0..size.hosts {
                    instance.hosts.push(host(rack, per_host, &mut pick));
                }
            }
        }
    }
    let hosts: Vec<i64> = (0..instance.hosts.len() as i64).collect();
    for _ in 0..size.guests {
        let vm = guest(pick(&hosts) as usize, size, &mut pick);
        instance.vms.push(vm);
    }
    instance.validate().unwrap();
    instance
}

fn host(rack: usize, per_host: i64, pick: &mut impl FnMut(&[i64]) -> i64) -> Host {
    let (cpu, memory) = (pick(&[8_000, 16_000]) * per_host, pick(&[16, 32, 48]) * 1024 * per_host);
    Host {
        rack,
        state: match pick(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 2]) {
            0 => HostState::Up,
            1 => HostState::Drain,
            _ => HostState::Down,
        },
        cpu_cap_milli: cpu,
        memory_cap_mib: memory,
        cpu_milli: cpu / pick(&[1, 2]),
        memory_mib: memory / pick(&[1, 2]),
        far_mib: pick(&[0, 8, 64]) * 1024 * per_host,
        vfs: pick(&[0, 2, 8]) * per_host,
        in_mbit: pick(&[200, 400]) * per_host,
        out_mbit: pick(&[300, 600]) * per_host,
        generation: pick(&[1, 1, 2]),
        labels: pick(&[0, 1, 2, 3]) as u64,
        mem_cost: pick(&[6, 10]),
    }
}

fn guest(primary: usize, size: Size, pick: &mut impl FnMut(&[i64]) -> i64) -> Guest {
    let copy = |k: u32, pick: &mut dyn FnMut(&[i64]) -> i64| Copy {
        tier: pick(&[0, 1, 1, 2]) as usize,
        latency_us: pick(&[45, 100, 400, 20_000]),
        apart: if k == 0 || pick(&[0, 1]) == 0 { Level::Rack } else { Level::Room },
        mbit: pick(&[10, 40, 160]),
        current: -1,
    };
    let need = pick(&[0, 0, 0, 0, 1]) as u64;
    Guest {
        primary,
        cpu_milli: pick(&[1_000, 2_000, 4_000]),
        memory_mib: pick(&[1_024, 4_096, 8_192, 16_384]),
        vfs: pick(&[0, 0, 1]),
        weight: pick(&[1, 2, 4]),
        generation: pick(&[1, 1, 1, 2]),
        need,
        avoid: if need == 0 { pick(&[0, 0, 0, 2]) as u64 } else { 0 },
        group: pick(&[-1, -1, -1, 0, 1]),
        barred: Vec::new(),
        copies: (0..pick(&[1, 1, i64::from(size.copies)]) as u32).map(|k| copy(k, pick)).collect(),
    }
}

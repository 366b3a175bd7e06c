//! What is to be placed: the instance and plan format `shadow-place/1`.
//!
//! Quantities are integers: CPU in milli-vCPU, memory in MiB, bandwidth in Mbit/s, latency in microseconds, cost in
//! milli-points. What refers to something else is its position in the array. Constraints and objective are described in
//! `docs/placement.md`; [`crate::checker`] is their reference here.

use serde::{Deserialize, Serialize};

mod plan;
mod read;

pub use plan::{Plan, PlanError};
pub use read::{InstanceError, parse};

/// The only format there is.
pub const FORMAT: &str = "shadow-place/1";
/// Largest CPU, memory, bandwidth or count that is accepted: 512 TiB in MiB. Three of them fit an `i32`.
pub const MAX_AMOUNT: i64 = 1 << 29;
/// Most hosts, guests and copies of one instance.
pub const MAX_HOSTS: usize = 1 << 20;
pub const MAX_COPIES: usize = 1 << 24;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    pub format: String,
    #[serde(default)]
    pub name: String,
    /// Failures of which any single one must leave room for all promotions it causes.
    pub survive: Vec<Level>,
    pub params: Params,
    pub regions: Vec<Region>,
    pub rooms: Vec<Room>,
    pub racks: Vec<Rack>,
    pub hosts: Vec<Host>,
    pub vms: Vec<Guest>,
}

/// What can fail, or differ, as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Host,
    Rack,
    Switch,
    Power,
    Room,
    Region,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Params {
    pub tiers: Vec<Tier>,
    pub cost: Cost,
}

impl Params {
    /// Hot, warm and cold, and prices that put a shadow left out above all, memory above CPU and streams, and let
    /// load cost from 60 % on.
    pub fn standard() -> Self {
        let tier = |name: &str, memory_permille, far_permille, cpu_permille, vf| Tier {
            name: name.into(),
            memory_permille,
            far_permille,
            cpu_permille,
            vf,
        };
        Self {
            tiers: vec![tier("hot", 1000, 0, 50, 1), tier("warm", 300, 700, 20, 0), tier("cold", 50, 1000, 5, 0)],
            cost: Cost {
                cpu: 8,
                far: 1,
                moved: 5,
                net_room: 100,
                net_xroom: 300,
                net_xregion: 1000,
                unplaced_fixed: 2_000_000,
                unplaced_mem: 60,
                unplaced_first: 2,
                bal_host: 100,
                bal_rack: 1000,
                bal_knots: vec![(600, 1), (800, 4), (900, 20)],
            },
        }
    }
}

/// What a shadow of this tier holds of its guest, in thousandths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tier {
    pub name: String,
    #[serde(rename = "mem_pm")]
    pub memory_permille: i64,
    #[serde(rename = "far_pm")]
    pub far_permille: i64,
    #[serde(rename = "cpu_pm")]
    pub cpu_permille: i64,
    /// 1: its VFs are attached; 0: they are not.
    pub vf: i64,
}

/// Prices in milli-points.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Per milli-vCPU.
    pub cpu: i64,
    /// Per MiB of far memory.
    pub far: i64,
    /// Per MiB of a guest whose copy leaves a host that is not down.
    #[serde(rename = "move")]
    pub moved: i64,
    /// Per Mbit/s that stays in the room, that leaves it, and that leaves the region.
    pub net_room: i64,
    pub net_xroom: i64,
    pub net_xregion: i64,
    pub unplaced_fixed: i64,
    /// Per MiB.
    pub unplaced_mem: i64,
    /// Factor for copy 0.
    pub unplaced_first: i64,
    pub bal_host: i64,
    pub bal_rack: i64,
    /// Utilisation in thousandths above which each further thousandth costs `slope` more: `[knot, slope]`.
    pub bal_knots: Vec<(i64, i64)>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Region {
    #[serde(rename = "lat")]
    pub latency_us: i64,
    #[serde(rename = "in")]
    pub in_mbit: i64,
    #[serde(rename = "out")]
    pub out_mbit: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Room {
    pub region: usize,
    #[serde(rename = "lat")]
    pub latency_us: i64,
    #[serde(rename = "in")]
    pub in_mbit: i64,
    #[serde(rename = "out")]
    pub out_mbit: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rack {
    pub room: usize,
    /// Racks of one leaf switch, and of one power domain, share the number.
    pub switch: u32,
    pub power: u32,
    #[serde(rename = "lat")]
    pub latency_us: i64,
    #[serde(rename = "in")]
    pub in_mbit: i64,
    #[serde(rename = "out")]
    pub out_mbit: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    Up,
    /// Takes nothing new.
    Drain,
    Down,
}

/// A host. Amounts are what is free for shadows; `_cap` are totals.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    pub rack: usize,
    pub state: HostState,
    #[serde(rename = "cpu_cap")]
    pub cpu_cap_milli: i64,
    #[serde(rename = "mem_cap")]
    pub memory_cap_mib: i64,
    #[serde(rename = "cpu")]
    pub cpu_milli: i64,
    #[serde(rename = "mem")]
    pub memory_mib: i64,
    #[serde(rename = "far")]
    pub far_mib: i64,
    #[serde(rename = "vf")]
    pub vfs: i64,
    #[serde(rename = "in")]
    pub in_mbit: i64,
    #[serde(rename = "out")]
    pub out_mbit: i64,
    /// Generation of the CPU and the machine types; a guest runs on its own and on newer ones.
    #[serde(rename = "gen")]
    pub generation: i64,
    pub labels: u64,
    /// Price of a MiB here.
    pub mem_cost: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// Host of the primary.
    #[serde(rename = "p")]
    pub primary: usize,
    #[serde(rename = "cpu")]
    pub cpu_milli: i64,
    #[serde(rename = "mem")]
    pub memory_mib: i64,
    #[serde(rename = "vf")]
    pub vfs: i64,
    #[serde(rename = "w")]
    pub weight: i64,
    #[serde(rename = "gen")]
    pub generation: i64,
    /// Labels a host must, and must not, have.
    pub need: u64,
    pub avoid: u64,
    /// Guests of one group keep off each other's hosts; -1: none.
    #[serde(rename = "grp")]
    pub group: i64,
    /// Hosts that take no copy of it. Not part of the benchmark's format, whose instances have none.
    #[serde(rename = "bar", default, skip_serializing_if = "Vec::is_empty")]
    pub barred: Vec<usize>,
    pub copies: Vec<Copy>,
}

/// A shadow to be placed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Copy {
    #[serde(rename = "t")]
    pub tier: usize,
    /// Longest round trip to the primary.
    #[serde(rename = "lat")]
    pub latency_us: i64,
    /// What must differ from the primary's: rack, room or region.
    #[serde(rename = "div")]
    pub apart: Level,
    #[serde(rename = "bw")]
    pub mbit: i64,
    /// Host it stands on now; -1: none.
    #[serde(rename = "cur", default = "nowhere")]
    pub current: i64,
}

fn nowhere() -> i64 {
    -1
}

impl Instance {
    /// Shadows to be placed.
    pub fn copies(&self) -> usize {
        self.vms.iter().map(|vm| vm.copies.len()).sum()
    }

    /// Whether any shadow stands somewhere already.
    pub fn is_replan(&self) -> bool {
        self.vms.iter().any(|vm| vm.copies.iter().any(|copy| copy.current >= 0))
    }
}

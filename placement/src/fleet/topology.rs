//! The site: regions, rooms, power domains, switches, racks, hosts and the links between them, from a TOML file.
//!
//! ```toml
//! survive = ["rack", "switch"]     # any one of these may fail; also "power"
//! [[region]]
//! name = "north"
//! latency_us = 1800                # one way, from the edge of a room to the edge of the region
//! [[room]]
//! name = "n1"
//! region = "north"                 # may be left out if there is one
//! latency_us = 40
//! in_mbit = 40000                  # for sync streams that cross; absent: no limit
//! out_mbit = 40000
//! [[power]]
//! name = "feed-a"
//! [[switch]]
//! name = "leaf-1"
//! [[rack]]
//! name = "r1"
//! room = "n1"                      # may be left out if there is one
//! switch = "leaf-1"                # absent: one of its own
//! power = "feed-a"                 # absent: one of its own
//! latency_us = 8
//! [[host]]
//! name = "a1"
//! rack = "r1"
//! labels = ["ssd"]
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::document::{Document, FileError, Table};
use crate::instance::{Level, MAX_AMOUNT, MAX_HOSTS};
use crate::units::HostName;

/// A site whose names have all been resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    pub(super) survive: Vec<Level>,
    pub(super) regions: Vec<Area>,
    pub(super) rooms: Vec<Area>,
    pub(super) racks: Vec<RackSite>,
    pub(super) hosts: BTreeMap<HostName, HostSite>,
}

/// A region, or a room with the region it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) name: String,
    pub(super) within: usize,
    pub(super) link: Link,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RackSite {
    pub(super) name: String,
    pub(super) room: usize,
    pub(super) switch: u32,
    pub(super) power: u32,
    pub(super) link: Link,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostSite {
    pub(super) rack: usize,
    pub(super) labels: BTreeSet<String>,
    pub(super) link: Link,
}

/// The way out of something, and into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) latency_us: i64,
    pub(super) in_mbit: i64,
    pub(super) out_mbit: i64,
}

/// Where a host is, as it tells itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLabels {
    pub host: HostName,
    pub rack: String,
    /// Power domain and switch of its rack.
    pub power: Option<String>,
    pub switch: Option<String>,
}

const UNLIMITED: Link = Link { latency_us: 0, in_mbit: MAX_AMOUNT, out_mbit: MAX_AMOUNT };
/// Longest latency of one link: 10 s.
const MAX_LATENCY_US: i64 = 10_000_000;
const LINK_KEYS: [&str; 3] = ["latency_us", "in_mbit", "out_mbit"];

impl Topology {
    /// Reads a file. What is malformed, unknown, named twice or contradicts itself is refused with its line.
    pub fn parse(text: &str) -> Result<Self, FileError> {
        let document = Document::parse(text)?;
        let root = document.root();
        root.only(&["survive", "region", "room", "power", "switch", "rack", "host"])?;
        let regions = Names::read(&root, "region")?;
        let rooms = Names::read(&root, "room")?;
        let powers = Names::read(&root, "power")?;
        let switches = Names::read(&root, "switch")?;
        let racks = Names::read(&root, "rack")?;
        for table in powers.tables.iter().chain(&switches.tables) {
            table.only(&["name"])?;
        }
        let mut topology = Self {
            survive: survive(&root)?,
            regions: regions.areas(None)?,
            rooms: rooms.areas(Some(&regions))?,
            racks: Vec::new(),
            hosts: BTreeMap::new(),
        };
        if topology.regions.is_empty() {
            topology.regions.push(Area { name: "region".into(), within: 0, link: UNLIMITED });
        }
        if topology.rooms.is_empty() {
            topology.rooms.push(Area { name: "room".into(), within: 0, link: UNLIMITED });
        }
        for (number, table) in racks.tables.iter().enumerate() {
            table.only(&[&["name", "room", "switch", "power"], &LINK_KEYS[..]].concat())?;
            // One of its own follows all that have names.
            let own = |named: &Names<'_>, key: &str| match table.has(key) {
                true => named.find(table, key).map(|index| index as u32),
                false => Ok((named.tables.len() + number) as u32),
            };
            topology.racks.push(RackSite {
                name: table.name("name")?,
                room: rooms.find(table, "room")?,
                switch: own(&switches, "switch")?,
                power: own(&powers, "power")?,
                link: link(table)?,
            });
        }
        topology.read_hosts(&root, &racks)?;
        Ok(topology)
    }

    fn read_hosts(&mut self, root: &Table<'_>, racks: &Names<'_>) -> Result<(), FileError> {
        for table in root.tables("host")? {
            table.only(&[&["name", "rack", "labels"], &LINK_KEYS[..]].concat())?;
            if table.has("latency_us") {
                return Err(table.refuse_key("latency_us", "hosts have none; give it to the rack"));
            }
            let name = table.name("name")?;
            let site = HostSite {
                rack: racks.find(&table, "rack")?,
                labels: table.names("labels")?.unwrap_or_default().into_iter().collect(),
                link: link(&table)?,
            };
            if self.hosts.insert(HostName::from(name.clone()), site).is_some() {
                return Err(table.refuse_key("name", format!("there is another host {name}")));
            }
            if self.hosts.len() > MAX_HOSTS {
                return Err(table.refuse(format!("more than {MAX_HOSTS} hosts")));
            }
        }
        if self.hosts.is_empty() {
            return Err(root.refuse("no [[host]] at all"));
        }
        Ok(())
    }

    /// A site of which nothing is known but the rack of each host: one room, and every rack has a switch and a power
    /// domain of its own.
    pub fn from_racks(hosts: impl IntoIterator<Item = (HostName, String)>) -> Self {
        Self::from_labels(hosts.into_iter().map(|(host, rack)| HostLabels { host, rack, power: None, switch: None }))
    }

    /// A site as its hosts tell it themselves: one room. A rack hangs on the switch and the power domain that its first
    /// host names, else on its own.
    pub fn from_labels(hosts: impl IntoIterator<Item = HostLabels>) -> Self {
        let mut topology = Self {
            survive: vec![Level::Rack, Level::Switch],
            regions: vec![Area { name: "region".into(), within: 0, link: UNLIMITED }],
            rooms: vec![Area { name: "room".into(), within: 0, link: UNLIMITED }],
            racks: Vec::new(),
            hosts: BTreeMap::new(),
        };
        let hosts: BTreeMap<HostName, HostLabels> = hosts.into_iter().map(|host| (host.host.clone(), host)).collect();
        let mut racks: BTreeMap<&String, [Option<&String>; 2]> = BTreeMap::new();
        for host in hosts.values() {
            let [power, switch] = racks.entry(&host.rack).or_default();
            *power = power.or(host.power.as_ref());
            *switch = switch.or(host.switch.as_ref());
        }
        let mut numbers: [BTreeMap<&String, u32>; 2] = Default::default();
        for (number, (rack, names)) in racks.iter().enumerate() {
            // Those with names come after one of its own for each rack.
            let mut shared = |kind: usize| match names[kind] {
                None => number as u32,
                Some(name) => {
                    let next = (racks.len() + numbers[kind].len()) as u32;
                    *numbers[kind].entry(name).or_insert(next)
                }
            };
            let (power, switch) = (shared(0), shared(1));
            topology.racks.push(RackSite { name: (*rack).clone(), room: 0, switch, power, link: UNLIMITED });
        }
        for (name, host) in &hosts {
            let rack = racks.keys().position(|rack| **rack == host.rack).unwrap_or_default();
            topology.hosts.insert(name.clone(), HostSite { rack, labels: BTreeSet::new(), link: UNLIMITED });
        }
        topology
    }

    /// All hosts, by name.
    pub fn hosts(&self) -> impl Iterator<Item = &HostName> {
        self.hosts.keys()
    }

    pub fn knows(&self, host: &HostName) -> bool {
        self.hosts.contains_key(host)
    }

    /// The rack of a host.
    pub fn rack_of(&self, host: &HostName) -> Option<&str> {
        self.hosts.get(host).map(|site| self.racks[site.rack].name.as_str())
    }

    /// The room and the region of a host.
    pub fn room_of(&self, host: &HostName) -> Option<(&str, &str)> {
        let room = &self.rooms[self.racks[self.hosts.get(host)?.rack].room];
        Some((&room.name, &self.regions[room.within].name))
    }
}

/// The tables of one kind, by name.
struct Names<'d> {
    kind: &'static str,
    tables: Vec<Table<'d>>,
    numbers: BTreeMap<String, usize>,
}

impl<'d> Names<'d> {
    fn read(root: &Table<'d>, kind: &'static str) -> Result<Self, FileError> {
        let tables = root.tables(kind)?;
        let mut numbers = BTreeMap::new();
        for (number, table) in tables.iter().enumerate() {
            let name = table.name("name")?;
            if numbers.insert(name.clone(), number).is_some() {
                return Err(table.refuse_key("name", format!("there is another {kind} {name}")));
            }
        }
        Ok(Self { kind, tables, numbers })
    }

    /// Which one `table` names by `key`. It need not if there is at most one.
    fn find(&self, table: &Table<'_>, key: &str) -> Result<usize, FileError> {
        let kind = self.kind;
        match table.optional_name(key)? {
            Some(name) => self.numbers.get(&name).copied().ok_or_else(|| {
                let known: Vec<&str> = self.numbers.keys().map(String::as_str).take(20).collect();
                table.refuse_key(key, format!("there is no {kind} {name}; there are: {}", known.join(", ")))
            }),
            None if kind == "rack" || self.tables.len() > 1 => {
                Err(table.refuse(format!("{key} is missing; there are {} of them", self.tables.len())))
            }
            None => Ok(0),
        }
    }

    fn areas(&self, within: Option<&Names<'_>>) -> Result<Vec<Area>, FileError> {
        let area = |table: &Table<'_>| {
            let (keys, within) = match within {
                Some(names) => (&["name", names.kind][..], names.find(table, names.kind)?),
                None => (&["name"][..], 0),
            };
            table.only(&[keys, &LINK_KEYS[..]].concat())?;
            Ok(Area { name: table.name("name")?, within, link: link(table)? })
        };
        self.tables.iter().map(area).collect()
    }
}

fn link(table: &Table<'_>) -> Result<Link, FileError> {
    let mbit = |key: &str| table.integer(key, 1..MAX_AMOUNT + 1);
    Ok(Link {
        latency_us: table.integer("latency_us", 0..MAX_LATENCY_US + 1)?.unwrap_or(0),
        in_mbit: mbit("in_mbit")?.unwrap_or(MAX_AMOUNT),
        out_mbit: mbit("out_mbit")?.unwrap_or(MAX_AMOUNT),
    })
}

fn survive(root: &Table<'_>) -> Result<Vec<Level>, FileError> {
    let Some(names) = root.names("survive")? else { return Ok(vec![Level::Rack, Level::Switch]) };
    let level = |name: &String| match name.as_str() {
        "rack" => Ok(Level::Rack),
        "switch" => Ok(Level::Switch),
        "power" => Ok(Level::Power),
        "room" => Ok(Level::Room),
        other => Err(root.refuse_key("survive", format!("{other:?} is none of rack, switch, power, room"))),
    };
    names.iter().map(level).collect()
}

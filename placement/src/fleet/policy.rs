//! What a guest asks of its shadows, as it is kept in libvirt's domain metadata.
//!
//! ```toml
//! shadows = 2                      # 0 to 8
//! tiers = ["hot", "warm"]          # of each, or one for all; absent: hot
//! apart = ["rack", "room"]         # what differs from the primary's, of each or for all; absent: rack
//! latency_us = [200, 2000]         # longest round trip, of each or for all; absent: any
//! interval_ms = 50                 # between two cuts
//! need = ["ssd"]                   # labels that hosts must have,
//! avoid = ["old"]                  # and must not have
//! group = "web"                    # guests of one group keep off each other's hosts
//! priority = 2                     # 1 to 4: what its shadows are worth when there is not room for all
//! ```

use std::collections::BTreeSet;

use super::document::{Document, FileError, Table};
use crate::instance::Level;
use crate::topology::MAX_SHADOWS;

/// How ready a shadow is; see the glossary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    Hot,
    Warm,
    Cold,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShadowPolicy {
    pub tier: Tier,
    /// Rack, room or region.
    pub apart: Level,
    /// Longest round trip to the primary; none: any.
    pub latency_us: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The first is the one that is promoted, with room kept for it.
    pub shadows: Vec<ShadowPolicy>,
    /// Milliseconds between two cuts; none: the site's.
    pub interval_ms: Option<u32>,
    pub need: BTreeSet<String>,
    pub avoid: BTreeSet<String>,
    pub group: Option<String>,
    /// 1 to 4.
    pub priority: u8,
}

const MAX_INTERVAL_MS: i64 = 3_600_000;
const KEYS: [&str; 9] =
    ["shadows", "tiers", "apart", "latency_us", "interval_ms", "need", "avoid", "group", "priority"];

impl Policy {
    /// So many hot shadows in other racks, and nothing else asked.
    pub fn of(shadows: usize) -> Self {
        let shadow = ShadowPolicy { tier: Tier::Hot, apart: Level::Rack, latency_us: None };
        Self {
            shadows: vec![shadow; shadows],
            interval_ms: None,
            need: BTreeSet::new(),
            avoid: BTreeSet::new(),
            group: None,
            priority: 1,
        }
    }

    /// Reads a policy. What is malformed, unknown or contradicts itself is refused with its line.
    pub fn parse(text: &str) -> Result<Self, FileError> {
        let document = Document::parse(text)?;
        let table = document.root();
        table.only(&KEYS)?;
        let count = table.integer("shadows", 0..i64::from(MAX_SHADOWS) + 1)?.unwrap_or(1) as usize;
        let tiers = each(&table, "tiers", count, table.names("tiers")?, |name| Tier::parse(name), Tier::Hot)?;
        let apart = each(&table, "apart", count, table.names("apart")?, |name| level(name), Level::Rack)?;
        let latencies = table.integers("latency_us", 1..i64::from(i32::MAX))?;
        let latencies = each(&table, "latency_us", count, latencies, |us| Ok(Some(*us as u32)), None)?;
        let set =
            |key: &str| Ok::<BTreeSet<String>, FileError>(table.names(key)?.unwrap_or_default().into_iter().collect());
        let (need, avoid) = (set("need")?, set("avoid")?);
        if let Some(both) = need.intersection(&avoid).next() {
            return Err(table.refuse_key("avoid", format!("{both} is needed and avoided")));
        }
        let shadows = (0..count).map(|k| ShadowPolicy { tier: tiers[k], apart: apart[k], latency_us: latencies[k] });
        Ok(Self {
            shadows: shadows.collect(),
            interval_ms: table.integer("interval_ms", 1..MAX_INTERVAL_MS + 1)?.map(|ms| ms as u32),
            need,
            avoid,
            group: table.optional_name("group")?,
            priority: table.integer("priority", 1..5)?.unwrap_or(1) as u8,
        })
    }
}

impl Tier {
    fn parse(name: &str) -> Result<Self, String> {
        match name {
            "hot" => Ok(Self::Hot),
            "warm" => Ok(Self::Warm),
            "cold" => Ok(Self::Cold),
            other => Err(format!("{other:?} is none of hot, warm, cold")),
        }
    }

    /// Its position in [`crate::instance::Params::standard`].
    pub(super) fn index(self) -> usize {
        match self {
            Self::Hot => 0,
            Self::Warm => 1,
            Self::Cold => 2,
        }
    }
}

fn level(name: &str) -> Result<Level, String> {
    match name {
        "rack" => Ok(Level::Rack),
        "room" => Ok(Level::Room),
        "region" => Ok(Level::Region),
        other => Err(format!("{other:?} is none of rack, room, region")),
    }
}

/// One value for each shadow: those given, or the only one given, or the default.
fn each<T, V: Clone>(
    table: &Table<'_>,
    key: &str,
    count: usize,
    given: Option<Vec<T>>,
    read: impl Fn(&T) -> Result<V, String>,
    default: V,
) -> Result<Vec<V>, FileError> {
    let Some(given) = given else { return Ok(vec![default; count]) };
    let values: Result<Vec<V>, String> = given.iter().map(read).collect();
    let values = values.map_err(|reason| table.refuse_key(key, reason))?;
    match &values[..] {
        [one] => Ok(vec![one.clone(); count]),
        all if all.len() == count => Ok(values),
        all => Err(table.refuse_key(key, format!("{} given for {count} shadows", all.len()))),
    }
}

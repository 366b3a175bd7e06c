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
use std::fmt;

use serde::{Deserialize, Serialize};

use super::document::{Document, FileError, Table};
use crate::instance::Level;

/// Most shadows a guest can have.
pub const MAX_SHADOWS: u32 = 8;

/// How ready a shadow is; see the glossary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    Hot,
    Warm,
    Cold,
}

/// What is asked of one shadow. The default: hot, in another rack, however far away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShadowPolicy {
    pub tier: Tier,
    /// Rack, room or region.
    pub apart: Level,
    /// Longest round trip to the primary; none: any.
    pub latency_us: Option<u32>,
}

impl Default for ShadowPolicy {
    fn default() -> Self {
        Self { tier: Tier::Hot, apart: Level::Rack, latency_us: None }
    }
}

/// Written and read as the text above; as a text it is saved, too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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
/// Keys with a value for each shadow.
const PER_SHADOW: [&str; 3] = ["tiers", "apart", "latency_us"];
const KEYS: [&str; 9] =
    ["shadows", "tiers", "apart", "latency_us", "interval_ms", "need", "avoid", "group", "priority"];

impl Policy {
    /// So many hot shadows in other racks, and nothing else asked.
    pub fn of(shadows: usize) -> Self {
        Self {
            shadows: vec![ShadowPolicy::default(); shadows],
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

impl Policy {
    /// The same for so many shadows; further ones are as the last, or the default.
    pub fn resized(&self, shadows: usize) -> Self {
        let mut policy = self.clone();
        let last = self.shadows.last().copied().unwrap_or_default();
        policy.shadows.resize(shadows, last);
        policy
    }

    /// With `changes` of the form `KEY=VALUE` made: a value is written as in the file, or without its quotes and
    /// brackets (`need=ssd,nvme`); an empty one takes the key away.
    pub fn changed<S: AsRef<str>>(&self, changes: &[S]) -> Result<Self, FileError> {
        let refused = |reason: String| FileError { line: 1, reason };
        let mut lines: Vec<(String, String)> = self.lines();
        for change in changes {
            let change = change.as_ref();
            let (key, value) = change.split_once('=').ok_or_else(|| refused(format!("{change:?} is not KEY=VALUE")))?;
            let (key, value) = (key.trim(), value.trim());
            if !KEYS.contains(&key) {
                return Err(refused(format!("{key}: no such key; there are {}", KEYS.join(", "))));
            }
            lines.retain(|(known, _)| known != key);
            if !value.is_empty() {
                let line = format!("{key} = {}", as_toml(value));
                // Alone it is on the first line, so that is said which change is meant and not where in a file.
                Document::parse(&line).map_err(|error| refused(format!("{change}: {}", error.reason)))?;
                lines.push((key.to_owned(), line));
            }
        }
        // With another number of shadows lists that were given for each fit no more, unless given anew.
        let named = |key: &str| changes.iter().any(|change| change.as_ref().trim_start().starts_with(key));
        if named("shadows") {
            lines.retain(|(key, line)| named(key) || !(PER_SHADOW.contains(&key.as_str()) && line.contains('[')));
        }
        let text: String = lines.into_iter().map(|(_, line)| line + "\n").collect();
        Self::parse(&text).map_err(|error| refused(error.reason))
    }

    /// Keys that say something other than their default, each with its line.
    fn lines(&self) -> Vec<(String, String)> {
        let default = ShadowPolicy::default();
        let text = |text: &str| toml_text(text);
        let list = |items: Vec<String>| match &items[..] {
            [first, rest @ ..] if rest.iter().all(|item| item == first) => first.clone(),
            _ => format!("[{}]", items.join(", ")),
        };
        let each = |of: &dyn Fn(&ShadowPolicy) -> String| list(self.shadows.iter().map(of).collect());
        let names = |names: &BTreeSet<String>| list(names.iter().map(|name| text(name)).collect());
        let any = |differs: &dyn Fn(&ShadowPolicy) -> bool| self.shadows.iter().any(differs);
        let mut lines = Vec::new();
        let mut line = |set: bool, key: &str, value: &dyn Fn() -> String| {
            if set {
                lines.push((key.to_owned(), format!("{key} = {}", value())));
            }
        };
        line(self.shadows.len() != 1, "shadows", &|| self.shadows.len().to_string());
        line(any(&|s| s.tier != default.tier), "tiers", &|| each(&|s| text(s.tier.name())));
        line(any(&|s| s.apart != default.apart), "apart", &|| each(&|s| text(level_name(s.apart))));
        let latency = |s: &ShadowPolicy| s.latency_us.unwrap_or(i32::MAX as u32 - 1).to_string();
        line(any(&|s| s.latency_us.is_some()), "latency_us", &|| each(&latency));
        line(self.interval_ms.is_some(), "interval_ms", &|| self.interval_ms.unwrap_or_default().to_string());
        line(!self.need.is_empty(), "need", &|| names(&self.need));
        line(!self.avoid.is_empty(), "avoid", &|| names(&self.avoid));
        line(self.group.is_some(), "group", &|| text(self.group.as_deref().unwrap_or_default()));
        line(self.priority != 1, "priority", &|| self.priority.to_string());
        lines
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::of(1)
    }
}

/// Only what differs from the default: the default is an empty text.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines().iter().try_for_each(|(_, line)| writeln!(f, "{line}"))
    }
}

impl TryFrom<String> for Policy {
    type Error = FileError;
    fn try_from(text: String) -> Result<Self, FileError> {
        Self::parse(&text)
    }
}

impl From<Policy> for String {
    fn from(policy: Policy) -> Self {
        policy.to_string()
    }
}

/// A name as TOML writes it. Names have no control characters.
fn toml_text(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// A value given on a command line.
fn as_toml(value: &str) -> String {
    let bare = |word: &str| match word.trim().parse::<i64>() {
        Ok(number) => number.to_string(),
        Err(_) => toml_text(word.trim()),
    };
    if value.starts_with(['[', '"', '\'']) {
        return value.to_owned();
    }
    match value.split(',').collect::<Vec<_>>()[..] {
        [one] => bare(one),
        ref several => format!("[{}]", several.iter().map(|word| bare(word)).collect::<Vec<_>>().join(", ")),
    }
}

impl Tier {
    pub fn name(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }

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

fn level_name(level: Level) -> &'static str {
    match level {
        Level::Room => "room",
        Level::Region => "region",
        _ => "rack",
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

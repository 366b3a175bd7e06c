//! Why shadows could not be placed, counted by reason, and the nearest remedy.

use std::collections::BTreeMap;
use std::fmt;

use crate::units::HostName;

/// Why one host was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rejection {
    Primary,
    HasShadow,
    PrimaryRack { rack: String },
    ShadowRack { rack: String, by: HostName },
    Memory { needs_mib: u64, has_mib: u64 },
    Silent,
    Down,
    Excluded { reason: String },
    Unknown,
}

/// Fewer hosts than wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub wanted: usize,
    /// The hosts were named by the caller; `rejected` holds only those.
    pub by_name: bool,
    /// Racks with any host at all.
    pub racks: usize,
    /// Hosts that could be taken.
    pub possible: Vec<HostName>,
    /// Shadows there are already.
    pub existing: usize,
    pub rejected: Vec<(HostName, Rejection)>,
}

impl Rejection {
    /// Reasons with the same key are counted together.
    fn key(&self) -> &'static str {
        match self {
            Self::Primary => "the primary itself",
            Self::HasShadow => "has a shadow already",
            Self::PrimaryRack { .. } => "same rack as the primary",
            Self::ShadowRack { .. } => "same rack as another shadow",
            Self::Memory { .. } => "no memory",
            Self::Silent => "agent silent",
            Self::Down => "down",
            Self::Excluded { .. } => "refused it",
            Self::Unknown => "unknown",
        }
    }
    fn detail(&self, host: &HostName) -> String {
        match self {
            Self::Memory { needs_mib, has_mib } => format!("needs {needs_mib} MiB, {host} has {has_mib}"),
            Self::PrimaryRack { rack } => format!("{host} in {rack}"),
            Self::ShadowRack { rack, by } => format!("{host} in {rack} with {by}"),
            Self::Excluded { reason } => format!("{host}: {reason}"),
            _ => host.to_string(),
        }
    }
}

impl Refusal {
    /// What would help with the least effort.
    pub fn remedy(&self) -> String {
        let lacks = |rejection: &Rejection| match rejection {
            Rejection::Memory { needs_mib, has_mib } => Some(needs_mib.saturating_sub(*has_mib)),
            _ => None,
        };
        let nearest = self.rejected.iter().filter_map(|(host, why)| Some((lacks(why)?, host))).min();
        let offline: Vec<_> = self
            .rejected
            .iter()
            .filter(|(_, why)| matches!(why, Rejection::Down | Rejection::Silent))
            .map(|(host, _)| host.as_str())
            .collect();
        let possible = self.existing + self.possible.len();
        if self.by_name {
            "name other hosts with --on, or leave the choice to the manager".into()
        } else if let Some((mib, host)) = nearest {
            format!("free {mib} MiB on {host}")
        } else if !offline.is_empty() {
            format!("bring back {}", offline.join(" or "))
        } else if possible > 0 {
            format!("ask for at most {possible} with --shadows, or add a host in another rack")
        } else {
            "add a host in another rack".into()
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counted: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (host, why) in &self.rejected {
            counted.entry(why.key()).or_default().push(why.detail(host));
        }
        let reasons: Vec<_> =
            counted.iter().map(|(key, details)| format!("{} {key} ({})", details.len(), details.join(", "))).collect();
        let hosts = if self.rejected.len() == 1 { "1 host".into() } else { format!("{} hosts", self.rejected.len()) };
        if self.by_name {
            write!(f, "of the hosts named, {hosts} cannot keep a shadow: {}", reasons.join(", "))?;
        } else {
            let (wanted, possible) = (self.existing + self.wanted, self.existing + self.possible.len());
            let plural = if wanted == 1 { "" } else { "s" };
            write!(f, "{wanted} shadow{plural} wanted, {possible} possible in {} racks", self.racks)?;
            if !reasons.is_empty() {
                write!(f, "; {hosts} not: {}", reasons.join(", "))?;
            }
        }
        write!(f, "; nearest remedy: {}", self.remedy())
    }
}

impl std::error::Error for Refusal {}

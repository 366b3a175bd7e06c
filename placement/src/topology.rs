//! Choice of the hosts that keep a guest's shadows.
//!
//! Hard rules: no two copies of a guest in one rack, the host is up, and it has room for the guest's memory. Among what
//! is left the host with the most free memory wins, and of equals the first by name, so that a choice can be repeated.
//! Every host that was not taken is counted with its reason. [`choose_shadow_hosts`] is the one door: a solver with
//! rules and costs goes behind it.

use std::collections::BTreeSet;

use crate::units::HostName;

mod refusal;
#[cfg(test)]
mod tests;

pub use refusal::{Refusal, Rejection};

/// What a shadow needs on its host beyond the guest's memory, MiB (36 measured for an idle one, and its journal).
pub const SHADOW_OVERHEAD_MIB: u64 = 64;
/// Most shadows a guest can have.
pub const MAX_SHADOWS: u32 = 8;

/// What is known of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    pub name: HostName,
    pub rack: String,
    pub availability: Availability,
    /// Memory that is neither used nor promised to a shadow, MiB.
    pub memory_free_mib: u64,
    /// Why this host was excluded for this guest for now: it has refused it a moment ago.
    pub excluded: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    Up,
    /// Its agent does not report; it cannot be given orders.
    Silent,
    Down,
}

/// Which shadows are looked for.
#[derive(Debug, Clone)]
pub struct ShadowRequest<'a> {
    pub primary: &'a HostName,
    pub guest_memory_mib: u64,
    /// How many more shadows.
    pub wanted: usize,
    /// Hosts that have to be taken; at most `wanted`.
    pub on: &'a [HostName],
}

/// Hosts for `request.wanted` more shadows, besides those in `existing`, best first (`request.on` before all).
/// `hosts` are all known ones, the primary's included.
pub fn choose_shadow_hosts(
    request: &ShadowRequest<'_>,
    hosts: &[HostFacts],
    existing: &[HostName],
) -> Result<Vec<HostName>, Refusal> {
    let mut choice = Choice::new(request, hosts, existing);
    for name in request.on {
        choice.take_named(name);
    }
    if choice.rejected.is_empty() {
        choice.take_best();
    }
    choice.finish()
}

struct Choice<'a> {
    request: &'a ShadowRequest<'a>,
    hosts: &'a [HostFacts],
    existing: &'a [HostName],
    /// Racks that hold a copy already, with the host that does.
    racks_taken: Vec<(&'a str, &'a HostName)>,
    taken: Vec<HostName>,
    rejected: Vec<(HostName, Rejection)>,
}

impl<'a> Choice<'a> {
    fn new(request: &'a ShadowRequest<'a>, hosts: &'a [HostFacts], existing: &'a [HostName]) -> Self {
        let racks_taken = hosts
            .iter()
            .filter(|host| host.name == *request.primary || existing.contains(&host.name))
            .map(|host| (host.rack.as_str(), &host.name))
            .collect();
        Self { request, hosts, existing, racks_taken, taken: Vec::new(), rejected: Vec::new() }
    }

    fn needs_mib(&self) -> u64 {
        self.request.guest_memory_mib.saturating_add(SHADOW_OVERHEAD_MIB)
    }

    /// Why `host` cannot have a shadow of this guest, the most telling reason first.
    fn objection(&self, host: &HostFacts) -> Option<Rejection> {
        if host.name == *self.request.primary {
            return Some(Rejection::Primary);
        }
        if self.existing.contains(&host.name) || self.taken.contains(&host.name) {
            return Some(Rejection::HasShadow);
        }
        if let Some((rack, by)) = self.racks_taken.iter().find(|(rack, _)| *rack == host.rack) {
            let (rack, by) = ((*rack).to_owned(), (*by).clone());
            return Some(if by == *self.request.primary {
                Rejection::PrimaryRack { rack }
            } else {
                Rejection::ShadowRack { rack, by }
            });
        }
        match host.availability {
            Availability::Up => (),
            Availability::Silent => return Some(Rejection::Silent),
            Availability::Down => return Some(Rejection::Down),
        }
        if let Some(reason) = &host.excluded {
            return Some(Rejection::Excluded { reason: reason.clone() });
        }
        let needs_mib = self.needs_mib();
        (host.memory_free_mib < needs_mib).then_some(Rejection::Memory { needs_mib, has_mib: host.memory_free_mib })
    }

    fn take(&mut self, host: &'a HostFacts) {
        self.racks_taken.push((&host.rack, &host.name));
        self.taken.push(host.name.clone());
    }

    fn take_named(&mut self, name: &HostName) {
        let Some(host) = self.hosts.iter().find(|host| host.name == *name) else {
            return self.rejected.push((name.clone(), Rejection::Unknown));
        };
        match self.objection(host) {
            Some(rejection) => self.rejected.push((name.clone(), rejection)),
            None => self.take(host),
        }
    }

    fn take_best(&mut self) {
        let mut by_room: Vec<_> = self.hosts.iter().filter(|host| self.objection(host).is_none()).collect();
        by_room.sort_by(|a, b| b.memory_free_mib.cmp(&a.memory_free_mib).then_with(|| a.name.cmp(&b.name)));
        for host in by_room {
            if self.taken.len() < self.request.wanted && self.objection(host).is_none() {
                self.take(host);
            }
        }
    }

    fn finish(mut self) -> Result<Vec<HostName>, Refusal> {
        if self.rejected.is_empty() && self.taken.len() >= self.request.wanted {
            return Ok(self.taken);
        }
        let by_name = !self.rejected.is_empty();
        if !by_name {
            let passed_over: Vec<_> = self
                .hosts
                .iter()
                .filter(|host| !self.taken.contains(&host.name))
                .filter_map(|host| Some((host.name.clone(), self.objection(host)?)))
                .collect();
            self.rejected = passed_over;
        }
        let racks: BTreeSet<_> = self.hosts.iter().map(|host| host.rack.as_str()).collect();
        Err(Refusal {
            wanted: self.request.wanted,
            by_name,
            racks: racks.len(),
            possible: self.taken,
            existing: self.existing.len(),
            rejected: self.rejected,
        })
    }
}

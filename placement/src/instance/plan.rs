//! A plan: a host for every shadow, or none and why.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Instance;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Per guest and copy its host; -1: left unplaced.
    pub place: Vec<Vec<i64>>,
    /// Of copies left unplaced, keyed `guest:copy`: hosts by the first reason that bars each. They sum to all hosts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub reasons: BTreeMap<String, BTreeMap<String, u64>>,
}

#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("not a plan: {0}")]
    Syntax(#[from] serde_json::Error),
    #[error("the plan is for {plan} guests, the instance has {instance}")]
    Guests { plan: usize, instance: usize },
    #[error("the plan has {plan} copies of guest {guest}, the instance {instance}")]
    Copies { guest: usize, plan: usize, instance: usize },
    #[error("the plan puts copy {copy} of guest {guest} on host {host}; there are {hosts}")]
    Host { guest: usize, copy: usize, host: i64, hosts: usize },
}

impl Plan {
    /// Parses a plan of `instance`.
    pub fn parse(json: &[u8], instance: &Instance) -> Result<Self, PlanError> {
        let plan: Self = serde_json::from_slice(json)?;
        plan.fits(instance)?;
        Ok(plan)
    }

    /// Whether the plan has the shape of `instance`; nothing is said of its rules.
    pub fn fits(&self, instance: &Instance) -> Result<(), PlanError> {
        if self.place.len() != instance.vms.len() {
            return Err(PlanError::Guests { plan: self.place.len(), instance: instance.vms.len() });
        }
        for (guest, (hosts, vm)) in self.place.iter().zip(&instance.vms).enumerate() {
            if hosts.len() != vm.copies.len() {
                return Err(PlanError::Copies { guest, plan: hosts.len(), instance: vm.copies.len() });
            }
            let limit = instance.hosts.len() as i64;
            if let Some((copy, &host)) = hosts.iter().enumerate().find(|&(_, &host)| !(-1..limit).contains(&host)) {
                return Err(PlanError::Host { guest, copy, host, hosts: instance.hosts.len() });
            }
        }
        Ok(())
    }
}

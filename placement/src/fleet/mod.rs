//! From what an operator writes and agents report to hosts for every shadow, in names.
//!
//! ```text
//! topology file --> Topology --\
//! agents ---------> HostFacts ---> plan --> Instance --> solver --> checker --> FleetPlan --> explain
//! guests ---------> GuestFacts -/           (numbers)                           (names)
//!                   (with Policy)
//! ```

mod document;
mod facts;
mod plan;
mod policy;
mod topology;
mod translate;

#[cfg(test)]
mod tests;

pub use document::FileError;
pub use facts::{Capacity, GuestFacts, HostFacts, SHADOW_OVERHEAD_MIB};
pub use plan::{FleetError, FleetPlan, FleetRefusal, Move, Placement, Question, plan};
pub use policy::{MAX_SHADOWS, Policy, ShadowPolicy, Tier};
pub use topology::{HostLabels, Topology};

//! Which hosts keep a guest's shadows, and who may be its primary.
//!
//! This crate decides and does nothing: no clock, file, socket, thread or random source. [`fleet`] plans hosts for all
//! shadows of a site, by [`solver`], judged by [`checker`]; [`term`] holds the rules of primaryship; [`guardian`] is the
//! state machine that turns silence, deaths and orders into what is written down first and what is said afterwards.
#![forbid(unsafe_code)]

pub mod checker;
pub mod consistency;
pub mod fleet;
pub mod guardian;
pub mod instance;
pub mod solver;
pub mod term;
pub mod units;

pub use consistency::{Consistency, ConsistencyMode, OnLoss, Quorum};
pub use units::{Budget, Epoch, GuestId, HostName, Keep, Moment, Term};

//! placeholder
#![forbid(unsafe_code)]

mod bytes;

pub mod batch;
pub mod device_state;
pub mod frame;
pub mod hashes;
pub mod layout;
pub mod message;
pub mod page_set;
pub mod units;
pub mod wire;

//! Disks of a protected guest, on its primary's host: a local copy of each, which every write of the guest reaches before
//! it completes, and which is then one more block of pages beside the guest's RAM.
//!
//! ```text
//! guest's write --> QEMU: source, then mirror job (synchronous writes) --unix socket--> server: copy file, dirty pages
//!                                                                                          |
//!                       cut: the guest is stopped, no write is in flight: dirty pages <----+
//! ```
//! The server answers at once, from the copy alone: no network and no peer is in the guest's way. A connection that does
//! not get on is closed by the guard process (`capture::guard`), and the guest writes on without it.
//! See `docs/disks.md`, and decision 30 for why there is a copy and not a log.

pub mod copy;
pub mod hole;
pub mod images;
pub mod line;
pub mod mirror;
pub mod proto;
pub mod server;

pub use copy::DiskCopy;
pub use mirror::{DiskPaths, DiskProblem, DiskSet};

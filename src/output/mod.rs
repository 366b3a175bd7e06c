//! The output gate of a guest: its outgoing packets wait beside the agent until their epoch is committed.
//!
//! ```text
//! QEMU: NIC --> fcap (filter-redirector) --capture socket--> gate process --release socket--> frel --> tap, the network
//!                                               ^                 ^   |
//!                              marks, at a cut: |  hold, release: |   | waits, opened, figures
//!                                               +---- agent: handle --+
//! ```
//! The gate process (`virtshadowd gate`, [`process`]) owns the sockets and the packets and does nothing else, so it
//! lives on when the agent is stopped or killed, and opens by itself: no monitor command is needed for output to go on.
//! It knows nothing of epochs; `vmsync::output` decides in both. If it is the gate that fails, the agent notices within
//! a tenth of a second, ends it and takes the filters out of QEMU ([`filters`]).

mod filters;
mod handle;
pub mod process;
mod wire;

pub use filters::{left_behind, remove};
pub use handle::{Followed, Gate, GateError, Marker, News, Plugged};
pub use wire::{Figures, Setting};

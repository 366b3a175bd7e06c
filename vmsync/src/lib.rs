//! Keeps copies of a running guest's memory and device state on other hosts equal to it, epoch by epoch. This crate
//! decides and encodes; it touches no socket, file, clock, thread or random source. Drivers in virt-shadow's `src/`
//! turn what happens into events, and execute effects.
//!
//! ```text
//!  primary host                                             shadow host
//!  cut, live reads --> source::Source                       target::Target --> journal, image, state record
//!                        |  message, codec, device_state         ^
//!                        +-- wire::encode ~~~~ bytes ~~~~ wire::Decoder
//! ```
//!
//! The one idea that everything rests on: a target gets a sequence of `Pages` (later ones override earlier ones), a
//! `DeviceState` and a `Commit`. It does not know, and need not, whether a page belongs to the epoch's cut or was
//! read before while the guest ran. With a committed image everything since the last commit is staged in a journal
//! and applied only when the next commit has been verified and sealed; the last commit stays promotable all the time.
//! Without one (the first copy) pages are applied as they come, and the first commit makes the image whole.
//!
//! # The primary's driver
//!
//! ```no_run
//! use vmsync::source::{Cut, CutPlan, Source, SourceEffect, SourceEvent};
//! use vmsync::{Millis, PageBatch};
//! # fn next_event() -> (Millis, SourceEvent) { unimplemented!() }
//! # fn cut_the_guest(_: vmsync::PageSet) -> Cut { unimplemented!() }
//! # fn collect() -> (Millis, vmsync::PageSet) { unimplemented!() }
//! # fn cut_is_due() -> bool { true }
//! # fn read(_: &[vmsync::PageAddr]) -> PageBatch { unimplemented!() }
//! # fn queue(_: vmsync::PeerId, _: std::sync::Arc<[u8]>) {}
//! # fn run(mut source: Source) -> Result<(), vmsync::source::SourceAlarm> {
//! let mut effects = Vec::new();
//! loop {
//!     // Sockets, timers, finished reads: each is an event. Cuts are made when due, and only if they serve somebody.
//!     let (now, event) = if cut_is_due() {
//!         match source.cut_plan() {
//!             CutPlan::Skip => continue,
//!             CutPlan::Collect => {
//!                 let (at, dirty) = collect();
//!                 (at, SourceEvent::Collected { at, dirty })
//!             }
//!             CutPlan::Cut { extras } => {
//!                 let cut = cut_the_guest(extras);
//!                 (cut.at, SourceEvent::Cut(cut))
//!             }
//!         }
//!     } else {
//!         next_event()
//!     };
//!     source.step(now, event, &mut effects)?;
//!     while !effects.is_empty() {
//!         for effect in std::mem::take(&mut effects) {
//!             match effect {
//!                 SourceEffect::Send { peer, bytes } => queue(peer, bytes), // later: Written
//!                 SourceEffect::ReadLive { peer, read: id, pages } => {
//!                     let pages = read(&pages);
//!                     source.step(now, SourceEvent::LiveRead { peer, read: id, pages }, &mut effects)?;
//!                 }
//!                 _ => { /* ... */ }
//!             }
//!         }
//!     }
//! }
//! # }
//! ```
//! Rules for it:
//! - [`cut_plan`](source::Source::cut_plan) is asked exactly once for each cut that is due.
//! - Epochs grow. A set of dirty pages that was read and cleared is never dropped: if its cut failed, it is told as
//!   [`Collected`](source::SourceEvent::Collected).
//! - Cuts, collections and reads are told in the order in which they happened to the guest, as far as this: a read
//!   that was made after a cut is not told before it. (The reverse is harmless: a read made before a cut may be told
//!   late.)
//! - A live read may be torn by the guest's writes: such a page is dirty at the next cut.
//! - Events of one peer come in order; one connection a peer is open at a time.
//! - A new RAM layout (a block came or went) needs a new source with a new lineage, and so a new first copy.
//! - After a promotion the new primary's epochs best go on from the promoted one, so that whoever compares epoch
//!   numbers of two shadows (`after_epoch`) is not misled; contents never depend on it.
//! - A switchover is: suspend the guest, then cut as often as needed (nothing is dirty any more) until
//!   [`Committed`](source::SourceEffect::Committed) names an epoch cut after the suspension.
//!
//! # The shadow's driver
//!
//! Read the state record and the journal, and [`Target::resume`](target::Target::resume) (or
//! [`Target::new`](target::Target::new)); then for each event `step` and execute the effects strictly in order. The
//! order carries the guarantees: an `Ack`'s Send stands behind the write that makes its epoch durable, and a write
//! into the image behind the one that makes it harmless. Of the effects only Prepare and Hash are answered later;
//! Keep and ReadBack are answered at once, before anything else is told.

#![deny(unsafe_code)] // but in codec::simd

mod bytes;

pub mod batch;
pub mod codec;
pub mod device_state;
pub mod hashes;
pub mod history;
pub mod inbound;
pub mod journal;
pub mod layout;
pub mod message;
pub mod output;
pub mod pace;
pub mod page_set;
pub mod source;
pub mod state_record;
pub mod target;
pub mod units;
pub mod wire;

pub use batch::PageBatch;
pub use device_state::DeviceState;
pub use history::Keep;
pub use layout::{RamBlock, RamLayout};
pub use page_set::PageSet;
pub use units::{BlockIndex, Epoch, GuestUuid, Lineage, Millis, PAGE_SIZE, Page, PageAddr, PageIndex, PeerId, Term};

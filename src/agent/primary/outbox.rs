//! What a step of the sync engine leaves for the session to do.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmsync::batch::PageBatch;
use vmsync::message::RefuseCode;
use vmsync::source::{SourceEffect, SourceEvent};
use vmsync::units::PageAddr;

use super::Reply;
use super::report::verify_report;
use crate::api::types::VerifyReport;
use crate::capture::memory::GuestMemory;

#[derive(Default)]
pub(super) struct Outbox {
    /// Bytes for shadows' hosts, and hosts whose connections shall end.
    pub outgoing: Vec<(String, Arc<[u8]>)>,
    pub closing: Vec<String>,
    /// Another host is primary, with this term.
    pub superseded: Option<u64>,
    /// Why shadows' hosts refuse.
    pub refusals: BTreeMap<String, String>,
    /// Who waits for the verification under way.
    pub verify: Vec<Reply<VerifyReport>>,
    /// Why the guest has to be attached anew.
    pub trouble: Option<String>,
}

impl Outbox {
    /// Carries out one effect; an event that follows from it at once, if any.
    pub fn perform(&mut self, effect: SourceEffect, memory: &GuestMemory, guest: &str) -> Option<SourceEvent> {
        let mut read = |pages: Vec<PageAddr>| match memory.read(pages.into_iter(), PageBatch::new()) {
            Ok(batch) => Some(batch),
            Err(error) => {
                self.trouble = Some(error.to_string());
                None
            }
        };
        match effect {
            SourceEffect::Send { peer, bytes } => self.outgoing.push((peer.as_str().to_owned(), bytes)),
            SourceEffect::ReadLive { peer, read: id, pages } => {
                return read(pages).map(|pages| SourceEvent::LiveRead { peer, read: id, pages });
            }
            SourceEffect::ReadVerify { read: id, pages } => {
                return read(pages).map(|pages| SourceEvent::VerifyRead { read: id, pages });
            }
            SourceEffect::Close { peer, reason } => {
                tracing::info!(guest, host = peer.as_str(), %reason, "closing the connection to a shadow");
                self.closing.push(peer.as_str().to_owned());
            }
            SourceEffect::Committed { peer, epoch } => {
                tracing::trace!(guest, host = peer.as_str(), %epoch, "committed");
            }
            SourceEffect::CommitLost { peer } => {
                tracing::warn!(
                    guest,
                    host = peer.as_str(),
                    "the shadow fell too far behind and receives a new first copy"
                );
            }
            SourceEffect::Superseded { peer, newer_term } => {
                tracing::error!(guest, host = peer.as_str(), %newer_term, "another host is primary by now");
                self.superseded = Some(newer_term.get());
            }
            SourceEffect::PeerRefused { peer, code, text } => {
                if code != RefuseCode::StaleTerm {
                    tracing::warn!(guest, host = peer.as_str(), text, "the shadow's host refuses");
                }
                self.refusals.insert(peer.as_str().to_owned(), text);
            }
            SourceEffect::Verified(report) => {
                let report = verify_report(guest, report, memory);
                for reply in self.verify.drain(..) {
                    let _ = reply.send(Ok(report.clone()));
                }
            }
        }
        None
    }
}

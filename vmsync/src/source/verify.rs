//! Verification: compares all memory and device state with all shadows, without a pause of its own.
//!
//! All pages are read while the guest runs and hashed; every cut re-hashes the dirty pages from its contents. Once
//! all pages have a hash, then at the next cut the table is exactly the memory of that epoch: a page hashed from a
//! live read and written later is dirty at that cut. Each streaming peer is asked for the hashes of its image right
//! behind that epoch's Commit. A tracker that misses a written page is caught: the live read has the new contents,
//! the shadow the old ones.

use std::collections::BTreeMap;

use super::peer::Reading;
use super::{Cut, ReadId, Source, SourceEffect};
use crate::batch::PageBatch;
use crate::hashes::{HashTable, hash_bytes, hash_page};
use crate::message::SourceBody;
use crate::page_set::PageSet;
use crate::units::{Epoch, Millis, PageAddr, PeerId};
use crate::wire::encode;

/// Result of a verification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// The epoch that was compared; none if it did not come to that.
    pub epoch: Epoch,
    /// All peers, by name.
    pub peers: Vec<(PeerId, PeerVerdict)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerVerdict {
    Compared { pages_compared: u64, pages_different: u64, first_difference: Option<PageAddr>, device_state_equal: bool },
    NotCompared(NotCompared),
}

impl PeerVerdict {
    /// Every page and the device state were compared and are equal.
    pub fn is_equal(&self) -> bool {
        matches!(self, Self::Compared { pages_different: 0, device_state_equal: true, .. })
    }
}

/// Why a peer was not compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotCompared {
    #[error("the shadow's host is not connected")]
    Disconnected,
    #[error("the shadow does not follow the primary yet")]
    NotFollowing,
    #[error("the shadow did not answer in time")]
    TimedOut,
    #[error("the shadow could not keep its memory unchanged for long enough; try again when the guest is less busy")]
    Incomplete,
}

#[derive(Debug)]
pub(super) struct Verify {
    started: Millis,
    table: HashTable,
    /// Pages to be read and hashed; those of `reading` are not in it.
    to_read: PageSet,
    reading: Option<Reading>,
    compare: Option<Compare>,
}

#[derive(Debug)]
struct Compare {
    epoch: Epoch,
    device_state_hash: u64,
    peers: BTreeMap<PeerId, Progress>,
}

#[derive(Debug)]
enum Progress {
    Comparing { seen: PageSet, different: u64, first: Option<PageAddr> },
    Done(PeerVerdict),
}

impl Verify {
    /// The page's contents at a cut are known.
    pub(super) fn set_at_cut(&mut self, addr: PageAddr, hash: u64) {
        if self.compare.is_none() {
            self.table.set(addr, hash);
            self.to_read.remove(addr);
        }
    }

    /// These pages changed, and their contents are not known.
    pub(super) fn forget(&mut self, dirty: &PageSet) {
        if self.compare.is_none() {
            dirty.iter().for_each(|addr| self.table.forget(addr));
            self.to_read.union_with(dirty);
        }
    }
}

impl Source {
    pub(super) fn verify_start(&mut self, now: Millis, effects: &mut Vec<SourceEffect>) {
        if self.verify.is_some() {
            return;
        }
        let layout = &self.config.layout;
        self.verify = Some(Verify {
            started: now,
            table: HashTable::new(layout),
            to_read: PageSet::full(layout),
            reading: None,
            compare: None,
        });
        if self.peers.values().any(|p| p.is_connected()) {
            self.verify_pump(effects);
        } else {
            self.verify_abandon(effects);
        }
    }

    pub(super) fn verify_read(&mut self, read: ReadId, pages: &PageBatch, effects: &mut Vec<SourceEffect>) {
        let Some(verify) = &mut self.verify else { return };
        let Some(asked) = verify.reading.take_if(|r| r.id == read) else { return };
        for (addr, page) in pages.iter() {
            // A cut in the meantime knows better, or knows that this is no longer true.
            let outdated = verify.to_read.contains(addr) || verify.table.get(addr).is_some();
            if !outdated && asked.pages.binary_search(&addr).is_ok() {
                verify.table.set(addr, hash_page(self.seed, page));
            }
        }
        // What could not be read is asked for again, unless a cut brought it.
        for addr in asked.pages.iter().filter(|addr| verify.table.get(**addr).is_none()) {
            verify.to_read.insert_known(&[*addr]);
        }
        self.verify_pump(effects);
    }

    /// Starts the next read of a verification that still collects hashes.
    pub(super) fn verify_pump(&mut self, effects: &mut Vec<SourceEffect>) {
        let read = self.new_read();
        let Some(verify) = &mut self.verify else { return };
        if verify.compare.is_some() || verify.reading.is_some() || verify.to_read.is_empty() {
            return;
        }
        let mut pages = verify.to_read.take_next(self.config.limits.verify_batch_pages);
        pages.sort_unstable();
        verify.reading = Some(Reading { id: read, pages: pages.clone() });
        effects.push(SourceEffect::ReadVerify { read, pages });
    }

    /// A cut was sent to `takers`; its contents were hashed. If the table is complete, this epoch is compared.
    pub(super) fn verify_cut(&mut self, now: Millis, cut: &Cut, takers: &[PeerId], effects: &mut Vec<SourceEffect>) {
        let Some(verify) = &mut self.verify else { return };
        let complete = verify.to_read.is_empty() && verify.reading.is_none();
        if verify.compare.is_some() || !complete || takers.is_empty() {
            return;
        }
        // Those that are about to follow are waited for, but not for ever.
        let waited = now.since(verify.started).get() > self.config.limits.verify.get() / 2;
        let all_follow = self.peers.values().filter(|p| p.is_connected()).all(|p| takers.contains(&p.id));
        if !all_follow && !waited {
            return;
        }
        let request = encode(self.config.term, cut.epoch, &SourceBody::VerifyRequest { seed: self.seed });
        let mut peers = BTreeMap::new();
        for peer in self.peers.values_mut() {
            let progress = if takers.contains(&peer.id) {
                peer.send(&request, effects);
                Progress::Comparing { seen: PageSet::new(&self.config.layout), different: 0, first: None }
            } else if peer.is_connected() {
                Progress::Done(PeerVerdict::NotCompared(NotCompared::NotFollowing))
            } else {
                Progress::Done(PeerVerdict::NotCompared(NotCompared::Disconnected))
            };
            peers.insert(peer.id.clone(), progress);
        }
        let device_state_hash = hash_bytes(self.seed, &cut.device_state);
        verify.compare = Some(Compare { epoch: cut.epoch, device_state_hash, peers });
    }

    pub(super) fn verify_hashes(
        &mut self,
        id: &PeerId,
        epoch: Epoch,
        hashes: impl Iterator<Item = (PageAddr, u64)>,
    ) -> Result<(), &'static str> {
        let Some(verify) = &mut self.verify else { return Ok(()) };
        // Hashes may still come of a verification that was given up.
        let Some(compare) = verify.compare.as_mut().filter(|c| c.epoch == epoch) else { return Ok(()) };
        let Some(Progress::Comparing { seen, different, first }) = compare.peers.get_mut(id) else { return Ok(()) };
        for (addr, hash) in hashes {
            if seen.insert(addr) != Ok(true) {
                return Err("sent a page's hash twice");
            }
            if verify.table.get(addr) != Some(hash) {
                *different += 1;
                *first = Some(first.map_or(addr, |f| f.min(addr)));
            }
        }
        Ok(())
    }

    pub(super) fn verify_hashes_end(
        &mut self,
        id: &PeerId,
        epoch: Epoch,
        complete: bool,
        device_state_hash: u64,
        effects: &mut Vec<SourceEffect>,
    ) -> Result<(), &'static str> {
        let all_pages = self.config.layout.total_pages();
        let compare = self.verify.as_mut().and_then(|v| v.compare.as_mut());
        let Some(compare) = compare.filter(|c| c.epoch == epoch) else { return Ok(()) };
        let Some(progress) = compare.peers.get_mut(id) else { return Ok(()) };
        if let Progress::Comparing { seen, different, first } = progress {
            let verdict = if complete && seen.len() == all_pages {
                PeerVerdict::Compared {
                    pages_compared: seen.len(),
                    pages_different: *different,
                    first_difference: *first,
                    device_state_equal: device_state_hash == compare.device_state_hash,
                }
            } else {
                PeerVerdict::NotCompared(NotCompared::Incomplete)
            };
            *progress = Progress::Done(verdict);
        }
        self.verify_finish(effects);
        Ok(())
    }

    /// The peer's connection is gone or new: it will not answer any more.
    pub(super) fn verify_peer_gone(&mut self, id: &PeerId, effects: &mut Vec<SourceEffect>) {
        if let Some(compare) = self.verify.as_mut().and_then(|v| v.compare.as_mut())
            && let Some(progress @ Progress::Comparing { .. }) = compare.peers.get_mut(id)
        {
            *progress = Progress::Done(PeerVerdict::NotCompared(NotCompared::Disconnected));
            self.verify_finish(effects);
        }
    }

    pub(super) fn verify_tick(&mut self, now: Millis, effects: &mut Vec<SourceEffect>) {
        self.verify_finish(effects);
        if self.verify.as_ref().is_some_and(|v| now.since(v.started) > self.config.limits.verify) {
            self.verify_abandon(effects);
        }
    }

    /// Reports if all peers have answered.
    fn verify_finish(&mut self, effects: &mut Vec<SourceEffect>) {
        let done = |compare: &Compare| compare.peers.values().all(|p| matches!(p, Progress::Done(_)));
        if self.verify.as_ref().and_then(|v| v.compare.as_ref()).is_some_and(done) {
            self.verify_abandon(effects);
        }
    }

    /// Reports what there is.
    fn verify_abandon(&mut self, effects: &mut Vec<SourceEffect>) {
        let Some(verify) = self.verify.take() else { return };
        let report = match verify.compare {
            Some(compare) => {
                let verdict = |progress| match progress {
                    Progress::Done(verdict) => verdict,
                    Progress::Comparing { .. } => PeerVerdict::NotCompared(NotCompared::TimedOut),
                };
                let peers = compare.peers.into_iter().map(|(id, p)| (id, verdict(p))).collect();
                VerifyReport { epoch: compare.epoch, peers }
            }
            None => {
                let reason = |connected| if connected { NotCompared::NotFollowing } else { NotCompared::Disconnected };
                let verdict = |connected| PeerVerdict::NotCompared(reason(connected));
                let peers = self.peers.values().map(|p| (p.id.clone(), verdict(p.is_connected()))).collect();
                VerifyReport { epoch: Epoch::NONE, peers }
            }
        };
        effects.push(SourceEffect::Verified(report));
    }
}

//! Pages and device state come in, epochs are sealed, acknowledged and applied.

use std::sync::Arc;

use super::session::{Hashing, Staged};
use super::{Applied, Breach, Target, TargetEffect};
use crate::codec::PagesFrame;
use crate::device_state::{DeviceState, DeviceStateError};
use crate::history::Stamp;
use crate::journal::{Commit, SealedEpoch};
use crate::message::TargetBody;
use crate::units::Epoch;
use crate::wire::Chain;

impl Target {
    pub(super) fn pages(
        &mut self,
        checksum: u64,
        bytes: Vec<u8>,
        effects: &mut Vec<TargetEffect>,
    ) -> Result<(), Breach> {
        let (Some(session), Some(image)) = (&mut self.session, &mut self.image) else { return Ok(()) };
        if matches!(session.hashing, Some(Hashing { epoch: Epoch::NONE, .. })) {
            return Err("pages before the hashes that were asked for".into());
        }
        let len = bytes.len() as u64;
        // Should the frame be refused, so is all that came since the last commit.
        let record = image.committed.is_some().then(|| self.journal.records.pages(&bytes));
        let frame = self.decoder.decode_owned(bytes, &image.layout).map_err(|error| error.to_string())?;
        image.known.accept(&frame).map_err(|error| Breach::out_of_step(&error))?;
        session.chain.add(checksum);
        let Some(record) = record else {
            image.zero = false;
            effects.push(TargetEffect::Apply(Arc::new(frame)));
            return Ok(());
        };
        session.staged.bytes += frame.memory_bytes().max(len);
        session.staged.frames.push(frame);
        self.append_journal(record, false, effects);
        self.bound_staging(effects);
        Ok(())
    }

    /// Takes a frame back that was applied: its memory serves a later one.
    pub fn reuse(&mut self, frame: Arc<PagesFrame>) {
        // Whoever else has it may keep it.
        Arc::into_inner(frame).into_iter().for_each(|frame| self.decoder.reuse(frame));
    }

    pub(super) fn device_state(
        &mut self,
        checksum: u64,
        bytes: &[u8],
        effects: &mut Vec<TargetEffect>,
    ) -> Result<(), Breach> {
        let (Some(session), Some(image)) = (&mut self.session, &self.image) else { return Ok(()) };
        if session.staged.device_state.is_some() {
            return Err("device state twice in one epoch".into());
        }
        let state = DeviceState::decode(bytes, session.former_state.as_ref()).map_err(|error| match error {
            DeviceStateError::OutOfStep => Breach::out_of_step(&error),
            other => other.to_string().into(),
        })?;
        session.chain.add(checksum);
        // Whole: at a replay nobody knows of which epoch the former state is that the state record has.
        let mut whole = Vec::new();
        state.encode_raw(&mut whole).map_err(|error| error.to_string())?;
        session.staged.device_state = Some(state);
        if image.committed.is_some() {
            let record = self.journal.records.device_state(&whole);
            self.append_journal(record, false, effects);
        }
        Ok(())
    }

    pub(super) fn commit(&mut self, epoch: Epoch, chain: Chain, effects: &mut Vec<TargetEffect>) -> Result<(), Breach> {
        let (Some(session), Some(image)) = (&mut self.session, &mut self.image) else { return Ok(()) };
        if session.chain != chain {
            let (found, claimed) = (session.chain.count, chain.count);
            let text = format!("epoch {epoch} is not what was sent: {found} messages came, {claimed} were sealed");
            return Err(text.into());
        }
        let commit = Commit { lineage: session.hello.lineage, term: session.term, epoch };
        let former = image.committed.as_ref().map(|(former, _)| *former);
        if epoch.is_none() || former.is_some_and(|f| f.lineage == commit.lineage && f.epoch >= epoch) {
            return Err(format!("epoch {epoch} is not later than the last commit").into());
        }
        let staged = std::mem::take(&mut session.staged);
        let device_state = staged.device_state.ok_or_else(|| format!("epoch {epoch} has no device state"))?;
        session.chain = Chain::default();
        session.former_state = Some(device_state.clone());
        let conn = session.conn;
        image.committed = Some((commit, device_state.clone()));
        self.inbound.committed();
        if former.is_some() {
            session.sealed.push_back(SealedEpoch { commit, frames: staged.frames, device_state });
            let record = self.journal.records.commit(commit);
            self.append_journal(record, true, effects);
        } else {
            // All pages are in the image: the record alone makes it whole.
            image.applied = Some(Applied { stamp: Stamp { commit, at: self.now }, device_state });
            self.save_state(effects);
        }
        self.send(conn, epoch, &TargetBody::Ack, effects);
        effects.push(TargetEffect::Committed(commit));
        if self.session.as_ref().is_some_and(|s| s.hashing.is_none()) {
            self.apply_sealed(effects);
        }
        // Epochs of an idle guest pile up, too, while they wait for a hashing run to end.
        self.bound_staging(effects);
        Ok(())
    }

    /// Applies all sealed epochs, then says so in the state record; the journal is needed no longer, except for what
    /// is staged behind them.
    pub(super) fn apply_sealed(&mut self, effects: &mut Vec<TargetEffect>) {
        let Some(session) = self.session.as_mut().filter(|s| !s.sealed.is_empty()) else { return };
        let nothing_staged = session.chain.count == 0;
        for epoch in std::mem::take(&mut session.sealed) {
            self.apply_epoch(epoch, true, effects);
        }
        self.save_state(effects);
        if nothing_staged {
            self.clear_journal(effects);
        }
    }

    /// Keeps staging within its limit: first by giving up a hashing run that epochs wait for, then the commit.
    fn bound_staging(&mut self, effects: &mut Vec<TargetEffect>) {
        let limit = self.config.staging_limit_bytes;
        let Some(session) = &mut self.session else { return };
        if session.staged.bytes + session.sealed_bytes() <= limit {
            return;
        }
        let conn = session.conn;
        if let Some(hashing) = session.hashing.take() {
            effects.push(TargetEffect::StopHash { id: hashing.id });
            let end = TargetBody::HashesEnd { complete: false, device_state_hash: 0 };
            self.send(conn, hashing.epoch, &end, effects);
            self.apply_sealed(effects);
        }
        let Some(session) = &mut self.session else { return };
        if session.staged.bytes <= limit {
            return;
        }
        // The device state stays: it may belong to the epoch that is being received.
        let staged = Staged { device_state: session.staged.device_state.take(), ..Staged::default() };
        let frames = std::mem::replace(&mut session.staged, staged).frames;
        if let Some(image) = &mut self.image {
            image.committed = None;
            image.applied = None;
            image.zero = false;
        }
        // First the record, durably: from here on the image is no epoch.
        self.inbound.clear();
        self.save_state(effects);
        self.drop_history(effects);
        self.clear_journal(effects);
        self.journal.records.reset();
        effects.push(TargetEffect::CommitLost);
        effects.extend(frames.into_iter().map(Arc::new).map(TargetEffect::Apply));
        self.send(conn, Epoch::NONE, &TargetBody::GaveUp, effects);
    }
}

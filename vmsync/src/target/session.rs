//! A source comes, greets, is refused or fed from, and goes.

use std::collections::VecDeque;

use super::{Breach, ConnId, HashId, Image, PreparedImage, Target, TargetCloseReason, TargetEffect};
use crate::codec::{KnownPages, PagesFrame};
use crate::device_state::DeviceState;
use crate::hashes::{HashSeed, hash_bytes};
use crate::journal::{SealedEpoch, encode_header};
use crate::message::{Hello, ImageState, MAX_HASHES, RefuseCode, SourceBody, SourceMessage, TargetBody};
use crate::units::{Epoch, Millis, PageAddr, PageIndex, Term};
use crate::wire::{Chain, WireError, encode};

#[derive(Debug)]
pub(super) struct Session {
    pub(super) conn: ConnId,
    pub(super) term: Term,
    pub(super) hello: Box<Hello>,
    /// Welcome was sent.
    pub(super) open: bool,
    /// Over the messages since the last commit.
    pub(super) chain: Chain,
    pub(super) staged: Staged,
    /// That of the last commit in this session, which the next one's may be made from.
    pub(super) former_state: Option<DeviceState>,
    /// Sealed epochs that wait for a hashing run to end before they are applied, oldest first.
    pub(super) sealed: VecDeque<SealedEpoch>,
    pub(super) hashing: Option<Hashing>,
}

/// What came since the last commit.
#[derive(Debug, Default)]
pub(super) struct Staged {
    /// Empty while pages are applied as they come.
    pub(super) frames: Vec<PagesFrame>,
    pub(super) device_state: Option<DeviceState>,
    pub(super) bytes: u64,
}

#[derive(Debug)]
pub(super) struct Hashing {
    pub(super) id: HashId,
    /// Epoch to be verified; none: the source asks what it need not send.
    pub(super) epoch: Epoch,
    pub(super) device_state_hash: u64,
}

impl Session {
    pub(super) fn sealed_bytes(&self) -> u64 {
        let epoch = |e: &SealedEpoch| {
            e.frames.iter().map(PagesFrame::memory_bytes).sum::<u64>() + e.device_state.bytes.len() as u64
        };
        self.sealed.iter().map(epoch).sum()
    }
}

impl Target {
    pub(super) fn received(
        &mut self,
        now: Millis,
        conn: ConnId,
        message: SourceMessage,
        effects: &mut Vec<TargetEffect>,
    ) {
        let SourceMessage { term, epoch, checksum, body } = message;
        if let SourceBody::Hello(hello) = body {
            self.hello(now, conn, term, hello, effects);
            return;
        }
        let Some(session) = self.session.as_mut().filter(|s| s.conn == conn) else {
            // A connection that was replaced, or one that did not greet.
            let reason = TargetCloseReason::Protocol("a message before Hello".into());
            effects.push(TargetEffect::Close { conn, reason });
            return;
        };
        self.heard_at = Some(now);
        let result = if term != session.term {
            Err(format!("a message of term {term} in a session of term {}", session.term).into())
        } else if matches!(body, SourceBody::Ping) {
            self.send(conn, Epoch::NONE, &TargetBody::Pong, effects);
            Ok(())
        } else if !session.open {
            Err("a message before Welcome".into())
        } else {
            self.session_message(epoch, checksum, body, effects)
        };
        if let Err(Breach { code, text }) = result {
            self.refuse(conn, code, text.clone(), effects);
            self.close(conn, TargetCloseReason::Protocol(text), effects);
        }
    }

    fn session_message(
        &mut self,
        epoch: Epoch,
        checksum: u64,
        body: SourceBody,
        effects: &mut Vec<TargetEffect>,
    ) -> Result<(), Breach> {
        match body {
            SourceBody::Pages(bytes) => self.pages(checksum, bytes, effects),
            SourceBody::DeviceState(bytes) => self.device_state(checksum, &bytes, effects),
            SourceBody::Commit(chain) => self.commit(epoch, chain, effects),
            SourceBody::HashRequest { seed } => self.hash_request(seed, effects),
            SourceBody::VerifyRequest { seed } => self.verify_request(epoch, seed, effects),
            SourceBody::Inbound(frames) => {
                // Of no use to a shadow that cannot be promoted.
                if self.committed().is_some() {
                    frames.into_iter().for_each(|frame| self.inbound.add(frame));
                }
                Ok(())
            }
            SourceBody::InboundCovered { all_but } => {
                self.inbound.cover_all_but(all_but);
                Ok(())
            }
            SourceBody::Ping | SourceBody::Hello(_) => Ok(()), // handled before
        }
    }

    fn hello(&mut self, now: Millis, conn: ConnId, term: Term, hello: Box<Hello>, effects: &mut Vec<TargetEffect>) {
        let host = &self.config.host;
        let refusal = if hello.guest != self.config.guest {
            Some((RefuseCode::UnknownGuest, format!("host {host} keeps no shadow of guest {} here", hello.guest)))
        } else if self.promotion.is_some() {
            let text = format!("host {host} runs this guest as its primary with term {}", self.term);
            Some((RefuseCode::Promoted, text))
        } else if term < self.term {
            let text = format!("host {host} knows term {}, the source has term {term}", self.term);
            Some((RefuseCode::StaleTerm, text))
        } else {
            None
        };
        if let Some((code, text)) = refusal {
            self.refuse(conn, code, text.clone(), effects);
            self.close(conn, TargetCloseReason::Refused(text), effects);
            return;
        }
        self.heard_at = Some(now);
        if let Some(old) = self.session.as_ref().map(|s| s.conn) {
            if old == conn {
                self.close(conn, TargetCloseReason::Protocol("a second Hello".into()), effects);
                return;
            }
            self.close(old, TargetCloseReason::Replaced, effects);
        }
        if term > self.term {
            self.term = term;
            // Before anything of the new term is acted upon.
            self.save_state(effects);
        }
        // Whoever sent them may have had the guest run on, or not.
        self.inbound.clear();
        self.session = Some(Session {
            conn,
            term,
            hello,
            open: false,
            chain: Chain::default(),
            staged: Staged::default(),
            former_state: None,
            sealed: VecDeque::new(),
            hashing: None,
        });
        self.prepare(effects);
    }

    pub(super) fn term_known(&mut self, term: Term, effects: &mut Vec<TargetEffect>) {
        if term <= self.term {
            return;
        }
        self.term = term;
        self.save_state(effects);
        if let Some(conn) = self.session.as_ref().map(|s| s.conn) {
            let text = format!("host {} knows term {term}", self.config.host);
            self.refuse(conn, RefuseCode::StaleTerm, text.clone(), effects);
            self.close(conn, TargetCloseReason::Refused(text), effects);
        }
    }

    /// Has the image made or found for the session's Hello, unless that is under way for an earlier one.
    fn prepare(&mut self, effects: &mut Vec<TargetEffect>) {
        let Some(session) = &self.session else { return };
        if self.preparing.is_some() {
            return;
        }
        let hello = session.hello.clone();
        let keep = self.image.as_ref().is_some_and(|image| image.layout == hello.layout);
        if !keep {
            self.forget_image(effects);
        }
        self.preparing = Some(hello.clone());
        effects.push(TargetEffect::Prepare { hello, keep });
    }

    pub(super) fn prepare_done(&mut self, result: Result<PreparedImage, String>, effects: &mut Vec<TargetEffect>) {
        let Some(prepared) = self.preparing.take() else { return };
        let failure = match result {
            Ok(image) => {
                self.image_ready(&prepared, image, effects);
                None
            }
            Err(text) => Some(text),
        };
        let Some(session) = &mut self.session else { return };
        if session.hello != prepared {
            // Another source came meanwhile.
            self.prepare(effects);
            return;
        }
        let conn = session.conn;
        if let Some(text) = failure {
            self.refuse(conn, RefuseCode::CannotPrepare, text.clone(), effects);
            self.close(conn, TargetCloseReason::Refused(text), effects);
            return;
        }
        session.open = true;
        let state = match &self.image {
            Some(Image { committed: Some((commit, _)), .. }) => {
                ImageState::Committed { lineage: commit.lineage, epoch: commit.epoch }
            }
            Some(Image { zero: true, .. }) => ImageState::Zero,
            _ => ImageState::Present,
        };
        self.send(conn, Epoch::NONE, &TargetBody::Welcome(state), effects);
    }

    fn image_ready(&mut self, hello: &Hello, prepared: PreparedImage, effects: &mut Vec<TargetEffect>) {
        let kept = prepared == PreparedImage::Kept;
        if kept && self.image.as_ref().is_some_and(|image| image.layout == hello.layout) {
            return;
        }
        // Fresh, or kept by a driver that knows of an image we know nothing of: then its contents are worth hashing.
        self.forget_image(effects);
        let known = if kept { KnownPages::unknown(&hello.layout) } else { KnownPages::zero(&hello.layout) };
        // Whatever a former agent may have left that nobody took up.
        effects.push(TargetEffect::DropKept { first: 0, last: u64::MAX });
        self.image = Some(Image { layout: hello.layout.clone(), zero: !kept, committed: None, applied: None, known });
        self.save_state(effects);
        effects.push(TargetEffect::TruncateJournal { len_bytes: 0 });
        self.journal.len_bytes = 0;
        let header = encode_header(self.config.guest, &hello.layout);
        self.append_journal(header, true, effects);
    }

    pub(super) fn image_lost(&mut self, effects: &mut Vec<TargetEffect>) {
        // There may be nothing any more to apply it to; what follows must be done all the same.
        if let Some(session) = &mut self.session {
            session.sealed.clear();
        }
        // No guest runs from it, and none will.
        self.promotion = None;
        self.going_back = None;
        // First of all: what ends with the session was acknowledged.
        self.forget_image(effects);
        // While a Prepare is under way its session goes on: a fresh image is about to come.
        if self.preparing.is_none()
            && let Some(conn) = self.session.as_ref().map(|s| s.conn)
        {
            self.close(conn, TargetCloseReason::ImageLost, effects);
        }
    }

    /// Says durably that there is no image.
    fn forget_image(&mut self, effects: &mut Vec<TargetEffect>) {
        self.inbound.clear();
        let Some(image) = self.image.take() else { return };
        self.save_state(effects);
        self.clear_journal(effects);
        self.drop_history(effects);
        if image.committed.is_some() {
            effects.push(TargetEffect::CommitLost);
        }
    }

    fn hash_request(&mut self, seed: HashSeed, effects: &mut Vec<TargetEffect>) -> Result<(), Breach> {
        let Some(session) = &self.session else { return Ok(()) };
        if session.hashing.is_some() || session.chain.count > 0 {
            return Err("a HashRequest is only allowed right after Welcome".into());
        }
        self.start_hashing(Epoch::NONE, seed, effects);
        Ok(())
    }

    fn verify_request(&mut self, epoch: Epoch, seed: HashSeed, effects: &mut Vec<TargetEffect>) -> Result<(), Breach> {
        let Some(session) = &self.session else { return Ok(()) };
        if session.chain.count > 0 || self.committed().map(|c| c.epoch) != Some(epoch) {
            return Err(format!("a VerifyRequest for epoch {epoch} does not follow its Commit").into());
        }
        // One that was given up by the source may still run, with sealed epochs waiting behind it.
        self.stop_hashing(effects);
        self.apply_sealed(effects);
        self.start_hashing(epoch, seed, effects);
        Ok(())
    }

    fn start_hashing(&mut self, epoch: Epoch, seed: HashSeed, effects: &mut Vec<TargetEffect>) {
        self.next_hash += 1;
        let id = HashId(self.next_hash);
        let state = self.image.as_ref().and_then(|image| image.committed.as_ref());
        let device_state_hash = state.map_or(0, |(_, state)| hash_bytes(seed, &state.bytes));
        if let Some(session) = &mut self.session {
            session.hashing = Some(Hashing { id, epoch, device_state_hash });
            effects.push(TargetEffect::Hash { id, seed });
        }
    }

    pub(super) fn stop_hashing(&mut self, effects: &mut Vec<TargetEffect>) {
        if let Some(hashing) = self.session.as_mut().and_then(|s| s.hashing.take()) {
            effects.push(TargetEffect::StopHash { id: hashing.id });
        }
    }

    pub(super) fn hashed(&mut self, id: HashId, start: PageAddr, hashes: &[u64], effects: &mut Vec<TargetEffect>) {
        let Some(session) = &self.session else { return };
        let Some(hashing) = session.hashing.as_ref().filter(|h| h.id == id) else { return };
        let (conn, epoch) = (session.conn, hashing.epoch);
        let mut page = start.page.get();
        for hashes in hashes.chunks(MAX_HASHES) {
            let start = PageAddr { block: start.block, page: PageIndex::new(page) };
            self.send(conn, epoch, &TargetBody::Hashes { start, hashes: hashes.to_vec() }, effects);
            page = page.wrapping_add(hashes.len() as u32); // at most MAX_HASHES
        }
    }

    pub(super) fn hashing_done(&mut self, id: HashId, effects: &mut Vec<TargetEffect>) {
        let Some(session) = &mut self.session else { return };
        let Some(hashing) = session.hashing.take_if(|h| h.id == id) else { return };
        let conn = session.conn;
        let end = TargetBody::HashesEnd { complete: true, device_state_hash: hashing.device_state_hash };
        self.send(conn, hashing.epoch, &end, effects);
        self.apply_sealed(effects);
    }

    pub(super) fn unreadable(&mut self, conn: ConnId, error: WireError, effects: &mut Vec<TargetEffect>) {
        let code = match error {
            WireError::Version { .. } => RefuseCode::Version,
            _ => RefuseCode::Protocol,
        };
        self.refuse(conn, code, error.to_string(), effects);
        self.close(conn, TargetCloseReason::Unreadable(error), effects);
    }

    pub(super) fn refuse(&mut self, conn: ConnId, code: RefuseCode, text: String, effects: &mut Vec<TargetEffect>) {
        self.send(conn, Epoch::NONE, &TargetBody::Refuse { code, text, known_term: self.term }, effects);
    }

    /// Closes a connection; if it is the session's, that ends.
    pub(super) fn close(&mut self, conn: ConnId, reason: TargetCloseReason, effects: &mut Vec<TargetEffect>) {
        effects.push(TargetEffect::Close { conn, reason });
        if self.session.as_ref().is_some_and(|s| s.conn == conn) {
            self.end_session(effects);
        }
    }

    /// Drops what no commit sealed, applies what one did.
    pub(super) fn end_session(&mut self, effects: &mut Vec<TargetEffect>) {
        self.stop_hashing(effects);
        self.truncate_journal(self.journal.sealed_len_bytes, effects);
        self.journal.records.reset();
        if let Some(session) = &mut self.session {
            let staged = std::mem::take(&mut session.staged);
            if let Some(image) = &mut self.image {
                staged.frames.iter().for_each(|frame| image.known.drop_frame(frame));
            }
        }
        self.apply_sealed(effects);
        // Of the next source there must not be records behind those of this one: they would not build upon each other.
        self.clear_journal(effects);
        self.session = None;
    }

    pub(super) fn send(&self, conn: ConnId, epoch: Epoch, body: &TargetBody, effects: &mut Vec<TargetEffect>) {
        effects.push(TargetEffect::Send { conn, bytes: encode(self.term, epoch, body).bytes });
    }
}

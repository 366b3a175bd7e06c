//! Connections: bytes take time, pieces have any length, and both sides see the end at different moments.

use std::collections::VecDeque;
use std::sync::Arc;

use vmsync::PeerId;
use vmsync::message::{SourceBody, TargetBody};
use vmsync::source::SourceEvent;
use vmsync::target::{ConnId, TargetEvent};
use vmsync::wire::Decoder;

use super::{Ev, World};

pub struct Link {
    pub primary: usize,
    pub primary_life: u64,
    pub node: usize,
    pub node_life: u64,
    /// Neither side has closed it, and it was not cut.
    pub up: bool,
    /// The target closed it: what it sent before still arrives.
    pub draining: bool,
    outgoing: VecDeque<(Arc<[u8]>, usize)>,
    transmitting: bool,
    /// Nothing moves, and nobody is told.
    stalled: bool,
    latency_ms: u64,
    bytes_per_ms: u64,
    to_source: Decoder<TargetBody>,
    to_target: Decoder<SourceBody>,
    /// A side that could not read what came reads no more.
    unreadable: bool,
    /// Arrival of the last piece: pieces do not overtake each other.
    last_to_target: u64,
    last_to_source: u64,
}

impl Link {
    /// Slow no more.
    pub fn heal(&mut self) {
        self.latency_ms = self.latency_ms.min(5);
        self.bytes_per_ms = self.bytes_per_ms.max(200_000);
    }
}

pub fn peer_id(node: usize) -> PeerId {
    PeerId::new(&format!("node{node}"))
}

pub fn node_of(peer: &PeerId) -> usize {
    peer.as_str().trim_start_matches("node").parse().unwrap()
}

impl World {
    pub fn connect(&mut self, primary: usize, life: u64, node: usize) {
        let (p, n) = (&self.primaries[primary], &self.nodes[node]);
        if !p.alive || p.life != life || p.links.contains_key(&node) {
            return;
        }
        if n.target.is_none() {
            self.at(100, Ev::Connect { primary, life, node });
            return;
        }
        let node_life = n.life;
        let slow = self.nature.faults && self.rng.chance(250);
        let link = Link {
            primary,
            primary_life: life,
            node,
            node_life,
            up: true,
            draining: false,
            outgoing: VecDeque::new(),
            transmitting: false,
            stalled: false,
            latency_ms: if slow { self.rng.between(20, 200) } else { self.rng.between(0, 5) },
            bytes_per_ms: if slow { self.rng.between(200, 3_000) } else { 200_000 },
            to_source: Decoder::new(),
            to_target: Decoder::new(),
            unreadable: false,
            last_to_target: 0,
            last_to_source: 0,
        };
        let id = self.new_link_id();
        self.log(|| format!("link {id}: primary {primary} to node {node}, slow: {slow}"));
        self.links.insert(id, link);
        self.primaries[primary].links.insert(node, id);
        self.source_event(primary, SourceEvent::Connected { peer: peer_id(node) });
    }

    pub fn send_to_target(&mut self, primary: usize, node: usize, bytes: Arc<[u8]>) {
        let Some(id) = self.primaries[primary].links.get(&node).copied() else { return };
        if self.nature.faults && self.rng.chance(self.nature.link_cut_per_mille) {
            let after = self.rng.below(20);
            self.at(after, Ev::CutLink { link: id });
        }
        if self.nature.faults && self.rng.chance(self.nature.stall_per_mille) {
            let lasts = self.rng.between(50, 3_000);
            self.at(0, Ev::Stall { link: id, stalled: true });
            self.at(lasts, Ev::Stall { link: id, stalled: false });
        }
        let Some(link) = self.links.get_mut(&id).filter(|l| l.up) else { return };
        link.outgoing.push_back((bytes, 0));
        if !link.transmitting && !link.stalled {
            link.transmitting = true;
            self.at(0, Ev::Transmit { link: id });
        }
    }

    /// The kernel takes a piece of what waits.
    pub fn transmit(&mut self, id: u64) {
        let most = self.rng.between(1, 60_000) as usize;
        let (flip, at) = (self.flips(), self.rng.next() as usize);
        let Some(link) = self.links.get_mut(&id).filter(|l| l.up) else { return };
        let next = link.outgoing.front_mut().filter(|_| !link.stalled);
        let Some((bytes, offset)) = next else {
            link.transmitting = false;
            return;
        };
        let len = most.min(bytes.len() - *offset);
        let mut piece = bytes[*offset..*offset + len].to_vec();
        if flip {
            piece[at % len] ^= 1 << (at / 65_536 % 8);
        }
        *offset += len;
        if *offset == bytes.len() {
            link.outgoing.pop_front();
        }
        let took = len as u64 / link.bytes_per_ms;
        let arrival = (self.now + took + link.latency_ms).max(link.last_to_target);
        link.last_to_target = arrival;
        let (primary, life, node) = (link.primary, link.primary_life, link.node);
        self.at(arrival - self.now, Ev::ToTarget { link: id, bytes: piece });
        self.at(took, Ev::Transmit { link: id });
        if self.primaries[primary].alive && self.primaries[primary].life == life {
            self.source_event(primary, SourceEvent::Written { peer: peer_id(node), bytes: len as u64 });
        }
    }

    fn flips(&mut self) -> bool {
        let flips = self.nature.faults && self.rng.chance(self.nature.flip_per_mille);
        self.seen.flips += u64::from(flips);
        flips
    }

    pub fn stall(&mut self, id: u64, stalled: bool) {
        self.seen.stalls += u64::from(stalled);
        let Some(link) = self.links.get_mut(&id).filter(|l| l.up) else { return };
        link.stalled = stalled;
        if !stalled && !link.transmitting {
            link.transmitting = true;
            self.at(0, Ev::Transmit { link: id });
        }
    }

    pub fn arrive_at_target(&mut self, id: u64, bytes: &[u8]) {
        let Some(link) = self.links.get_mut(&id).filter(|l| l.up) else { return };
        link.to_target.push(bytes);
        loop {
            let Some(link) = self.links.get_mut(&id).filter(|l| l.up) else { return };
            let (node, life) = (link.node, link.node_life);
            if link.unreadable {
                return;
            }
            let next = link.to_target.next();
            link.unreadable = next.is_err();
            let event = match next {
                Ok(Some(message)) => {
                    if self.nodes[node].life == life {
                        self.hears(node, id, &message.body);
                    }
                    TargetEvent::Received { conn: ConnId(id), message }
                }
                Ok(None) => return,
                Err(error) => TargetEvent::Unreadable { conn: ConnId(id), error },
            };
            if self.nodes[node].life != life {
                return;
            }
            self.target_event(node, event);
            self.greeted(node);
        }
    }

    pub fn send_to_source(&mut self, id: u64, bytes: &[u8]) {
        let split = self.rng.below(bytes.len() as u64) as usize;
        let (flip, at) = (self.flips(), self.rng.next() as usize);
        let mut bytes = bytes.to_vec();
        if flip {
            let at = at % bytes.len();
            bytes[at] ^= 1 << (at % 8);
        }
        let Some(link) = self.links.get_mut(&id).filter(|l| l.up && !l.draining) else { return };
        let arrival = (self.now + link.latency_ms).max(link.last_to_source);
        link.last_to_source = arrival;
        let delay = arrival - self.now;
        self.at(delay, Ev::ToSource { link: id, bytes: bytes[..split].to_vec() });
        self.at(delay, Ev::ToSource { link: id, bytes: bytes[split..].to_vec() });
    }

    pub fn arrive_at_source(&mut self, id: u64, bytes: &[u8]) {
        let Some(link) = self.links.get_mut(&id).filter(|l| l.up) else { return };
        link.to_source.push(bytes);
        loop {
            let Some(link) = self.links.get_mut(&id).filter(|l| l.up) else { return };
            let (primary, life, node) = (link.primary, link.primary_life, link.node);
            let next = link.to_source.next();
            if !self.primaries[primary].alive || self.primaries[primary].life != life {
                return;
            }
            let message = match next {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(error) => {
                    assert!(self.seen.flips > 0, "what a target sends can be read: {error}");
                    return self.source_event(primary, SourceEvent::Unreadable { peer: peer_id(node), error });
                }
            };
            if let TargetBody::Welcome(state) = &message.body {
                let lineage = self.primaries[primary].lineage;
                match state {
                    vmsync::message::ImageState::Zero => {}
                    vmsync::message::ImageState::Committed { lineage: l, .. } if l.get() == lineage => {
                        self.seen.delta_resumes += 1;
                    }
                    _ => self.seen.hash_resumes += 1,
                }
            }
            self.source_event(primary, SourceEvent::Received { peer: peer_id(node), message });
        }
    }

    /// The network fails, or a host: each side finds out when it does.
    pub fn cut_link(&mut self, id: u64) {
        let Some(link) = self.links.get_mut(&id).filter(|l| l.up) else { return };
        link.up = false;
        link.outgoing.clear();
        self.seen.cut_links += 1;
        self.log(|| format!("link {id} is cut"));
        let (source_after, target_after) = (self.rng.below(150), self.rng.below(400));
        self.at(source_after, Ev::SourceSeesEnd { link: id });
        self.at(target_after, Ev::TargetSeesEnd { link: id });
    }

    /// The source's driver closes.
    pub fn source_closes(&mut self, primary: usize, node: usize) {
        let Some(id) = self.primaries[primary].links.remove(&node) else { return };
        if let Some(link) = self.links.get_mut(&id) {
            link.up = false;
            self.at(1, Ev::TargetSeesEnd { link: id });
        }
        self.reconnect(primary, node);
    }

    /// The target's driver closes, after what it sent.
    pub fn target_closes(&mut self, id: u64) {
        let Some(link) = self.links.get_mut(&id).filter(|l| l.up) else { return };
        link.draining = true;
        let after = link.latency_ms.max(link.last_to_source.saturating_sub(self.now)) + 1;
        self.at(after, Ev::SourceSeesEnd { link: id });
    }

    pub fn source_sees_end(&mut self, id: u64) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.up = false;
        let (primary, life, node) = (link.primary, link.primary_life, link.node);
        let p = &mut self.primaries[primary];
        if p.alive && p.life == life && p.links.get(&node) == Some(&id) {
            p.links.remove(&node);
            self.source_event(primary, SourceEvent::Disconnected { peer: peer_id(node) });
            self.reconnect(primary, node);
        }
    }

    pub fn target_sees_end(&mut self, id: u64) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.up = false;
        let (node, life) = (link.node, link.node_life);
        if self.nodes[node].life == life {
            self.nodes[node].heard.ended(id);
            self.target_event(node, TargetEvent::Disconnected { conn: ConnId(id) });
        }
    }

    fn reconnect(&mut self, primary: usize, node: usize) {
        let after = self.rng.between(10, 300);
        let life = self.primaries[primary].life;
        self.at(after, Ev::Connect { primary, life, node });
    }
}

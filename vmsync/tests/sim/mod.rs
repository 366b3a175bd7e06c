//! The simulated world; see `simulation.rs`.

mod frames;
mod link;
mod node;
mod primary;

use std::collections::BTreeMap;

use vmsync::codec::MirrorBudget;
use vmsync::source::{ReadId, SourceLimits};
use vmsync::target::{HashId, PreparedImage};
use vmsync::{GuestUuid, Keep, Millis, PageAddr, PageBatch, RamBlock, RamLayout};

pub use link::Link;
pub use node::Node;
pub use primary::Primary;

pub const GUEST: GuestUuid = GuestUuid::from_bytes([7; 16]);

/// xorshift64*; the only source of chance.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }
    /// True `per_mille` times of a thousand.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

/// What happens at some moment. Generations tell what was meant for a former life of an agent.
pub enum Ev {
    GuestWrites { primary: usize },
    FramesCome { primary: usize },
    CutDue { primary: usize },
    Tick { primary: usize },
    ReadNow { primary: usize, life: u64, read: Read },
    ReadDone { primary: usize, life: u64, read: Read, pages: PageBatch },
    VerifyStart { primary: usize },
    RestartPrimary { primary: usize },
    StopPrimary { primary: usize },
    Connect { primary: usize, life: u64, node: usize },
    Transmit { link: u64 },
    ToTarget { link: u64, bytes: Vec<u8> },
    ToSource { link: u64, bytes: Vec<u8> },
    SourceSeesEnd { link: u64 },
    TargetSeesEnd { link: u64 },
    CutLink { link: u64 },
    Stall { link: u64, stalled: bool },
    Prepared { node: usize, life: u64, keep: bool },
    HashNow { node: usize, life: u64, id: HashId, seed: vmsync::hashes::HashSeed, from: u64 },
    CrashNode { node: usize },
    StartNode { node: usize },
    DestroyImage { node: usize },
    Promote { node: usize },
    KeepChanged { node: usize },
    ClockJump { node: usize },
}

pub enum Read {
    Live { node: usize, id: ReadId, pages: Vec<PageAddr> },
    Verify { id: ReadId, pages: Vec<PageAddr> },
}

/// How this seed's world behaves.
pub struct Nature {
    pub faults: bool,
    pub write_pages_max: u64,
    pub values: u64,
    pub link_cut_per_mille: u64,
    pub stall_per_mille: u64,
    pub crash_per_mille: u64,
    pub failed_cut_per_mille: u64,
    pub staging_limit_bytes: u64,
    pub limits: SourceLimits,
    pub zstd_level: i32,
    pub mirror: MirrorBudget,
    pub keep_fails_per_mille: u64,
    /// Of pieces on their way, one bit of which changes.
    pub flip_per_mille: u64,
    /// Of writes for which there is no room.
    pub full_per_ten_thousand: u64,
}

/// Contents of guest memory at one epoch.
pub struct Moment {
    pub pages: Vec<u64>,
    pub device_state: Vec<u8>,
    /// For the guest, told before the cut was planned.
    pub frames: u64,
}

pub struct World {
    pub rng: Rng,
    pub now: u64,
    pub trace: bool,
    pub layout: RamLayout,
    pub nature: Nature,
    pub traffic: frames::Traffic,
    pub primaries: Vec<Primary>,
    pub nodes: Vec<Node>,
    pub links: BTreeMap<u64, Link>,
    /// (lineage, epoch) -> what the guest held.
    pub history: BTreeMap<(u64, u64), Moment>,
    pub term: u64,
    pub lineage: u64,
    pub seen: Seen,
    next_link: u64,
    queue: BTreeMap<(u64, u64), Ev>,
    queue_seq: u64,
}

/// How often what the simulation is for has happened.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    pub commits: u64,
    pub promotions: u64,
    pub commits_lost: u64,
    pub crashes: u64,
    pub torn_applies: u64,
    pub torn_patches: u64,
    pub patched_pages: u64,
    pub torn_appends: u64,
    pub replayed_epochs: u64,
    pub delta_resumes: u64,
    pub hash_resumes: u64,
    pub superseded: u64,
    pub refused: u64,
    pub silent: u64,
    pub verified_equal: u64,
    pub not_compared: u64,
    pub torn_reads: u64,
    pub collects: u64,
    pub coalesced: u64,
    pub checks: u64,
    pub kept: u64,
    pub not_kept: u64,
    pub torn_records: u64,
    pub went_back: u64,
    pub torn_steps: u64,
    pub checked_back: u64,
    pub cut_links: u64,
    pub stalls: u64,
    pub flips: u64,
    pub full_disks: u64,
    pub clock_jumps: u64,
    pub destroyed: u64,
    pub restarts: u64,
    pub replays: u64,
    pub frames_replayed: u64,
    pub refused_with_frames: u64,
}

impl Seen {
    /// All that went wrong on purpose.
    pub fn faults(&self) -> u64 {
        let links = self.cut_links + self.stalls + self.flips;
        let storage = self.torn_applies + self.torn_appends + self.torn_records + self.torn_steps + self.not_kept;
        let hosts = self.crashes + self.restarts + self.destroyed + self.full_disks + self.clock_jumps;
        links + storage + hosts + self.torn_reads + self.collects
    }

    pub fn add(&mut self, world: &World) {
        let (s, w) = (self, &world.seen);
        s.commits += w.commits;
        s.promotions += w.promotions;
        s.commits_lost += w.commits_lost;
        s.crashes += w.crashes;
        s.torn_applies += w.torn_applies;
        s.torn_patches += w.torn_patches;
        s.patched_pages += w.patched_pages;
        s.torn_appends += w.torn_appends;
        s.replayed_epochs += w.replayed_epochs;
        s.delta_resumes += w.delta_resumes;
        s.hash_resumes += w.hash_resumes;
        s.superseded += w.superseded;
        s.refused += w.refused;
        s.silent += w.silent;
        s.verified_equal += w.verified_equal;
        s.not_compared += w.not_compared;
        s.torn_reads += w.torn_reads;
        s.collects += w.collects;
        s.coalesced += w.coalesced;
        s.checks += w.checks;
        s.kept += w.kept;
        s.not_kept += w.not_kept;
        s.torn_records += w.torn_records;
        s.went_back += w.went_back;
        s.torn_steps += w.torn_steps;
        s.checked_back += w.checked_back;
        s.cut_links += w.cut_links;
        s.stalls += w.stalls;
        s.flips += w.flips;
        s.full_disks += w.full_disks;
        s.clock_jumps += w.clock_jumps;
        s.destroyed += w.destroyed;
        s.restarts += w.restarts;
        s.replays += w.replays;
        s.frames_replayed += w.frames_replayed;
        s.refused_with_frames += w.refused_with_frames;
    }

    pub fn assert_everything_happened(&self, seeds: u64) {
        if seeds < 100 {
            return;
        }
        for (what, times) in [
            ("commits", self.commits / 20),
            ("promotions", self.promotions),
            ("commits given up", self.commits_lost),
            ("crashes", self.crashes),
            ("torn applies", self.torn_applies),
            ("torn patches", self.torn_patches * 3),
            ("patched pages", self.patched_pages / 100),
            ("torn journal appends", self.torn_appends),
            ("epochs replayed from a journal", self.replayed_epochs),
            ("delta resumes", self.delta_resumes),
            ("hash resumes", self.hash_resumes),
            ("superseded primaries", self.superseded),
            ("refusals", self.refused),
            ("silent peers", self.silent),
            ("equal verifications", self.verified_equal),
            ("torn live reads", self.torn_reads),
            ("collections", self.collects),
            ("coalesced epochs", self.coalesced),
            ("kept epochs", self.kept / 10),
            ("epochs that could not be kept", self.not_kept),
            ("torn undo records", self.torn_records),
            ("promotions of a former epoch", self.went_back),
            ("torn steps back", self.torn_steps * 3),
            ("former epochs checked", self.checked_back / 10),
            ("links that were cut", self.cut_links),
            ("links that stalled", self.stalls),
            ("bits that flipped", self.flips),
            ("full disks", self.full_disks),
            ("clocks that jumped", self.clock_jumps),
            ("images destroyed", self.destroyed),
            ("restarts of a primary's agent", self.restarts),
            ("promotions with frames to replay", self.replays),
            ("frames to replay", self.frames_replayed / 10),
            ("refused ways back with frames to keep", self.refused_with_frames),
        ] {
            assert!(times >= seeds / 20, "too few {what}: {times} in {seeds} seeds");
        }
    }
}

const CHAOS_MS: u64 = 4_500;
const HEAL_MS: u64 = 4_500;
const PEERS: usize = 3;

impl World {
    pub fn new(seed: u64, trace: bool) -> Self {
        Self::with(seed, trace, frames::Traffic::new(seed))
    }

    /// Of seeds that are older than frames.
    pub fn without_frames(seed: u64) -> Self {
        Self::with(seed, false, frames::Traffic::none())
    }

    fn with(seed: u64, trace: bool, traffic: frames::Traffic) -> Self {
        let mut rng = Rng::new(seed);
        let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * 4096 };
        let layout = RamLayout::new(vec![block("pc.ram", 90), block("pc.bios", 3), block("vga.vram", 27)]).unwrap();
        let nature = nature(&mut rng);
        let mut world = Self {
            rng,
            now: 0,
            trace,
            nature,
            traffic,
            primaries: Vec::new(),
            nodes: Vec::new(),
            links: BTreeMap::new(),
            history: BTreeMap::new(),
            term: 1,
            lineage: 100,
            seen: Seen::default(),
            next_link: 0,
            queue: BTreeMap::new(),
            queue_seq: 0,
            layout,
        };
        for node in 0..PEERS {
            let keep = keep(&mut world.rng);
            world.nodes.push(Node::new(node, keep));
            world.start_node(node);
        }
        let pages = (0..world.layout.total_pages()).map(|_| world.rng.below(3)).collect();
        world.start_primary(pages, (0..PEERS).collect());
        world.schedule_faults();
        world
    }

    pub fn at(&mut self, delay_ms: u64, ev: Ev) {
        self.queue_seq += 1;
        self.queue.insert((self.now + delay_ms, self.queue_seq), ev);
    }

    pub fn millis(&self) -> Millis {
        Millis::new(self.now)
    }

    pub fn log(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:6} {}", self.now, what());
        }
    }

    pub fn new_link_id(&mut self) -> u64 {
        self.next_link += 1;
        self.next_link
    }

    /// Runs the chaos, then lets everything heal, and checks that all shadows follow and are equal.
    pub fn run(mut self) -> Self {
        self.run_until(CHAOS_MS);
        self.nature.faults = false;
        self.links.values_mut().for_each(Link::heal);
        // Later than any verification that faults may still spoil.
        for primary in 0..self.primaries.len() {
            self.at(3_000, Ev::VerifyStart { primary });
        }
        self.run_until(CHAOS_MS + HEAL_MS);
        self.check_healed();
        self.seen.patched_pages = self.primaries.iter().map(|p| p.source.codec_stats().pages_patched).sum();
        self
    }

    fn run_until(&mut self, end: u64) {
        while let Some(entry) = self.queue.first_entry() {
            let (time, _) = *entry.key();
            if time > end {
                break;
            }
            let ev = entry.remove();
            self.now = time;
            self.handle(ev);
            self.check_bounds();
        }
        self.now = end;
    }

    fn handle(&mut self, ev: Ev) {
        match ev {
            Ev::GuestWrites { primary } => self.guest_writes(primary),
            Ev::FramesCome { primary } => self.frames_come(primary),
            Ev::CutDue { primary } => self.cut_due(primary),
            Ev::Tick { primary } => self.primary_tick(primary),
            Ev::ReadNow { primary, life, read } => self.read_now(primary, life, read),
            Ev::ReadDone { primary, life, read, pages } => self.read_done(primary, life, read, pages),
            Ev::VerifyStart { primary } => self.verify_start(primary),
            Ev::RestartPrimary { primary } => self.restart_primary(primary),
            Ev::StopPrimary { primary } => self.stop_primary(primary),
            Ev::Connect { primary, life, node } => self.connect(primary, life, node),
            Ev::Transmit { link } => self.transmit(link),
            Ev::ToTarget { link, bytes } => self.arrive_at_target(link, &bytes),
            Ev::ToSource { link, bytes } => self.arrive_at_source(link, &bytes),
            Ev::SourceSeesEnd { link } => self.source_sees_end(link),
            Ev::TargetSeesEnd { link } => self.target_sees_end(link),
            Ev::CutLink { link } => self.cut_link(link),
            Ev::Stall { link, stalled } => self.stall(link, stalled),
            Ev::Prepared { node, life, keep } => self.prepared(node, life, keep),
            Ev::HashNow { node, life, id, seed, from } => self.hash_now(node, life, id, seed, from),
            Ev::CrashNode { node } => self.crash_node(node),
            Ev::StartNode { node } => self.start_node(node),
            Ev::DestroyImage { node } => self.destroy_image(node),
            Ev::Promote { node } => self.promote(node),
            Ev::KeepChanged { node } => self.keep_changed(node),
            Ev::ClockJump { node } => self.clock_jump(node),
        }
    }

    fn schedule_faults(&mut self) {
        for node in 0..PEERS {
            if self.rng.chance(300) {
                let at = self.rng.below(CHAOS_MS);
                self.at(at, Ev::DestroyImage { node });
            }
            for _ in 0..self.rng.below(4) {
                let at = self.rng.below(CHAOS_MS);
                self.at(at, Ev::CrashNode { node });
            }
        }
        for _ in 0..self.rng.below(3) {
            let (at, node) = (self.rng.between(500, CHAOS_MS), self.rng.below(PEERS as u64) as usize);
            self.at(at, Ev::Promote { node });
        }
        for node in 0..PEERS {
            if self.rng.chance(200) {
                let at = self.rng.below(CHAOS_MS);
                self.at(at, Ev::KeepChanged { node });
            }
            if self.rng.chance(200) {
                let at = self.rng.below(CHAOS_MS);
                self.at(at, Ev::ClockJump { node });
            }
        }
        if self.rng.chance(400) {
            let at = self.rng.below(CHAOS_MS);
            self.at(at, Ev::RestartPrimary { primary: 0 });
        }
    }
}

fn nature(rng: &mut Rng) -> Nature {
    let tight = rng.chance(400);
    Nature {
        faults: true,
        write_pages_max: [2, 5, 12, 40][rng.below(4) as usize],
        values: [2, 4, 1000][rng.below(3) as usize],
        link_cut_per_mille: [0, 2, 10, 40][rng.below(4) as usize],
        stall_per_mille: [0, 0, 5][rng.below(3) as usize],
        crash_per_mille: [0, 1, 5][rng.below(3) as usize],
        failed_cut_per_mille: [0, 0, 30, 100][rng.below(4) as usize],
        staging_limit_bytes: if rng.chance(400) { rng.between(4, 60) * 4096 } else { 4 << 20 },
        limits: SourceLimits {
            in_flight_epochs: rng.between(1, 4) as usize,
            unsent_bytes: if tight { 40_000 } else { 1 << 20 },
            live_batch_pages: rng.between(1, 40) as usize,
            join_pages: rng.between(1, 30),
            join_pages_max: rng.between(30, 80),
            skipped_plans: rng.below(4) as u32,
            ping_after: Millis::new(200),
            silence: Millis::new(1_200),
            welcome: Millis::new(1_000),
            verify_batch_pages: rng.between(1, 200) as usize,
            verify: Millis::new(2_000),
        },
        zstd_level: if rng.chance(100) { 1 } else { 0 },
        mirror: match rng.below(4) {
            0 => MirrorBudget::Bytes(rng.below(20) * 4096),
            _ => MirrorBudget::Full,
        },
        keep_fails_per_mille: [0, 2, 30][rng.below(3) as usize],
        flip_per_mille: [0, 0, 1, 4][rng.below(4) as usize],
        full_per_ten_thousand: [0, 0, 3, 20][rng.below(4) as usize],
    }
}

/// How many former epochs a node keeps.
pub fn keep(rng: &mut Rng) -> Keep {
    let age = if rng.chance(300) { rng.between(50, 2_000) } else { 0 };
    Keep {
        epochs: [0, 1, 3, 8][rng.below(4) as usize],
        age: Millis::new(age),
        bytes: [0, 8 << 10, 60 << 10, 1 << 20][rng.below(4) as usize],
    }
}

/// Pages of the model are two numbers, at the start and at the end of the page, so that torn reads can be told.
pub fn content(value: u64) -> vmsync::Page {
    let mut page = [0; 4096];
    page[..4].copy_from_slice(&(value as u32).to_le_bytes());
    page[4092..].copy_from_slice(&((value >> 32) as u32).to_le_bytes());
    page
}

pub fn value(page: &vmsync::Page) -> u64 {
    assert!(page[4..4092] == [0; 4088], "a page that no guest ever had");
    let low = u32::from_le_bytes([page[0], page[1], page[2], page[3]]);
    let high = u32::from_le_bytes([page[4092], page[4093], page[4094], page[4095]]);
    u64::from(low) | u64::from(high) << 32
}

/// A whole page of that number.
pub fn whole(number: u64) -> u64 {
    number | number << 32
}

pub fn fresh_or_kept(kept: bool) -> PreparedImage {
    if kept { PreparedImage::Kept } else { PreparedImage::Fresh }
}

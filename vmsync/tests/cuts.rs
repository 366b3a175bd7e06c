//! A shadow's host is cut off at every write: killed between any two and within each, and without power, when only what
//! was synced is sure to be there and anything else may be, in any part. What comes up is the last epoch that was
//! acknowledged or a later one, whole; and every former epoch that is kept is what the guest held then.
//!
//! The real target is driven through a day of its life; its effects become writes to modelled files, as the agent's files
//! make them. Each cut makes a storage, on which a new target resumes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use vmsync::codec::{Encoder, MirrorBudget};
use vmsync::hashes::HashSeed;
use vmsync::history::{FoundUndo, Undo, UndoRecord, read_back};
use vmsync::message::{Hello, SourceBody, TargetBody};
use vmsync::target::{ConnId, Left, PreparedImage, Target, TargetConfig, TargetEffect, TargetEvent};
use vmsync::wire::{Chain, Decoder, encode};
use vmsync::{
    DeviceState, Epoch, GuestUuid, Keep, Lineage, Millis, PAGE_SIZE, Page, PageAddr, RamBlock, RamLayout, Term,
};

const GUEST: GuestUuid = GuestUuid::from_bytes([7; 16]);
const PAGES: u32 = 10;
/// Most bytes that a disk writes at once or not at all.
const SECTOR: usize = 512;
/// Ways a power cut may leave what was not synced, for each moment.
const POWER_CUTS: u64 = 6;

fn layout() -> RamLayout {
    RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: u64::from(PAGES) * PAGE_SIZE as u64 }]).unwrap()
}

fn config() -> TargetConfig {
    let keep = Keep { epochs: 4, age: Millis::new(0), bytes: 1 << 20 };
    TargetConfig { guest: GUEST, host: "h2".into(), term: Term::new(3), staging_limit_bytes: 100_000, keep }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum File {
    Journal,
    Image,
    Undo(u64),
    /// Which undo records there are.
    Folder,
}

/// One write, as a system call makes it.
#[derive(Debug, Clone)]
enum Write {
    Bytes {
        file: File,
        at: usize,
        bytes: Vec<u8>,
    },
    Length {
        file: File,
        len: usize,
    },
    Make {
        seq: u64,
    },
    Remove {
        seq: u64,
    },
    /// Written aside, synced, renamed, synced: the old record or the new one.
    State(Vec<u8>),
    Sync(File),
    /// From here on the primary knows that this epoch is safe.
    Acked(u64),
    /// The order to go back to that epoch was carried out as far as it is written down.
    Back(u64),
}

#[derive(Debug, Clone, Default)]
struct Storage {
    files: BTreeMap<File, Vec<u8>>,
    folder: BTreeSet<u64>,
    state: Vec<u8>,
}

use File::{Folder, Image, Journal};

impl Storage {
    fn new() -> Self {
        let mut storage = Self::default();
        storage.files.insert(Image, vec![0; PAGES as usize * PAGE_SIZE]);
        storage.files.insert(Journal, Vec::new());
        storage
    }

    fn do_it(&mut self, write: &Write) {
        match write {
            Write::Bytes { file, at, bytes } => {
                let contents = self.files.entry(*file).or_default();
                let end = at + bytes.len();
                contents.resize(contents.len().max(end), 0);
                contents[*at..end].copy_from_slice(bytes);
            }
            Write::Length { file, len } => self.files.entry(*file).or_default().resize(*len, 0),
            Write::Make { seq } => drop(self.folder.insert(*seq)),
            Write::Remove { seq } => drop(self.folder.remove(seq)),
            Write::State(bytes) => self.state.clone_from(bytes),
            Write::Sync(_) | Write::Acked(_) | Write::Back(_) => {}
        }
    }

    fn page(&self, addr: PageAddr) -> Page {
        let at = addr.page.byte_offset() as usize;
        *self.files[&Image][at..].first_chunk().unwrap()
    }

    fn undo(&self, seq: u64) -> Vec<u8> {
        self.files.get(&File::Undo(seq)).cloned().unwrap_or_default()
    }

    fn found(&self) -> Vec<FoundUndo> {
        let found = |seq: &u64| {
            let bytes = self.undo(*seq);
            let head = UndoRecord::read(&bytes, GUEST, &layout()).ok().map(|record| record.head);
            FoundUndo { seq: *seq, bytes: bytes.len() as u64, head }
        };
        self.folder.iter().map(found).collect()
    }
}

/// A target, its files, and all that was written to them.
struct Shadow {
    target: Target,
    storage: Storage,
    written: Vec<Write>,
    effects: VecDeque<TargetEffect>,
    /// The next record cannot be made: there is no room.
    full: bool,
    promoted: Option<u64>,
    hashing: Option<vmsync::target::HashId>,
}

impl Shadow {
    fn new(target: Target, storage: Storage) -> Self {
        let (written, effects) = (Vec::new(), VecDeque::new());
        Self { target, storage, written, effects, full: false, promoted: None, hashing: None }
    }

    fn write(&mut self, write: Write) {
        self.storage.do_it(&write);
        self.written.push(write);
    }

    fn step(&mut self, event: TargetEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut effects = Vec::new();
            self.target.step(Millis::new(self.written.len() as u64), event, &mut effects);
            self.effects.extend(effects);
            events.extend(self.carry_out());
        }
    }

    /// As the agent does it: see src/agent/shadows/slot.rs and src/standby.
    fn carry_out(&mut self) -> Vec<TargetEvent> {
        let mut answers = Vec::new();
        while let Some(effect) = self.effects.pop_front() {
            match effect {
                TargetEffect::SaveState(bytes) => {
                    // An image that outlives a host is synced first.
                    self.write(Write::Sync(Image));
                    self.write(Write::State(bytes));
                }
                TargetEffect::AppendJournal { bytes, durable } => {
                    let at = self.storage.files[&Journal].len();
                    self.write(Write::Bytes { file: Journal, at, bytes });
                    if durable {
                        self.write(Write::Sync(Journal));
                    }
                }
                TargetEffect::TruncateJournal { len_bytes } => {
                    self.write(Write::Length { file: Journal, len: len_bytes as usize });
                }
                TargetEffect::Apply(frame) => self.apply(&frame),
                TargetEffect::Keep(undo) => answers.push(self.keep(&undo)),
                TargetEffect::DropKept { first, last } => self.remove(first, last),
                TargetEffect::ReadBack { seqs, state } => {
                    let read = |seq| Ok::<_, String>(self.storage.undo(seq));
                    let result = read_back(&seqs, state, GUEST, &layout(), read);
                    answers.push(TargetEvent::BackRead { result });
                }
                TargetEffect::StepBack { seq } => {
                    let bytes = self.storage.undo(seq);
                    let record = UndoRecord::read(&bytes, GUEST, &layout()).unwrap();
                    record.frames(&layout()).for_each(|frame| self.apply(&frame.unwrap()));
                }
                TargetEffect::Prepare { keep, .. } => {
                    let image = if keep { PreparedImage::Kept } else { PreparedImage::Fresh };
                    answers.push(TargetEvent::PrepareDone { result: Ok(image) });
                }
                TargetEffect::Hash { id, .. } => self.hashing = Some(id),
                TargetEffect::Send { bytes, .. } => {
                    let mut decoder = Decoder::<TargetBody>::new();
                    decoder.push(&bytes);
                    let message = decoder.next().unwrap().unwrap();
                    if message.body == TargetBody::Ack {
                        self.write(Write::Acked(message.epoch.get()));
                    }
                }
                TargetEffect::Promote(promotion) => self.promoted = Some(promotion.commit.epoch.get()),
                TargetEffect::PromoteRefused(refusal) => panic!("{refusal}"),
                TargetEffect::CommitLost => self.write(Write::Acked(0)),
                TargetEffect::StopHash { .. } | TargetEffect::Close { .. } | TargetEffect::Committed(_) => {}
            }
        }
        answers
    }

    fn apply(&mut self, frame: &vmsync::codec::PagesFrame) {
        use vmsync::codec::PageContent;
        for (addr, content) in frame.iter() {
            let at = addr.page.byte_offset() as usize;
            match content {
                PageContent::Patch(patch) => patch.runs().for_each(|(within, bytes)| {
                    self.write(Write::Bytes { file: Image, at: at + within, bytes: bytes.to_vec() });
                }),
                other => {
                    let mut page = self.storage.page(addr);
                    other.apply(&mut page);
                    self.write(Write::Bytes { file: Image, at, bytes: page.to_vec() });
                }
            }
        }
    }

    fn keep(&mut self, undo: &Undo) -> TargetEvent {
        let seq = undo.head.seq;
        let mut pieces = Vec::new();
        let image = self.storage.clone();
        let made = undo.make(
            |addr, page| {
                *page = image.page(addr);
                Ok::<(), ()>(())
            },
            |bytes| {
                pieces.push(bytes.to_vec());
                Ok(())
            },
        );
        self.write(Write::Make { seq });
        self.write(Write::Length { file: File::Undo(seq), len: 0 });
        let mut at = 0;
        let pieces_written = if self.full { 1 } else { pieces.len() };
        for bytes in pieces.into_iter().take(pieces_written) {
            let len = bytes.len();
            self.write(Write::Bytes { file: File::Undo(seq), at, bytes });
            at += len;
        }
        if std::mem::take(&mut self.full) {
            self.remove(0, u64::MAX);
            return TargetEvent::Kept { seq, bytes: None };
        }
        self.write(Write::Sync(File::Undo(seq)));
        self.write(Write::Sync(Folder));
        TargetEvent::Kept { seq, bytes: Some(made.unwrap()) }
    }

    fn remove(&mut self, first: u64, last: u64) {
        for seq in self.storage.folder.range(first..=last).copied().collect::<Vec<_>>() {
            self.write(Write::Remove { seq });
            if self.storage.folder.is_empty() {
                self.write(Write::Sync(Folder));
            }
        }
    }
}

/// What the guest held at an epoch.
type Moment = (Vec<Page>, Vec<u8>);

/// The primary, and the shadow that it feeds.
struct Day {
    shadow: Shadow,
    encoder: Encoder,
    memory: Vec<Page>,
    epoch: u64,
    chain: Chain,
    conn: u64,
    moments: BTreeMap<u64, Moment>,
    random: u64,
}

impl Day {
    fn new() -> Self {
        Self {
            shadow: Shadow::new(Target::new(config()), Storage::new()),
            encoder: Encoder::new(&layout(), MirrorBudget::Full, HashSeed::new(1), 1),
            memory: vec![[0; PAGE_SIZE]; PAGES as usize],
            epoch: 0,
            chain: Chain::default(),
            conn: 0,
            moments: BTreeMap::new(),
            random: 88_172_645_463_325_252,
        }
    }

    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn send(&mut self, epoch: u64, body: &SourceBody) {
        let encoded = encode(Term::new(3), Epoch::new(epoch), body);
        if matches!(body, SourceBody::Pages(_) | SourceBody::DeviceState(_)) {
            self.chain.add(encoded.checksum);
        }
        let mut decoder = Decoder::new();
        decoder.push(&encoded.bytes);
        let message = decoder.next().unwrap().unwrap();
        self.shadow.step(TargetEvent::Received { conn: ConnId(self.conn), message });
    }

    fn connect(&mut self) {
        self.conn += 1;
        self.chain = Chain::default();
        let hello = Hello {
            lineage: Lineage::new(50),
            guest: GUEST,
            domain: "g1".into(),
            source_host: "h1".into(),
            layout: layout(),
            description: vec![],
        };
        self.send(0, &SourceBody::Hello(Box::new(hello)));
    }

    /// The guest writes: mostly a few bytes, sometimes whole pages, and some of them zero.
    fn writes(&mut self) {
        for _ in 0..4 {
            let (at, kind) = ((self.next() % u64::from(PAGES)) as usize, self.next() % 6);
            let seed = self.next();
            match kind {
                0 => self.memory[at] = [0; PAGE_SIZE],
                1 => {
                    self.memory[at] = std::array::from_fn(|i| ((usize::from(seed as u8 >> (i % 8)) * i * i) >> 5) as u8)
                }
                _ => {
                    let start = (seed % 4000) as usize;
                    self.memory[at][start..start + 1 + (seed % 40) as usize].fill(seed as u8 | 1);
                }
            }
        }
    }

    fn pages(&mut self) {
        for (i, page) in self.memory.iter().enumerate() {
            self.encoder.page(PageAddr::new(0, i as u32), page);
        }
        for frame in self.encoder.finish() {
            self.send(self.epoch, &SourceBody::Pages(frame));
        }
    }

    fn epoch(&mut self) {
        self.epoch += 1;
        self.writes();
        // What was read before the cut, and again at the cut.
        self.pages();
        self.writes();
        self.pages();
        let salt = self.next();
        let bytes = format!("devices of epoch {} {salt}", self.epoch).into_bytes();
        self.moments.insert(self.epoch, (self.memory.clone(), bytes.clone()));
        let mut state = Vec::new();
        DeviceState { running: true, bytes: bytes.into() }.encode(None, &mut state).unwrap();
        self.send(self.epoch, &SourceBody::DeviceState(state));
        let chain = std::mem::take(&mut self.chain);
        self.send(self.epoch, &SourceBody::Commit(chain));
    }

    /// The first copy; epochs; epochs that wait for a comparison; a connection lost in the middle of an epoch; no room to
    /// keep one; and back to an epoch before, at last.
    fn whole() -> Self {
        let mut day = Self::new();
        day.connect();
        (0..4).for_each(|_| day.epoch());
        day.send(day.epoch, &SourceBody::VerifyRequest { seed: HashSeed::new(1) });
        (0..3).for_each(|_| day.epoch());
        let id = day.shadow.hashing.take().expect("a comparison is under way");
        day.shadow.step(TargetEvent::HashingDone { id });
        (0..2).for_each(|_| day.epoch());
        day.writes();
        day.pages();
        day.shadow.step(TargetEvent::Disconnected { conn: ConnId(day.conn) });
        day.connect();
        // What was dropped is sent again, whole.
        for addr in 0..PAGES {
            day.encoder.forget(PageAddr::new(0, addr));
        }
        day.epoch();
        day.shadow.full = true;
        day.epoch();
        (0..4).for_each(|_| day.epoch());
        day.send(day.epoch, &SourceBody::VerifyRequest { seed: HashSeed::new(2) });
        (0..2).for_each(|_| day.epoch());
        let back = day.epoch - 3;
        let marks = day.shadow.written.len();
        day.shadow.step(TargetEvent::Promote {
            term: Term::new(4),
            after_epoch: Epoch::NONE,
            back_to: Some(Epoch::new(back)),
        });
        assert_eq!(day.shadow.promoted, Some(back));
        let memory = &day.moments[&back].0;
        assert!((0..PAGES).all(|i| day.shadow.storage.page(PageAddr::new(0, i)) == memory[i as usize]));
        day.shadow.written.insert(marks, Write::Back(back));
        day
    }
}

/// What a cut must not lose.
#[derive(Debug, Clone, Copy, Default)]
struct Promised {
    acked: u64,
    /// A promotion back to this epoch was ordered: it may have been decided.
    back: Option<u64>,
}

#[derive(Default)]
struct Seen {
    cuts: u64,
    replays: u64,
    torn_records: u64,
    way_back: u64,
    promotions: u64,
}

/// A new agent comes up on what is there.
fn check(
    storage: &Storage,
    rebooted: bool,
    promised: Promised,
    moments: &BTreeMap<u64, Moment>,
    seen: &mut Seen,
    what: &str,
) {
    seen.cuts += 1;
    if storage.state.is_empty() {
        assert_eq!(promised.acked, 0, "{what}");
        return;
    }
    let undo = storage.found();
    seen.torn_records += u64::from(undo.iter().any(|found| found.head.is_none()));
    let left = Left { state: &storage.state, journal: &storage.files[&Journal], undo: &undo, rebooted };
    let resumed = Target::resume(config(), Millis::new(0), left).unwrap();
    let mut shadow = Shadow::new(resumed.target, storage.clone());
    seen.replays += u64::from(resumed.effects.iter().any(|effect| matches!(effect, TargetEffect::Apply(_))));
    shadow.effects = resumed.effects.into();
    let answers = shadow.carry_out();
    answers.into_iter().for_each(|answer| shadow.step(answer));
    let Some(commit) = shadow.target.committed() else {
        assert_eq!(promised.acked, 0, "{what}: the commit is lost");
        return;
    };
    let epoch = commit.epoch.get();
    if let Some(promotion) = shadow.target.promotion().cloned() {
        // Decided: the order is repeated, and carried out.
        assert_eq!(Some(epoch), promised.back, "{what}");
        let order = TargetEvent::Promote {
            term: promotion.term,
            after_epoch: Epoch::NONE,
            back_to: promised.back.map(Epoch::new),
        };
        shadow.step(order);
        assert_eq!(shadow.promoted, promised.back, "{what}");
        seen.promotions += 1;
    } else {
        assert!(epoch >= promised.acked, "{what}: {} was acknowledged, {epoch} is there", promised.acked);
    }
    let holds = |storage: &Storage, epoch: u64, what: &str| {
        let memory = &moments[&epoch].0;
        let wrong = (0..PAGES).find(|i| storage.page(PageAddr::new(0, *i)) != memory[*i as usize]);
        assert_eq!(wrong, None, "{what}: a page is not that of epoch {epoch}");
    };
    holds(&shadow.storage, epoch, what);
    if shadow.target.promotion().is_some() {
        return;
    }
    // And back, as far as it goes.
    let mut state = DeviceState { running: true, bytes: moments[&epoch].1.clone().into() };
    for kept in shadow.target.kept().iter().rev().filter(|kept| kept.seq > 0) {
        let epoch = kept.stamp.commit.epoch.get();
        let read = |seq| Ok::<_, String>(shadow.storage.undo(seq));
        state = read_back(&[kept.seq], state, GUEST, &layout(), read).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(&state.bytes[..], &moments[&epoch].1[..], "{what}");
        let bytes = shadow.storage.undo(kept.seq);
        let record = UndoRecord::read(&bytes, GUEST, &layout()).unwrap();
        record.frames(&layout()).for_each(|frame| shadow.apply(&frame.unwrap()));
        holds(&shadow.storage, epoch, &format!("{what}: back"));
        seen.way_back += 1;
    }
}

fn promise(promised: &mut Promised, write: &Write) {
    match write {
        Write::Acked(epoch) => promised.acked = *epoch,
        Write::Back(epoch) => promised.back = Some(*epoch),
        _ => {}
    }
}

/// As much of a write as a process that is killed may have made.
fn parts(write: &Write) -> Vec<Write> {
    let Write::Bytes { file, at, bytes } = write else { return Vec::new() };
    let ends: BTreeSet<usize> = [1, 8, 15, 16, 17, 100, bytes.len() / 2, bytes.len().saturating_sub(1)].into();
    let part = |end: &usize| Write::Bytes { file: *file, at: *at, bytes: bytes[..*end].to_vec() };
    ends.iter().filter(|end| (1..bytes.len()).contains(*end)).map(part).collect()
}

#[test]
fn killed_at_every_write() {
    let day = Day::whole();
    let (mut storage, mut promised, mut seen) = (Storage::new(), Promised::default(), Seen::default());
    for (i, write) in day.shadow.written.iter().enumerate() {
        check(&storage, false, promised, &day.moments, &mut seen, &format!("before write {i}"));
        for part in parts(write) {
            let mut torn = storage.clone();
            torn.do_it(&part);
            check(&torn, false, promised, &day.moments, &mut seen, &format!("within write {i}"));
        }
        storage.do_it(write);
        promise(&mut promised, write);
    }
    check(&storage, false, promised, &day.moments, &mut seen, "at the end");
    let Seen { cuts, replays, torn_records, way_back, promotions } = seen;
    println!(
        "killed {cuts} times in {} writes: {replays} replays, {torn_records} torn undo records, {way_back} steps back, {promotions} promotions carried on",
        day.shadow.written.len()
    );
    assert!(cuts > 1000 && replays > 50 && torn_records > 50 && way_back > 1000 && promotions > 10);
}

/// What was written since a file was last synced, with its place in the order of all.
type Pending = Vec<(File, Write)>;

fn file_of(write: &Write) -> Option<File> {
    match write {
        Write::Bytes { file, .. } | Write::Length { file, .. } => Some(*file),
        Write::Make { .. } | Write::Remove { .. } => Some(Folder),
        _ => None,
    }
}

/// Without power: of what was not synced, each write may be there, or not, or some of its sectors.
fn without_power(durable: &Storage, pending: &Pending, variant: u64, random: &mut u64) -> Storage {
    let mut storage = durable.clone();
    let mut next = || {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        *random
    };
    for (_, write) in pending {
        let fate = match variant {
            0 => 0,
            1 => 1,
            _ => next() % 3,
        };
        match (fate, write) {
            (0, _) => {}
            (2, Write::Bytes { file, at, bytes }) => {
                let mut start = 0;
                while start < bytes.len() {
                    let end = ((at + start) / SECTOR * SECTOR + SECTOR - at).min(bytes.len());
                    if next() % 2 == 0 {
                        storage.do_it(&Write::Bytes { file: *file, at: at + start, bytes: bytes[start..end].to_vec() });
                    }
                    start = end;
                }
            }
            _ => storage.do_it(write),
        }
    }
    storage
}

#[test]
fn without_power_at_every_write() {
    let day = Day::whole();
    let (mut durable, mut pending) = (Storage::new(), Pending::new());
    let (mut promised, mut seen, mut random) = (Promised::default(), Seen::default(), 0x1234_5678_9abc_def1_u64);
    for (i, write) in day.shadow.written.iter().enumerate() {
        for variant in 0..POWER_CUTS {
            let storage = without_power(&durable, &pending, variant, &mut random);
            check(&storage, true, promised, &day.moments, &mut seen, &format!("power cut {variant} before write {i}"));
        }
        match (write, file_of(write)) {
            (Write::Sync(file), _) => {
                let synced = pending.extract_if(.., |(of, _)| of == file).collect::<Vec<_>>();
                synced.iter().for_each(|(_, write)| durable.do_it(write));
            }
            (_, Some(file)) => pending.push((file, write.clone())),
            _ => durable.do_it(write),
        }
        promise(&mut promised, write);
    }
    let Seen { cuts, replays, torn_records, way_back, promotions } = seen;
    println!(
        "{cuts} power cuts in {} writes: {replays} replays, {torn_records} torn undo records, {way_back} steps back, {promotions} promotions carried on",
        day.shadow.written.len()
    );
    assert!(cuts > 1000 && replays > 50 && way_back > 1000 && promotions > 10);
}

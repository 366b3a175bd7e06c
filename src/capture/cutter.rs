//! The cut: one monitor command that stops the guest, hands its device state out through a short pipe and starts it
//! again, during whose stop the written pages are found and copied.
//!
//! ```text
//! agent                                   QEMU
//! guard.begin ----------------------------------------> (guard: from now on at most `bound`)
//! xen-save-devices-state -- libvirt -->   stops the vCPUs, drains I/O
//!                        <-- inotify --   opens the pipe
//! find written pages, by several threads  makes its first 32 KiB of state
//!                        <-- pipe -----   writes them, waits: the pipe holds one page
//! find and protect the rest of them       (waits)
//! widen the pipe, copy the pages          goes on with the state, waits again before its end
//! read the pipe until QEMU has closed it  closes it, starts the guest
//! guard.has_fired ------------------------------------> void if it fired; if not, the cut is there
//!                        <-- reply ----
//! read the disks' pages, as they were ([`crate::disk::copy`])
//! guard.end
//! ```
//! Whatever fails in between, the guest is started by QEMU itself; the pages found are carried into the next cut.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vmsync::batch::PageBatch;
use vmsync::output::Mark;
use vmsync::page_set::PageSet;
use vmsync::units::{PAGE_SIZE, PageAddr};

use super::crew::{self, Crew};
use super::guard::{Guard, GuardError, Slot};
use super::memory::{GuestMemory, MemoryError};
use super::pipe::{Openings, StatePipe, WIDE_PIPE_BYTES, Writing};
use super::priority;
use super::spares::Spares;
use super::tracker::{LiveReads, Tracker, TrackerError, Writer};
use crate::disk::{DiskProblem, DiskSet};

/// Sends one QMP command by the hypervisor's pass-through and waits for its answer.
pub type MonitorCall = Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// Largest device state accepted; 200 KB is usual.
pub use vmsync::device_state::MAX_DEVICE_STATE_BYTES;
/// Pages written on disks whose contents a cut takes, right after it; with more it only tells which, and they are read later.
const DISK_PAGES_MAX: u64 = 8192;
/// How long a pipe must be silent after a failed command until we believe that QEMU writes no more to it.
const QUIET_FOR: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum CutError {
    #[error("the monitor refused the cut: {0}")]
    Monitor(String),
    #[error("the watchdog let the guest go: the cut took more than {} ms", .0.as_millis())]
    WatchdogFired(Duration),
    #[error("the guard failed: {0}")]
    Guard(#[from] GuardError),
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Crew(#[from] crew::Lost),
    #[error(transparent)]
    Disk(#[from] DiskProblem),
    #[error("device state: {0}")]
    DeviceState(String),
    #[error("pipe from QEMU: {0}")]
    Pipe(#[source] io::Error),
}

/// Called while the guest stands still and all it has sent has left QEMU; the number of a mark that was put there.
pub type AtStop = Arc<dyn Fn() -> Option<Mark> + Send + Sync>;

/// What one cut brought.
pub struct Captured {
    /// Pages written since the cut before, and their contents; none of these if too much was written on disks.
    pub dirty: PageSet,
    pub pages: PageBatch,
    /// Contents of the pages asked for besides.
    pub extras: PageBatch,
    pub device_state: Vec<u8>,
    /// When the guest was seen stopped.
    pub at: Instant,
    /// From there until its state was read whole: the guest starts about then.
    pub held: Duration,
    /// Of that: finding the written pages, as far as QEMU waited for it, and copying them.
    pub scan: Duration,
    pub copy: Duration,
    /// All our work on it.
    pub worked: Duration,
    /// See [`GuestMemory::mappings_digest`]; of a moment when the guest stood still.
    pub mappings: u64,
    /// In the guest's output, if somebody holds it.
    pub mark: Option<Mark>,
}

/// What stopping the guest brought; see [`Captured`].
struct Stopped {
    device_state: Vec<u8>,
    at: Instant,
    held: Duration,
}

const FROM_PIPE: u64 = 0;
const FROM_MONITOR: u64 = 1;
const FROM_OPENINGS: u64 = 2;

/// Tells what happens in the pipe as it happens, once: between two commands it has no writer, which would be told for ever.
fn news_of(pipe: &StatePipe, monitor: &MonitorThread, openings: Option<&Openings>) -> nix::Result<Epoll> {
    let news = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let once = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    news.add(&pipe.read_end, EpollEvent::new(once, FROM_PIPE))?;
    news.add(&*monitor.done, EpollEvent::new(EpollFlags::EPOLLIN, FROM_MONITOR))?;
    if let Some(openings) = openings {
        news.add(openings, EpollEvent::new(EpollFlags::EPOLLIN, FROM_OPENINGS))?;
    }
    Ok(news)
}

/// What there is to be seen of a cut.
struct News {
    pipe: EpollFlags,
    opened: bool,
    answered: bool,
}

type Copiers = Crew<(Arc<ToCopy>, PageBatch), Result<PageBatch, MemoryError>>;

/// Pages that threads share among them as they go: QEMU, which writes its state meanwhile, has the processor of one.
struct ToCopy {
    pages: Vec<PageAddr>,
    next: AtomicUsize,
}

impl ToCopy {
    /// They take some 50 us, and are two system calls at most.
    const PIECE_PAGES: usize = 64;

    /// What one thread takes of them, into `batch`.
    fn copy(&self, memory: &GuestMemory, mut batch: PageBatch) -> Result<PageBatch, MemoryError> {
        batch.clear();
        loop {
            let first = self.next.fetch_add(Self::PIECE_PAGES, Ordering::Relaxed);
            let Some(rest) = self.pages.get(first..).filter(|rest| !rest.is_empty()) else { return Ok(batch) };
            batch = memory.read_more(rest.iter().take(Self::PIECE_PAGES).copied(), batch)?;
        }
    }
}

/// Cuts one guest.
pub struct Cutter {
    guard: Arc<Guard>,
    slot: Slot,
    pipe: StatePipe,
    monitor: MonitorThread,
    /// `None`: not told here; the first bytes are.
    openings: Option<Openings>,
    news: Epoll,
    memory: GuestMemory,
    tracker: Box<dyn Tracker>,
    at_stop: Option<AtStop>,
    /// Pages found by cuts that failed: their contents never left.
    carried: PageSet,
    bound: Duration,
    copiers: Copiers,
    spares: Spares,
    /// How many pages the next cut will bring, roughly.
    pages_hint: usize,
    state_bytes_hint: usize,
    /// How the last whole state ended.
    ending: Option<Ending>,
    /// The monitor has not answered the last command yet.
    unanswered: bool,
    /// Room in the pipe while pages are copied, and what may be read from it before: see [`held_bytes`].
    room_bytes: usize,
    spare_bytes: usize,
}

/// Adds the pages that were written on the guest's disks.
fn collect_disks(memory: &GuestMemory, written: &mut PageSet) -> Result<(), DiskProblem> {
    match memory.disks() {
        Some((disks, first)) if disks.is_ready() => disks.collect(first, written),
        _ => Ok(()),
    }
}

/// Pages of disks whose contents at a cut can be read after it, until this is dropped.
struct Held<'a>(&'a DiskSet);

impl<'a> Held<'a> {
    /// `None`: there are no disks.
    fn hold(memory: &'a GuestMemory, pages: &PageSet) -> Option<Self> {
        let (disks, first) = memory.disks().filter(|(disks, _)| !disks.is_empty())?;
        disks.hold(first, pages);
        Some(Self(disks))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// The contents of `pages`, in parts that each go upwards; each takes the first of `spares` that is left. To free what is
/// not needed would take time of the pause.
fn copy_pages(
    memory: &GuestMemory,
    copiers: &mut Copiers,
    pages: Vec<PageAddr>,
    spares: &mut Vec<PageBatch>,
) -> Result<Vec<PageBatch>, CutError> {
    let hands = copying_hands(copiers, pages.len());
    let mut spares = spares.drain(..hands.min(spares.len()));
    if hands == 1 {
        return Ok(vec![memory.read(pages.into_iter(), spares.next().unwrap_or_default())?]);
    }
    let to_copy = Arc::new(ToCopy { pages, next: AtomicUsize::new(0) });
    let parts = (0..hands).map(|_| (Arc::clone(&to_copy), spares.next().unwrap_or_default())).collect();
    let copied = copiers.run(parts, |(to_copy, spare)| to_copy.copy(memory, spare));
    copied.into_iter().map(|part| Ok(part??)).collect()
}

fn copying_hands(copiers: &Copiers, pages: usize) -> usize {
    crew::worth((pages * PAGE_SIZE) as u64, COPY_LEAST_BYTES).min(copiers.len() + 1)
}

/// Less is not worth waking a thread for.
const COPY_LEAST_BYTES: u64 = 2 << 20;

/// How much of a state of `len` bytes QEMU may write while we copy: room in the pipe (a power of two), and what
/// may be read from it meanwhile. QEMU must still have something to write when we are done, as the guest runs on after
/// the last byte; so well below what the state was last time, and every cut checks it.
fn held_bytes(len: usize) -> (usize, usize) {
    let most = (len / 4 * 3).clamp(PAGE_SIZE, WIDE_PIPE_BYTES as usize);
    let room = 1 << most.ilog2();
    (room, most - room)
}

impl Cutter {
    pub fn new(
        guard: Arc<Guard>,
        pipe: StatePipe,
        call: MonitorCall,
        memory: GuestMemory,
        tracker: Box<dyn Tracker>,
        bound: Duration,
    ) -> Result<Self, CutError> {
        let slot = guard.watch(pipe.read_end.as_fd(), memory.pid())?;
        let monitor = MonitorThread::start(call).map_err(CutError::Pipe)?;
        let openings = match Openings::of(&pipe) {
            Ok(openings) => Some(openings),
            Err(error) => {
                tracing::warn!(%error, "inotify does not watch QEMU's pipe; pauses are a little longer");
                None
            }
        };
        let news = news_of(&pipe, &monitor, openings.as_ref()).map_err(|error| CutError::Pipe(error.into()))?;
        let carried = PageSet::new(memory.layout());
        let hands = crew::hands_for(memory.layout().total_bytes(), COPY_LEAST_BYTES);
        let copy = |memory: GuestMemory| move |(to_copy, spare): (Arc<ToCopy>, _)| to_copy.copy(&memory, spare);
        let copiers = Crew::start("copier", (1..hands).map(|_| copy(memory.clone()))).map_err(CutError::Pipe)?;
        Ok(Self {
            guard,
            slot,
            pipe,
            monitor,
            openings,
            news,
            memory,
            tracker,
            at_stop: None,
            carried,
            bound,
            copiers,
            spares: Spares::default(),
            pages_hint: 0,
            state_bytes_hint: 64 << 10,
            ending: None,
            unanswered: false,
            room_bytes: PAGE_SIZE,
            spare_bytes: 0,
        })
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub fn tracker_name(&self) -> &'static str {
        self.tracker.name()
    }

    /// See [`Tracker::live_reads`].
    pub fn live_reads(&self) -> Option<LiveReads> {
        self.tracker.live_reads()
    }

    pub fn set_at_stop(&mut self, at_stop: AtStop) {
        self.at_stop = Some(at_stop);
    }

    /// Goes on with another guard, after the one we had was lost.
    pub fn set_guard(&mut self, guard: Arc<Guard>) {
        match guard.watch(self.pipe.read_end.as_fd(), self.memory.pid()) {
            Ok(slot) => (self.guard, self.slot) = (guard, slot),
            Err(error) => tracing::error!(%error, "the new guard does not take the pipe"),
        }
    }

    /// Stops the guest for the next part of the tracker's preparation; true: it is ready, cuts may begin.
    pub fn prepare(&mut self) -> Result<bool, CutError> {
        let (memory, mut ready) = (self.memory.clone(), false);
        let work = |tracker: &mut dyn Tracker, _: &mut PageSet, qemu: &mut Writing| {
            qemu.wait().map_err(TrackerError::Writer)?;
            ready = tracker.prepare_part(&memory)?;
            Ok(())
        };
        self.stopped(self.bound, work, || ())?;
        Ok(ready)
    }

    /// Takes back the pages of a former cut that are needed no longer: their memory serves a later one.
    pub fn give_back(&mut self, pages: PageBatch) {
        self.spares.give(pages);
    }

    /// Cuts within `bound`, and reads the contents of `extras` besides the written pages.
    pub fn cut(&mut self, extras: &PageSet, bound: Duration) -> Result<Captured, CutError> {
        let memory = self.memory.clone();
        let mut dirty = PageSet::new(memory.layout());
        let (mut parts, mut extra_pages) = (Vec::new(), PageBatch::new());
        let (mut scan, mut copy, mut worked) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        let (at_stop, mut mark) = (self.at_stop.clone(), None);
        // Room for the pages is made before the guest stops, for about as many as last time.
        let hands = copying_hands(&self.copiers, self.pages_hint);
        // One may do much more than the others; the first one's takes in all of them in the end.
        let others = self.pages_hint / hands / 2 * 3;
        let rooms = std::iter::once(self.pages_hint).chain((1..hands).map(|_| others));
        let mut spares: Vec<_> = rooms.map(|pages| self.spares.take(pages)).collect();
        let mut copiers = std::mem::take(&mut self.copiers);
        let mut for_later = None;
        let work = |tracker: &mut dyn Tracker, carried: &mut PageSet, qemu: &mut Writing| {
            let began = Instant::now();
            mark = at_stop.as_ref().and_then(|at_stop| at_stop());
            // Before the scan clears anything: what it finds must not be lost, whatever happens from here on.
            dirty.union_with(carried);
            let found = tracker.collect(&memory, &mut dirty, qemu);
            let in_memory = dirty.len();
            let on_disks = collect_disks(&memory, &mut dirty);
            carried.union_with(&dirty);
            found?;
            on_disks?;
            scan = qemu.waited();
            let found_at = Instant::now();
            qemu.go_on();
            if dirty.len() - in_memory > DISK_PAGES_MAX {
                return Ok(());
            }
            for_later = Held::hold(&memory, &dirty);
            let in_ram = dirty.iter().filter(|page| !memory.is_disk(*page)).collect();
            parts = copy_pages(&memory, &mut copiers, in_ram, &mut spares)?;
            extra_pages = memory.read(extras.iter().filter(|page| !dirty.contains(*page)), PageBatch::new())?;
            (copy, worked) = (found_at.elapsed(), began.elapsed());
            Ok(())
        };
        let mut mappings = None;
        let outcome = self.stopped(bound, work, || mappings = Some(memory.mappings_digest()));
        self.copiers = copiers;
        // Those that were not needed, or nothing came of it.
        spares.into_iter().for_each(|spare| self.spares.give(spare));
        let Stopped { device_state, at, held } = outcome?;
        let mappings = mappings.ok_or_else(|| CutError::DeviceState("nothing was captured meanwhile".into()))??;
        // The guest runs again, and writes to its disks.
        let mut of_disks = match for_later {
            Some(_) => memory.read(dirty.iter().filter(|page| memory.is_disk(*page)), PageBatch::new())?,
            None => PageBatch::new(),
        };
        drop(for_later);
        self.carried.clear();
        let mut parts = parts.into_iter();
        let mut pages = parts.next().unwrap_or_default();
        parts.for_each(|mut part| {
            pages.append(&mut part);
            self.spares.give(part);
        });
        self.pages_hint = pages.len() + pages.len() / 4;
        pages.append(&mut of_disks);
        Ok(Captured { dirty, pages, extras: extra_pages, device_state, at, held, scan, copy, worked, mappings, mark })
    }

    /// Finds the written pages without copying them: for when nobody can use a cut, or too much may have piled up.
    pub fn collect(&mut self) -> Result<(PageSet, Instant), CutError> {
        let memory = self.memory.clone();
        let mut dirty = PageSet::new(memory.layout());
        let work = |tracker: &mut dyn Tracker, carried: &mut PageSet, qemu: &mut Writing| {
            let found = tracker.collect(&memory, carried, qemu);
            let on_disks = collect_disks(&memory, carried);
            dirty.union_with(carried);
            found?;
            Ok(on_disks?)
        };
        let at = self.stopped(self.bound, work, || ())?.at;
        self.carried.clear();
        Ok((dirty, at))
    }

    /// Runs `work` while the guest is stopped, and then `meanwhile` while QEMU writes the rest of its state, for longer
    /// than a short look takes.
    fn stopped(
        &mut self,
        bound: Duration,
        mut work: impl FnMut(&mut dyn Tracker, &mut PageSet, &mut Writing) -> Result<(), CutError>,
        mut meanwhile: impl FnMut(),
    ) -> Result<Stopped, CutError> {
        self.finish()?;
        self.pipe.empty().map_err(CutError::Pipe)?;
        self.was_opened();
        self.guard.begin(self.slot, bound)?;
        let command = format!(
            r#"{{"execute":"xen-save-devices-state","arguments":{{"filename":"/proc/self/fd/{}","live":false}}}}"#,
            self.pipe.path_fd
        );
        self.monitor.send(command);
        self.unanswered = true;
        let mut worked = None;
        let mut began = None;
        let mut opened_again = false;
        let mut filled = 0;
        let mut closed = false;
        let mut state = Vec::with_capacity(self.state_bytes_hint);
        // `None`: the state is whole, and QEMU has closed the pipe. It will say so.
        let answer = loop {
            let News { pipe: seen, opened, answered } = self.wait()?;
            opened_again |= opened && began.is_some();
            // The guest stands still from before the opening until we have read what comes then.
            let stands_still = seen.contains(EpollFlags::EPOLLIN) || opened && self.pipe.has_writer();
            if !seen.is_empty() || stands_still {
                if began.is_none() && stands_still {
                    began = Some(Instant::now());
                    let mut qemu = Writing {
                        pipe: &self.pipe,
                        answered: &self.monitor.done,
                        state: &mut state,
                        room_bytes: self.room_bytes,
                        spare_bytes: self.spare_bytes,
                        waits_since: None,
                    };
                    worked = Some(work(&mut *self.tracker, &mut self.carried, &mut qemu));
                    filled = state.len() + self.pipe.filled().map_err(CutError::Pipe)?;
                    self.pipe.widen();
                    meanwhile();
                }
                closed |= self.read_available(&mut state)? && !state.is_empty();
                if closed && Ending::of(&state).is_some_and(|ending| self.ending == Some(ending)) {
                    break None;
                }
            }
            if answered {
                let answer = self.monitor.answer();
                self.unanswered = false;
                self.drain(&mut state, answer.is_err())?;
                break Some(answer);
            }
        };
        let ended = Instant::now();
        // The room while the next cut copies: what this state allows, or the least until one has come through.
        let whole = answer.as_ref().is_none_or(Result::is_ok);
        (self.room_bytes, self.spare_bytes) =
            if whole && state.len() > filled { held_bytes(state.len()) } else { (PAGE_SIZE, 0) };
        let fired = if self.unanswered { self.guard.has_fired(self.slot)? } else { self.end()? };
        if fired {
            return Err(CutError::WatchdogFired(bound));
        }
        answer.transpose().map_err(CutError::Monitor)?;
        let (Some(at), Some(worked)) = (began, worked) else {
            return Err(CutError::DeviceState("QEMU answered without writing any".into()));
        };
        worked?;
        // By a command that came late, say: what was searched may be of before the guest ran again.
        if self.was_opened() || opened_again {
            return Err(CutError::DeviceState("the pipe was opened twice".into()));
        }
        if state.len() > MAX_DEVICE_STATE_BYTES {
            return Err(CutError::DeviceState(format!("more than {MAX_DEVICE_STATE_BYTES} bytes")));
        }
        if !state.starts_with(b"QEVM") {
            return Err(CutError::DeviceState("it does not begin with QEMU's magic word".into()));
        }
        // More came after we were done: QEMU had still been writing, and the guest had stood still.
        if state.len() <= filled {
            return Err(CutError::DeviceState(format!("all {filled} bytes came before memory was captured")));
        }
        self.ending = Ending::of(&state);
        self.state_bytes_hint = state.len() + 4096;
        Ok(Stopped { device_state: state, at, held: ended - at })
    }

    /// Waits for the answer to the last command, which may come well after its state: what is left to do of a cut.
    pub fn finish(&mut self) -> Result<(), CutError> {
        if !std::mem::take(&mut self.unanswered) {
            return Ok(());
        }
        if let Err(error) = self.monitor.answer() {
            // Its state was whole all the same, or else the cut has failed already.
            tracing::debug!(error, "the monitor's answer after a cut");
            self.drain(&mut Vec::new(), true)?;
        }
        self.end().map(drop)
    }

    /// The command is over. True: the guard had to read the pipe.
    fn end(&mut self) -> Result<bool, CutError> {
        self.pipe.hold(PAGE_SIZE).map_err(CutError::Pipe)?;
        Ok(self.guard.end(self.slot)?)
    }

    /// Whether the pipe was opened since this was last asked.
    fn was_opened(&self) -> bool {
        self.openings.as_ref().is_some_and(Openings::take)
    }

    /// Waits for the opening of the pipe, bytes in it, its end, or the monitor's answer.
    fn wait(&self) -> Result<News, CutError> {
        let mut events = [EpollEvent::empty(); 3];
        let ready = match self.news.wait(&mut events, EpollTimeout::NONE) {
            Ok(ready) => ready,
            Err(nix::Error::EINTR) => 0,
            Err(error) => return Err(CutError::Pipe(error.into())),
        };
        let of = |data| events[..ready].iter().find(|event| event.data() == data).map(EpollEvent::events);
        Ok(News {
            pipe: of(FROM_PIPE).unwrap_or(EpollFlags::empty()),
            opened: of(FROM_OPENINGS).is_some() && self.was_opened(),
            answered: of(FROM_MONITOR).is_some(),
        })
    }

    fn read_available(&self, state: &mut Vec<u8>) -> Result<bool, CutError> {
        self.pipe.read_available(MAX_DEVICE_STATE_BYTES, state).map_err(CutError::Pipe)
    }

    /// Reads what is left after the answer. After a failed command QEMU may still be writing (libvirt died between
    /// us): read until it is quiet.
    fn drain(&mut self, state: &mut Vec<u8>, failed: bool) -> Result<(), CutError> {
        while !self.read_available(state)? && failed {
            let mut polled = libc::pollfd { fd: self.pipe.read_end.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one live element.
            let ready = unsafe { libc::poll(&mut polled, 1, QUIET_FOR.as_millis() as i32) };
            if ready <= 0 || polled.revents & libc::POLLIN == 0 {
                break;
            }
        }
        Ok(())
    }
}

/// The last bytes of a state: the footer of the last device, with its number, and the mark of the end. A state that breaks
/// off because a device failed does not end so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ending([u8; Self::BYTES]);

impl Ending {
    const BYTES: usize = 6;
    /// `QEMU_VM_SECTION_FOOTER` and `QEMU_VM_EOF` (migration/savevm.h).
    const FOOTER: u8 = 0x7e;
    const EOF: u8 = 0;

    fn of(state: &[u8]) -> Option<Self> {
        let ending = *state.last_chunk::<{ Self::BYTES }>()?;
        (ending[0] == Self::FOOTER && ending[Self::BYTES - 1] == Self::EOF).then_some(Self(ending))
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        let _ = self.guard.unwatch(self.slot);
    }
}

/// The monitor call blocks until QEMU answers, and QEMU answers only after the pipe was read: a thread of its own.
struct MonitorThread {
    commands: Option<SyncSender<String>>,
    answers: Receiver<Result<(), String>>,
    done: Arc<EventFd>,
}

impl MonitorThread {
    fn start(call: MonitorCall) -> io::Result<Self> {
        let (commands, orders) = sync_channel::<String>(1);
        let (results, answers) = sync_channel(1);
        let done = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?);
        let signal = Arc::clone(&done);
        std::thread::Builder::new().name("cut-monitor".into()).spawn(move || {
            priority::hurry();
            while let Ok(command) = orders.recv() {
                let result = call(&command);
                if results.send(result).is_err() || signal.write(1).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { commands: Some(commands), answers, done })
    }

    fn send(&self, command: String) {
        // The thread ends only when this sender is dropped, so it is there; a lost answer shows as a refused cut.
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
        }
    }

    fn answer(&self) -> Result<(), String> {
        let _ = self.done.read();
        self.answers.recv().unwrap_or_else(|_| Err("the monitor thread ended".into()))
    }
}

impl Drop for MonitorThread {
    fn drop(&mut self) {
        self.commands = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use vmsync::{RamBlock, RamLayout};

    #[test]
    fn what_may_wait_in_the_pipe_is_less_than_the_state() {
        for len in [0, 1, 4_096, 5_500, 13_000, 60_000, 181_000, 1 << 20, 9 << 20] {
            let (room, spare) = held_bytes(len);
            assert!(room.is_power_of_two() && (PAGE_SIZE..=WIDE_PIPE_BYTES as usize).contains(&room));
            assert!(room == PAGE_SIZE || (room + spare) * 4 <= len * 3, "{room} and {spare} of {len}");
        }
        assert_eq!(held_bytes(149_072), (64 << 10, 46_268));
    }

    /// This process's own memory stands for the guest's.
    #[test]
    fn buffers_that_are_not_needed_for_a_copy_are_left() {
        let mut own = vec![7_u8; 3 * PAGE_SIZE];
        let skipped = own.as_ptr().addr().next_multiple_of(PAGE_SIZE) - own.as_ptr().addr();
        own[skipped + PAGE_SIZE] = 8;
        let layout = RamLayout::new(vec![RamBlock { name: "ram".into(), len_bytes: 2 * PAGE_SIZE as u64 }]).unwrap();
        let address = own[skipped..].as_ptr().addr() as u64;
        let memory = GuestMemory::new(std::process::id() as i32, Arc::new(layout), vec![address]).unwrap();
        let pages = || vec![PageAddr::new(0, 0), PageAddr::new(0, 1)];
        let mut spares: Vec<_> = [2, 1].map(PageBatch::with_capacity).into();
        for left in [1, 0, 0] {
            let parts = copy_pages(&memory, &mut Copiers::default(), pages(), &mut spares).unwrap();
            let [part] = &parts[..] else { panic!("{} parts", parts.len()) };
            assert_eq!((part.addrs(), part.bytes()), (&pages()[..], &own[skipped..][..2 * PAGE_SIZE]));
            assert_eq!(spares.len(), left);
        }
    }

    #[test]
    fn each_writer_that_comes_and_goes_is_told_once() {
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        let path = format!("/proc/self/fd/{}", read_end.as_raw_fd());
        let pipe = StatePipe::new(read_end, 0).unwrap();
        let monitor = MonitorThread::start(Arc::new(|_| Ok(()))).unwrap();
        let openings = Openings::of(&pipe).unwrap();
        let news = news_of(&pipe, &monitor, Some(&openings)).unwrap();
        let told = || {
            let mut events = [EpollEvent::empty(); 2];
            let ready = news.wait(&mut events, EpollTimeout::ZERO).unwrap();
            (ready == 1).then(|| (events[0].data(), events[0].events()))
        };
        let mut state = Vec::new();
        drop(write_end);
        told();
        for _ in 0..3 {
            assert_eq!(told(), None);
            let mut writer = File::options().write(true).open(&path).unwrap();
            assert_eq!(told(), Some((FROM_OPENINGS, EpollFlags::EPOLLIN)));
            assert!(openings.take());
            assert_eq!(told(), None);
            writer.write_all(b"QEVM").unwrap();
            assert_eq!(told(), Some((FROM_PIPE, EpollFlags::EPOLLIN)));
            assert!(!pipe.read_available(8, &mut state).unwrap());
            drop(writer);
            assert_eq!(told(), Some((FROM_PIPE, EpollFlags::EPOLLHUP)));
            assert!(pipe.read_available(8, &mut state).unwrap());
        }
        assert_eq!(state, b"QEVMQEVMQEVM");
        monitor.send(String::new());
        monitor.answer().unwrap();
    }

    #[test]
    fn only_a_whole_state_has_an_ending() {
        assert_eq!(Ending::of(b"QEVM....\x7e\0\0\0\x2a\0"), Some(Ending([0x7e, 0, 0, 0, 42, 0])));
        assert_eq!(Ending::of(b"QEVM....\x7e\0\0\0\x2a"), None);
        assert_eq!(Ending::of(b"QEVM....\0\0\0\x2a\0\0"), None);
        assert_eq!(Ending::of(b""), None);
    }
}

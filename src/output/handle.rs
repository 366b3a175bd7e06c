//! The agent's side of a gate: starts the process, speaks to it, and watches it.
//!
//! One thread a gate listens and pings. A gate that somebody stopped is continued, once in a while: what it holds is not
//! lost. One that ended or does not answer for [`SILENT_AFTER`] is killed and the filters are taken out of QEMU by the
//! same thread, so that the guest's output goes on whatever the session does.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use nix::unistd::Pid;
use vmsync::output::Mark;

use super::filters;
use super::process::MAX_NICS;
use super::wire::{self, Figures, Order, Setting, Word};
use crate::capture::{companion, priority};
use crate::hypervisor::xml::{OutputNic, XmlError, output_nics};
use crate::hypervisor::{Domain, HypervisorError, XmlKind};

/// Half a dozen pings go by before either side takes the other for stopped.
const PING_EVERY: Duration = Duration::from_millis(20);
/// A gate that does not answer for so long is of no use.
const SILENT_AFTER: Duration = Duration::from_millis(80);
/// After so long it is asked whether somebody has stopped it.
const STOPPED_AFTER: Duration = Duration::from_millis(30);
/// A gate that is stopped again within this time is not continued again.
const CONTINUED_ONCE_IN: Duration = Duration::from_secs(10);
/// Looks that must have been in vain as well: this process itself may have stood still.
const LOOKS: u32 = 3;
/// For the gate to give back what it held when it is taken out.
const FLUSH_WITHIN: Duration = Duration::from_millis(100);
/// Room in the sockets, so that QEMU need not wait for the gate's next turn.
const SOCKET_BYTES: usize = 4 << 20;

/// What a gate tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// Output waits that came after that mark.
    Waits(Mark),
    /// It opened by itself: a frame was too old, or (`unheard`) this process had said nothing for too long.
    Opened {
        unheard: bool,
    },
    Figures(Figures),
    /// It is gone, and so are the filters unless the monitor did not answer; then output does not leave.
    Lost {
        removed: bool,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum GateError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error("its definition: {0}")]
    Xml(#[from] XmlError),
    #[error("{0}")]
    Refused(String),
    #[error("cannot {0}: {1}")]
    System(&'static str, #[source] io::Error),
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> GateError {
    move |error| GateError::System(what, error.into())
}

/// Finds the guest's domain, on whatever connection there is at that moment.
pub type FindDomain = Arc<dyn Fn() -> Result<Arc<Domain>, HypervisorError> + Send + Sync>;

/// Streams of the NICs that are held, and the last mark that went into them.
#[derive(Debug, Default)]
struct Streams {
    last: Mark,
    /// By netdev.
    captures: Vec<(String, OwnedFd)>,
}

/// Writes marks into the streams of all NICs.
#[derive(Debug, Clone, Default)]
pub struct Marker {
    streams: Arc<Mutex<Streams>>,
}

impl Marker {
    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// From now on marks go there as well; the last one that did not.
    fn add(&self, netdev: &str, capture: OwnedFd) -> Mark {
        let mut streams = self.streams();
        streams.captures.push((netdev.to_owned(), capture));
        streams.last
    }

    fn remove(&self, netdev: &str) {
        self.streams().captures.retain(|(of, _)| of != netdev);
    }

    /// To be called while the guest stands still. False: a stream has no room; what was sent is not told from what will
    /// be, and this mark must not be released.
    pub fn mark(&self, mark: Mark) -> bool {
        let bytes = wire::mark_bytes(mark);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let mut streams = self.streams();
        streams.last = mark;
        let send = |socket: &OwnedFd| nix::sys::socket::send(socket.as_raw_fd(), &bytes, flags) == Ok(bytes.len());
        streams.captures.iter().all(|(_, socket)| send(socket))
    }
}

/// A gate that is in place.
pub struct Gate {
    control: Arc<OwnedFd>,
    marker: Marker,
    /// The end of its names in QEMU.
    tag: String,
    /// NICs that are held, and how many there were ever.
    nics: Vec<OutputNic>,
    lanes: usize,
    stop: Arc<AtomicBool>,
    /// It has been told to end.
    leaving: Arc<AtomicBool>,
    find: FindDomain,
    watcher: Option<JoinHandle<()>>,
}

impl Gate {
    /// Puts a gate between the guest and its network, open or holding. What another agent left is taken out when this one
    /// stands: nothing slips through in between.
    pub fn start(
        find: FindDomain,
        setting: Setting,
        holding: bool,
        news: impl Fn(News) + Send + 'static,
    ) -> Result<Self, GateError> {
        let domain = find()?;
        // Those that cannot be held are told of by `follow`.
        let (nics, refused): (Vec<_>, Vec<_>) =
            output_nics(&domain.xml(XmlKind::Live)?)?.into_iter().partition(|nic| nic.refusal.is_none());
        if let (true, Some(refusal)) = (nics.is_empty(), refused.iter().find_map(|nic| nic.refusal.as_ref())) {
            return Err(GateError::Refused(refusal.to_string()));
        }
        let (control, child) =
            companion::start(Command::new("/proc/self/exe"), "gate").map_err(system("start the gate process"))?;
        let mut child = Ended(child);
        // The end of a name in QEMU: no two gates that could be there at once have the same.
        let tag = format!("{:x}", child.0.id());
        wire::send(control.as_fd(), &Order::Set(setting), &[]).map_err(system("speak to the gate"))?;
        if holding {
            wire::send(control.as_fd(), &Order::Hold, &[]).map_err(system("speak to the gate"))?;
        }
        let marker = Marker::default();
        for nic in &nics {
            if let Err(error) = insert(&domain, nic, &tag, &control, &marker) {
                if let Err(error) = filters::remove(&domain, None, || ()) {
                    tracing::error!(guest = domain.name(), %error, "cannot take filters out again");
                }
                return Err(error);
            }
        }
        filters::remove(&domain, Some(&tag), || ())?;
        tracing::info!(guest = domain.name(), nics = nics.len(), pid = child.0.id(), "its output goes through a gate");
        let (control, stop) = (Arc::new(control), Arc::new(AtomicBool::new(false)));
        let leaving = Arc::new(AtomicBool::new(false));
        let watcher = {
            let (control, stop, find) = (Arc::clone(&control), Arc::clone(&stop), Arc::clone(&find));
            let leaving = Arc::clone(&leaving);
            let (netdevs, tag): (Vec<String>, _) = (nics.iter().map(|nic| nic.netdev.clone()).collect(), tag.clone());
            std::thread::Builder::new().name("gate".into()).spawn(move || {
                priority::hurry();
                let lost = watch(&control, &stop, &leaving, &news, &child);
                child.end();
                if lost {
                    let removed = find().and_then(|domain| {
                        filters::bypass(&domain, &netdevs, &tag);
                        filters::remove(&domain, None, || ())
                    });
                    if let Err(error) = &removed {
                        tracing::error!(%error, "the gate is lost and its filters cannot be taken out");
                    }
                    news(News::Lost { removed: removed.is_ok() });
                }
            })
        };
        let watcher = watcher.map_err(system("start a thread"))?;
        let lanes = nics.len();
        Ok(Self { control, marker, tag, nics, lanes, stop, leaving, find, watcher: Some(watcher) })
    }

    /// NICs that it holds.
    pub fn nics(&self) -> &[OutputNic] {
        &self.nics
    }

    pub fn marker(&self) -> Marker {
        self.marker.clone()
    }

    /// Devices may have come or gone: holds the output of NICs that came, forgets those that went. An error: it does not
    /// stand before the NICs that it stood before.
    pub fn follow(&mut self) -> Result<Followed, GateError> {
        let domain = (self.find)()?;
        let nics = output_nics(&domain.xml(XmlKind::Live)?)?;
        let present = filters::present(&domain)?;
        let mut followed = Followed::default();
        let is_there = |held: &OutputNic| nics.contains(held) && filters::is_whole(&present, &held.netdev, &self.tag);
        let gone: Vec<OutputNic> = self.nics.iter().filter(|nic| !is_there(nic)).cloned().collect();
        for nic in gone {
            self.marker.remove(&nic.netdev);
            filters::remove_nic(&domain, &nic.netdev, &self.tag)?;
            self.nics.retain(|held| *held != nic);
            followed.unplugged.push(nic.mac);
        }
        for nic in nics {
            if self.nics.contains(&nic) {
                continue;
            }
            if let Some(refusal) = &nic.refusal {
                followed.not_held.push(refusal.to_string());
                continue;
            }
            if self.lanes >= MAX_NICS {
                return Err(GateError::Refused(format!("this gate has had {MAX_NICS} interfaces")));
            }
            self.lanes += 1;
            match insert(&domain, &nic, &self.tag, &self.control, &self.marker) {
                Ok(()) => {
                    followed.plugged.push(Plugged { mac: nic.mac.clone(), left_before: frames_from_guest(&nic) });
                    self.nics.push(nic);
                }
                Err(error) => {
                    self.marker.remove(&nic.netdev);
                    if let Err(error) = filters::remove_nic(&domain, &nic.netdev, &self.tag) {
                        tracing::error!(guest = domain.name(), %error, "filters of an interface are left");
                    }
                    followed.not_held.push(format!("output of interface {} cannot be held: {error}", nic.mac));
                }
            }
        }
        Ok(followed)
    }

    // A gate that does not take an order does not answer pings either: the watcher ends it.

    pub fn set(&self, setting: Setting) {
        let _ = wire::send(self.control.as_fd(), &Order::Set(setting), &[]);
    }

    pub fn hold(&self) {
        let _ = wire::send(self.control.as_fd(), &Order::Hold, &[]);
    }

    pub fn open(&self) {
        let _ = wire::send(self.control.as_fd(), &Order::Open, &[]);
    }

    pub fn release(&self, mark: Mark) {
        let _ = wire::send(self.control.as_fd(), &Order::Release(mark.get()), &[]);
    }

    /// Takes it out. What it held leaves.
    pub fn remove(self) {
        self.leaving.store(true, Ordering::Release);
        let removed = (self.find)().and_then(|domain| {
            filters::remove(&domain, None, || {
                let _ = wire::send(self.control.as_fd(), &Order::End, &[]);
                // It ends when QEMU has taken everything; the watcher sees that.
                let began = Instant::now();
                let ended = || self.watcher.as_ref().is_none_or(JoinHandle::is_finished);
                while !ended() && began.elapsed() < FLUSH_WITHIN {
                    std::thread::sleep(Duration::from_millis(1));
                }
            })
        });
        if let Err(error) = removed {
            tracing::debug!(%error, "the gate's filters are left to QEMU");
        }
    }
}

impl Gate {
    /// Takes it out; what it held is lost, as the network may lose it: another copy of the guest may have gone on.
    pub fn discard(self) {
        let Self { find, .. } = &self;
        let find = Arc::clone(find);
        drop(self);
        if let Err(error) = find().and_then(|domain| filters::remove(&domain, None, || ())) {
            tracing::debug!(%error, "the gate's filters are left to QEMU");
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = nix::sys::socket::shutdown(self.control.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

/// The process; ended when its handle is dropped.
struct Ended(Child);

impl Ended {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Stopped by a signal. One that a debugger has is not.
    fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('T'))
    }

    fn go_on(&self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGCONT);
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.end();
    }
}

/// A NIC that was plugged and is held from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugged {
    pub mac: String,
    /// Frames that had left by then, if that can be known.
    pub left_before: Option<u64>,
}

/// What a look at the guest's NICs brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Followed {
    pub plugged: Vec<Plugged>,
    /// Addresses of NICs that are gone.
    pub unplugged: Vec<String>,
    /// NICs whose output leaves unheld, and why.
    pub not_held: Vec<String>,
}

/// How many frames the guest has sent by a NIC whose device on the host is a tap: all that the host has received by it.
fn frames_from_guest(nic: &OutputNic) -> Option<u64> {
    let folder = Path::new("/sys/class/net").join(nic.device.as_ref()?);
    let is_tap = folder.join("tun_flags").exists();
    let count = std::fs::read_to_string(folder.join("statistics/rx_packets")).ok()?;
    count.trim().parse().ok().filter(|_| is_tap)
}

/// Puts the filters of one NIC in; from now on marks go into its stream.
fn insert(domain: &Domain, nic: &OutputNic, tag: &str, control: &OwnedFd, marker: &Marker) -> Result<(), GateError> {
    let pair = || socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC);
    let (capture, capture_of_qemu) = pair().map_err(system("make a socket"))?;
    let (release, release_of_qemu) = pair().map_err(system("make a socket"))?;
    for socket in [&capture_of_qemu, &release] {
        // Without the right to so much: as much as there may be.
        if nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::SndBufForce, &SOCKET_BYTES).is_err() {
            let _ = nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::SndBuf, &SOCKET_BYTES);
        }
    }
    // Before QEMU has it: no frame can be between two marks of which the stream has only the second.
    let of_qemu = capture_of_qemu.try_clone().map_err(system("copy a socket"))?;
    let after = marker.add(&nic.netdev, capture_of_qemu).get();
    wire::send(control.as_fd(), &Order::Nic { after }, &[capture.as_raw_fd(), release.as_raw_fd()])
        .map_err(system("speak to the gate"))?;
    filters::insert(domain, nic, tag, of_qemu.as_fd(), release_of_qemu.as_fd())?;
    Ok(())
}

/// Passes on what the gate tells until it is taken out (false) or lost (true).
fn watch(control: &OwnedFd, stop: &AtomicBool, leaving: &AtomicBool, news: &impl Fn(News), child: &Ended) -> bool {
    let mut asked = 0u64;
    let mut continued_at: Option<Instant> = None;
    let mut waiting: Option<(Instant, u32)> = None;
    let mut ping_at = Instant::now();
    loop {
        if stop.load(Ordering::Acquire) {
            return false;
        }
        let now = Instant::now();
        match &mut waiting {
            Some((since, looks)) => {
                *looks += 1;
                let silent = now - *since;
                let again = continued_at.is_some_and(|at| now < at + CONTINUED_ONCE_IN);
                if silent > STOPPED_AFTER && *looks > 1 && child.is_stopped() && !again {
                    tracing::warn!("somebody has stopped a gate; it is told to go on");
                    continued_at = Some(now);
                    child.go_on();
                } else if silent > SILENT_AFTER && *looks > LOOKS {
                    tracing::error!("a gate does not answer; its guest's output goes on without it");
                    return true;
                }
            }
            None if now >= ping_at => {
                asked += 1;
                ping_at = now + PING_EVERY;
                waiting = Some((now, 0));
                let _ = wire::send(control.as_fd(), &Order::Ping(asked), &[]);
            }
            None => {}
        }
        let mut polled = libc::pollfd { fd: control.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live element.
        if unsafe { libc::poll(&mut polled, 1, PING_EVERY.as_millis() as i32) } <= 0 {
            continue;
        }
        loop {
            match wire::receive::<Word>(control.as_fd()) {
                Ok(None) => break,
                Ok(Some((Word::Here(number), _))) if number == asked => waiting = None,
                Ok(Some((Word::Here(_), _))) => {}
                Ok(Some((Word::Waits(mark), _))) => news(News::Waits(Mark::new(mark))),
                Ok(Some((Word::Opened { unheard }, _))) => news(News::Opened { unheard }),
                Ok(Some((Word::Figures(figures), _))) => news(News::Figures(figures)),
                Err(_) if stop.load(Ordering::Acquire) || leaving.load(Ordering::Acquire) => return false,
                Err(error) => {
                    tracing::error!(%error, "a gate ended; its guest's output goes on without it");
                    return true;
                }
            }
        }
    }
}

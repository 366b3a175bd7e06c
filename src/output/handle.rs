//! The agent's side of a gate: starts the process, speaks to it, and watches it.
//!
//! One thread a gate listens and pings. A gate that ended or does not answer for [`SILENT_AFTER`] is killed and the
//! filters are taken out of QEMU by the same thread, so that the guest's output goes on whatever the session does.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use vmsync::output::Mark;

use super::filters;
use super::wire::{self, Figures, Order, Setting, Word};
use crate::capture::{companion, priority};
use crate::hypervisor::xml::{OutputNic, XmlError, output_nics};
use crate::hypervisor::{Domain, HypervisorError, XmlKind};

const PING_EVERY: Duration = Duration::from_millis(50);
/// A gate that does not answer for so long is of no use.
const SILENT_AFTER: Duration = Duration::from_millis(120);
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
    /// It opened by itself: a frame was too old.
    Opened,
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

/// Writes marks into the streams of all NICs.
#[derive(Debug, Clone)]
pub struct Marker {
    captures: Arc<Vec<OwnedFd>>,
}

impl Marker {
    /// To be called while the guest stands still. False: a stream has no room; what was sent is not told from what will
    /// be, and this mark must not be released.
    pub fn mark(&self, mark: Mark) -> bool {
        let bytes = wire::mark_bytes(mark);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        self.captures.iter().all(|socket| nix::sys::socket::send(socket.as_raw_fd(), &bytes, flags) == Ok(bytes.len()))
    }
}

/// A gate that is in place.
pub struct Gate {
    control: Arc<OwnedFd>,
    marker: Marker,
    nics: Vec<OutputNic>,
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
        let nics = output_nics(&domain.xml(XmlKind::Live)?)?;
        if let Some(refusal) = nics.iter().find_map(|nic| nic.refusal.as_ref()) {
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
        let mut captures = Vec::new();
        for nic in &nics {
            match insert(&domain, nic, &tag, &control) {
                Ok(capture) => captures.push(capture),
                Err(error) => {
                    if let Err(error) = filters::remove(&domain, None, || ()) {
                        tracing::error!(guest = domain.name(), %error, "cannot take filters out again");
                    }
                    return Err(error);
                }
            }
        }
        filters::remove(&domain, Some(&tag), || ())?;
        tracing::info!(guest = domain.name(), nics = nics.len(), pid = child.0.id(), "its output goes through a gate");
        let (control, stop) = (Arc::new(control), Arc::new(AtomicBool::new(false)));
        let leaving = Arc::new(AtomicBool::new(false));
        let watcher = {
            let (control, stop, find) = (Arc::clone(&control), Arc::clone(&stop), Arc::clone(&find));
            let leaving = Arc::clone(&leaving);
            std::thread::Builder::new().name("gate".into()).spawn(move || {
                priority::hurry();
                let lost = watch(&control, &stop, &leaving, &news);
                child.end();
                if lost {
                    let removed = find().and_then(|domain| filters::remove(&domain, None, || ()));
                    if let Err(error) = &removed {
                        tracing::error!(%error, "the gate is lost and its filters cannot be taken out");
                    }
                    news(News::Lost { removed: removed.is_ok() });
                }
            })
        };
        let watcher = watcher.map_err(system("start a thread"))?;
        let marker = Marker { captures: Arc::new(captures) };
        Ok(Self { control, marker, nics, stop, leaving, find, watcher: Some(watcher) })
    }

    pub fn marker(&self) -> Marker {
        self.marker.clone()
    }

    /// Whether it stands before exactly the NICs the guest has now.
    pub fn covers(&self, live_xml: &str) -> bool {
        output_nics(live_xml).is_ok_and(|nics| nics == self.nics)
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
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.end();
    }
}

/// Puts the filters of one NIC in; returns a copy of QEMU's capture socket, for marks.
fn insert(domain: &Domain, nic: &OutputNic, tag: &str, control: &OwnedFd) -> Result<OwnedFd, GateError> {
    let pair = || socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC);
    let (capture, capture_of_qemu) = pair().map_err(system("make a socket"))?;
    let (release, release_of_qemu) = pair().map_err(system("make a socket"))?;
    for socket in [&capture_of_qemu, &release] {
        // Without the right to so much: as much as there may be.
        if nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::SndBufForce, &SOCKET_BYTES).is_err() {
            let _ = nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::SndBuf, &SOCKET_BYTES);
        }
    }
    wire::send(control.as_fd(), &Order::Nic, &[capture.as_raw_fd(), release.as_raw_fd()])
        .map_err(system("speak to the gate"))?;
    filters::insert(domain, nic, tag, capture_of_qemu.as_fd(), release_of_qemu.as_fd())?;
    Ok(capture_of_qemu)
}

/// Passes on what the gate tells until it is taken out (false) or lost (true).
fn watch(control: &OwnedFd, stop: &AtomicBool, leaving: &AtomicBool, news: &impl Fn(News)) -> bool {
    let mut asked = 0u64;
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
                if now > *since + SILENT_AFTER && *looks > LOOKS {
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
                Ok(Some((Word::Opened, _))) => news(News::Opened),
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

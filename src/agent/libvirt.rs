//! The agent's connection to its libvirtd: opened again whenever it breaks, its events passed to whom they concern.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::{Duration, Instant};

use crate::hypervisor::{Domain, Hypervisor, HypervisorError, HypervisorEvent};

const RECONNECT_AFTER: Duration = Duration::from_millis(200);
/// How often a quiet connection is checked.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Called for each event of one guest, on the router's thread; must not block.
pub type GuestSink = Arc<dyn Fn(&HypervisorEvent) + Send + Sync>;

/// A connection that heals itself. Threads of guests share it.
pub struct Libvirt {
    uri: String,
    current: RwLock<Option<Arc<Hypervisor>>>,
    sinks: Mutex<HashMap<String, GuestSink>>,
    others: GuestSink,
}

impl Libvirt {
    /// Starts connecting in the background. `others` gets the events of guests without a sink of their own, and
    /// `Disconnected`.
    pub fn start(uri: &str, others: GuestSink) -> std::io::Result<Arc<Self>> {
        let libvirt = Arc::new(Self {
            uri: uri.to_owned(),
            current: RwLock::new(None),
            sinks: Mutex::new(HashMap::new()),
            others,
        });
        let weak = Arc::downgrade(&libvirt);
        std::thread::Builder::new().name("libvirt".into()).spawn(move || keep_connected(&weak))?;
        Ok(libvirt)
    }

    /// The connection of this moment.
    pub fn get(&self) -> Result<Arc<Hypervisor>, HypervisorError> {
        let current = self.current.read().unwrap_or_else(|p| p.into_inner());
        current.clone().filter(|hypervisor| hypervisor.is_alive()).ok_or_else(|| HypervisorError::NotConnected {
            uri: self.uri.clone(),
            message: "libvirtd does not answer; connecting again".into(),
        })
    }

    /// The connection as soon as there is one: libvirtd may just be starting.
    pub fn wait(&self, within: Duration) -> Result<Arc<Hypervisor>, HypervisorError> {
        let give_up_at = Instant::now() + within;
        loop {
            match self.get() {
                Err(_) if Instant::now() < give_up_at => std::thread::sleep(RECONNECT_AFTER / 4),
                outcome => return outcome,
            }
        }
    }

    pub fn lookup(&self, name_or_uuid: &str) -> Result<Domain, HypervisorError> {
        self.get()?.lookup(name_or_uuid)
    }

    /// Sends the events of the guest `uuid` to `sink` until [`Libvirt::forget`].
    pub fn listen(&self, uuid: &str, sink: GuestSink) {
        self.sinks().insert(uuid.to_owned(), sink);
    }

    pub fn forget(&self, uuid: &str) {
        self.sinks().remove(uuid);
    }

    fn sinks(&self) -> std::sync::MutexGuard<'_, HashMap<String, GuestSink>> {
        self.sinks.lock().unwrap_or_else(|p| p.into_inner())
    }

    fn set(&self, hypervisor: Option<Arc<Hypervisor>>) {
        *self.current.write().unwrap_or_else(|p| p.into_inner()) = hypervisor;
    }

    fn route(&self, event: &HypervisorEvent) {
        let sink = match event {
            HypervisorEvent::Lifecycle { uuid, .. }
            | HypervisorEvent::DeviceAdded { uuid, .. }
            | HypervisorEvent::DeviceRemoved { uuid, .. }
            | HypervisorEvent::Monitor { uuid, .. } => self.sinks().get(uuid).cloned(),
            HypervisorEvent::Disconnected { .. } => None,
        };
        sink.as_ref().unwrap_or(&self.others)(event);
    }
}

/// A guest's domain on whatever connection there is: looked up again after libvirtd was restarted.
pub struct LiveDomain {
    libvirt: Arc<Libvirt>,
    uuid: String,
    known: Mutex<Option<(Arc<Hypervisor>, Arc<Domain>)>>,
}

impl LiveDomain {
    pub fn new(libvirt: Arc<Libvirt>, uuid: &str) -> Self {
        Self { libvirt, uuid: uuid.to_owned(), known: Mutex::new(None) }
    }

    pub fn get(&self) -> Result<Arc<Domain>, HypervisorError> {
        let current = self.libvirt.get()?;
        let mut known = self.known.lock().unwrap_or_else(|p| p.into_inner());
        if let Some((hypervisor, domain)) = known.as_ref()
            && Arc::ptr_eq(hypervisor, &current)
        {
            return Ok(Arc::clone(domain));
        }
        let domain = Arc::new(current.lookup_uuid(&self.uuid)?);
        *known = Some((current, Arc::clone(&domain)));
        Ok(domain)
    }
}

/// The router's thread: connects, passes events on, starts over. Ends with the last handle.
fn keep_connected(libvirt: &Weak<Libvirt>) {
    let mut reported = false;
    while let Some(strong) = libvirt.upgrade() {
        let (events, received): (Sender<HypervisorEvent>, Receiver<HypervisorEvent>) = channel();
        let connected = Hypervisor::connect(&strong.uri).and_then(|hypervisor| {
            let events = Mutex::new(events);
            hypervisor.subscribe(Arc::new(move |event| {
                let _ = events.lock().unwrap_or_else(|p| p.into_inner()).send(event);
            }))?;
            Ok(hypervisor)
        });
        match connected {
            Ok(hypervisor) => {
                tracing::info!(uri = strong.uri, "connected to libvirt");
                reported = false;
                strong.set(Some(Arc::clone(&hypervisor)));
                drop(strong);
                pass_events(libvirt, &hypervisor, &received);
                if let Some(strong) = libvirt.upgrade() {
                    strong.set(None);
                    strong.route(&HypervisorEvent::Disconnected { reason: "libvirtd went away".into() });
                    tracing::warn!(uri = strong.uri, "libvirt is gone; connecting again");
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut reported, true) {
                    tracing::warn!(%error, "cannot connect to libvirt; trying again");
                }
                drop(strong);
            }
        }
        std::thread::sleep(RECONNECT_AFTER);
    }
}

fn pass_events(libvirt: &Weak<Libvirt>, hypervisor: &Arc<Hypervisor>, received: &Receiver<HypervisorEvent>) {
    loop {
        let event = received.recv_timeout(CHECK_EVERY);
        let Some(strong) = libvirt.upgrade() else { return };
        match event {
            Ok(HypervisorEvent::Disconnected { .. }) => return,
            Ok(event) => strong.route(&event),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) if hypervisor.is_alive() => {}
            Err(_) => return,
        }
    }
}

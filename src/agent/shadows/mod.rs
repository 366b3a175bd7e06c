//! The shadows' side of the agent: guests of other hosts that are kept ready here.
//!
//! ```text
//! listener --> connection (reader, writer threads) --Hello's guest--> Slot: vmsync::Target + standby::Shadow
//! manager's commands (accept, promote, drop) -----------------------> Slot
//! ```
//! A slot's lock is held for one step of its core and the effects of it; whatever takes long (making a domain,
//! hashing all memory) runs on a thread of its own and takes the lock bit by bit.

mod connection;
mod slot;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::Context;

use super::libvirt::Libvirt;
use super::lock;
use super::records::Records;
use crate::api::control::{GuestEvent, Role, ShadowStatus};
use crate::api::types::{ApiError, Keep, KeptEpoch};
use crate::config::Config;
use crate::transport::Security;
use slot::Slot;
pub(super) use slot::remove_images;

/// Sync connections served at a time; each shadow has one.
const MAX_CONNECTIONS: usize = 1024;

/// What all slots share.
pub(super) struct Shared {
    pub(super) host: String,
    pub(super) security: Security,
    pub(super) run_dir: std::path::PathBuf,
    pub(super) disk_dir: std::path::PathBuf,
    pub(super) libvirt: Arc<Libvirt>,
    report: Arc<dyn Fn(GuestEvent) + Send + Sync>,
    /// Promoted guests that are being announced and defined.
    pub(super) finishing: Mutex<BTreeMap<String, JoinHandle<()>>>,
}

impl Shared {
    /// Tells the manager something about a guest, for people.
    fn notice(&self, uuid: &str, level: &str, name: &str, message: String) {
        let (uuid, level, name) = (Some(uuid.to_owned()), level.into(), name.into());
        (self.report)(GuestEvent::Notice { uuid, level, name, message });
    }
}

/// How a promotion went.
#[derive(Debug, Clone, Copy)]
pub struct Promoted {
    pub term: u64,
    pub epoch: u64,
    /// Its own epochs are numbered above this.
    pub numbers_after: u64,
    pub took_us: u64,
}

/// All shadows of this host.
pub struct Shadows {
    shared: Arc<Shared>,
    records: Arc<Records>,
    slots: Mutex<BTreeMap<String, Arc<Slot>>>,
    /// Promotions done, so that a repeated command gets the same answer.
    promoted: Mutex<BTreeMap<String, Promoted>>,
    next_connection: AtomicU64,
}

impl Shadows {
    /// Takes up the shadows that a former agent of this host left, and listens for primaries.
    pub fn start(
        config: &Config,
        security: Security,
        libvirt: Arc<Libvirt>,
        records: Arc<Records>,
        report: Arc<dyn Fn(GuestEvent) + Send + Sync>,
    ) -> anyhow::Result<Arc<Self>> {
        let addr: SocketAddr = config.agent.sync_listen;
        let listener = listen(addr).with_context(|| format!("cannot listen at {addr} for primaries"))?;
        let shared = Arc::new(Shared {
            host: config.host.clone(),
            security,
            run_dir: config.run_dir.clone(),
            disk_dir: config.agent.disk_dir.clone(),
            libvirt,
            report,
            finishing: Mutex::default(),
        });
        let shadows = Arc::new(Self {
            shared,
            records: Arc::clone(&records),
            slots: Mutex::default(),
            promoted: Mutex::default(),
            next_connection: AtomicU64::new(1),
        });
        for record in records.all().into_iter().filter(|record| record.role == Role::Shadow) {
            let slot = Slot::new(Arc::clone(&shadows.shared), &record.uuid, &record.domain, record.term, record.keep);
            match slot {
                Ok(slot) => {
                    Slot::take_up(&slot);
                    lock(&shadows.slots).insert(record.uuid, slot);
                }
                Err(error) => tracing::error!(guest = record.domain, %error, "cannot take up a shadow"),
            }
        }
        let of_thread = Arc::clone(&shadows);
        std::thread::Builder::new().name("sync-listener".into()).spawn(move || of_thread.accept_all(&listener))?;
        Ok(shadows)
    }

    fn accept_all(self: &Arc<Self>, listener: &TcpListener) {
        let open = Arc::new(());
        loop {
            let (stream, from) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a primary's connection");
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    continue;
                }
            };
            if Arc::strong_count(&open) > MAX_CONNECTIONS {
                tracing::warn!(%from, "refused: {MAX_CONNECTIONS} primaries are connected");
                continue;
            }
            let number = self.next_connection.fetch_add(1, Ordering::Relaxed);
            let (shadows, counted) = (Arc::clone(self), Arc::clone(&open));
            let spawned = std::thread::Builder::new().name("shadow-reader".into()).spawn(move || {
                connection::serve(&shadows, stream, from, number);
                drop(counted);
            });
            if let Err(error) = spawned {
                tracing::error!(%error, "cannot serve a primary");
            }
        }
    }

    fn slot(&self, uuid: &str) -> Option<Arc<Slot>> {
        lock(&self.slots).get(uuid).cloned()
    }

    /// From now on a primary with `term` may keep a shadow of this guest here.
    pub fn accept(&self, uuid: &str, domain: &str, term: u64, primary: &str, keep: Keep) -> Result<(), ApiError> {
        // One that is being given up is waited for: its files are where those of the next one will be.
        if let Some(old) = self.slot(uuid).filter(|slot| slot.has_ended()) {
            self.forget(&old);
        }
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.get(uuid) {
            slot.term_known(term);
            slot.keep_changed(keep);
        } else {
            let slot = Slot::new(Arc::clone(&self.shared), uuid, domain, term, keep)?;
            slots.insert(uuid.into(), slot);
            lock(&self.promoted).remove(uuid);
            tracing::info!(guest = domain, term, primary, "a shadow of this guest may be kept here");
        }
        Ok(())
    }

    /// Gives a shadow up: its domain, memory and journal are gone when this returns. Also if there is none.
    pub fn drop_shadow(&self, uuid: &str) -> Result<(), ApiError> {
        let Some(slot) = self.slot(uuid) else { return Ok(()) };
        // Two orders may do this at a time; neither answers before it is done.
        let result = slot.destroy();
        self.forget(&slot);
        result
    }

    fn forget(&self, slot: &Arc<Slot>) {
        lock(&self.slots).retain(|_, known| !Arc::ptr_eq(known, slot));
    }

    /// Makes the shadow the primary. Repeated with the same term it answers the same.
    pub fn promote(&self, uuid: &str, term: u64, after_epoch: u64, back_to: Option<u64>) -> Result<Promoted, ApiError> {
        if let Some(done) = lock(&self.promoted).get(uuid).filter(|done| done.term == term) {
            return Ok(*done);
        }
        let slot = self.slot(uuid).ok_or_else(|| self.no_shadow(uuid))?;
        let promoted = slot.promote(term, after_epoch, back_to)?;
        lock(&self.promoted).insert(uuid.into(), promoted);
        lock(&self.slots).remove(uuid);
        Ok(promoted)
    }

    /// Waits until a guest promoted here has its definition: whoever protects it next describes it by that.
    pub fn wait_finished(&self, uuid: &str) {
        let thread = lock(&self.shared.finishing).remove(uuid);
        if let Some(thread) = thread {
            // It ends by itself within seconds; a panic in it was told on standard error.
            let _ = thread.join();
        }
    }

    /// Highest term of the guest that this host knows.
    fn known_term(&self, uuid: &str) -> Option<u64> {
        let promoted = lock(&self.promoted).get(uuid).map(|promoted| promoted.term);
        promoted.max(self.records.get(uuid).map(|record| record.term))
    }

    /// What the epochs of this host's copy are numbered above if it was promoted; otherwise 0.
    pub fn promoted_epoch(&self, uuid: &str) -> u64 {
        lock(&self.promoted).get(uuid).map_or(0, |promoted| promoted.numbers_after)
    }

    /// The epochs that the shadow here could be promoted from, oldest first.
    pub fn epochs(&self, uuid: &str) -> Vec<KeptEpoch> {
        self.slot(uuid).map(|slot| slot.epochs()).unwrap_or_default()
    }

    /// Keeps one of them for a while.
    pub fn hold_epoch(&self, uuid: &str, epoch: u64, hold_ms: u64) -> Result<(), ApiError> {
        self.slot(uuid).ok_or_else(|| self.no_shadow(uuid))?.hold_epoch(epoch, hold_ms)
    }

    /// Gives up what the shadow here has committed, as it was found different; says so.
    pub fn distrust(&self, uuid: &str, difference: &str) -> Result<String, ApiError> {
        self.slot(uuid).ok_or_else(|| self.no_shadow(uuid))?.distrust(difference)
    }

    fn no_shadow(&self, uuid: &str) -> ApiError {
        ApiError::new("not-found", format!("{} keeps no shadow of guest {uuid}", self.shared.host))
    }

    pub fn status(&self, uuid: &str) -> Option<ShadowStatus> {
        self.slot(uuid).map(|slot| slot.status())
    }

    pub fn statuses(&self) -> Vec<ShadowStatus> {
        let slots: Vec<_> = lock(&self.slots).values().cloned().collect();
        slots.iter().map(|slot| slot.status()).collect()
    }

    /// How long ago the guest's primary was last heard on its stream.
    pub fn silent_ms(&self, uuid: &str) -> Option<u64> {
        self.slot(uuid).and_then(|slot| slot.silent_ms())
    }
}

fn listen(addr: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(addr), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

//! One shadow: the target's state machine, and whoever tells it something.

mod effects;
mod promotion;
mod take_up;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use vmsync::message::SourceMessage;
use vmsync::target::{ConnId, HashId, Target, TargetConfig, TargetEffect, TargetEvent};
use vmsync::units::{GuestUuid, Millis, Term};
use vmsync::wire::WireError;

use super::connection::Answers;
use super::{Promoted, Shared};
use crate::agent::libvirt::Libvirt;
use crate::api::control::ShadowStatus;
use crate::api::types::{ApiError, Keep};
use crate::disk::images;
use crate::hypervisor::xml::GuestDefinition;
use crate::hypervisor::{HypervisorError, HypervisorEvent, Lifecycle, XmlKind};
use crate::standby::{JournalFile, Shadow, UndoFiles};

/// Memory for epochs that are not applied yet: a quarter of the guest would do for most, this much for all.
const STAGING_LIMIT_BYTES: u64 = 512 << 20;

pub(super) struct Slot {
    shared: Arc<Shared>,
    uuid: String,
    guest: GuestUuid,
    domain: String,
    started: Instant,
    /// When that was, by the host's clock: ages of epochs outlast this agent.
    started_ms: u64,
    inner: Mutex<Inner>,
    /// What a heartbeat shows; readable while a step is under way.
    status: Mutex<(ShadowStatus, Option<Instant>)>,
}

struct Inner {
    target: Target,
    shadow: Option<Shadow>,
    keep: Keep,
    journal: JournalFile,
    undo: UndoFiles,
    /// Former epochs cannot be kept: said once.
    keeping_fails: bool,
    connections: BTreeMap<ConnId, Answers>,
    /// The hashing that is wanted; another one or none ends the thread that works on it.
    hashing: Option<HashId>,
    /// Why the shadow could not be promoted.
    problem: String,
    promotion: Option<Result<Promoted, String>>,
    /// Promoted already.
    done: Option<Promoted>,
    /// Given up: threads of it stop.
    ended: bool,
    /// And nothing of it is left.
    destroyed: bool,
}

impl Slot {
    pub(super) fn new(
        shared: Arc<Shared>,
        uuid: &str,
        domain: &str,
        term: u64,
        keep: Keep,
    ) -> Result<Arc<Self>, ApiError> {
        let guest =
            GuestUuid::parse(uuid).ok_or_else(|| ApiError::new("invalid", format!("{uuid:?} is not a UUID")))?;
        let failed = |error: &dyn std::fmt::Display| {
            ApiError::new("failed", format!("shadow of {domain} on {}: {error}", shared.host))
        };
        let dir = dir_of(&shared.run_dir, uuid);
        fs::create_dir_all(&dir).map_err(|error| failed(&format!("{}: {error}", dir.display())))?;
        // Twice what may be staged, as the target promises, and room for device states.
        let journal =
            JournalFile::open(&dir.join("journal"), 2 * STAGING_LIMIT_BYTES + (64 << 20)).map_err(|e| failed(&e))?;
        let config = TargetConfig {
            guest,
            host: shared.host.clone(),
            term: Term::new(term),
            staging_limit_bytes: STAGING_LIMIT_BYTES,
            keep: limits(keep),
        };
        let undo = UndoFiles::open(&dir.join("undo"));
        let libvirt = Arc::clone(&shared.libvirt);
        let status = ShadowStatus {
            uuid: uuid.into(),
            term,
            committed_epoch: 0,
            committed_term: 0,
            connected: false,
            problem: "nothing committed yet".into(),
        };
        let slot = Arc::new(Self {
            shared,
            uuid: uuid.into(),
            guest,
            domain: domain.into(),
            started: Instant::now(),
            started_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |span| span.as_millis() as u64),
            inner: Mutex::new(Inner {
                target: Target::new(config),
                shadow: None,
                journal,
                undo,
                keeping_fails: false,
                keep,
                connections: BTreeMap::new(),
                hashing: None,
                problem: "nothing committed yet".into(),
                promotion: None,
                done: None,
                ended: false,
                destroyed: false,
            }),
            status: Mutex::new((status, None)),
        });
        let weak = Arc::downgrade(&slot);
        let listener = move |event: &HypervisorEvent| {
            if let HypervisorEvent::Lifecycle { event: Lifecycle::Stopped(_), .. } = event
                && let Some(slot) = weak.upgrade()
            {
                // Not here: this thread passes on everybody's events.
                let _ = std::thread::Builder::new().name("shadow-ended".into()).spawn(move || slot.image_ended());
            }
        };
        libvirt.listen(uuid, Arc::new(listener));
        Ok(slot)
    }

    /// Milliseconds by the host's clock when this began, steadily from there on.
    fn now(&self) -> Millis {
        Millis::new(self.started_ms.saturating_add(self.started.elapsed().as_millis() as u64))
    }

    fn config(&self, term: Term, keep: Keep) -> TargetConfig {
        TargetConfig {
            guest: self.guest,
            host: self.shared.host.clone(),
            term,
            staging_limit_bytes: STAGING_LIMIT_BYTES,
            keep: limits(keep),
        }
    }

    /// The waiting QEMU ended: somebody destroyed it, or the host ran out of memory.
    fn image_ended(self: &Arc<Self>) {
        let mut inner = self.lock();
        if inner.ended || inner.shadow.as_ref().is_none_or(|shadow| shadow.problem().is_none()) {
            return;
        }
        tracing::warn!(guest = self.domain, "the shadow's QEMU ended; it is made anew");
        inner.problem = "its waiting QEMU ended; it is being made anew".into();
        self.step_locked(&mut inner, TargetEvent::ImageLost);
        self.destroy_image(&mut inner);
        self.publish(&inner);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn status(&self) -> ShadowStatus {
        super::lock(&self.status).0.clone()
    }

    pub(super) fn silent_ms(&self) -> Option<u64> {
        super::lock(&self.status).1.map(|heard| heard.elapsed().as_millis() as u64)
    }

    pub(super) fn connected(&self, conn: ConnId, answers: Answers) {
        self.lock().connections.insert(conn, answers);
    }

    pub(super) fn disconnected(self: &Arc<Self>, conn: ConnId) {
        self.step(TargetEvent::Disconnected { conn });
        self.lock().connections.remove(&conn);
    }

    pub(super) fn received(self: &Arc<Self>, conn: ConnId, message: SourceMessage) {
        super::lock(&self.status).1 = Some(Instant::now());
        self.step(TargetEvent::Received { conn, message });
    }

    pub(super) fn unreadable(self: &Arc<Self>, conn: ConnId, error: WireError) {
        self.step(TargetEvent::Unreadable { conn, error });
    }

    /// One step of the core with all that follows from it.
    fn step(self: &Arc<Self>, event: TargetEvent) {
        let mut inner = self.lock();
        self.step_locked(&mut inner, event);
    }

    fn step_locked(self: &Arc<Self>, inner: &mut Inner, event: TargetEvent) {
        if inner.ended {
            return;
        }
        self.settle(inner, Vec::new(), VecDeque::from([event]));
        self.publish(inner);
    }

    /// Carries out effects, then tells events, those too that effects lead to, until there are none.
    fn settle(self: &Arc<Self>, inner: &mut Inner, mut effects: Vec<TargetEffect>, mut events: VecDeque<TargetEvent>) {
        loop {
            self.perform(inner, &mut effects, &mut events);
            let Some(event) = events.pop_front() else { return };
            inner.target.step(self.now(), event, &mut effects);
        }
    }

    /// The manager says that the guest's primaryship has this term now.
    pub(super) fn term_known(self: &Arc<Self>, term: u64) {
        self.step(TargetEvent::TermKnown { term: Term::new(term) });
    }

    /// So many former epochs are to be kept from now on.
    pub(super) fn keep_changed(self: &Arc<Self>, keep: Keep) {
        let mut inner = self.lock();
        if inner.keep != keep {
            inner.keep = keep;
            self.step_locked(&mut inner, TargetEvent::KeepChanged { keep: limits(keep) });
        }
    }

    /// Memory or disks were found different from the guest's, as after a fault of this host's memory or disk: no epoch of
    /// it is promoted. The image stays, and the primary, which finds its connection closed, compares all of it.
    pub(super) fn distrust(self: &Arc<Self>, difference: &str) -> Result<String, ApiError> {
        let mut inner = self.lock();
        let subject = format!("shadow of {} on {}", self.domain, self.shared.host);
        if inner.ended {
            return Err(ApiError::new("conflict", format!("{subject}: it is no shadow any more")));
        }
        self.step_locked(&mut inner, TargetEvent::ImageLost);
        inner.problem = format!("it was found damaged ({difference}) and is compared with its guest");
        self.publish(&inner);
        Ok(format!("{subject} {}", inner.problem.trim_start_matches("it ")))
    }

    /// Given up, completely; waits if that is under way.
    pub(super) fn has_ended(&self) -> bool {
        self.lock().destroyed
    }

    /// Gives the shadow up for good.
    pub(super) fn destroy(self: &Arc<Self>) -> Result<(), ApiError> {
        let mut inner = self.lock();
        if inner.destroyed {
            return Ok(());
        }
        self.step_locked(&mut inner, TargetEvent::ImageLost);
        (inner.ended, inner.destroyed) = (true, true);
        inner.connections.values().for_each(Answers::close);
        inner.connections.clear();
        self.destroy_image(&mut inner);
        self.shared.libvirt.forget(&self.uuid);
        remove_files(&dir_of(&self.shared.run_dir, &self.uuid));
        remove_images(&self.shared.libvirt, &self.shared.disk_dir, &self.uuid);
        tracing::info!(guest = self.domain, "shadow dropped");
        Ok(())
    }

    fn destroy_image(&self, inner: &mut Inner) {
        inner.shadow = None;
        let removed = self.shared.libvirt.get().map_err(|error| error.to_string()).and_then(|hypervisor| {
            Shadow::remove(&hypervisor, &self.uuid, &self.shared.run_dir).map_err(|error| error.to_string())
        });
        if let Err(error) = removed {
            tracing::error!(guest = self.domain, error, "cannot remove the shadow's domain");
        }
    }

    fn publish(&self, inner: &Inner) {
        let view = inner.target.view();
        let mut status = super::lock(&self.status);
        status.0.term = view.term.get();
        status.0.committed_term = view.commit.map_or(0, |commit| commit.term.get());
        status.0.committed_epoch = view.commit.map_or(0, |commit| commit.epoch.get());
        status.0.connected = view.source_host.is_some();
        status.0.problem = match (&inner.shadow, view.commit) {
            (Some(_), Some(_)) => String::new(),
            _ if inner.problem.is_empty() => "nothing committed yet".into(),
            _ => inner.problem.clone(),
        };
    }
}

/// Removes the images of a guest's disks, but for those that it runs from here.
pub(in crate::agent) fn remove_images(libvirt: &Libvirt, disk_dir: &Path, uuid: &str) {
    let in_use = match libvirt.lookup(uuid) {
        Err(HypervisorError::NotFound { .. }) => Ok(Vec::new()),
        Err(error) => Err(error.to_string()),
        Ok(domain) => domain.xml(XmlKind::Live).map_err(|error| error.to_string()).and_then(|xml| {
            let definition = GuestDefinition::parse(&xml).map_err(|error| error.to_string())?;
            Ok(definition.disks.into_iter().filter_map(|disk| disk.source).collect())
        }),
    };
    // Without libvirt's word nothing is removed: a guest's only disk may be among them.
    let removed = in_use
        .and_then(|in_use: Vec<String>| images::remove(disk_dir, uuid, &in_use).map_err(|error| error.to_string()));
    if let Err(error) = removed {
        tracing::warn!(uuid, dir = %disk_dir.display(), error, "images of a guest's disks stay");
    }
}

fn limits(keep: Keep) -> vmsync::Keep {
    let Keep { epochs, age_ms, mib } = keep;
    vmsync::Keep { epochs, age: Millis::new(age_ms), bytes: mib.saturating_mul(1 << 20) }
}

fn dir_of(run_dir: &Path, uuid: &str) -> PathBuf {
    run_dir.join("targets").join(uuid)
}

fn remove_files(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(dir = %dir.display(), %error, "cannot remove a shadow's files");
    }
}

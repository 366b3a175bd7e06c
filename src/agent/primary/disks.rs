//! A session's disks: mirrored before anything is captured, kept when the guest is attached anew.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::PrimaryContext;
use crate::agent::libvirt::LiveDomain;
use crate::disk::mirror::Progress;
use crate::disk::{DiskPaths, DiskProblem, DiskSet};
use crate::hypervisor::Domain;
use crate::hypervisor::xml::GuestDefinition;

/// How often libvirt is asked how far the first copies are.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A mirror that broke is made again after a while, twice as long each time it did not get ready in between: each time
/// the whole disk is read.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(60);

/// What a session keeps of its disks over attachments.
#[derive(Default)]
pub(super) struct SessionDisks {
    set: Option<Arc<DiskSet>>,
    failures: u32,
    not_before: Option<Instant>,
}

impl SessionDisks {
    /// The mirrors of the guest's disks: those there are, or new ones.
    pub(super) fn of(
        &mut self,
        context: &PrimaryContext,
        domain: &Domain,
        definition: &str,
    ) -> Result<Arc<DiskSet>, String> {
        let definition = GuestDefinition::parse(definition).map_err(|error| error.to_string())?;
        if let Some(set) = self.set.as_ref().filter(|set| set.fits(domain, &definition)) {
            return Ok(Arc::clone(set));
        }
        let was_ready = self.set.take().is_some_and(|set| set.is_ready());
        let now = Instant::now();
        if let Some(wait) = self.not_before.map(|at| at.saturating_duration_since(now)).filter(|wait| !wait.is_zero()) {
            return Err(format!("its disks are mirrored again in {} s", wait.as_secs() + 1));
        }
        self.failures = if was_ready { 0 } else { self.failures.saturating_add(1) };
        let paths = DiskPaths {
            disk_dir: context.disk_dir.clone(),
            run_dir: context.run_dir.clone(),
            copy_mib_per_s: context.disk_copy_mib_per_s,
        };
        let guard = context.guards.get().map_err(|error| error.to_string())?;
        let started = DiskSet::start(domain, &definition, &paths, &guard);
        self.not_before = Some(now + (AGAIN_AFTER * 2u32.saturating_pow(self.failures)).min(AGAIN_AFTER_MAX));
        let set = Arc::new(started.map_err(|error| error.to_string())?);
        self.set = Some(Arc::clone(&set));
        Ok(set)
    }
}

/// The disks of one attachment.
pub(super) struct DiskWatch {
    pub(super) set: Arc<DiskSet>,
    look_at: Instant,
    /// How far the first copies are; empty when there is nothing to tell.
    pub(super) text: String,
}

impl DiskWatch {
    pub(super) fn new(set: Arc<DiskSet>) -> Self {
        Self { set, look_at: Instant::now(), text: String::new() }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.set.is_ready()
    }

    /// True when the copies became complete with this look. An error: they are of no more use.
    pub(super) fn look(&mut self, now: Instant, domain: &LiveDomain) -> Result<bool, String> {
        if self.set.is_ready() {
            return self.set.check().map(|()| false).map_err(|error| error.to_string());
        }
        if now < self.look_at {
            return Ok(false);
        }
        self.look_at = now + LOOK_EVERY;
        let progress = domain.get().map_err(DiskProblem::from).and_then(|domain| self.set.progress(&domain));
        match progress {
            Ok(Progress::Ready) => {
                self.text.clear();
                Ok(true)
            }
            Ok(Progress::Copying(text)) => {
                self.text = text;
                Ok(false)
            }
            // libvirtd is away; the mirrors are not.
            Err(DiskProblem::Hypervisor(_)) => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }
}

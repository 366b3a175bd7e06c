//! What a former agent of this host left is gone on with.

use std::collections::VecDeque;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use vmsync::state_record::StateError;
use vmsync::target::{Left, Target};

use super::{Inner, Slot, dir_of};
use crate::agent::shadows::Promoted;
use crate::standby::{Adopted, Shadow};

impl Slot {
    /// Goes on with what a former agent left: its waiting domain, its state record, its journal.
    pub(in crate::agent::shadows) fn take_up(slot: &Arc<Self>) {
        let slot = Arc::clone(slot);
        let spawned = std::thread::Builder::new().name("shadow-take-up".into()).spawn(move || slot.take_up_now());
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot take up a shadow");
        }
    }

    fn take_up_now(self: &Arc<Self>) {
        let dir = dir_of(&self.shared.run_dir, &self.uuid);
        let Ok(state) = fs::read(dir.join("target")) else { return };
        // libvirtd may still be starting, as after a reboot.
        let hypervisor = match self.shared.libvirt.wait(Duration::from_secs(20)) {
            Ok(hypervisor) => hypervisor,
            Err(error) => return tracing::warn!(guest = self.domain, %error, "shadow not taken up"),
        };
        let mut inner = self.lock();
        if inner.shadow.is_some() {
            return;
        }
        let adopted = match Shadow::adopt(&hypervisor, &self.uuid, &self.shared.run_dir) {
            Ok(adopted) => adopted,
            Err(error) => return tracing::warn!(guest = self.domain, %error, "the shadow cannot be taken up"),
        };
        if matches!(adopted, Adopted::None) {
            return tracing::info!(guest = self.domain, "the shadow's domain is gone; waiting for its primary");
        }
        let journal = inner.journal.read_all().unwrap_or_default();
        let undo = match &adopted {
            Adopted::Waiting(shadow) => inner.undo.found(self.guest, shadow.layout()),
            _ => Vec::new(),
        };
        // Its QEMU has lived on: this host was not started anew.
        let left = Left { state: &state, journal: &journal, undo: &undo, rebooted: false };
        let config = self.config(inner.target.view().term, inner.keep);
        let resumed = match Target::resume(config, self.now(), left) {
            Ok(resumed) => resumed,
            Err(error @ StateError::Damaged) => return self.found_damaged(&mut inner, &error.to_string()),
            Err(error) => return tracing::warn!(guest = self.domain, %error, "a shadow's state record is of no use"),
        };
        if let Some(damage) = &resumed.damage {
            self.found_damaged(&mut inner, damage);
        }
        for note in resumed.notes {
            tracing::info!(guest = self.domain, note, "taking up a shadow");
        }
        inner.target = resumed.target;
        let mut effects = resumed.effects;
        match adopted {
            Adopted::Waiting(shadow) => inner.shadow = Some(*shadow),
            Adopted::Promoted(done) => {
                inner.done = inner.target.promotion().map(|promotion| Promoted {
                    term: promotion.term.get(),
                    epoch: promotion.commit.epoch.get(),
                    numbers_after: promotion.numbers_after().get(),
                    took_us: done.timings.running_us,
                });
                effects.clear();
                inner.ended = true;
            }
            Adopted::None => {}
        }
        self.settle(&mut inner, effects, VecDeque::new());
        let epoch = inner.target.committed().map_or(0, |commit| commit.epoch.get());
        tracing::info!(guest = self.domain, epoch, "shadow taken up where it was");
        self.publish(&inner);
    }

    /// Nothing that a former agent left here is promoted: the primary, which finds no commit, compares all of it.
    fn found_damaged(&self, inner: &mut Inner, damage: &str) {
        inner.problem = format!("what was kept here was found damaged ({damage}) and is compared with its guest");
        self.publish(inner);
        let message = format!("shadow of {} on {}: {}", self.domain, self.shared.host, inner.problem);
        tracing::error!(message);
        self.shared.notice(&self.uuid, "alarm", "shadow-damaged", message);
    }
}

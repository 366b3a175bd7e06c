//! How a guest comes to be captured, and how it is left: attached to its QEMU, with a cut thread and a watch on its end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmsync::codec::MirrorBudget;
use vmsync::source::{Source, SourceConfig, SourceLimits};
use vmsync::units::{GuestUuid, Lineage, Term};

use super::Capturing;
use crate::agent::libvirt::LiveDomain;
use crate::agent::primary::PrimaryContext;
use crate::agent::primary::cut_thread::CutThread;
use crate::agent::primary::describe::{
    definition_of, description_of, monitor_call, random_u64, refuse_what_cannot_be_captured,
};
use crate::agent::primary::disks::DiskWatch;
use crate::agent::primary::exit_watch::ExitWatch;
use crate::agent::primary::final_cut::{FinalCut, forget_held};
use crate::agent::primary::outbox::Outbox;
use crate::agent::primary::pacing::Pacing;
use crate::agent::primary::recorder::Recorder;
use crate::agent::primary::session::{Input, Session};
use crate::api::types::ApiError;
use crate::capture::advice::huge_pages;
use crate::capture::attach::{AttachOptions, Attached, attach, detach};
use crate::hypervisor::DomainState;

/// Level of the pages' compression; the fastest that still shrinks well.
const ZSTD_LEVEL: i32 = -1;

impl Capturing {
    pub(in crate::agent::primary) fn attach(session: &mut Session, attachment: u64) -> Result<Self, String> {
        let (context, spec) = (Arc::clone(&session.context), session.spec.clone());
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let domain = context.libvirt.lookup(&spec.uuid).map_err(|e| text(&e))?;
        let (state, _) = domain.state().map_err(|e| text(&e))?;
        if !matches!(state, DomainState::Running | DomainState::Paused) {
            return Err(format!("domain {} is {state:?}, not running", spec.domain));
        }
        let definition = definition_of(&domain)?;
        refuse_what_cannot_be_captured(&definition)?;
        let description = description_of(&domain, &definition)?;
        let guard = context.guards.get().map_err(|e| text(&e))?;
        let disks = session.disks.of(&context, &domain, &definition)?;
        let options =
            AttachOptions { tracker: context.tracker, bound: context.watchdog, run_dir: context.run_dir.clone() };
        let call = monitor_call(LiveDomain::new(Arc::clone(&context.libvirt), &spec.uuid));
        let Attached { mut cutter, process, layout, tracker_reason } =
            attach(&domain, &guard, call, Arc::clone(&disks), &options).map_err(|e| text(&e))?;
        let guest = GuestUuid::parse(&spec.uuid).ok_or_else(|| format!("{} is no UUID", spec.uuid))?;
        let mut source = Source::new(SourceConfig {
            term: Term::new(spec.term),
            lineage: Lineage::new(random_u64()?),
            guest,
            domain: spec.domain.clone(),
            host: context.host.clone(),
            layout: (*layout).clone(),
            description,
            zstd_level: ZSTD_LEVEL,
            mirror: mirror_budget(spec.mirror_mib),
            limits: SourceLimits::default(),
        })
        .map_err(|e| text(&e))?;
        source.set_mirror_advice(huge_pages);
        cutter.set_at_stop(session.output.at_stop());
        let memory = cutter.memory().clone();
        let mappings = memory.mappings_digest().map_err(|e| text(&e))?;
        let memory_bytes = memory.ranges().map(|(_, _, len)| len).sum();
        let (tracker, live_reads) = (cutter.tracker_name(), cutter.live_reads());
        let inputs = Mutex::new(session.inputs.clone());
        let cuts = CutThread::start(cutter, move |answer| {
            let input = Input::Cut { attachment, answer };
            let _ = inputs.lock().unwrap_or_else(|p| p.into_inner()).send(input);
        })
        .map_err(|e| text(&e))?;
        let inputs = session.inputs.clone();
        let exit = ExitWatch::start(process.pid, move |exit| drop(inputs.send(Input::Exited { attachment, exit })))
            .map_err(|e| text(&e))?;
        if !process.is_alive() {
            return Err("QEMU ended while it was being attached".into());
        }
        let interval_ms = spec.interval.as_millis();
        let recorder =
            context.record_dir.as_ref().and_then(|dir| Recorder::start(dir, &spec.domain, interval_ms, &memory));
        let totals = std::mem::take(&mut session.totals);
        tracing::info!(guest = spec.domain, pid = process.pid, tracker, tracker_reason, "attached");
        let now = Instant::now();
        Ok(Self {
            guest: spec.domain,
            uuid: spec.uuid.clone(),
            host: context.host.clone(),
            started: now,
            domain: LiveDomain::new(Arc::clone(&context.libvirt), &session.spec.uuid),
            process,
            memory,
            live_reads,
            disks: DiskWatch::new(disks),
            mappings,
            source,
            cuts,
            _exit: exit,
            tracker,
            tracker_reason,
            pacing: Pacing::new(spec.interval, spec.budget),
            next_cut_at: now,
            cut_bound: context.watchdog,
            held_up: false,
            ready: false,
            recorder,
            cutting_since: None,
            last_cut_ended: now,
            failures: 0,
            problem: String::new(),
            paused: state == DomainState::Paused,
            devices_changed_at: None,
            final_cut: FinalCut::left_behind(&session.context.run_dir, &session.spec.uuid),
            lost: BTreeMap::new(),
            rates: BTreeMap::new(),
            lags: BTreeMap::new(),
            before: (totals.raw_bytes, totals.wire_bytes, totals.epochs),
            totals,
            deferred: Vec::new(),
            out: Outbox::default(),
            context,
            cut_marks: Vec::new(),
            memory_bytes,
        })
    }

    /// Leaves the guest. `for_good`: also takes back what would serve a later attachment.
    pub(in crate::agent::primary) fn detach(self, context: &PrimaryContext, uuid: &str, for_good: bool) {
        for reply in self.out.verify {
            let _ = reply.send(Err(ApiError::new("unavailable", "the guest is no longer captured; try again")));
        }
        if for_good {
            forget_held(&context.run_dir, uuid);
        }
        if for_good && let Ok(guard) = context.guards.get() {
            // A cut under way ends first: its pipe must not vanish under QEMU.
            let give_up_at = Instant::now() + Duration::from_secs(2);
            drop(self.cuts);
            while self.cutting_since.is_some() && self.process.is_alive() && Instant::now() < give_up_at {
                std::thread::sleep(Duration::from_millis(5));
                if self.last_cut_ended.elapsed() > context.watchdog * 2 {
                    break;
                }
            }
            detach(&guard, self.process, uuid, &context.run_dir);
        }
    }
}

/// As much as the guest has, or more, is all of it: the source takes no more than that.
pub(in crate::agent::primary) fn mirror_budget(mib: u64) -> MirrorBudget {
    MirrorBudget::Bytes(mib.saturating_mul(1 << 20))
}

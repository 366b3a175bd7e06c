//! One protected guest: the loop, and what each input leads to. Decisions about epochs and peers are `vmsync`'s.
//!
//! ```text
//!            attach ok             tracker ready
//! Detached ------------> Preparing -------------> Capturing --FinalCut--> Held
//!    ^  retried, 0.1 to 2 s  |                        |  ^                  |
//!    +-----------------------+---- trouble -----------+  +--UndoFinalCut----+
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::capturing::{Capturing, mirror_budget};
use super::disks::SessionDisks;
use super::epochs::EpochNumbers;
use super::exit_watch::Exit;
use super::final_cut::forget_held;
use super::inbound::Inbound;
use super::output::Output;
use super::peers::{PeerEvent, PeerLink};
use super::{PrimaryContext, PrimarySpec, Reply};
use crate::agent::primary::cut_thread::CutAnswer;
use crate::agent::primary::watch::{DomainWatch, Seen};
use crate::api::control::{GuestEvent, PrimaryStatus, Role};
use crate::api::types::{ApiError, VerifyReport};
use crate::capture::priority::Brisk;
use crate::hypervisor::HypervisorEvent;
use crate::output::News;

/// How long until a guest that could not be attached is tried again: soon at first (an agent that has just started has
/// no connection to libvirt yet), then twice as long each time.
const ATTACH_AGAIN_AFTER: Duration = Duration::from_millis(100);
const ATTACH_AGAIN_AFTER_MAX: Duration = Duration::from_secs(2);
/// After the end of a QEMU libvirt tidies up, some 200 ms and more on a busy host, before it tells why. One that was
/// killed is known to be before (`exit_watch`), where the kernel tells; this is for where it does not.
const REASON_WITHIN: Duration = Duration::from_millis(1_500);
/// One that ended with code 0 was asked to: nothing is taken over in a hurry.
const REASON_OF_CLEAN_END_WITHIN: Duration = Duration::from_secs(5);
/// The loop looks at its timers at least this often.
pub(super) const TICK: Duration = Duration::from_millis(50);
/// With an output gate the status is left for the heartbeat only so often.
const PUBLISH_EVERY: Duration = Duration::from_millis(20);

pub(super) enum Input {
    Update(PrimarySpec),
    Release,
    FinalCut {
        to: String,
        reply: Reply<(u64, u64)>,
    },
    UndoFinalCut {
        term: u64,
        reply: Reply<()>,
    },
    Verify(Reply<VerifyReport>),
    /// `generation` tells events of links that have been replaced.
    Peer {
        host: String,
        generation: u64,
        event: PeerEvent,
    },
    /// `attachment` tells answers and exits of an earlier attachment.
    Cut {
        attachment: u64,
        answer: CutAnswer,
    },
    Exited {
        attachment: u64,
        exit: Exit,
    },
    Libvirt(HypervisorEvent),
    /// `generation` tells news of earlier gates.
    Output {
        generation: u64,
        news: News,
    },
    /// There are frames on their way to the guest.
    Inbound,
}

/// Why the loop ended.
enum End {
    Released,
    GuestEnded {
        how: Option<&'static str>,
        detail: String,
    },
    /// Another host is primary with that term.
    Superseded(u64),
}

pub(super) struct Session {
    pub(super) context: Arc<PrimaryContext>,
    pub(super) spec: PrimarySpec,
    pub(super) inputs: Sender<Input>,
    status: Arc<Mutex<PrimaryStatus>>,
    capturing: Option<Capturing>,
    attachments: u64,
    attach_at: Instant,
    attach_again_after: Duration,
    problem: String,
    links: BTreeMap<String, Link>,
    generations: u64,
    watch: DomainWatch,
    /// QEMU has ended: until then libvirt may tell why.
    reason_by: Option<Instant>,
    /// Carried over attachments, so that epochs and totals only grow.
    pub(super) totals: super::capturing::Totals,
    pub(super) epochs: EpochNumbers,
    pub(super) output: Output,
    inbound: Inbound,
    publish_at: Instant,
    pub(super) disks: SessionDisks,
    /// Output waits for epochs: threads that they pass through hurry.
    hurries: Arc<AtomicBool>,
}

struct Link {
    generation: u64,
    addr: std::net::SocketAddr,
    link: PeerLink,
    connected: bool,
}

impl Link {
    /// Over a new connection: each begins with a Hello, of which it has one.
    fn start_over(&mut self) {
        self.connected = false;
        self.link.reset();
    }
}

impl Session {
    pub(super) fn new(
        context: Arc<PrimaryContext>,
        spec: PrimarySpec,
        inputs: Sender<Input>,
        status: Arc<Mutex<PrimaryStatus>>,
        wished: Arc<AtomicBool>,
    ) -> Self {
        let output = Output::new(&context, &spec.domain, &spec.uuid, spec.consistency, wished);
        let hurries = Arc::new(AtomicBool::new(spec.consistency.is_output_commit()));
        let epochs = EpochNumbers::open(&context.run_dir, &spec.uuid, spec.after_epoch);
        Self {
            context,
            spec,
            inputs,
            status,
            capturing: None,
            attachments: 0,
            attach_at: Instant::now(),
            attach_again_after: ATTACH_AGAIN_AFTER,
            problem: "attaching".into(),
            links: BTreeMap::new(),
            generations: 0,
            watch: DomainWatch::default(),
            reason_by: None,
            totals: Default::default(),
            epochs,
            output,
            inbound: Inbound::default(),
            publish_at: Instant::now(),
            disks: SessionDisks::default(),
            hurries,
        }
    }

    pub(super) fn run(mut self, received: &Receiver<Input>) {
        let uuid = self.spec.uuid.clone();
        let events = Mutex::new(self.inputs.clone());
        self.context.libvirt.listen(
            &uuid,
            Arc::new(move |event| {
                let _ = events.lock().unwrap_or_else(|p| p.into_inner()).send(Input::Libvirt(event.clone()));
            }),
        );
        tracing::info!(guest = self.spec.domain, term = self.spec.term, "protecting");
        let mut brisk = Brisk::this_thread();
        let end = loop {
            // Of an epoch that nobody waits for the guest shall feel as little as can be.
            brisk.look(self.hurries.load(Ordering::Relaxed));
            if let Some(end) = self.turn(received) {
                break end;
            }
        };
        self.context.libvirt.forget(&uuid);
        let last_epoch = self.epochs.last();
        self.output.end();
        if let Some(capturing) = self.capturing.take() {
            capturing.detach(&self.context, &uuid, matches!(end, End::Released));
        }
        // However it ended, no copy is held here any more; a later one must not be taken for it.
        forget_held(&self.context.run_dir, &uuid);
        let term = self.spec.term;
        match end {
            End::Released => {
                self.epochs.forget();
                tracing::info!(guest = self.spec.domain, "no longer protecting");
            }
            End::GuestEnded { how: Some(how), .. } => {
                tracing::info!(guest = self.spec.domain, how, "the guest ended");
                (self.context.report)(GuestEvent::Stopped { uuid, term, how: how.into() });
            }
            End::GuestEnded { how: None, detail } => {
                tracing::error!(guest = self.spec.domain, detail, "the guest died");
                (self.context.report)(GuestEvent::Died { uuid, term, detail, last_epoch });
            }
            End::Superseded(newer_term) => self.end_copy(newer_term),
        }
    }

    /// The one case in which we end a guest: two copies of it must not serve the same address.
    fn end_copy(&self, newer_term: u64) {
        let (uuid, guest, term) = (self.spec.uuid.clone(), &self.spec.domain, self.spec.term);
        tracing::error!(guest, term, newer_term, "another host runs this guest by now; ending the copy here");
        if let Err(error) = self.context.libvirt.lookup(&uuid).and_then(|domain| domain.destroy()) {
            tracing::error!(guest, %error, "cannot end it; use virsh destroy at once");
        }
        match self.context.records.set_role(&uuid, guest, newer_term, Role::Retired) {
            Ok(_) => {}
            Err(error) => tracing::error!(guest, %error, "cannot record that this host is retired"),
        }
        (self.context.report)(GuestEvent::Superseded { uuid, term, newer_term });
    }

    /// One turn of the loop: due timers, then one input.
    fn turn(&mut self, received: &Receiver<Input>) -> Option<End> {
        let now = Instant::now();
        if self.reason_by.is_some_and(|by| now >= by) {
            let how = self.watch.unexplained_end();
            return Some(End::GuestEnded { how, detail: "QEMU's process ended and libvirt told nothing".into() });
        }
        if self.capturing.is_none() && self.reason_by.is_none() && now >= self.attach_at {
            self.attach();
        }
        let on_hold = self.watch.on_hold(now);
        if let Some(capturing) = &mut self.capturing {
            let stopped_since = self.watch.stopped_since;
            capturing.cut_bound = self.output.cut_bound(self.context.watchdog);
            capturing.timers(now, on_hold, stopped_since);
        }
        if let Some(end) = self.after_step() {
            return Some(end);
        }
        let now = Instant::now();
        let wait = self.next_deadline(now).saturating_duration_since(now).min(TICK);
        match received.recv_timeout(wait) {
            Ok(input) => self.take(input),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(End::Released),
        }
    }

    fn next_deadline(&self, now: Instant) -> Instant {
        match (&self.capturing, self.reason_by) {
            (_, Some(reason_by)) => reason_by,
            (Some(capturing), None) => capturing.next_look_at(now),
            (None, None) => self.attach_at,
        }
    }

    fn take(&mut self, input: Input) -> Option<End> {
        match input {
            Input::Release => return Some(End::Released),
            Input::Update(spec) => self.update(spec),
            Input::FinalCut { to, reply } => match &mut self.capturing {
                Some(capturing) => capturing.begin_final_cut(&to, reply),
                None => drop(reply.send(Err(self.not_capturing()))),
            },
            Input::UndoFinalCut { term, reply } => {
                let outcome = match &mut self.capturing {
                    Some(capturing) => capturing.undo_final_cut(),
                    None => Ok(()),
                };
                if outcome.is_ok() {
                    self.set_term(term);
                }
                let _ = reply.send(outcome);
            }
            Input::Verify(reply) => match &mut self.capturing {
                Some(capturing) => capturing.begin_verify(reply),
                None => drop(reply.send(Err(self.not_capturing()))),
            },
            Input::Peer { host, generation, event } => self.peer(&host, generation, event),
            Input::Cut { attachment, answer } if attachment == self.attachments => {
                if let Some(capturing) = &mut self.capturing {
                    capturing.cut_answered(answer, &mut self.epochs);
                }
            }
            Input::Exited { attachment, exit } if attachment == self.attachments => {
                let within = if exit == Exit::Clean { REASON_OF_CLEAN_END_WITHIN } else { REASON_WITHIN };
                self.reason_by.get_or_insert_with(|| Instant::now() + within);
                // A QEMU that had said SHUTDOWN was asked to end, however it went in the end.
                if let (Exit::Died { status }, None) = (exit, self.watch.unexplained_end()) {
                    let detail = format!("QEMU was ended by somebody or something (wait status {status:#x})");
                    return Some(End::GuestEnded { how: None, detail });
                }
            }
            Input::Cut { .. } | Input::Exited { .. } => {}
            Input::Libvirt(event) => return self.libvirt(&event),
            Input::Output { generation, news } => self.output.news(generation, news),
            Input::Inbound => {
                let frames = self.inbound.take();
                if let Some(capturing) = &mut self.capturing {
                    capturing.inbound(frames);
                }
            }
        }
        self.after_step()
    }

    fn libvirt(&mut self, event: &HypervisorEvent) -> Option<End> {
        match (self.watch.see(event, Instant::now()), &mut self.capturing) {
            (Seen::Ended { how }, _) => {
                let detail = "libvirt reports that QEMU failed".to_owned();
                return Some(End::GuestEnded { how, detail });
            }
            (Seen::Devices, Some(capturing)) => {
                self.output.follow_nics();
                capturing.look_at_devices();
            }
            (Seen::Stop { at_us }, Some(capturing)) => capturing.guest_stopped(at_us),
            (Seen::Resume { at_us }, Some(capturing)) => capturing.guest_resumed(at_us),
            _ => {}
        }
        self.after_step()
    }

    fn not_capturing(&self) -> ApiError {
        ApiError::new(
            "unavailable",
            format!("guest {} is not captured on {}: {}", self.spec.domain, self.context.host, self.problem),
        )
    }

    fn update(&mut self, spec: PrimarySpec) {
        if spec.term > self.spec.term {
            self.set_term(spec.term);
        }
        (self.spec.interval, self.spec.budget) = (spec.interval, spec.budget);
        self.spec.mirror_mib = spec.mirror_mib;
        self.spec.consistency = spec.consistency;
        self.output.set(spec.consistency);
        self.hurries.store(spec.consistency.is_output_commit(), Ordering::Relaxed);
        self.spec.shadows = spec.shadows;
        if let Some(capturing) = &mut self.capturing {
            capturing.set_pace(self.spec.interval, self.spec.budget);
            capturing.source.set_mirror(mirror_budget(self.spec.mirror_mib));
        }
        self.sync_links();
    }

    /// A new term means new Hellos: all links start over.
    fn set_term(&mut self, term: u64) {
        if term != self.spec.term {
            self.spec.term = term;
            if let Some(capturing) = &mut self.capturing {
                capturing.set_term(term);
            }
            self.links.values_mut().for_each(Link::start_over);
        }
    }

    fn attach(&mut self) {
        self.attachments += 1;
        match Capturing::attach(self, self.attachments) {
            Ok(capturing) => {
                self.problem.clear();
                self.attach_again_after = ATTACH_AGAIN_AFTER;
                self.output.attached(&capturing.domain);
                self.capturing = Some(capturing);
                self.sync_links();
                for (host, link) in &self.links {
                    if link.connected
                        && let Some(capturing) = &mut self.capturing
                    {
                        capturing.peer(host, PeerEvent::Connected);
                    }
                }
            }
            Err(error) => {
                if self.problem != error {
                    tracing::warn!(guest = self.spec.domain, error, "cannot capture; trying again");
                }
                self.problem = error;
                self.attach_at = Instant::now() + self.attach_again_after;
                self.attach_again_after = (self.attach_again_after * 2).min(ATTACH_AGAIN_AFTER_MAX);
            }
        }
    }

    /// Links for exactly the shadows that are wanted.
    fn sync_links(&mut self) {
        let wanted: BTreeMap<_, _> = self.spec.shadows.iter().map(|s| (s.host.clone(), s.addr)).collect();
        let unwanted = |host: &String, link: &Link| wanted.get(host) != Some(&link.addr);
        let gone: Vec<String> =
            self.links.iter().filter(|(host, link)| unwanted(host, link)).map(|(host, _)| host.clone()).collect();
        for host in gone {
            self.links.remove(&host);
            if let Some(capturing) = &mut self.capturing {
                capturing.remove_peer(&host);
            }
        }
        for (host, addr) in wanted {
            if let Some(capturing) = &mut self.capturing {
                capturing.add_peer(&host);
            }
            if self.links.contains_key(&host) {
                continue;
            }
            self.generations += 1;
            let (generation, name) = (self.generations, host.clone());
            let inputs = Mutex::new(self.inputs.clone());
            let sink = Arc::new(move |event| {
                let input = Input::Peer { host: name.clone(), generation, event };
                let _ = inputs.lock().unwrap_or_else(|p| p.into_inner()).send(input);
            });
            match PeerLink::start(&self.context.security, &host, addr, Arc::clone(&self.hurries), sink) {
                Ok(link) => drop(self.links.insert(host, Link { generation, addr, link, connected: false })),
                Err(error) => tracing::error!(host, %error, "cannot start a connection"),
            }
        }
    }

    fn peer(&mut self, host: &str, generation: u64, event: PeerEvent) {
        let Some(link) = self.links.get_mut(host).filter(|link| link.generation == generation) else { return };
        match event {
            PeerEvent::Connected => link.connected = true,
            PeerEvent::Lost(_) => link.connected = false,
            _ => {}
        }
        if let Some(capturing) = &mut self.capturing {
            capturing.peer(host, event);
        }
    }

    /// Carries out what the step asked for, and leaves the status for the heartbeat.
    fn after_step(&mut self) -> Option<End> {
        if let Some(capturing) = &mut self.capturing {
            for (host, bytes) in std::mem::take(&mut capturing.out.outgoing) {
                if let Some(link) = self.links.get(&host) {
                    link.link.send(bytes);
                }
            }
            for host in std::mem::take(&mut capturing.out.closing) {
                if let Some(link) = self.links.get_mut(&host) {
                    link.start_over();
                }
            }
            if let Some(newer_term) = capturing.out.superseded.take() {
                return Some(End::Superseded(newer_term));
            }
            self.output.keep_gate(&self.context, &self.inputs);
            if let Some(nics) = self.output.changed_nics() {
                self.inbound.follow(&self.spec.domain, nics, &self.inputs);
            }
            let (cuts, now) = (capturing.take_cut_marks(), capturing.now());
            if let Some(at) = self.output.step(cuts, || capturing.source.peer_views(now)) {
                capturing.cut_by(at);
            }
            if let Some(trouble) = capturing.out.trouble.take() {
                tracing::warn!(guest = self.spec.domain, trouble, "attaching anew");
                self.problem = trouble;
                self.detach_for_retry();
            }
        }
        self.publish();
        None
    }

    fn detach_for_retry(&mut self) {
        if let Some(capturing) = self.capturing.take() {
            self.totals = capturing.totals();
            capturing.detach(&self.context, &self.spec.uuid, false);
        }
        // What is attached next begins with a Hello.
        self.links.values_mut().for_each(Link::start_over);
        self.attach_at = Instant::now() + TICK;
    }

    fn publish(&mut self) {
        // Cut on demand, a guest has hundreds of turns a second, and output waits for each.
        let now = Instant::now();
        if self.output.is_on() && self.capturing.is_some() && now < self.publish_at {
            return;
        }
        self.publish_at = now + PUBLISH_EVERY;
        let mut status = self.status.lock().unwrap_or_else(|p| p.into_inner());
        status.term = self.spec.term;
        let output = self.output.stats();
        match &mut self.capturing {
            Some(capturing) => capturing.fill(&mut status, self.epochs.last()),
            None => {
                status.problem.clone_from(&self.problem);
                status.peers.clear();
            }
        }
        status.stats.output = output;
    }
}

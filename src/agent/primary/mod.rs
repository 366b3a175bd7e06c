//! The primary's side of the agent: one session a protected guest.
//!
//! ```text
//!           +-- cut thread: capture::Cutter                 (orders down, answers up)
//! session --+-- peer links: reader and writer a shadow      (bytes down, messages up)
//!  (thread) +-- exit watch, libvirt's events                (up)
//!           +-- vmsync::Source: every decision about epochs and peers
//! ```
//! A session has one loop; everything that happens becomes an [`session::Input`] of it.

mod capturing;
mod cut_thread;
mod describe;
mod disks;
mod epochs;
mod exit_watch;
mod final_cut;
mod inbound;
mod outbox;
mod output;
mod pacing;
mod peers;
mod recorder;
mod report;
mod session;
mod watch;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::api::control::{GuestEvent, PrimaryStatus, ShadowTarget};
use crate::api::types::{ApiError, Budget, Consistency, VerifyReport};
use crate::config::TrackerChoice;
use crate::transport::Security;

use super::guards::GuardKeeper;
use super::libvirt::Libvirt;
use super::records::Records;
pub use final_cut::{forget_held, is_held};
use session::{Input, Session};

/// What shall be protected, and how; replaced as a whole by the manager's `Protect`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrimarySpec {
    pub uuid: String,
    pub domain: String,
    pub term: u64,
    pub interval: Duration,
    pub budget: Budget,
    /// Memory for previous contents of pages.
    pub mirror_mib: u64,
    pub consistency: Consistency,
    pub shadows: Vec<ShadowTarget>,
    /// Epoch that this host's copy was promoted from; numbers go on behind it.
    pub after_epoch: u64,
}

/// What a session shares with its agent.
pub struct PrimaryContext {
    pub security: Security,
    pub host: String,
    pub libvirt: Arc<Libvirt>,
    pub records: Arc<Records>,
    pub guards: Arc<GuardKeeper>,
    pub tracker: TrackerChoice,
    pub watchdog: Duration,
    pub run_dir: std::path::PathBuf,
    pub disk_dir: std::path::PathBuf,
    pub disk_copy_mib_per_s: u64,
    /// Where epochs are recorded, if at all.
    pub record_dir: Option<std::path::PathBuf>,
    /// Takes events for the manager; must not block.
    pub report: Arc<dyn Fn(GuestEvent) + Send + Sync>,
}

type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// Handle of a session.
pub struct Primary {
    inputs: Sender<Input>,
    status: Arc<Mutex<PrimaryStatus>>,
    thread: Option<std::thread::JoinHandle<()>>,
    /// Ended by the operator's wish: output that is held may leave.
    wished: Arc<AtomicBool>,
}

impl Primary {
    pub fn start(context: Arc<PrimaryContext>, spec: PrimarySpec) -> std::io::Result<Self> {
        let (inputs, received) = channel();
        let status = Arc::new(Mutex::new(PrimaryStatus {
            uuid: spec.uuid.clone(),
            term: spec.term,
            running: true,
            memory_bytes: 0,
            problem: "attaching".into(),
            stats: Default::default(),
            peers: Vec::new(),
        }));
        let wished = Arc::new(AtomicBool::new(false));
        let session = Session::new(context, spec, inputs.clone(), Arc::clone(&status), Arc::clone(&wished));
        let thread = std::thread::Builder::new().name("session".into()).spawn(move || session.run(&received))?;
        Ok(Self { inputs, status, thread: Some(thread), wished })
    }

    pub fn status(&self) -> PrimaryStatus {
        self.status.lock().unwrap_or_else(|p| p.into_inner()).clone()
    }

    pub fn update(&self, spec: PrimarySpec) {
        let _ = self.inputs.send(Input::Update(spec));
    }

    /// False once the guest ended: the session is over.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// For questions that take a while.
    pub fn asker(&self) -> Asker {
        Asker { inputs: self.inputs.clone() }
    }

    /// Ends the session: the guest runs on untouched. Waits until nothing of ours is attached to it.
    pub fn release(mut self) {
        self.wished.store(true, Ordering::Release);
        self.stop();
    }

    fn stop(&mut self) {
        let _ = self.inputs.send(Input::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Asks a session; independent of its handle.
pub struct Asker {
    inputs: Sender<Input>,
}

impl Asker {
    /// See [`crate::api::control::Command::FinalCut`]; the epoch, and how long the guest has stood still, microseconds.
    pub async fn final_cut(self, to: String) -> Result<(u64, u64), ApiError> {
        self.ask(|reply| Input::FinalCut { to, reply }).await
    }

    pub async fn undo_final_cut(self, term: u64) -> Result<(), ApiError> {
        self.ask(|reply| Input::UndoFinalCut { term, reply }).await
    }

    pub async fn verify(self) -> Result<VerifyReport, ApiError> {
        self.ask(Input::Verify).await
    }

    async fn ask<T>(self, input: impl FnOnce(Reply<T>) -> Input) -> Result<T, ApiError> {
        let ended = || ApiError::new("unavailable", "this guest is not protected here any more");
        let (reply, answer) = oneshot::channel();
        self.inputs.send(input(reply)).map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

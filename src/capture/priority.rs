//! Who runs first while a guest stands still: the agent's threads that it waits for, and QEMU's main thread, which
//! writes its state. Without the right to it (CAP_SYS_NICE), or where a control group gives no real-time share, all run
//! as others do, and pauses are longer on a busy host.
//!
//! QEMU's thread is preferred for the time of a cut only, by the guard, which outlives an agent that stopped or died
//! ([`super::guard`]); and while a promoted shadow loads its state, by the agent, whose successor takes it back. SCHED_RESET_ON_FORK keeps what the thread starts at the usual priority, and tells the policy we set
//! from one that an operator set.

use std::io;
use std::time::{Duration, Instant};

use nix::time::ClockId;

/// The lowest real-time priority: before everything usual, after everything else that is real-time.
const PRIORITY: libc::c_int = 1;
const OURS: libc::c_int = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;

/// Lets this thread run as soon as it can. It works for a millisecond at a time, and the guard bounds it.
pub fn hurry() {
    if let Err(error) = set(0, OURS, PRIORITY) {
        tracing::debug!(%error, "cuts run at the usual priority");
    }
}

/// Prefers thread `tid` until [`usual`]; a thread whose policy is not the usual one is left alone.
pub fn prefer(tid: libc::pid_t) {
    if policy(tid) == Some(libc::SCHED_OTHER) {
        let _ = set(tid, OURS, PRIORITY);
    }
}

/// Undoes [`prefer`], if that is what the thread has.
pub fn usual(tid: libc::pid_t) {
    if policy(tid) == Some(OURS) {
        let _ = set(tid, libc::SCHED_OTHER, 0);
    }
}

/// A thread that is preferred as long as this lives.
#[derive(Debug)]
pub struct Preferred(libc::pid_t);

impl Preferred {
    pub fn thread(tid: libc::pid_t) -> Self {
        prefer(tid);
        Self(tid)
    }

    pub fn this_thread() -> Self {
        // SAFETY: no arguments.
        Self::thread(unsafe { libc::gettid() })
    }
}

impl Drop for Preferred {
    fn drop(&mut self) {
        usual(self.0);
    }
}

/// A thread through which epochs, acknowledgements or guests' output pass: it hurries for up to a tenth of a processor, so
/// that what comes alone does not wait behind a guest, and beyond that works as others do, so that nobody starves.
#[derive(Debug)]
pub struct Brisk {
    window: Instant,
    cpu_before: Duration,
    hurries: bool,
}

const BRISK_WINDOW: Duration = Duration::from_millis(100);
const BRISK_CPU: Duration = Duration::from_millis(10);

impl Brisk {
    /// For the thread that calls.
    pub fn this_thread() -> Self {
        prefer(0);
        Self { window: Instant::now(), cpu_before: thread_cpu(), hurries: true }
    }

    /// To be called between two pieces of work.
    pub fn look(&mut self) {
        let (now, cpu) = (Instant::now(), thread_cpu());
        if now >= self.window + BRISK_WINDOW {
            (self.window, self.cpu_before) = (now, cpu);
            if !std::mem::replace(&mut self.hurries, true) {
                prefer(0);
            }
        } else if self.hurries && cpu.saturating_sub(self.cpu_before) > BRISK_CPU {
            self.hurries = false;
            usual(0);
        }
    }
}

/// Processor time of this thread so far.
pub fn thread_cpu() -> Duration {
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().map_or(Duration::ZERO, Duration::from)
}

fn policy(tid: libc::pid_t) -> Option<libc::c_int> {
    // SAFETY: an integer in, an integer out.
    let policy = unsafe { libc::sched_getscheduler(tid) };
    (policy >= 0).then_some(policy)
}

fn set(tid: libc::pid_t, policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameters are alive for the call.
    match unsafe { libc::sched_setscheduler(tid, policy, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preferred_thread_is_usual_again_and_others_are_left_alone() {
        std::thread::spawn(|| {
            // SAFETY: no arguments.
            let own = unsafe { libc::gettid() };
            usual(own);
            assert_eq!(policy(own), Some(libc::SCHED_OTHER));
            prefer(own);
            if policy(own) == Some(libc::SCHED_OTHER) {
                eprintln!("no right to real-time priority here");
                return;
            }
            assert_eq!(policy(own), Some(OURS));
            usual(own);
            assert_eq!(policy(own), Some(libc::SCHED_OTHER));
            set(own, libc::SCHED_BATCH, 0).unwrap();
            prefer(own);
            usual(own);
            assert_eq!(policy(own), Some(libc::SCHED_BATCH), "an operator's choice");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_brisk_thread_hurries_for_a_tenth_of_a_processor() {
        std::thread::spawn(|| {
            let mut brisk = Brisk::this_thread();
            brisk.look();
            assert!(brisk.hurries);
            brisk.cpu_before = Duration::ZERO;
            brisk.window = Instant::now() + BRISK_WINDOW;
            while thread_cpu() <= BRISK_CPU {}
            brisk.look();
            assert!(!brisk.hurries);
            // SAFETY: no arguments.
            assert_eq!(policy(unsafe { libc::gettid() }), Some(libc::SCHED_OTHER));
            brisk.window -= 2 * BRISK_WINDOW;
            brisk.look();
            assert!(brisk.hurries);
        })
        .join()
        .unwrap();
    }
}

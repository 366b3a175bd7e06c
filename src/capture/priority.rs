//! Who runs first while a guest stands still: the agent's threads that it waits for, and QEMU's main thread, which
//! writes its state. Without the right to it (CAP_SYS_NICE), or where a control group gives no real-time share, all run
//! as others do, and pauses are longer on a busy host; so does all of an agent whose configuration says so ([`forbid`]).
//!
//! QEMU's thread is preferred for the time of a cut only, by the guard, which outlives an agent that stopped or died
//! ([`super::guard`]); and while a promoted shadow loads its state, by the agent, whose successor takes it back. SCHED_RESET_ON_FORK keeps what the thread starts at the usual priority, and tells the policy we set
//! from one that an operator set.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::time::ClockId;

/// The lowest real-time priority: before everything usual, after everything else that is real-time.
const PRIORITY: libc::c_int = 1;
const OURS: libc::c_int = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;

/// Whether this process may prefer any thread.
static ALLOWED: AtomicBool = AtomicBool::new(true);

/// From now on this process, and those that it starts as its companions, prefer no thread; for a process that has preferred
/// none yet.
pub fn forbid() {
    ALLOWED.store(false, Ordering::Relaxed);
}

pub fn is_allowed() -> bool {
    ALLOWED.load(Ordering::Relaxed)
}

/// Lets this thread run as soon as it can. It works for a millisecond at a time, and the guard bounds it.
pub fn hurry() {
    if !is_allowed() {
        return;
    }
    if let Err(error) = set(0, OURS, PRIORITY) {
        tracing::debug!(%error, "cuts run at the usual priority");
    }
}

/// Prefers thread `tid` until [`usual`]; a thread whose policy is not the usual one is left alone.
pub fn prefer(tid: libc::pid_t) {
    if is_allowed() && policy(tid) == Some(libc::SCHED_OTHER) {
        let _ = set(tid, OURS, PRIORITY);
    }
}

/// Undoes [`prefer`], if that is what the thread has, whoever did it.
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

/// A thread through which epochs, acknowledgements or guests' output pass while somebody waits for them: it hurries for up
/// to a tenth of a processor, so that what comes alone does not wait behind a guest; beyond that it works as others do, so
/// that nobody starves. A shadow's host does not know whether somebody waits: there a thread hurries for half a
/// millisecond at a stretch, which is what an epoch takes that is cut for waiting output.
#[derive(Debug)]
pub struct Brisk {
    window: Instant,
    cpu_before: Duration,
    /// When this was last asked, and processor time then and when this stretch of work began.
    looked: Instant,
    cpu: Duration,
    stretch: Duration,
    at_a_stretch: Duration,
    hurries: bool,
}

const BRISK_WINDOW: Duration = Duration::from_millis(100);
const BRISK_CPU: Duration = Duration::from_millis(10);
const BRISK_STRETCH: Duration = Duration::from_micros(500);
/// A thread that did not run for so long between two looks has waited: what it does now is another stretch.
const WAITED: Duration = Duration::from_micros(200);

impl Brisk {
    /// For the thread that calls, which is told whether somebody waits.
    pub fn this_thread() -> Self {
        let (now, cpu) = (Instant::now(), thread_cpu());
        Self { window: now, cpu_before: cpu, looked: now, cpu, stretch: cpu, at_a_stretch: BRISK_CPU, hurries: false }
    }

    /// For the thread that calls, which does not know it.
    pub fn for_all_there_is() -> Self {
        Self { at_a_stretch: BRISK_STRETCH, ..Self::this_thread() }
    }

    /// To be called between two pieces of work. `wanted`: somebody waits for what passes.
    pub fn look(&mut self, wanted: bool) {
        let hurries = self.may_hurry(wanted, Instant::now(), thread_cpu());
        if std::mem::replace(&mut self.hurries, hurries) != hurries {
            if hurries { prefer(0) } else { usual(0) }
        }
    }

    fn may_hurry(&mut self, wanted: bool, now: Instant, cpu: Duration) -> bool {
        let (looked, cpu_then) = (std::mem::replace(&mut self.looked, now), std::mem::replace(&mut self.cpu, cpu));
        if now >= looked + cpu.saturating_sub(cpu_then) + WAITED {
            self.stretch = cpu_then;
        }
        if now >= self.window + BRISK_WINDOW {
            (self.window, self.cpu_before) = (now, cpu);
        }
        let worked = |since: Duration| cpu.saturating_sub(since);
        wanted && worked(self.cpu_before) <= BRISK_CPU && worked(self.stretch) <= self.at_a_stretch
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
    fn a_brisk_thread_hurries_for_a_tenth_of_a_processor_and_never_for_long() {
        let mut brisk = Brisk::for_all_there_is();
        let (start, us) = (brisk.looked, Duration::from_micros);
        let (mut now, mut cpu) = (start, brisk.cpu);
        // How long it waited, then worked; and whether it may hurry then.
        let mut step = |waited, worked, wanted| {
            now += us(waited) + us(worked);
            cpu += us(worked);
            brisk.may_hurry(wanted, now, cpu)
        };
        assert!(step(0, 300, true) && step(100, 200, true), "half a millisecond");
        assert!(!step(0, 10, true), "and no more, without a wait");
        assert!(!step(150, 10, true), "which is not the moment that another took");
        assert!(step(1_000, 10, true), "a new stretch");
        assert!(!step(1_000, 10, false), "nobody waits");
        let hurried = (0..60).filter(|_| step(1_000, 400, true)).count();
        assert!((20..=26).contains(&hurried), "a tenth of a processor: {hurried}");
        assert!(step(100_000, 100, true), "another tenth of a second");
    }

    #[test]
    fn a_brisk_thread_has_the_priority_that_it_says() {
        std::thread::spawn(|| {
            // SAFETY: no arguments.
            let own = unsafe { libc::gettid() };
            let mut brisk = Brisk::this_thread();
            brisk.look(true);
            if policy(own) == Some(libc::SCHED_OTHER) {
                eprintln!("no right to real-time priority here");
                return;
            }
            assert_eq!(policy(own), Some(OURS));
            brisk.look(false);
            assert_eq!(policy(own), Some(libc::SCHED_OTHER));
        })
        .join()
        .unwrap();
    }
}

//! What the examples share: threads to lend to the planner, and what the kernel says of time and memory.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, reason = "examples act; the crate they show does not")]

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use placement::solver::{Task, Workers};

/// So many threads, the caller's among them.
pub struct Threads {
    count: usize,
    /// CPU time of threads that have ended.
    spent_ns: AtomicU64,
}

impl Threads {
    pub fn new(count: usize) -> Self {
        Self { count, spent_ns: AtomicU64::new(0) }
    }

    /// CPU time of the calling thread and of all that were started here.
    pub fn cpu(&self) -> Duration {
        Duration::from_nanos(own_cpu_ns() + self.spent_ns.load(Ordering::Relaxed))
    }
}

impl Workers for Threads {
    fn run(&self, tasks: Vec<Task<'_>>) {
        let helpers = self.count.min(tasks.len()).saturating_sub(1);
        let queue = Mutex::new(tasks.into_iter());
        let next = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
        let work = || {
            while let Some(task) = next() {
                task();
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|| {
                    work();
                    self.spent_ns.fetch_add(own_cpu_ns(), Ordering::Relaxed);
                });
            }
            work();
        });
    }
}

/// CPU time of this thread; 0 where the kernel does not tell.
fn own_cpu_ns() -> u64 {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

/// Most memory this process ever had, MiB; 0 where the kernel does not tell.
pub fn peak_memory_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|kib| kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) / 1024
}

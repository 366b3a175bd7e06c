//! Threads that share the work for which a guest stands still: finding its written pages, copying them.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::priority;

/// More would wait for memory, not for processors.
const CREW_MAX: usize = 16;

/// Threads that each take a part of a job. They wait while there is none, and end with this handle.
pub struct Crew<Part, Done> {
    workers: Vec<Worker<Part, Done>>,
}

struct Worker<Part, Done> {
    parts: SyncSender<Part>,
    done: Receiver<Done>,
}

/// Nobody: all is done by the caller.
impl<Part, Done> Default for Crew<Part, Done> {
    fn default() -> Self {
        Self { workers: Vec::new() }
    }
}

/// A thread of the crew ended, by a panic: what its part would have brought is not known.
#[derive(Debug, thiserror::Error)]
#[error("a thread that works for the cut has ended")]
pub struct Lost;

/// How many threads a job of `bytes` is worth, if each is to have `least_bytes` or more.
pub fn worth(bytes: u64, least_bytes: u64) -> usize {
    usize::try_from(bytes / least_bytes).unwrap_or(usize::MAX).max(1)
}

/// The same, as far as this host has processors. Not while a guest stands still: their number is read from files.
pub fn hands_for(bytes: u64, least_bytes: u64) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    worth(bytes, least_bytes).min(processors.min(CREW_MAX))
}

impl<Part: Send + 'static, Done: Send + 'static> Crew<Part, Done> {
    /// One thread for each of `works`, which does a part.
    pub fn start<Work>(name: &str, works: impl IntoIterator<Item = Work>) -> std::io::Result<Self>
    where
        Work: FnMut(Part) -> Done + Send + 'static,
    {
        let start = |mut work: Work| {
            let (parts, orders) = sync_channel::<Part>(1);
            let (results, done) = sync_channel(1);
            std::thread::Builder::new().name(name.into()).spawn(move || {
                priority::hurry();
                while let Ok(part) = orders.recv() {
                    if results.send(work(part)).is_err() {
                        break;
                    }
                }
            })?;
            Ok(Worker { parts, done })
        };
        Ok(Self { workers: works.into_iter().map(start).collect::<std::io::Result<_>>()? })
    }

    /// Threads besides the caller's.
    pub fn len(&self) -> usize {
        self.workers.len()
    }

    /// Does all `parts`, at most one more than there are threads: the first on this thread, by `own`. In their order.
    pub fn run(&mut self, parts: Vec<Part>, own: impl FnOnce(Part) -> Done) -> Vec<Result<Done, Lost>> {
        assert!(parts.len() <= self.workers.len() + 1, "{} parts for {} threads", parts.len(), self.workers.len());
        let mut parts = parts.into_iter();
        let Some(first) = parts.next() else { return Vec::new() };
        let sent: Vec<bool> = parts.zip(&self.workers).map(|(part, worker)| worker.parts.send(part).is_ok()).collect();
        let mut done = vec![Ok(own(first))];
        let answers = sent.into_iter().zip(&self.workers);
        done.extend(answers.map(|(sent, worker)| if sent { worker.done.recv().map_err(|_| Lost) } else { Err(Lost) }));
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_back_in_order_and_a_lost_thread_is_told() {
        let work = |part: u32| if part == 13 { panic!("unlucky") } else { part * 2 };
        let mut crew = Crew::start("test", [work, work]).unwrap();
        let done = |crew: &mut Crew<u32, u32>, parts: &[u32]| {
            crew.run(parts.to_vec(), |part| part * 2).into_iter().map(Result::ok).collect::<Vec<_>>()
        };
        assert_eq!(done(&mut crew, &[1, 2, 3]), [Some(2), Some(4), Some(6)]);
        assert_eq!(done(&mut crew, &[5]), [Some(10)]);
        assert_eq!(done(&mut crew, &[]), []);
        assert_eq!(done(&mut crew, &[1, 13, 3]), [Some(2), None, Some(6)]);
        assert_eq!(done(&mut crew, &[1, 2, 3]), [Some(2), None, Some(6)], "and every time from then on");
    }

    #[test]
    fn small_jobs_are_not_shared() {
        assert_eq!(hands_for(100, 200), 1);
        assert!((1..=CREW_MAX).contains(&hands_for(u64::MAX, 1)));
    }
}

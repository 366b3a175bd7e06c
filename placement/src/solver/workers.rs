//! Who does the work: this crate starts no threads, it is lent some.

/// A piece of work. Pieces handed over together share nothing that matters for their results.
pub type Task<'t> = Box<dyn FnOnce() + Send + 't>;

/// Runs tasks, side by side or one after the other: the plan is the same.
pub trait Workers {
    /// Returns when all are done.
    fn run(&self, tasks: Vec<Task<'_>>);
}

/// The caller's own thread.
pub struct OneByOne;

impl Workers for OneByOne {
    fn run(&self, tasks: Vec<Task<'_>>) {
        for task in tasks {
            task();
        }
    }
}

/// Runs `work` on each of `items` and gives back the results in their order.
pub(super) fn map<T: Send, R: Send>(workers: &dyn Workers, items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let work = &work;
    let tasks = items
        .into_iter()
        .zip(&mut results)
        .map(|(item, result)| -> Task<'_> { Box::new(move || *result = Some(work(item))) });
    workers.run(tasks.collect());
    results.into_iter().flatten().collect()
}

//! The thread that cuts one guest: nothing else runs on it, so a cut never waits for encoding or the network.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use vmsync::batch::PageBatch;
use vmsync::page_set::PageSet;

use crate::capture::cutter::{Captured, CutError, Cutter};
use crate::capture::guard::Guard;
use crate::capture::priority;

/// What the thread can be told.
enum Order {
    Prepare,
    Cut { extras: PageSet, bound: Duration, spent: PageBatch },
    Collect,
    SetGuard(Arc<Guard>),
}

/// What it answers.
pub enum CutAnswer {
    /// One part of the tracker's preparation was done; true: it is ready.
    Prepared(Result<bool, CutError>),
    Cut(Box<Result<Captured, CutError>>),
    /// Written pages only, and when.
    Collected(Result<(PageSet, Instant), CutError>),
}

/// Handle of the thread; dropped, the thread ends after the order it works on, and the cutter with it.
pub struct CutThread {
    orders: Sender<Order>,
}

impl CutThread {
    pub fn start(mut cutter: Cutter, answer: impl Fn(CutAnswer) + Send + 'static) -> std::io::Result<Self> {
        let (orders, received): (Sender<Order>, Receiver<Order>) = channel();
        std::thread::Builder::new().name("cutter".into()).spawn(move || {
            priority::hurry();
            while let Ok(order) = received.recv() {
                match order {
                    Order::Prepare => answer(CutAnswer::Prepared(cutter.prepare())),
                    Order::Cut { extras, bound, spent } => {
                        cutter.give_back(spent);
                        answer(CutAnswer::Cut(Box::new(cutter.cut(&extras, bound))));
                    }
                    Order::Collect => answer(CutAnswer::Collected(cutter.collect())),
                    Order::SetGuard(guard) => cutter.set_guard(guard),
                }
                // A guard that is lost fails the next order as well.
                let _ = cutter.finish();
            }
        })?;
        Ok(Self { orders })
    }

    // The thread ends only with this handle (or by a panic, after which the guard has let the guest go): a failed
    // send shows as an answer that never comes, which the session bounds.

    pub fn prepare(&self) {
        let _ = self.orders.send(Order::Prepare);
    }

    /// `bound`: for this cut, instead of the usual one. `spent`: pages of a former one that are needed no longer.
    pub fn cut(&self, extras: PageSet, bound: Duration, spent: PageBatch) {
        let _ = self.orders.send(Order::Cut { extras, bound, spent });
    }

    pub fn collect(&self) {
        let _ = self.orders.send(Order::Collect);
    }

    pub fn set_guard(&self, guard: Arc<Guard>) {
        let _ = self.orders.send(Order::SetGuard(guard));
    }
}

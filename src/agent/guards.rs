//! Keeps one guard process alive for the agent.

use std::sync::{Arc, Mutex};

use crate::capture::guard::{Guard, GuardError};

/// Hands out the guard, a new one when the old one died or stopped answering.
#[derive(Default)]
pub struct GuardKeeper {
    current: Mutex<Option<Arc<Guard>>>,
}

impl GuardKeeper {
    pub fn get(&self) -> Result<Arc<Guard>, GuardError> {
        let mut current = self.current.lock().unwrap_or_else(|p| p.into_inner());
        if let Some(guard) = current.as_ref().filter(|guard| guard.is_alive()) {
            return Ok(Arc::clone(guard));
        }
        let guard = Arc::new(Guard::start()?);
        tracing::info!(pid = guard.pid(), "guard process started");
        *current = Some(Arc::clone(&guard));
        Ok(guard)
    }
}

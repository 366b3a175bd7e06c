//! Numbers of epochs: they only grow, also over restarts of the agent, so that of two shadows the one with the
//! higher epoch is always the newer one.

use std::fs;
use std::path::{Path, PathBuf};

/// Numbers reserved at a time: so many epochs pass between two writes of the file.
const RESERVED_AT_ONCE: u64 = 1000;

/// Hands out the numbers of one guest's epochs. What the file says has been reserved; a restarted agent goes on
/// behind it. The file is lost with the host's memory, as the guest is.
#[derive(Debug)]
pub struct EpochNumbers {
    path: PathBuf,
    last: u64,
    reserved: u64,
}

impl EpochNumbers {
    /// Goes on after `after` (the epoch this host's copy was promoted from) and after what the file says.
    pub fn open(run_dir: &Path, uuid: &str, after: u64) -> Self {
        let path = run_dir.join("epochs").join(uuid);
        let reserved = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let last = after.max(reserved);
        Self { path, last, reserved: last }
    }

    pub fn last(&self) -> u64 {
        self.last
    }

    pub fn next(&mut self) -> u64 {
        self.last += 1;
        if self.last > self.reserved {
            self.reserved = self.last + RESERVED_AT_ONCE;
            let written = fs::create_dir_all(self.path.parent().unwrap_or(Path::new("/")))
                .and_then(|()| fs::write(&self.path, self.reserved.to_string()));
            if let Err(error) = written {
                // Only a restart of the agent at this very time would count some numbers twice.
                tracing::warn!(path = %self.path.display(), %error, "cannot reserve epoch numbers");
            }
        }
        self.last
    }

    /// The guest is no longer protected here.
    pub fn forget(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_only_grow_whatever_happens_to_the_agent() {
        let dir = std::env::temp_dir().join(format!("virt-shadow-epochs-{}", std::process::id()));
        let mut numbers = EpochNumbers::open(&dir, "a", 0);
        let first: Vec<u64> = (0..1500).map(|_| numbers.next()).collect();
        assert_eq!(first, (1..=1500).collect::<Vec<_>>());
        let mut restarted = EpochNumbers::open(&dir, "a", 7);
        assert!(restarted.next() > 1500);
        assert_eq!(EpochNumbers::open(&dir, "b", 41).next(), 42);
        restarted.forget();
        assert_eq!(EpochNumbers::open(&dir, "a", 0).next(), 1);
        fs::remove_dir_all(&dir).unwrap();
    }
}

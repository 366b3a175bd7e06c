//! Compares each guest's shadows with it every now and then, without anybody asking: what lies in a shadow's memory and on its
//! disks is not looked at otherwise until it is needed.
//!
//! Each guest has a moment of its own in each period, which does not depend on when the manager was started. One guest
//! at a time, and so much pause behind each that comparing takes a twentieth of the time at most.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::Manager;

/// How often guests are looked at; in short periods more often.
const LOOK_EVERY: Duration = Duration::from_secs(30);
const LOOKS_A_PERIOD: u32 = 20;
/// Pause behind a comparison, times what it took.
const PAUSE: u32 = 19;

/// Whose turn it is.
#[derive(Debug, Default)]
struct Turns {
    /// Number of the period in which each guest had its turn, or in which it was first seen.
    seen: BTreeMap<String, u64>,
    due: VecDeque<String>,
}

impl Turns {
    /// Takes note of the guests there are at `now`, time since 1970.
    fn look(&mut self, guests: &[String], now: Duration, period: Duration) {
        self.seen.retain(|guest, _| guests.contains(guest));
        self.due.retain(|guest| guests.contains(guest));
        for guest in guests {
            let number = (now + moment_of(guest, period)).as_millis() / period.as_millis().max(1);
            let number = u64::try_from(number).unwrap_or(u64::MAX);
            let before = self.seen.insert(guest.clone(), number);
            if before.is_some_and(|before| before != number) && !self.due.contains(guest) {
                self.due.push_back(guest.clone());
            }
        }
    }
}

/// How long before the end of a period a guest has its turn.
fn moment_of(guest: &str, period: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    guest.hash(&mut hasher);
    Duration::from_millis(hasher.finish() % u64::try_from(period.as_millis()).unwrap_or(u64::MAX).max(1))
}

/// Until `shutdown`.
pub(super) async fn run(manager: Manager, period: Duration, mut shutdown: watch::Receiver<bool>) {
    let look_every = LOOK_EVERY.min(period / LOOKS_A_PERIOD);
    let mut turns = Turns::default();
    let mut pause = look_every;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
        pause = look_every;
        let known = manager.read(|state| state.guest_views().into_iter().map(|view| view.uuid).collect::<Vec<_>>());
        let Ok(guests) = known.await else { continue };
        turns.look(&guests, SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), period);
        let Some(guest) = turns.due.pop_front() else { continue };
        let began = Instant::now();
        // What differs is not promoted from then on, and told, as when an operator asks.
        match manager.verify(&guest).await {
            Ok(report) => tracing::info!(guest, %report, "compared a guest's shadows with it"),
            // Not protected at the moment, or busy with a move.
            Err(error) => {
                tracing::debug!(guest, error = error.message, "its shadows are compared later");
                turns.due.push_back(guest);
            }
        }
        pause = look_every.max(began.elapsed() * PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guest_has_one_turn_a_period_and_they_are_spread() {
        let guests: Vec<String> = (0..40).map(|number| format!("guest-{number}")).collect();
        let period = Duration::from_secs(86_400);
        let mut turns = Turns::default();
        let (mut had, mut most) = (BTreeMap::<String, u32>::new(), 0);
        // Two days, looked at every half an hour; begun in the middle of nowhere.
        for look in 0..=96 {
            turns.look(&guests, Duration::from_secs(1_700_000_123 + look * 1_800), period);
            most = most.max(turns.due.len());
            turns.due.drain(..).for_each(|guest| *had.entry(guest).or_default() += 1);
        }
        assert!(had.len() == 40 && had.values().all(|times| *times == 2), "{had:?}");
        assert!(most < 10, "{most} at once");
        turns.look(&guests[..1], Duration::from_secs(1_800_000_000), period);
        assert!(turns.seen.len() == 1 && turns.due.len() <= 1);
    }
}

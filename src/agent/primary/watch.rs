//! What the guest and its operators do, told from libvirt's and QEMU's events.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::hypervisor::{HypervisorEvent, Lifecycle, Stopped};

/// Cuts start again this long after a migration, save or snapshot ended: QEMU may abort when one meets its end.
const QUIET_AFTER_MIGRATION: Duration = Duration::from_millis(500);
/// A guest that stays paused this long after our last cut, without an operator's doing, was left so by accident.
pub(super) const STUCK_AFTER: Duration = Duration::from_millis(300);

/// What an event means for the session.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Nothing,
    /// Devices may have come or gone, or the definition changed: look at them and at the RAM blocks again.
    Devices,
    /// QEMU stopped or started its vCPUs, at its own time, microseconds.
    Stop {
        at_us: u64,
    },
    Resume {
        at_us: u64,
    },
    /// The domain ended, on purpose (`how`) or not (`None`).
    Ended {
        how: Option<&'static str>,
    },
}

/// Remembers what events tell.
#[derive(Debug, Default)]
pub(super) struct DomainWatch {
    /// No cuts until then, because of a migration, save or snapshot; `None` inside `Some`: until it ends.
    hold: Option<Option<Instant>>,
    /// QEMU said SHUTDOWN: its end is no accident.
    shutting_down: bool,
    /// Since when the vCPUs stand still, as QEMU told.
    pub(super) stopped_since: Option<Instant>,
}

impl DomainWatch {
    pub(super) fn see(&mut self, event: &HypervisorEvent, now: Instant) -> Seen {
        match event {
            HypervisorEvent::Monitor { event, time_us, details, .. } => self.monitor(event, *time_us, details, now),
            HypervisorEvent::DeviceAdded { .. } | HypervisorEvent::DeviceRemoved { .. } => Seen::Devices,
            // The shadows keep the persistent definition too, for the day they are promoted.
            HypervisorEvent::Lifecycle { event: Lifecycle::Defined | Lifecycle::Undefined, .. } => Seen::Devices,
            HypervisorEvent::Lifecycle { event: Lifecycle::Stopped(stopped), .. } => {
                Seen::Ended { how: self.reason(*stopped) }
            }
            _ => Seen::Nothing,
        }
    }

    fn monitor(&mut self, event: &str, at_us: u64, details: &Value, now: Instant) -> Seen {
        match event {
            "STOP" => {
                self.stopped_since = Some(now);
                Seen::Stop { at_us }
            }
            "RESUME" => {
                self.stopped_since = None;
                Seen::Resume { at_us }
            }
            "MIGRATION" => {
                match details.get("status").and_then(Value::as_str) {
                    Some("completed" | "failed" | "cancelled" | "none") => {
                        self.hold = Some(Some(now + QUIET_AFTER_MIGRATION));
                    }
                    Some(_) => self.hold = Some(None),
                    None => {}
                }
                Seen::Nothing
            }
            "SHUTDOWN" => {
                self.shutting_down = true;
                Seen::Nothing
            }
            "ACPI_DEVICE_OST" | "DEVICE_DELETED" => Seen::Devices,
            _ => Seen::Nothing,
        }
    }

    /// Whether cuts must wait: a migration, save or snapshot is under way or has just ended.
    pub(super) fn on_hold(&mut self, now: Instant) -> bool {
        if self.hold.is_some_and(|until| until.is_some_and(|until| until <= now)) {
            self.hold = None;
        }
        self.hold.is_some()
    }

    /// The end of QEMU's process, when libvirt told nothing about it.
    pub(super) fn unexplained_end(&self) -> Option<&'static str> {
        self.shutting_down.then_some("shutdown")
    }

    fn reason(&self, stopped: Stopped) -> Option<&'static str> {
        match stopped {
            Stopped::Shutdown => Some("shutdown"),
            Stopped::Destroyed => Some("destroyed"),
            Stopped::Migrated => Some("migrated"),
            Stopped::Saved => Some("saved"),
            Stopped::FromSnapshot => Some("reverted"),
            // The guest's own kernel gave up and the definition says to end it: its shadow would do the same.
            Stopped::Crashed => Some("crashed"),
            Stopped::Failed | Stopped::Other(_) => self.unexplained_end(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor(event: &str, status: &str) -> HypervisorEvent {
        HypervisorEvent::Monitor {
            uuid: String::new(),
            name: String::new(),
            event: event.into(),
            time_us: 7,
            details: serde_json::json!({ "status": status }),
        }
    }

    fn stopped(stopped: Stopped) -> HypervisorEvent {
        HypervisorEvent::Lifecycle { uuid: String::new(), name: String::new(), event: Lifecycle::Stopped(stopped) }
    }

    #[test]
    fn cuts_wait_from_a_migrations_setup_until_a_while_after_its_end() {
        let (mut watch, now) = (DomainWatch::default(), Instant::now());
        assert!(!watch.on_hold(now));
        watch.see(&monitor("MIGRATION", "setup"), now);
        assert!(watch.on_hold(now + Duration::from_secs(3600)));
        watch.see(&monitor("MIGRATION", "failed"), now);
        assert!(watch.on_hold(now + Duration::from_millis(499)));
        assert!(!watch.on_hold(now + Duration::from_millis(500)));
    }

    #[test]
    fn only_an_end_that_nobody_asked_for_is_a_death() {
        let now = Instant::now();
        let mut watch = DomainWatch::default();
        assert_eq!(watch.see(&stopped(Stopped::Failed), now), Seen::Ended { how: None });
        assert_eq!(watch.see(&stopped(Stopped::Destroyed), now), Seen::Ended { how: Some("destroyed") });
        assert_eq!(watch.see(&stopped(Stopped::Saved), now), Seen::Ended { how: Some("saved") });
        watch.see(&monitor("SHUTDOWN", ""), now);
        assert_eq!(watch.see(&stopped(Stopped::Failed), now), Seen::Ended { how: Some("shutdown") });
    }
}

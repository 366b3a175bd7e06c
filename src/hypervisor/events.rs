//! What libvirt and QEMU tell us unasked, as values.

use std::sync::Arc;

use virt::sys;

/// Called on the event-loop thread: it must return at once and must not call libvirt. Send into a channel.
pub type EventSink = Arc<dyn Fn(HypervisorEvent) + Send + Sync>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HypervisorEvent {
    Lifecycle {
        uuid: String,
        name: String,
        event: Lifecycle,
    },
    DeviceAdded {
        uuid: String,
        alias: String,
    },
    DeviceRemoved {
        uuid: String,
        alias: String,
    },
    /// An event of QEMU's own monitor (`STOP`, `RESUME`, `MIGRATION`, `RESET`, `SHUTDOWN`, `BALLOON_CHANGE`,
    /// `ACPI_DEVICE_OST`, `DEVICE_DELETED`...) with QEMU's time of it, microseconds since 1970.
    Monitor {
        uuid: String,
        name: String,
        event: String,
        time_us: u64,
        details: serde_json::Value,
    },
    /// The connection is gone and will not come back; `reason` says why.
    Disconnected {
        reason: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    Defined,
    Undefined,
    Started(Started),
    Suspended(Suspended),
    Resumed(Resumed),
    Stopped(Stopped),
    /// The guest has finished its shutdown; `Stopped` follows when QEMU ends.
    ShuttingDown,
    PmSuspended,
    /// The guest's kernel reported a panic.
    GuestPanicked,
    Unknown {
        event: i32,
        detail: i32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    Booted,
    Migrated,
    Restored,
    FromSnapshot,
    Wakeup,
    Other(i32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspended {
    /// By an operator or an application, or by one of our cuts: the event alone cannot tell them apart.
    Paused,
    Migrated,
    IoError,
    Watchdog,
    Restored,
    FromSnapshot,
    ApiError,
    Postcopy,
    PostcopyFailed,
    GuestShutdown,
    Other(i32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resumed {
    Unpaused,
    Migrated,
    FromSnapshot,
    Postcopy,
    PostcopyFailed,
    Other(i32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    Shutdown,
    Destroyed,
    /// QEMU's process died by itself.
    Crashed,
    Migrated,
    Saved,
    Failed,
    FromSnapshot,
    Other(i32),
}

impl Lifecycle {
    /// From libvirt's virDomainEventType and its detail; numbers of a newer libvirt are kept as they are.
    pub(super) fn from_raw(event: i32, detail: i32) -> Self {
        let (Ok(kind), Ok(d)) = (u32::try_from(event), u32::try_from(detail)) else {
            return Self::Unknown { event, detail };
        };
        match kind {
            sys::VIR_DOMAIN_EVENT_DEFINED => Self::Defined,
            sys::VIR_DOMAIN_EVENT_UNDEFINED => Self::Undefined,
            sys::VIR_DOMAIN_EVENT_STARTED => Self::Started(match d {
                sys::VIR_DOMAIN_EVENT_STARTED_BOOTED => Started::Booted,
                sys::VIR_DOMAIN_EVENT_STARTED_MIGRATED => Started::Migrated,
                sys::VIR_DOMAIN_EVENT_STARTED_RESTORED => Started::Restored,
                sys::VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT => Started::FromSnapshot,
                sys::VIR_DOMAIN_EVENT_STARTED_WAKEUP => Started::Wakeup,
                _ => Started::Other(detail),
            }),
            sys::VIR_DOMAIN_EVENT_SUSPENDED => Self::Suspended(match d {
                sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED => Suspended::Paused,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED => Suspended::Migrated,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR => Suspended::IoError,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_WATCHDOG => Suspended::Watchdog,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_RESTORED => Suspended::Restored,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_FROM_SNAPSHOT => Suspended::FromSnapshot,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_API_ERROR => Suspended::ApiError,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY => Suspended::Postcopy,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY_FAILED => Suspended::PostcopyFailed,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_GUEST_SHUTDOWN => Suspended::GuestShutdown,
                _ => Suspended::Other(detail),
            }),
            sys::VIR_DOMAIN_EVENT_RESUMED => Self::Resumed(match d {
                sys::VIR_DOMAIN_EVENT_RESUMED_UNPAUSED => Resumed::Unpaused,
                sys::VIR_DOMAIN_EVENT_RESUMED_MIGRATED => Resumed::Migrated,
                sys::VIR_DOMAIN_EVENT_RESUMED_FROM_SNAPSHOT => Resumed::FromSnapshot,
                sys::VIR_DOMAIN_EVENT_RESUMED_POSTCOPY => Resumed::Postcopy,
                sys::VIR_DOMAIN_EVENT_RESUMED_POSTCOPY_FAILED => Resumed::PostcopyFailed,
                _ => Resumed::Other(detail),
            }),
            sys::VIR_DOMAIN_EVENT_STOPPED => Self::Stopped(match d {
                sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => Stopped::Shutdown,
                sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED => Stopped::Destroyed,
                sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED => Stopped::Crashed,
                sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED => Stopped::Migrated,
                sys::VIR_DOMAIN_EVENT_STOPPED_SAVED => Stopped::Saved,
                sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => Stopped::Failed,
                sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT => Stopped::FromSnapshot,
                _ => Stopped::Other(detail),
            }),
            sys::VIR_DOMAIN_EVENT_SHUTDOWN => Self::ShuttingDown,
            sys::VIR_DOMAIN_EVENT_PMSUSPENDED => Self::PmSuspended,
            sys::VIR_DOMAIN_EVENT_CRASHED => Self::GuestPanicked,
            _ => Self::Unknown { event, detail },
        }
    }
}

/// virConnectCloseReason in words.
pub(super) fn close_reason(reason: i32) -> String {
    match u32::try_from(reason) {
        Ok(sys::VIR_CONNECT_CLOSE_REASON_ERROR) => "input or output error on the connection".into(),
        Ok(sys::VIR_CONNECT_CLOSE_REASON_EOF) => "libvirtd closed the connection or ended".into(),
        Ok(sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE) => "libvirtd did not answer keepalives".into(),
        Ok(sys::VIR_CONNECT_CLOSE_REASON_CLIENT) => "closed by this program".into(),
        _ => format!("unknown reason {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_of_a_stop_are_told_apart() {
        assert_eq!(Lifecycle::from_raw(5, 0), Lifecycle::Stopped(Stopped::Shutdown));
        assert_eq!(Lifecycle::from_raw(5, 2), Lifecycle::Stopped(Stopped::Crashed));
        assert_eq!(Lifecycle::from_raw(5, 4), Lifecycle::Stopped(Stopped::Saved));
        assert_eq!(Lifecycle::from_raw(5, 99), Lifecycle::Stopped(Stopped::Other(99)));
        assert_eq!(Lifecycle::from_raw(77, 1), Lifecycle::Unknown { event: 77, detail: 1 });
        assert_eq!(Lifecycle::from_raw(-1, 0), Lifecycle::Unknown { event: -1, detail: 0 });
    }
}

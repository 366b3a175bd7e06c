//! libvirt calls that the `virt` crate does not wrap: events, the close callback, monitor commands with files.
//!
//! Rules of this module: every pointer handed to libvirt outlives the call or is owned by it through its free
//! callback; no panic leaves a callback; nothing but owned Rust values leaves this file.

use std::ffi::{CStr, CString, c_char, c_int, c_longlong, c_uint, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::OnceLock;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::sys;

use super::HypervisorError;
use super::events::{EventSink, HypervisorEvent, Lifecycle, close_reason};

/// Registers libvirt's default event loop and runs it on a thread of its own; once in a process, before the first
/// connection. libvirt's habit of printing every error is switched off.
pub(super) fn start_event_loop() -> Result<(), HypervisorError> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        virt::error::clear_error_callback();
        virt::event::event_register_default_impl().map_err(|error| error.message().to_owned())?;
        std::thread::Builder::new()
            .name("libvirt-events".into())
            .spawn(|| {
                loop {
                    if virt::event::event_run_default_impl().is_err() {
                        // Happens only when poll itself fails; going round at full speed would help nobody.
                        std::thread::sleep(std::time::Duration::from_millis(20));
                    }
                }
            })
            .map(drop)
            .map_err(|error| error.to_string())
    });
    started.clone().map_err(|message| HypervisorError::Libvirt {
        action: "start libvirt's event loop".into(),
        code: sys::VIR_ERR_INTERNAL_ERROR,
        origin: sys::VIR_FROM_EVENT,
        message,
    })
}

/// What has been registered on one connection; undone by [`Registrations::remove`].
#[derive(Default)]
pub(super) struct Registrations {
    domain_events: Vec<c_int>,
    monitor_events: Vec<c_int>,
    close: bool,
}

impl Registrations {
    /// Registers `sink` for everything in [`HypervisorEvent`]. What was registered before a failure is in `self`.
    pub(super) fn add(&mut self, connect: &Connect, sink: &EventSink) -> Result<(), HypervisorError> {
        self.add_close(connect, sink)?;
        // SAFETY: libvirt declares every domain event's callback as the generic type and calls it back with the
        // signature that belongs to the event number, which is the one each of these functions has.
        let callbacks: [(c_uint, sys::virConnectDomainEventGenericCallback); 3] = unsafe {
            [
                (
                    sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                    Some(std::mem::transmute::<LifecycleCallback, GenericCallback>(on_lifecycle)),
                ),
                (
                    sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
                    Some(std::mem::transmute::<DeviceCallback, GenericCallback>(on_device_added)),
                ),
                (
                    sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
                    Some(std::mem::transmute::<DeviceCallback, GenericCallback>(on_device_removed)),
                ),
            ]
        };
        for (event, callback) in callbacks {
            let opaque = leak_sink(sink);
            // SAFETY: the connection is open; a null domain means all domains; `opaque` is owned by libvirt from
            // here on and comes back through `free_sink`.
            let id = unsafe {
                sys::virConnectDomainEventRegisterAny(
                    connect.as_ptr(),
                    ptr::null_mut(),
                    event as c_int,
                    callback,
                    opaque,
                    Some(free_sink),
                )
            };
            self.domain_events.push(registered(id, opaque, "watch the domains' lifecycle and devices")?);
        }
        let opaque = leak_sink(sink);
        // SAFETY: as above; a null event name means all of QEMU's events.
        let id = unsafe {
            sys::virConnectDomainQemuMonitorEventRegister(
                connect.as_ptr(),
                ptr::null_mut(),
                ptr::null(),
                Some(on_monitor),
                opaque,
                Some(free_sink),
                0,
            )
        };
        self.monitor_events.push(registered(id, opaque, "watch QEMU's monitor events")?);
        Ok(())
    }

    fn add_close(&mut self, connect: &Connect, sink: &EventSink) -> Result<(), HypervisorError> {
        let opaque = leak_sink(sink);
        // SAFETY: the connection is open and `opaque` is owned by libvirt until it calls `free_sink`.
        let result =
            unsafe { sys::virConnectRegisterCloseCallback(connect.as_ptr(), Some(on_close), opaque, Some(free_sink)) };
        registered(result, opaque, "watch the connection")?;
        self.close = true;
        Ok(())
    }

    /// Undoes everything. libvirt may still be inside a callback; it frees the sink when that has returned.
    pub(super) fn remove(&mut self, connect: &Connect) {
        // SAFETY: the connection is still referenced, and each number came from the matching registration. A
        // failure (a connection that is gone) leaves nothing to do.
        unsafe {
            for id in self.domain_events.drain(..) {
                sys::virConnectDomainEventDeregisterAny(connect.as_ptr(), id);
            }
            for id in self.monitor_events.drain(..) {
                sys::virConnectDomainQemuMonitorEventDeregister(connect.as_ptr(), id);
            }
            if std::mem::take(&mut self.close) {
                sys::virConnectUnregisterCloseCallback(connect.as_ptr(), Some(on_close));
            }
        }
    }
}

type GenericCallback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
type LifecycleCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
type DeviceCallback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);

fn registered(id: c_int, opaque: *mut c_void, action: &str) -> Result<c_int, HypervisorError> {
    if id >= 0 {
        return Ok(id);
    }
    let error = HypervisorError::last(action);
    // SAFETY: registration failed, so libvirt has not taken `opaque`, which came from `leak_sink`.
    unsafe { free_sink(opaque) };
    Err(error)
}

fn leak_sink(sink: &EventSink) -> *mut c_void {
    Box::into_raw(Box::new(sink.clone())).cast()
}

unsafe extern "C" fn free_sink(opaque: *mut c_void) {
    // SAFETY: `opaque` came from `leak_sink` and libvirt gives it back once.
    drop(unsafe { Box::from_raw(opaque.cast::<EventSink>()) });
}

/// Hands `event` to the sink; a panic in there ends here, because unwinding into C is not defined.
///
/// # Safety
/// `opaque` came from `leak_sink` and is still registered.
unsafe fn deliver(opaque: *mut c_void, event: HypervisorEvent) {
    // SAFETY: see above.
    let sink = unsafe { &*opaque.cast::<EventSink>() };
    if catch_unwind(AssertUnwindSafe(|| sink(event))).is_err() {
        tracing::error!("a receiver of libvirt events panicked; the event is lost");
    }
}

/// UUID and name of the domain of a callback.
///
/// # Safety
/// `dom` is valid for the length of the callback.
unsafe fn identity(dom: sys::virDomainPtr) -> Option<(String, String)> {
    let mut uuid: [c_char; 37] = [0; 37];
    // SAFETY: both calls only read the object; the buffer has libvirt's VIR_UUID_STRING_BUFLEN.
    unsafe {
        if sys::virDomainGetUUIDString(dom, uuid.as_mut_ptr()) < 0 {
            return None;
        }
        Some((text(uuid.as_ptr())?, text(sys::virDomainGetName(dom))?))
    }
}

/// # Safety
/// `chars` is null or a string that ends with NUL.
unsafe fn text(chars: *const c_char) -> Option<String> {
    if chars.is_null() {
        return None;
    }
    // SAFETY: see above.
    Some(unsafe { CStr::from_ptr(chars) }.to_string_lossy().into_owned())
}

unsafe extern "C" fn on_lifecycle(
    _connect: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a valid domain and the opaque of the registration.
    unsafe {
        if let Some((uuid, name)) = identity(dom) {
            let event = Lifecycle::from_raw(event, detail);
            deliver(opaque, HypervisorEvent::Lifecycle { uuid, name, event });
        }
    }
    0
}

unsafe extern "C" fn on_device_added(
    _connect: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_lifecycle`; the alias is a C string for the length of the callback.
    unsafe {
        if let (Some((uuid, _)), Some(alias)) = (identity(dom), text(alias)) {
            deliver(opaque, HypervisorEvent::DeviceAdded { uuid, alias });
        }
    }
}

unsafe extern "C" fn on_device_removed(
    _connect: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_device_added`.
    unsafe {
        if let (Some((uuid, _)), Some(alias)) = (identity(dom), text(alias)) {
            deliver(opaque, HypervisorEvent::DeviceRemoved { uuid, alias });
        }
    }
}

unsafe extern "C" fn on_monitor(
    _connect: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    event: *const c_char,
    seconds: c_longlong,
    micros: c_uint,
    details: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_lifecycle`; event and details are C strings (details may be null).
    unsafe {
        let (Some((uuid, name)), Some(event)) = (identity(dom), text(event)) else { return };
        let details = text(details).and_then(|json| serde_json::from_str(&json).ok()).unwrap_or_default();
        let time_us = u64::try_from(seconds).unwrap_or(0).saturating_mul(1_000_000).saturating_add(micros.into());
        deliver(opaque, HypervisorEvent::Monitor { uuid, name, event, time_us, details });
    }
}

unsafe extern "C" fn on_close(_connect: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt passes the opaque of the registration.
    unsafe { deliver(opaque, HypervisorEvent::Disconnected { reason: close_reason(reason) }) };
}

/// State and reason as libvirt's numbers. (`virt`'s own call loses the error.)
pub(super) fn domain_state(domain: &Domain) -> Result<(i32, i32), HypervisorError> {
    let (mut state, mut reason) = (0, 0);
    // SAFETY: the domain object is referenced by `domain`; both results are written before return.
    if unsafe { sys::virDomainGetState(domain.as_ptr(), &mut state, &mut reason, 0) } < 0 {
        return Err(HypervisorError::last("read the domain's state"));
    }
    Ok((state, reason))
}

/// Whether a job (migration, save, dump, backup...) is under way.
pub(super) fn job_running(domain: &Domain) -> Result<bool, HypervisorError> {
    // SAFETY: the structure is plain numbers, for which all zero is a value.
    let mut info: sys::virDomainJobInfo = unsafe { std::mem::zeroed() };
    // SAFETY: the domain object is referenced by `domain`; `info` lives until the call returns.
    if unsafe { sys::virDomainGetJobInfo(domain.as_ptr(), &mut info) } < 0 {
        return Err(HypervisorError::last("ask for the domain's job"));
    }
    Ok(info.type_ != sys::VIR_DOMAIN_JOB_NONE as c_int)
}

/// A block job as libvirt tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockJob {
    pub done: u64,
    pub all: u64,
}

impl BlockJob {
    /// A copy that is ready keeps up with the disk. libvirt shows both equal only then.
    pub fn is_ready(self) -> bool {
        self.all > 0 && self.done == self.all
    }

    pub fn percent(self) -> u64 {
        self.done.saturating_mul(100).checked_div(self.all).unwrap_or(0).min(99)
    }
}

/// Begins to copy a disk to the one of `xml`, which exists; every write of the guest goes to both before it completes.
pub(super) fn mirror_disk(domain: &Domain, disk: &CStr, xml: &CStr) -> Result<(), HypervisorError> {
    let flags = sys::VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
        | sys::VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        | sys::VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES;
    // SAFETY: the domain is referenced by `domain`; both strings outlive the call; there are no parameters.
    let result =
        unsafe { sys::virDomainBlockCopy(domain.as_ptr(), disk.as_ptr(), xml.as_ptr(), ptr::null_mut(), 0, flags) };
    if result < 0 { Err(HypervisorError::last("mirror a disk")) } else { Ok(()) }
}

/// The job on a disk, if there is one.
pub(super) fn block_job(domain: &Domain, disk: &CStr) -> Result<Option<BlockJob>, HypervisorError> {
    // SAFETY: the structure is plain numbers, for which all zero is a value.
    let mut info: sys::virDomainBlockJobInfo = unsafe { std::mem::zeroed() };
    // SAFETY: the domain is referenced by `domain`; string and structure outlive the call.
    match unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &mut info, 0) } {
        0 => Ok(None),
        1.. => Ok(Some(BlockJob { done: info.cur, all: info.end })),
        _ => Err(HypervisorError::last("ask for a disk's job")),
    }
}

/// Ends the job on a disk; the guest goes on with the disk it has.
pub(super) fn abort_block_job(domain: &Domain, disk: &CStr) -> Result<(), HypervisorError> {
    // SAFETY: the domain is referenced by `domain`; the string outlives the call.
    let result = unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), 0) };
    if result < 0 { Err(HypervisorError::last("end a disk's job")) } else { Ok(()) }
}

pub(super) fn limit_block_job(domain: &Domain, disk: &CStr, bytes_per_s: u64) -> Result<(), HypervisorError> {
    let flags = sys::VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES;
    // SAFETY: the domain is referenced by `domain`; the string outlives the call.
    let result = unsafe { sys::virDomainBlockJobSetSpeed(domain.as_ptr(), disk.as_ptr(), bytes_per_s, flags) };
    if result < 0 { Err(HypervisorError::last("limit a disk's job")) } else { Ok(()) }
}

/// A QMP command that carries descriptors to QEMU; the caller keeps its own.
pub(super) fn monitor_command_with_files(
    domain: &Domain,
    command: &CStr,
    files: &[BorrowedFd<'_>],
) -> Result<String, HypervisorError> {
    let mut in_files: Vec<c_int> = files.iter().map(|fd| fd.as_raw_fd()).collect();
    let count = c_uint::try_from(in_files.len()).unwrap_or(c_uint::MAX);
    let mut reply: *mut c_char = ptr::null_mut();
    // SAFETY: all pointers outlive the call; descriptors are borrowed for its length; no output files are asked for
    // (null is allowed for both); `reply` is only read when the call succeeded.
    let result = unsafe {
        sys::virDomainQemuMonitorCommandWithFiles(
            domain.as_ptr(),
            command.as_ptr(),
            count,
            in_files.as_mut_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            &mut reply,
            sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT,
        )
    };
    if result < 0 {
        return Err(HypervisorError::last("send a monitor command with descriptors"));
    }
    // SAFETY: libvirt returned a C string that the caller has to free with free(3).
    unsafe {
        let text = text(reply).unwrap_or_default();
        libc::free(reply.cast());
        Ok(text)
    }
}

/// `text` for C, or the error that names what it was for.
pub(super) fn c_string(text: &str, action: &str) -> Result<CString, HypervisorError> {
    CString::new(text).map_err(|_| HypervisorError::NulByte { action: action.to_owned() })
}

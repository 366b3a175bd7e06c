//! One domain of a connection: state, definition, monitor.

use std::os::fd::BorrowedFd;

use serde_json::Value;
use virt::sys;

use super::process::QemuProcess;
use super::ramblock::{self, RamBlock};
use super::{HypervisorError, Result, ffi};

/// Reason of [`DomainState::Paused`] when QEMU stopped by itself, which is how libvirt sees our cuts.
pub const PAUSED_UNKNOWN: i32 = sys::VIR_DOMAIN_PAUSED_UNKNOWN as i32;
/// Reason of [`DomainState::Paused`] when an operator or application asked for it.
pub const PAUSED_BY_USER: i32 = sys::VIR_DOMAIN_PAUSED_USER as i32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    NoState,
    Running,
    Blocked,
    Paused,
    ShuttingDown,
    ShutOff,
    Crashed,
    PmSuspended,
    Unknown(i32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XmlKind {
    /// As it runs, with runtime details and secrets.
    Live,
    /// The persistent definition, with secrets.
    Inactive,
    /// As it runs, in the form libvirt itself sends to another host, with secrets.
    Migratable,
}

/// A domain, held by reference: valid as long as its connection, also while the domain is shut off.
#[derive(Debug, Clone)]
pub struct Domain {
    inner: virt::domain::Domain,
    name: String,
    uuid: String,
}

impl Domain {
    pub(super) fn new(inner: virt::domain::Domain) -> Result<Self> {
        let name = inner.name().map_err(|error| HypervisorError::from_virt("read a domain's name", &error))?;
        let uuid = inner.uuid_string().map_err(|error| HypervisorError::from_virt("read a domain's UUID", &error))?;
        Ok(Self { inner, name, uuid })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// In libvirt's form: lower case with dashes.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// libvirt's number of the running domain; none while it is shut off. May be old: it is read when the handle is
    /// made and updated by some calls only.
    pub fn id(&self) -> Option<u32> {
        self.inner.id()
    }

    /// State and libvirt's number of the reason ([`PAUSED_UNKNOWN`], [`PAUSED_BY_USER`]...).
    pub fn state(&self) -> Result<(DomainState, i32)> {
        let (state, reason) = ffi::domain_state(&self.inner).map_err(|error| self.named(error))?;
        let state = match u32::try_from(state) {
            Ok(sys::VIR_DOMAIN_NOSTATE) => DomainState::NoState,
            Ok(sys::VIR_DOMAIN_RUNNING) => DomainState::Running,
            Ok(sys::VIR_DOMAIN_BLOCKED) => DomainState::Blocked,
            Ok(sys::VIR_DOMAIN_PAUSED) => DomainState::Paused,
            Ok(sys::VIR_DOMAIN_SHUTDOWN) => DomainState::ShuttingDown,
            Ok(sys::VIR_DOMAIN_SHUTOFF) => DomainState::ShutOff,
            Ok(sys::VIR_DOMAIN_CRASHED) => DomainState::Crashed,
            Ok(sys::VIR_DOMAIN_PMSUSPENDED) => DomainState::PmSuspended,
            _ => DomainState::Unknown(state),
        };
        Ok((state, reason))
    }

    pub fn is_active(&self) -> Result<bool> {
        self.inner.is_active().map_err(|error| self.failed("ask whether it is active", &error))
    }

    pub fn is_persistent(&self) -> Result<bool> {
        self.inner.is_persistent().map_err(|error| self.failed("ask whether it is persistent", &error))
    }

    pub fn xml(&self, kind: XmlKind) -> Result<String> {
        let flags = sys::VIR_DOMAIN_XML_SECURE
            | match kind {
                XmlKind::Live => 0,
                XmlKind::Inactive => sys::VIR_DOMAIN_XML_INACTIVE,
                XmlKind::Migratable => sys::VIR_DOMAIN_XML_MIGRATABLE,
            };
        self.inner.xml_desc(flags).map_err(|error| self.failed("read its definition", &error))
    }

    pub fn suspend(&self) -> Result<()> {
        self.inner.suspend().map_err(|error| self.failed("suspend it", &error)).map(drop)
    }

    pub fn resume(&self) -> Result<()> {
        self.inner.resume().map_err(|error| self.failed("resume it", &error)).map(drop)
    }

    /// Ends QEMU at once.
    pub fn destroy(&self) -> Result<()> {
        self.inner.destroy().map_err(|error| self.failed("destroy it", &error)).map(drop)
    }

    /// Removes the persistent definition, keeping NVRAM and leaving a running domain transient.
    pub fn undefine(&self) -> Result<()> {
        let flags = sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM;
        self.inner.undefine_flags(flags).map_err(|error| self.failed("undefine it", &error)).map(drop)
    }

    /// Whether a libvirt job (migration, save, dump, backup...) is under way.
    pub fn job_running(&self) -> Result<bool> {
        ffi::job_running(&self.inner).map_err(|error| self.named(error))
    }

    pub fn attach_device_live(&self, xml: &str) -> Result<()> {
        ffi::c_string(xml, "attach a device")?;
        let flags = sys::VIR_DOMAIN_AFFECT_LIVE;
        self.inner.attach_device_flags(xml, flags).map_err(|error| self.failed("attach a device", &error)).map(drop)
    }

    /// Asks the guest to give the device up; [`super::HypervisorEvent::DeviceRemoved`] follows when it has.
    pub fn detach_device_live(&self, xml: &str) -> Result<()> {
        ffi::c_string(xml, "detach a device")?;
        let flags = sys::VIR_DOMAIN_AFFECT_LIVE;
        self.inner.detach_device_flags(xml, flags).map_err(|error| self.failed("detach a device", &error)).map(drop)
    }

    /// Keeps `xml` (one element) with the domain under the namespace `uri`, written with prefix `key`; `None` takes
    /// it away. Goes to the running and to the persistent definition, whichever exist.
    pub fn set_metadata(&self, uri: &str, key: &str, xml: Option<&str>) -> Result<()> {
        for text in [uri, key, xml.unwrap_or_default()] {
            ffi::c_string(text, "set metadata")?;
        }
        let mut flags = 0;
        if self.is_active()? {
            flags |= sys::VIR_DOMAIN_AFFECT_LIVE;
        }
        if self.is_persistent()? {
            flags |= sys::VIR_DOMAIN_AFFECT_CONFIG;
        }
        let kind = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;
        self.inner
            .set_metadata(kind, xml, Some(key), Some(uri), flags)
            .map_err(|error| self.failed("set its metadata", &error))
            .map(drop)
    }

    /// The element kept under the namespace `uri`, if any.
    pub fn metadata(&self, uri: &str) -> Result<Option<String>> {
        ffi::c_string(uri, "read metadata")?;
        match self.inner.metadata(sys::VIR_DOMAIN_METADATA_ELEMENT as i32, Some(uri), 0) {
            Ok(xml) => Ok(Some(xml)),
            Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN_METADATA => Ok(None),
            Err(error) => Err(self.failed("read its metadata", &error)),
        }
    }

    /// Mirrors a disk (by its target, such as `vda`) to the existing one that `xml` describes, from now on
    /// synchronously; what it holds is copied meanwhile.
    pub fn mirror_disk(&self, target: &str, xml: &str) -> Result<()> {
        let (disk, xml) = (ffi::c_string(target, "mirror a disk")?, ffi::c_string(xml, "mirror a disk")?);
        ffi::mirror_disk(&self.inner, &disk, &xml).map_err(|error| self.named(error))
    }

    pub fn block_job(&self, target: &str) -> Result<Option<ffi::BlockJob>> {
        let disk = ffi::c_string(target, "ask for a disk's job")?;
        ffi::block_job(&self.inner, &disk).map_err(|error| self.named(error))
    }

    pub fn abort_block_job(&self, target: &str) -> Result<()> {
        let disk = ffi::c_string(target, "end a disk's job")?;
        ffi::abort_block_job(&self.inner, &disk).map_err(|error| self.named(error))
    }

    pub fn limit_block_job(&self, target: &str, bytes_per_s: u64) -> Result<()> {
        let disk = ffi::c_string(target, "limit a disk's job")?;
        ffi::limit_block_job(&self.inner, &disk, bytes_per_s).map_err(|error| self.named(error))
    }

    /// Size of a disk as the guest sees it.
    pub fn disk_bytes(&self, target: &str) -> Result<u64> {
        ffi::c_string(target, "ask for a disk's size")?;
        let info = self.inner.block_info(target, 0).map_err(|error| self.failed("ask for a disk's size", &error))?;
        Ok(info.capacity)
    }

    /// Sends one QMP command, given as JSON text (`{"execute": ...}`); returns what stands under `return`.
    pub fn qmp(&self, command: &str) -> Result<Value> {
        ffi::c_string(command, "send a monitor command")?;
        let reply = self
            .inner
            .qemu_monitor_command(command, sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)
            .map_err(|error| self.failed("send it a monitor command", &error))?;
        self.parse_reply(command, &reply)
    }

    /// [`Domain::qmp`] from a command's name and arguments (`Value::Null`: none).
    pub fn qmp_call(&self, execute: &str, arguments: Value) -> Result<Value> {
        self.qmp(&qmp_text(execute, arguments))
    }

    /// [`Domain::qmp`] with descriptors for QEMU (`getfd`, `add-fd`); the caller's own stay open.
    pub fn qmp_with_files(&self, command: &str, files: &[BorrowedFd<'_>]) -> Result<Value> {
        let text = ffi::c_string(command, "send a monitor command")?;
        let reply = ffi::monitor_command_with_files(&self.inner, &text, files).map_err(|error| self.named(error))?;
        self.parse_reply(command, &reply)
    }

    /// Sends a command of the human monitor and returns its text.
    pub fn hmp(&self, command: &str) -> Result<String> {
        ffi::c_string(command, "send a monitor command")?;
        self.inner
            .qemu_monitor_command(command, sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
            .map_err(|error| self.failed("send it a monitor command", &error))
    }

    /// QEMU's RAM blocks (`info ramblock`), in QEMU's order.
    pub fn ram_blocks(&self) -> Result<Vec<RamBlock>> {
        let text = self.hmp("info ramblock")?;
        ramblock::parse(&text).map_err(|source| HypervisorError::Ramblock { domain: self.name.clone(), source })
    }

    /// Why QEMU itself says that the guest's state cannot leave it (`query-migrate`: blocked-reasons).
    pub fn migration_blockers(&self) -> Result<Vec<String>> {
        let reply = self.qmp_call("query-migrate", Value::Null)?;
        let reasons = reply.get("blocked-reasons").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(reasons.iter().filter_map(Value::as_str).map(str::to_owned).collect())
    }

    /// QEMU's run state (`running`, `paused`, `inmigrate`, `finish-migrate`...).
    pub fn run_state(&self) -> Result<String> {
        let reply = self.qmp_call("query-status", Value::Null)?;
        match reply.get("status").and_then(Value::as_str) {
            Some(status) => Ok(status.to_owned()),
            None => Err(self.reply_error("query-status", format!("no status in {reply}"))),
        }
    }

    /// The QEMU process of this domain, found by its own threads and checked by its command line. Needs the process
    /// to be in this program's PID namespace.
    pub fn process(&self) -> Result<QemuProcess> {
        let cpus = self.qmp_call("query-cpus-fast", Value::Null)?;
        let thread = cpus.get(0).and_then(|cpu| cpu.get("thread-id")).and_then(Value::as_i64);
        let thread = thread.and_then(|id| i32::try_from(id).ok()).filter(|id| *id > 0);
        let thread = thread.ok_or_else(|| self.reply_error("query-cpus-fast", format!("no thread-id in {cpus}")))?;
        QemuProcess::of_thread(thread, &self.uuid)
            .map_err(|reason| HypervisorError::Process { domain: self.name.clone(), reason })
    }

    /// PID of QEMU; see [`Domain::process`].
    pub fn pid(&self) -> Result<i32> {
        Ok(self.process()?.pid)
    }

    fn parse_reply(&self, command: &str, reply: &str) -> Result<Value> {
        let mut value: Value = serde_json::from_str(reply)
            .map_err(|error| self.reply_error(&command_name(command), format!("not JSON: {error}")))?;
        if let Some(error) = value.get("error") {
            let field = |name| error.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            return Err(HypervisorError::Monitor {
                domain: self.name.clone(),
                command: command_name(command),
                class: field("class"),
                desc: field("desc"),
            });
        }
        match value.get_mut("return") {
            Some(result) => Ok(result.take()),
            None => Err(self.reply_error(&command_name(command), "neither return nor error".into())),
        }
    }

    fn reply_error(&self, command: &str, reason: String) -> HypervisorError {
        HypervisorError::MonitorReply { domain: self.name.clone(), command: command.to_owned(), reason }
    }

    fn failed(&self, action: &str, error: &virt::error::Error) -> HypervisorError {
        self.named(HypervisorError::from_virt(action, error))
    }

    /// Puts the domain's name into an error made where it was not known.
    fn named(&self, error: HypervisorError) -> HypervisorError {
        match error {
            HypervisorError::Libvirt { code, .. } if code == sys::VIR_ERR_NO_DOMAIN => {
                HypervisorError::NotFound { domain: self.name.clone() }
            }
            HypervisorError::Libvirt { action, code, origin, message } => {
                HypervisorError::Libvirt { action: format!("{action} (domain {})", self.name), code, origin, message }
            }
            other => other,
        }
    }
}

/// JSON text of a QMP command.
pub(crate) fn qmp_text(execute: &str, arguments: Value) -> String {
    let mut command = serde_json::Map::new();
    command.insert("execute".into(), execute.into());
    if !arguments.is_null() {
        command.insert("arguments".into(), arguments);
    }
    Value::Object(command).to_string()
}

fn command_name(command: &str) -> String {
    let parsed: Option<Value> = serde_json::from_str(command).ok();
    let name = parsed.as_ref().and_then(|value| value.get("execute")).and_then(Value::as_str);
    name.unwrap_or("a malformed command").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_built_with_and_without_arguments() {
        assert_eq!(qmp_text("stop", Value::Null), r#"{"execute":"stop"}"#);
        let text = qmp_text("getfd", serde_json::json!({"fdname": "a"}));
        assert_eq!(text, r#"{"arguments":{"fdname":"a"},"execute":"getfd"}"#);
        assert_eq!(command_name(&text), "getfd");
        assert_eq!(command_name("{"), "a malformed command");
    }

    #[test]
    fn replies_of_qemu_become_values_or_typed_errors() {
        let domain = crate::hypervisor::Hypervisor::connect("test:///default").unwrap().lookup("test").unwrap();
        let parse = |reply: &str| domain.parse_reply(r#"{"execute":"cont"}"#, reply);
        assert_eq!(parse(r#"{"return":{"a":1},"id":"libvirt-9"}"#).unwrap(), serde_json::json!({"a": 1}));
        let error =
            parse(r#"{"id":"x","error":{"class":"CommandNotFound","desc":"The command cont has not been found"}}"#)
                .unwrap_err();
        assert!(error.is_command_not_found(), "{error}");
        assert!(error.to_string().contains("QEMU of test refused cont: The command"), "{error}");
        assert!(matches!(parse("{}"), Err(HypervisorError::MonitorReply { .. })));
        assert!(matches!(parse("nonsense"), Err(HypervisorError::MonitorReply { .. })));
    }
}

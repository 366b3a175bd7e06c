//! One connection to a libvirtd.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use virt::connect::Connect;
use virt::sys;

use super::events::EventSink;
use super::ffi::{self, Registrations};
use super::{Domain, HypervisorError, Result, xml};

/// Interval of libvirt's keepalive messages, seconds, and how many may go unanswered before the connection counts
/// as gone. A libvirtd busy for a moment must not look dead; one that hangs must not block us for long.
const KEEPALIVE_INTERVAL_S: i32 = 1;
const KEEPALIVE_COUNT: u32 = 4;

/// A connection; cheap to share, safe to use from many threads at once.
pub struct Hypervisor {
    connect: Connect,
    uri: String,
    registrations: Mutex<Registrations>,
}

impl Hypervisor {
    /// Connects to `uri`, such as `qemu:///system`. Starts libvirt's event loop if this is the first connection.
    pub fn connect(uri: &str) -> Result<Arc<Self>> {
        ffi::start_event_loop()?;
        ffi::c_string(uri, "connect to libvirt")?;
        let connect = Connect::open(Some(uri)).map_err(|error| HypervisorError::NotConnected {
            uri: uri.to_owned(),
            message: error.message().to_owned(),
        })?;
        // Local drivers (test:///) know no keepalive; that is no reason not to use them.
        if let Err(error) = connect.set_keep_alive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT) {
            tracing::debug!(uri, "no keepalive on this connection: {}", error.message());
        }
        Ok(Arc::new(Self { connect, uri: uri.to_owned(), registrations: Mutex::default() }))
    }

    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Whether the connection still stands, as far as libvirt's keepalive knows.
    pub fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    /// Has `sink` called with every event of every domain from now on, until this connection is dropped. See
    /// [`EventSink`] for what it may do.
    pub fn subscribe(&self, sink: EventSink) -> Result<()> {
        let mut registrations = self.registrations.lock().unwrap_or_else(PoisonError::into_inner);
        let result = registrations.add(&self.connect, &sink);
        if result.is_err() {
            registrations.remove(&self.connect);
        }
        result
    }

    /// Finds a domain by UUID or by name, whichever fits.
    pub fn lookup(&self, name_or_uuid: &str) -> Result<Domain> {
        match self.lookup_uuid(name_or_uuid) {
            Err(HypervisorError::NotFound { .. } | HypervisorError::Libvirt { .. }) => self.lookup_name(name_or_uuid),
            other => other,
        }
    }

    pub fn lookup_name(&self, name: &str) -> Result<Domain> {
        ffi::c_string(name, "look a domain up")?;
        Domain::new(self.connect.lookup_domain_by_name(name).map_err(|error| self.lookup_error(name, &error))?)
    }

    pub fn lookup_uuid(&self, uuid: &str) -> Result<Domain> {
        ffi::c_string(uuid, "look a domain up")?;
        Domain::new(self.connect.lookup_domain_by_uuid_string(uuid).map_err(|error| self.lookup_error(uuid, &error))?)
    }

    /// All active domains, in the order libvirt gives.
    pub fn running_domains(&self) -> Result<Vec<Domain>> {
        let domains = self
            .connect
            .list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            .map_err(|error| HypervisorError::from_virt("list the active domains", &error))?;
        domains.into_iter().map(Domain::new).collect()
    }

    /// Starts a transient domain from `xml`; with `paused` its vCPUs do not run.
    pub fn create_xml(&self, xml: &str, paused: bool) -> Result<Domain> {
        ffi::c_string(xml, "create a domain")?;
        let flags = if paused { sys::VIR_DOMAIN_START_PAUSED } else { sys::VIR_DOMAIN_NONE };
        let domain = self
            .connect
            .create_domain_xml(xml, flags)
            .map_err(|error| HypervisorError::from_virt("create the domain", &error))?;
        Domain::new(domain)
    }

    /// Makes `xml` the persistent definition of its domain. A running domain of that UUID becomes persistent.
    pub fn define_xml(&self, xml: &str) -> Result<Domain> {
        ffi::c_string(xml, "define a domain")?;
        let domain = self
            .connect
            .define_domain_xml(xml)
            .map_err(|error| HypervisorError::from_virt("define the domain", &error))?;
        Domain::new(domain)
    }

    /// Machine types that its QEMUs know, as [`xml::machine_types`]; empty if libvirt does not tell.
    pub fn machine_types(&self) -> BTreeSet<String> {
        let told = self.connect.capabilities().map_err(|error| error.message().to_owned());
        let read = told.and_then(|told| xml::machine_types(&told).map_err(|error| error.to_string()));
        read.unwrap_or_else(|error| {
            tracing::debug!(uri = self.uri, "libvirt does not tell machine types: {error}");
            BTreeSet::new()
        })
    }

    /// CPU models that guests can have here, as [`xml::cpu_models`]; empty if libvirt does not tell.
    pub fn cpu_models(&self) -> BTreeSet<String> {
        // Without KVM there are only those of `qemu`.
        let told = |kind: &str| {
            let told = self.connect.domain_capabilities(None, None, None, Some(kind), 0).ok()?;
            xml::cpu_models(&told, kind).ok()
        };
        ["kvm", "qemu"].into_iter().filter_map(told).flatten().collect()
    }

    /// libvirt's version as major, minor, release.
    pub fn libvirt_version(&self) -> Result<(u32, u32, u32)> {
        split_version(self.connect.lib_version(), "ask for libvirt's version")
    }

    /// Version of the QEMU that libvirt would start.
    pub fn qemu_version(&self) -> Result<(u32, u32, u32)> {
        split_version(self.connect.hyp_version(), "ask for QEMU's version")
    }

    fn lookup_error(&self, domain: &str, error: &virt::error::Error) -> HypervisorError {
        if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN {
            return HypervisorError::NotFound { domain: domain.to_owned() };
        }
        HypervisorError::from_virt(format!("look domain {domain:?} up"), error)
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        let registrations = self.registrations.get_mut().unwrap_or_else(PoisonError::into_inner);
        registrations.remove(&self.connect);
    }
}

impl std::fmt::Debug for Hypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hypervisor").field("uri", &self.uri).finish_non_exhaustive()
    }
}

fn split_version(version: std::result::Result<u32, virt::error::Error>, action: &str) -> Result<(u32, u32, u32)> {
    let number = version.map_err(|error| HypervisorError::from_virt(action, &error))?;
    Ok((number / 1_000_000, number / 1_000 % 1_000, number % 1_000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::{DomainState, XmlKind};

    /// libvirt's built-in test driver: a domain named "test", lifecycle and events, no QEMU.
    fn test_driver() -> Arc<Hypervisor> {
        Hypervisor::connect("test:///default").unwrap()
    }

    #[test]
    fn lookups_accept_name_and_uuid_and_name_what_is_missing() {
        let hypervisor = test_driver();
        assert!(hypervisor.is_alive());
        let by_name = hypervisor.lookup("test").unwrap();
        let by_uuid = hypervisor.lookup(by_name.uuid()).unwrap();
        assert_eq!((by_uuid.name(), by_uuid.uuid()), ("test", by_name.uuid()));
        assert!(by_name.xml(XmlKind::Live).unwrap().contains("<name>test</name>"));
        by_name.suspend().unwrap();
        assert_eq!(by_name.state().unwrap().0, DomainState::Paused);
        by_name.resume().unwrap();
        assert_eq!(by_name.state().unwrap().0, DomainState::Running);
        assert!(hypervisor.create_xml("<domain/>", true).is_err());
        let missing = hypervisor.lookup("nobody").unwrap_err();
        assert!(matches!(&missing, HypervisorError::NotFound { domain } if domain == "nobody"), "{missing}");
        assert!(matches!(hypervisor.lookup("a\0b"), Err(HypervisorError::NulByte { .. })));
    }

    #[test]
    fn a_refused_subscription_leaves_nothing_behind() {
        let hypervisor = test_driver();
        let sink: EventSink = Arc::new(drop);
        // The test driver has no QEMU monitor. It forgets close callbacks without freeing them: one reference stays.
        // Others are freed by the event loop a little later.
        assert!(hypervisor.subscribe(sink.clone()).is_err());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while Arc::strong_count(&sink) > 2 && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(Arc::strong_count(&sink) <= 2);
    }
}

//! Facts about a guest's definition, and why a guest cannot have shadows.

use xmltree::Element;

use super::XmlError;
use super::tree::{at, attribute, children, parse_domain, text};

/// What the rest of the program needs to know about a guest, from its live XML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDefinition {
    pub name: String,
    /// Lower case with dashes.
    pub uuid: String,
    /// `kvm` or `qemu`.
    pub domain_type: String,
    /// Machine type as QEMU resolved it, such as `pc-q35-10.0`.
    pub machine: String,
    /// `ARCH/MACHINE`, as [`super::machine_types`] has it.
    pub machine_type: Option<String>,
    /// `ACCELERATOR/MODEL`, as [`super::cpu_models`] has it; none: whatever the host has.
    pub cpu_model: Option<String>,
    /// Memory including hot-plugged modules, bytes.
    pub memory_bytes: u64,
    pub vcpus: u32,
    pub disks: Vec<Disk>,
    pub interfaces: Vec<Interface>,
    /// Files a shadow's host needs at the same path: kernel, initrd, device tree, firmware image, CD images.
    pub files: Vec<String>,
    /// Memory is backed by huge pages.
    pub hugepages: bool,
    /// Memory is allocated ahead or locked: none of it is to be given back while the guest waits.
    pub keeps_memory: bool,
    refusals: Vec<Refusal>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Name in the guest, such as `vda`.
    pub target: String,
    /// `disk`, `cdrom`, `floppy`, `lun`.
    pub device: String,
    pub writable: bool,
    /// File, device or volume; none for an empty drive.
    pub source: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Lower case, such as `52:54:00:12:34:56`.
    pub mac: String,
    pub link: InterfaceLink,
    /// Host's end, such as `vnet3`; only in live XML that is not migratable.
    pub host_device: Option<String>,
}

/// What an interface hangs on, on its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InterfaceLink {
    Bridge(String),
    /// macvtap over this device.
    Direct(String),
    /// Managed by others, or without a link layer on the host (user mode).
    Other(String),
}

/// Why a guest cannot have shadows, and what would change that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: String,
    pub remedy: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; {}", self.reason, self.remedy)
    }
}

impl GuestDefinition {
    /// Reads a domain's live XML (migratable or not).
    pub fn parse(xml: &str) -> Result<Self, XmlError> {
        let root = parse_domain(xml)?;
        let required =
            |path: &[&str], what| text(&root, path).filter(|t| !t.is_empty()).ok_or(XmlError::Missing { what });
        Ok(Self {
            name: required(&["name"], "<name>")?,
            uuid: required(&["uuid"], "<uuid>")?.to_lowercase(),
            domain_type: root.attributes.get("type").cloned().ok_or(XmlError::Missing { what: "domain type" })?,
            machine: attribute(&root, &["os", "type"], "machine").unwrap_or_default().to_owned(),
            machine_type: super::abilities::machine_type(&root),
            cpu_model: super::abilities::cpu_model(&root),
            memory_bytes: memory_bytes(&root)?,
            vcpus: vcpus(&root)?,
            disks: devices(&root, "disk").map(disk).collect(),
            interfaces: devices(&root, "interface").map(interface).collect(),
            files: files(&root),
            hugepages: at(&root, &["memoryBacking", "hugepages"]).is_some(),
            keeps_memory: at(&root, &["memoryBacking", "locked"]).is_some()
                || attribute(&root, &["memoryBacking", "allocation"], "mode") == Some("immediate"),
            refusals: refusals(&root),
        })
    }

    /// Disks that a shadow needs a copy of.
    pub fn mirrored_disks(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| disk.is_mirrored())
    }

    /// Why this guest cannot have shadows; empty when it can, as far as its definition tells. QEMU's own reasons
    /// come from [`crate::hypervisor::Domain::migration_blockers`].
    pub fn refusals(&self) -> &[Refusal] {
        &self.refusals
    }
}

fn devices<'a>(root: &'a Element, name: &'a str) -> impl Iterator<Item = &'a Element> {
    root.get_child("devices").into_iter().flat_map(move |devices| children(devices, name))
}

fn memory_bytes(root: &Element) -> Result<u64, XmlError> {
    let element = root.get_child("memory").ok_or(XmlError::Missing { what: "<memory>" })?;
    let value = text(element, &[]).unwrap_or_default();
    let unit = element.attributes.get("unit").map_or("KiB", String::as_str);
    scaled_bytes(&value, unit).ok_or(XmlError::Invalid { what: "<memory>", value: format!("{value} {unit}") })
}

/// libvirt's units of memory (virScaleInteger): decimal and binary, KiB when none is given.
fn scaled_bytes(value: &str, unit: &str) -> Option<u64> {
    let factor: u64 = match unit {
        "b" | "bytes" => 1,
        "KB" => 1_000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    value.parse::<u64>().ok()?.checked_mul(factor)
}

fn vcpus(root: &Element) -> Result<u32, XmlError> {
    let current = attribute(root, &["vcpu"], "current").map(str::to_owned);
    match current.or_else(|| text(root, &["vcpu"])) {
        None => Ok(1),
        Some(value) => value.parse().map_err(|_| XmlError::Invalid { what: "<vcpu>", value }),
    }
}

impl Disk {
    /// Whether a shadow needs a copy of it.
    pub(super) fn is_mirrored(&self) -> bool {
        self.writable && self.device == "disk"
    }
}

pub(super) fn disk(element: &Element) -> Disk {
    let device = element.attributes.get("device").map_or("disk", String::as_str).to_owned();
    let read_only = element.get_child("readonly").is_some() || device == "cdrom";
    let source = element.get_child("source").and_then(|source| {
        ["file", "dev", "volume", "name", "dir", "path"].iter().find_map(|name| source.attributes.get(*name)).cloned()
    });
    let target = attribute(element, &["target"], "dev").unwrap_or_default().to_owned();
    Disk { target, device, writable: !read_only, source }
}

fn interface(element: &Element) -> Interface {
    let kind = element.attributes.get("type").map_or("", String::as_str);
    let source = |name| attribute(element, &["source"], name).map(str::to_owned);
    let link = match (kind, source("bridge"), source("dev")) {
        // A virtual network's bridge is known in live XML only.
        ("bridge" | "network", Some(bridge), _) => InterfaceLink::Bridge(bridge),
        ("direct" | "network", None, Some(device)) => InterfaceLink::Direct(device),
        ("direct", _, Some(device)) => InterfaceLink::Direct(device),
        _ => InterfaceLink::Other(kind.to_owned()),
    };
    Interface {
        mac: attribute(element, &["mac"], "address").unwrap_or_default().to_lowercase(),
        link,
        host_device: attribute(element, &["target"], "dev").map(str::to_owned),
    }
}

fn files(root: &Element) -> Vec<String> {
    let mut files: Vec<String> = ["kernel", "initrd", "dtb", "loader"]
        .iter()
        .filter_map(|name| text(root, &["os", name]))
        .filter(|path| path.starts_with('/'))
        .collect();
    let images = devices(root, "disk").map(disk).filter(|disk| !disk.writable).filter_map(|disk| disk.source);
    files.extend(images.filter(|path| path.starts_with('/')));
    files
}

/// Everything of a definition that keeps a guest from being captured or restored.
fn refusals(root: &Element) -> Vec<Refusal> {
    let mut found = Vec::new();
    let mut refuse = |reason: String, remedy: &str| found.push(Refusal { reason, remedy: remedy.to_owned() });
    let domain_type = root.attributes.get("type").map_or("", String::as_str);
    if !matches!(domain_type, "kvm" | "qemu") {
        refuse(format!("it is a {domain_type:?} domain"), "only QEMU guests (type kvm or qemu) can have shadows");
    }
    if let Some(security) = root.get_child("launchSecurity") {
        let kind = security.attributes.get("type").map_or("some kind", String::as_str);
        refuse(format!("its memory is encrypted ({kind})"), "remove <launchSecurity> to have it shadowed");
    }
    for element in devices(root, "disk") {
        let kind = element.attributes.get("type").map_or("", String::as_str);
        let disk = self::disk(element);
        if kind == "vhostuser" || kind == "vhostvdpa" {
            refuse(
                format!(
                    "disk {} is served by another process ({kind}), whose writes to memory cannot be seen",
                    disk.target
                ),
                "use a disk that QEMU itself serves",
            );
        } else if disk.writable {
            refuse_disk(element, &disk, &mut refuse);
        }
    }
    for element in devices(root, "interface") {
        let mac = attribute(element, &["mac"], "address").unwrap_or("without address");
        match element.attributes.get("type").map_or("", String::as_str) {
            kind @ ("vhostuser" | "vdpa") => refuse(
                format!("interface {mac} is {kind}: another process or a device writes to memory unseen"),
                "use an interface of type bridge, network or direct",
            ),
            "hostdev" => refuse(
                format!("interface {mac} is a host's device passed through (VFIO)"),
                "use an interface of type bridge, network or direct",
            ),
            _ => {}
        }
    }
    for element in devices(root, "hostdev") {
        let mode = element.attributes.get("mode").map_or("", String::as_str);
        let kind = element.attributes.get("type").map_or("", String::as_str);
        refuse(format!("a host's device is passed through ({mode} {kind})"), "detach the device");
    }
    for element in devices(root, "filesystem") {
        let target = attribute(element, &["target"], "dir").unwrap_or("without a name");
        refuse(
            format!("a host's folder is mounted in the guest ({target})"),
            "detach it, or use a network file system",
        );
    }
    for element in devices(root, "shmem") {
        let name = element.attributes.get("name").map_or("", String::as_str);
        refuse(format!("memory {name} is shared with other processes, whose writes cannot be seen"), "detach <shmem>");
    }
    for element in devices(root, "memory") {
        let model = element.attributes.get("model").map_or("", String::as_str);
        match model {
            "dimm" => {}
            "nvdimm" | "virtio-pmem" => {
                refuse(format!("a {model} keeps data on the host, which is not mirrored"), "detach it")
            }
            _ => refuse(format!("memory of model {model} is not supported yet"), "use <memory model='dimm'>"),
        }
    }
    for element in devices(root, "tpm") {
        let backend = attribute(element, &["backend"], "type").unwrap_or("unknown");
        refuse(format!("its TPM ({backend}) keeps state outside QEMU"), "remove <tpm> to have the guest shadowed");
    }
    if unstable_tsc(root) {
        refuse(
            "its CPU has the feature invtsc without a fixed frequency, so its clock would jump".into(),
            "give <timer name='tsc' frequency='...'/> or remove the feature",
        );
    }
    found
}

/// A writable disk that cannot be mirrored, or whose copy would not be what it is.
fn refuse_disk(element: &Element, disk: &Disk, refuse: &mut impl FnMut(String, &str)) {
    let target = &disk.target;
    let has = |name: &str| element.get_child(name).is_some();
    let encrypted =
        has("encryption") || element.get_child("source").is_some_and(|s| s.get_child("encryption").is_some());
    if disk.device != "disk" {
        refuse(
            format!("{} {target} is writable, and only disks are mirrored", disk.device),
            "detach it, or make it <readonly/>",
        );
    } else if disk.source.is_none() {
        refuse(format!("disk {target} has no source that could be mirrored"), "detach it");
    } else if has("shareable") {
        refuse(
            format!("disk {target} is shared with other guests, whose writes a shadow would miss"),
            "detach it, or remove <shareable/> if no other guest writes it",
        );
    } else if has("transient") {
        refuse(format!("what the guest writes to disk {target} is thrown away at its end"), "remove <transient/>");
    } else if encrypted {
        refuse(
            format!("disk {target} is encrypted by QEMU, and its copies would not be"),
            "encrypt inside the guest, or the hosts' file systems",
        );
    }
}

fn unstable_tsc(root: &Element) -> bool {
    let Some(cpu) = root.get_child("cpu") else { return false };
    let required = children(cpu, "feature").any(|feature| {
        feature.attributes.get("name").is_some_and(|name| name == "invtsc")
            && feature.attributes.get("policy").is_some_and(|policy| policy == "require" || policy == "force")
    });
    let fixed = root.get_child("clock").is_some_and(|clock| {
        children(clock, "timer").any(|timer| {
            timer.attributes.get("name").is_some_and(|name| name == "tsc") && timer.attributes.contains_key("frequency")
        })
    });
    required && !fixed
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = include_str!("../../../fixtures/xml/plain-live.xml");
    const RICH: &str = include_str!("../../../fixtures/xml/rich-live.xml");

    #[test]
    fn facts_of_a_plain_guest() {
        let guest = GuestDefinition::parse(PLAIN).unwrap();
        assert_eq!((guest.name.as_str(), guest.machine.as_str(), guest.vcpus), ("counter1", "pc-q35-10.0", 1));
        assert_eq!(guest.memory_bytes, 256 << 20);
        assert_eq!(guest.files, ["/srv/lab/vmlinuz", "/srv/lab/guest.cpio"]);
        assert_eq!(guest.interfaces[0].mac, "52:54:00:aa:00:01");
        assert_eq!(guest.interfaces[0].link, InterfaceLink::Bridge("br0".into()));
        assert_eq!(guest.refusals(), []);
    }

    #[test]
    fn facts_of_a_rich_guest() {
        let guest = GuestDefinition::parse(RICH).unwrap();
        assert_eq!((guest.memory_bytes, guest.vcpus), (4608 << 20, 4));
        assert!(guest.hugepages && guest.keeps_memory);
        let writable: Vec<_> = guest.disks.iter().map(|d| (d.target.as_str(), d.writable)).collect();
        assert_eq!(writable, [("vda", true), ("vdb", false), ("sda", false)]);
        assert_eq!(guest.files, ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/srv/images/tools.raw"]);
        let links: Vec<_> = guest.interfaces.iter().map(|i| i.link.clone()).collect();
        let expected = [
            InterfaceLink::Bridge("virbr0".into()),
            InterfaceLink::Bridge("br-tenant".into()),
            InterfaceLink::Direct("eth1".into()),
            InterfaceLink::Other("vhostuser".into()),
        ];
        assert_eq!(links, expected);
    }

    #[test]
    fn everything_that_cannot_be_captured_is_refused_with_a_remedy() {
        let guest = GuestDefinition::parse(RICH).unwrap();
        let reasons: Vec<_> = guest.refusals().iter().map(|r| r.reason.as_str()).collect();
        let expected = [
            "interface 52:54:00:00:00:0d is vhostuser: another process or a device writes to memory unseen",
            "a host's device is passed through (subsystem pci)",
            "a host's folder is mounted in the guest (share)",
            "its TPM (emulator) keeps state outside QEMU",
            "its CPU has the feature invtsc without a fixed frequency, so its clock would jump",
        ];
        assert_eq!(reasons, expected);
        assert!(guest.refusals().iter().all(|r| !r.remedy.is_empty()));
    }

    #[test]
    fn single_causes_of_refusal() {
        let refused = |kind: &str, body: &str, devices: &str| {
            let xml = format!(
                "<domain type='{kind}'><name>a</name><uuid>u</uuid><memory>1</memory>{body}<devices>{devices}</devices></domain>"
            );
            let guest = GuestDefinition::parse(&xml).unwrap();
            guest.refusals().iter().map(|r| r.reason.clone()).collect::<Vec<_>>().join("|")
        };
        assert_eq!(refused("kvm", "", ""), "");
        assert!(refused("lxc", "", "").contains("lxc"));
        assert!(refused("kvm", "<launchSecurity type='sev'/>", "").contains("encrypted (sev)"));
        assert!(refused("kvm", "", "<shmem name='s0'/>").contains("shared with other processes"));
        assert!(refused("kvm", "", "<memory model='nvdimm'/>").contains("nvdimm"));
        assert!(refused("kvm", "", "<memory model='virtio-mem'/>").contains("virtio-mem"));
        assert_eq!(refused("kvm", "", "<memory model='dimm'/>"), "");
        assert!(
            refused("kvm", "", "<disk type='vhostuser' device='disk'><target dev='vda'/></disk>").contains("vhostuser")
        );
        assert!(
            refused("kvm", "", "<disk type='file' device='floppy'><target dev='fda'/></disk>").contains("floppy fda")
        );
        let disk = |inside: &str| {
            format!("<disk type='file' device='disk'><source file='/a'/><target dev='vda'/>{inside}</disk>")
        };
        assert_eq!(refused("kvm", "", &disk("")), "");
        assert_eq!(refused("kvm", "", &disk("<shareable/><readonly/>")), "");
        assert!(refused("kvm", "", &disk("<shareable/>")).contains("other guests"));
        assert!(refused("kvm", "", &disk("<transient/>")).contains("thrown away"));
        assert!(refused("kvm", "", &disk("<encryption format='luks'/>")).contains("encrypted"));
        assert!(refused("kvm", "", "<interface type='hostdev'/>").contains("VFIO"));
        let tsc =
            "<cpu><feature policy='require' name='invtsc'/></cpu><clock><timer name='tsc' frequency='1'/></clock>";
        assert_eq!(refused("kvm", tsc, ""), "");
    }

    #[test]
    fn definitions_that_lack_something_are_named_so() {
        let parse = |xml: &str| GuestDefinition::parse(xml).unwrap_err().to_string();
        assert!(parse("<domain type='kvm'><uuid>u</uuid><memory>1</memory></domain>").contains("<name>"));
        assert!(parse("<domain type='kvm'><name>a</name><uuid>u</uuid></domain>").contains("<memory>"));
        let memory = "<domain type='kvm'><name>a</name><uuid>u</uuid><memory unit='bushel'>1</memory></domain>";
        assert!(parse(memory).contains("bushel"));
        assert!(parse("<domain type='kvm'/>").contains("lacks"));
    }
}

//! The definition of a waiting shadow, and the one a promoted guest keeps.
//!
//! A shadow differs from its primary in two things only: its memory is a shared memfd, so that the agent can write
//! it, and QEMU waits for a state (`-incoming defer`). Both are added to the live definition, whatever it holds
//! already; deriving from a promoted guest's live definition, which has both, gives the same again.

use xmltree::{Element, Namespace, XMLNode};

use super::XmlError;
use super::disks::{is_mirrored, strip_source};
use super::tree::{QEMU_NAMESPACE, children, elements_mut, ensure_child, parse_domain, remove_children, write};

const INCOMING: [&str; 2] = ["-incoming", "defer"];
/// Names libvirt itself gives to the host's end of an interface.
const GENERATED_DEVICES: [&str; 3] = ["vnet", "macvtap", "macvlan"];
/// Folders in which libvirt itself places sockets of channels.
const GENERATED_SOCKETS: [&str; 2] = ["/run/libvirt/qemu/channel/", "/var/lib/libvirt/qemu/channel/"];

/// The definition to create a waiting shadow from (transient, paused), derived from the primary's live XML.
pub fn shadow_xml(live: &str) -> Result<String, XmlError> {
    let mut root = parse_domain(live)?;
    strip_runtime(&mut root);
    share_memory(&mut root);
    strip_incoming(&mut root);
    add_incoming(&mut root);
    write(&root)
}

/// The definition a promoted guest is to be started from next time.
///
/// `inactive` is the guest's persistent definition, which is kept as it was but for leftovers of ours. Without it
/// (the guest was transient) the live one is used, and shared memfd memory is taken for ours and removed.
pub fn clean_persistent_xml(live: &str, inactive: Option<&str>) -> Result<String, XmlError> {
    let mut root = parse_domain(inactive.unwrap_or(live))?;
    strip_runtime(&mut root);
    strip_incoming(&mut root);
    if inactive.is_none() {
        unshare_memory(&mut root);
    }
    write(&root)
}

/// Whether this live definition is that of a waiting shadow (or of one that was promoted and runs since).
pub fn is_shadow(live: &str) -> Result<bool, XmlError> {
    let root = parse_domain(live)?;
    let lists = root.children.iter().filter_map(XMLNode::as_element).filter(|e| is_commandline(e));
    let is_pair = |list: &Element| {
        let values: Vec<_> = children(list, "arg").map(|a| a.attributes.get("value").map(String::as_str)).collect();
        values.windows(2).any(|pair| pair == INCOMING.map(Some))
    };
    Ok(lists.into_iter().any(is_pair))
}

/// The parts of a definition that a guest's state depends on, as text to compare: two guests of one shape have the
/// same devices at the same places, whatever their limits, labels and balloons are at the moment.
pub fn shape(live: &str) -> Result<String, XmlError> {
    const NO_MATTER: [&str; 16] = [
        "title",
        "description",
        "metadata",
        "currentMemory",
        "blkiotune",
        "memtune",
        "numatune",
        "cputune",
        "resource",
        "seclabel",
        "perf",
        "pm",
        "on_poweroff",
        "on_reboot",
        "on_crash",
        "memoryBacking",
    ];
    let mut root = parse_domain(live)?;
    strip_runtime(&mut root);
    strip_incoming(&mut root);
    declare_namespace(&mut root);
    remove_children(&mut root, |child| NO_MATTER.contains(&child.name.as_str()));
    for_each_memory_part(&mut root, |part, name| drop(part.attributes.remove(name)));
    if let Some(clock) = root.get_mut_child("clock") {
        clock.attributes.remove("adjustment");
    }
    if let Some(devices) = root.get_mut_child("devices") {
        // What shows or limits the guest on its host can change while it runs.
        remove_children(devices, |device| matches!(device.name.as_str(), "graphics" | "emulator"));
        for device in elements_mut(devices) {
            if is_mirrored(device) {
                strip_source(device);
            }
            remove_children(device, |child| {
                matches!(child.name.as_str(), "bandwidth" | "iotune" | "link" | "filterref")
            });
            if let Some(target) = device.get_mut_child("target") {
                // How much of a module is plugged or requested at the moment.
                remove_children(target, |child| matches!(child.name.as_str(), "current" | "requested"));
            }
        }
    }
    write(&root)
}

fn share_memory(root: &mut Element) {
    let backing = ensure_child(root, "memoryBacking");
    ensure_child(backing, "source").attributes = [("type".to_owned(), "memfd".to_owned())].into_iter().collect();
    ensure_child(backing, "access").attributes = [("mode".to_owned(), "shared".to_owned())].into_iter().collect();
    // A cell or module that says otherwise would keep its own memory private.
    for_each_memory_part(root, |part, name| {
        if part.attributes.contains_key(name) {
            part.attributes.insert(name.to_owned(), "shared".to_owned());
        }
    });
}

fn unshare_memory(root: &mut Element) {
    let Some(backing) = root.get_mut_child("memoryBacking") else { return };
    remove_children(backing, |child| {
        let is = |name: &str, value: &str| child.attributes.get(name).is_some_and(|v| v == value);
        (child.name == "source" && is("type", "memfd")) || (child.name == "access" && is("mode", "shared"))
    });
    if backing.children.is_empty() {
        remove_children(root, |child| child.name == "memoryBacking");
    }
}

/// Calls `change` for every NUMA cell and memory module with the name of its access attribute.
fn for_each_memory_part(root: &mut Element, mut change: impl FnMut(&mut Element, &str)) {
    if let Some(numa) = root.get_mut_child("cpu").and_then(|cpu| cpu.get_mut_child("numa")) {
        elements_mut(numa).filter(|e| e.name == "cell").for_each(|cell| change(cell, "memAccess"));
    }
    if let Some(devices) = root.get_mut_child("devices") {
        elements_mut(devices).filter(|e| e.name == "memory").for_each(|module| change(module, "access"));
    }
}

fn is_commandline(element: &Element) -> bool {
    element.name == "commandline" && element.namespace.as_deref() == Some(QEMU_NAMESPACE)
}

/// Removes every `-incoming defer` from the guest's own QEMU arguments, and the list if nothing is left in it.
fn strip_incoming(root: &mut Element) {
    for commandline in elements_mut(root).filter(|e| is_commandline(e)) {
        let value = |node: &XMLNode| node.as_element().and_then(|e| e.attributes.get("value")).cloned();
        commandline.children.retain(|node| node.as_element().is_some());
        let mut kept: Vec<XMLNode> = Vec::new();
        for node in std::mem::take(&mut commandline.children) {
            let pair = value(&node).as_deref() == Some(INCOMING[1])
                && kept.last().and_then(value).as_deref() == Some(INCOMING[0]);
            if pair { drop(kept.pop()) } else { kept.push(node) }
        }
        commandline.children = kept;
    }
    remove_children(root, |child| is_commandline(child) && child.children.is_empty());
}

fn declare_namespace(root: &mut Element) {
    root.namespaces.get_or_insert_with(Namespace::empty).put("qemu", QEMU_NAMESPACE);
}

fn add_incoming(root: &mut Element) {
    declare_namespace(root);
    let qemu_element = |name: &str| {
        let mut element = Element::new(name);
        element.prefix = Some("qemu".to_owned());
        element.namespace = Some(QEMU_NAMESPACE.to_owned());
        element
    };
    let arguments = INCOMING.map(|value| {
        let mut argument = qemu_element("arg");
        argument.attributes.insert("value".to_owned(), value.to_owned());
        XMLNode::Element(argument)
    });
    if let Some(commandline) = elements_mut(root).find(|e| is_commandline(e)) {
        commandline.children.extend(arguments);
        return;
    }
    let mut commandline = qemu_element("commandline");
    commandline.children.extend(arguments);
    root.children.push(XMLNode::Element(commandline));
}

/// Removes what belongs to one run on one host.
fn strip_runtime(root: &mut Element) {
    root.attributes.remove("id");
    remove_children(root, |child| child.name == "seclabel" && is_generated_label(child));
    let Some(devices) = root.get_mut_child("devices") else { return };
    for device in elements_mut(devices) {
        remove_children(device, |child| {
            child.name == "alias" && !child.attributes.get("name").is_some_and(|name| name.starts_with("ua-"))
        });
        match device.name.as_str() {
            "disk" => strip_disk(device),
            "interface" => strip_interface(device),
            "serial" | "parallel" | "console" | "channel" => strip_character_device(device),
            "graphics" => strip_graphics(device),
            _ => {}
        }
    }
}

/// A label that libvirt generated for this run; fixed ones and base labels belong to the definition.
fn is_generated_label(label: &Element) -> bool {
    let kind = label.attributes.get("type").map_or("dynamic", String::as_str);
    kind == "dynamic" && label.get_child("baselabel").is_none()
}

fn strip_disk(disk: &mut Element) {
    remove_children(disk, |child| matches!(child.name.as_str(), "backingStore" | "mirror" | "privateData"));
    if let Some(source) = disk.get_mut_child("source") {
        source.attributes.remove("index");
    }
}

fn strip_interface(interface: &mut Element) {
    remove_children(interface, |child| {
        let generated = |device: &String| GENERATED_DEVICES.iter().any(|prefix| device.starts_with(prefix));
        child.name == "target" && child.attributes.get("dev").is_some_and(generated)
    });
    let is_network = interface.attributes.get("type").is_some_and(|kind| kind == "network");
    if let Some(source) = interface.get_mut_child("source") {
        source.attributes.remove("portid");
        if is_network {
            source.attributes.remove("bridge");
        }
    }
}

fn strip_character_device(device: &mut Element) {
    device.attributes.remove("tty");
    let is_pty = device.attributes.get("type").is_some_and(|kind| kind == "pty");
    remove_children(device, |child| {
        let generated = |path: &String| GENERATED_SOCKETS.iter().any(|folder| path.starts_with(folder));
        child.name == "source" && (is_pty || child.attributes.get("path").is_some_and(generated))
    });
    if let Some(target) = device.get_mut_child("target") {
        target.attributes.remove("state");
    }
}

fn strip_graphics(graphics: &mut Element) {
    if graphics.attributes.get("autoport").is_some_and(|value| value == "yes") {
        graphics.attributes.remove("port");
        graphics.attributes.remove("tlsPort");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::xml::tree::{at, attribute};

    const PLAIN: &str = include_str!("../../../fixtures/xml/plain-live.xml");
    const RICH: &str = include_str!("../../../fixtures/xml/rich-live.xml");

    fn arguments(xml: &str) -> Vec<String> {
        let root = parse_domain(xml).unwrap();
        let commandlines = root.children.iter().filter_map(XMLNode::as_element).filter(|e| is_commandline(e));
        let values = commandlines.flat_map(|list| children(list, "arg")).filter_map(|a| a.attributes.get("value"));
        values.cloned().collect()
    }

    #[test]
    fn a_shadow_has_shared_memory_and_waits_for_a_state() {
        let xml = shadow_xml(PLAIN).unwrap();
        let root = parse_domain(&xml).unwrap();
        assert_eq!(attribute(&root, &["memoryBacking", "source"], "type"), Some("memfd"));
        assert_eq!(attribute(&root, &["memoryBacking", "access"], "mode"), Some("shared"));
        assert_eq!(arguments(&xml), INCOMING);
        assert_eq!(root.attributes.get("id"), None);
        assert_eq!(root.attributes.get("type").map(String::as_str), Some("qemu"));
        for runtime in ["vnet", "/dev/pts/", "<alias", "portid", "imagelabel", "tty="] {
            assert!(PLAIN.contains(runtime) && !xml.contains(runtime), "{runtime}");
        }
    }

    #[test]
    fn the_guests_own_choices_stay() {
        let xml = shadow_xml(RICH).unwrap();
        let root = parse_domain(&xml).unwrap();
        assert!(at(&root, &["memoryBacking", "hugepages", "page"]).is_some());
        assert!(at(&root, &["memoryBacking", "locked"]).is_some());
        assert_eq!(attribute(&root, &["memoryBacking", "source"], "type"), Some("memfd"));
        let numa = at(&root, &["cpu", "numa"]).unwrap();
        let access: Vec<_> = children(numa, "cell").map(|c| c.attributes.get("memAccess").cloned()).collect();
        assert_eq!(access, [Some("shared".to_owned()), None]);
        assert_eq!(arguments(&xml), ["-fw_cfg", "name=opt/site,string=a&b<c", "-incoming", "defer"]);
        assert!(xml.contains("ua-uplink") && xml.contains("br-tenant") && xml.contains("tap-fixed"));
        assert!(xml.contains("<nova:flavor"), "metadata stays");
        assert!(xml.contains("type=\"static\""), "a fixed label stays");
        assert!(!xml.contains("5903") && xml.contains("5910"), "only generated ports go");
    }

    #[test]
    fn deriving_from_a_derived_definition_changes_nothing() {
        for source in [PLAIN, RICH] {
            let once = shadow_xml(source).unwrap();
            assert_eq!(shadow_xml(&once).unwrap(), once);
        }
    }

    #[test]
    fn a_persistent_definition_has_nothing_of_ours() {
        let live = shadow_xml(RICH).unwrap();
        let inactive = "<domain type='kvm'><name>web</name><memoryBacking><source type='memfd'/>\
            <access mode='shared'/></memoryBacking></domain>";
        let clean = clean_persistent_xml(&live, Some(inactive)).unwrap();
        assert!(clean.contains("memfd"), "the guest's own wish for a memfd stays: {clean}");
        assert!(!clean.contains("incoming"));

        let clean = clean_persistent_xml(&shadow_xml(PLAIN).unwrap(), None).unwrap();
        for ours in ["incoming", "commandline", "memoryBacking"] {
            assert!(!clean.contains(ours), "{ours}: {clean}");
        }
        let clean = clean_persistent_xml(&live, None).unwrap();
        assert_eq!(arguments(&clean), ["-fw_cfg", "name=opt/site,string=a&b<c"]);
        assert!(clean.contains("hugepages"));
    }

    #[test]
    fn shadows_are_recognised() {
        assert!(!is_shadow(PLAIN).unwrap() && !is_shadow(RICH).unwrap());
        assert!(is_shadow(&shadow_xml(PLAIN).unwrap()).unwrap() && is_shadow(&shadow_xml(RICH).unwrap()).unwrap());
    }

    #[test]
    fn the_shape_changes_with_the_devices_only() {
        let plain = shape(PLAIN).unwrap();
        assert_eq!(shape(&shadow_xml(PLAIN).unwrap()).unwrap(), plain, "a shadow has its primary's shape");
        assert_eq!(shape(&shadow_xml(RICH).unwrap()).unwrap(), shape(RICH).unwrap());
        let ballooned = PLAIN.replace("<currentMemory unit='KiB'>262144", "<currentMemory unit='KiB'>131072");
        assert!(ballooned != PLAIN && shape(&ballooned).unwrap() == plain);
        let plugged = PLAIN.replace("<input ", "<rng model='virtio'/><input ");
        assert_ne!(shape(&plugged).unwrap(), plain);
        assert_ne!(shape(&PLAIN.replace("bus='0x01'", "bus='0x03'")).unwrap(), plain);
    }

    #[test]
    fn text_that_is_no_definition_is_refused() {
        assert!(matches!(shadow_xml("<domain"), Err(XmlError::Malformed { .. })));
        assert!(matches!(shadow_xml("<network/>"), Err(XmlError::NotADomain { .. })));
        let long = " ".repeat(super::super::MAX_XML_BYTES + 1);
        assert!(matches!(shadow_xml(&long), Err(XmlError::TooLong { .. })));
    }
}

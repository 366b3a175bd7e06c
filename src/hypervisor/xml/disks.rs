//! Disks in definitions: those of a shadow are files of its host, and what a mirror leaves in a live definition is not
//! the guest's.

use xmltree::Element;

use super::XmlError;
use super::definition::disk;
use super::tree::{at, attribute, children, elements_mut, ensure_child, parse_domain, remove_children, write};

/// Children of a disk that tell of its source's host, not of the guest.
const OF_THE_SOURCE: [&str; 8] =
    ["source", "backingStore", "mirror", "auth", "encryption", "privateData", "alias", "slices"];

/// Whether a device is a disk that shadows get a copy of.
pub(super) fn is_mirrored(device: &Element) -> bool {
    device.name == "disk" && disk(device).is_mirrored()
}

/// The definition with these disks (target, path) as raw files; all else about them stays.
pub fn with_disk_files(xml: &str, files: &[(String, String)]) -> Result<String, XmlError> {
    let mut root = parse_domain(xml)?;
    let devices = root.get_mut_child("devices").ok_or(XmlError::Missing { what: "<devices>" })?;
    for (target, path) in files {
        let disk = elements_mut(devices).find(|e| e.name == "disk" && attribute(e, &["target"], "dev") == Some(target));
        let Some(disk) = disk else { continue };
        remove_children(disk, |child| OF_THE_SOURCE.contains(&child.name.as_str()));
        disk.attributes.insert("type".into(), "file".into());
        ensure_child(disk, "source").attributes.insert("file".into(), path.clone());
        let driver = ensure_child(disk, "driver");
        driver.attributes.insert("name".into(), "qemu".into());
        driver.attributes.insert("type".into(), "raw".into());
        for of_qcow2 in ["metadata_cache", "discard_no_unref"] {
            driver.attributes.remove(of_qcow2);
        }
        remove_children(driver, |child| child.name == "metadata_cache");
    }
    write(&root)
}

/// The live definition without what a mirror job adds and changes while it runs.
pub fn without_mirrors(xml: &str) -> Result<String, XmlError> {
    let mut root = parse_domain(xml)?;
    if let Some(devices) = root.get_mut_child("devices") {
        for disk in elements_mut(devices).filter(|e| e.name == "disk") {
            remove_children(disk, |child| matches!(child.name.as_str(), "mirror" | "backingStore" | "privateData"));
            if let Some(source) = disk.get_mut_child("source") {
                source.attributes.remove("index");
            }
        }
    }
    write(&root)
}

/// Removes from a disk what differs between a guest and its shadow.
pub(super) fn strip_source(disk: &mut Element) {
    remove_children(disk, |child| OF_THE_SOURCE.contains(&child.name.as_str()));
    disk.attributes.remove("type");
    if let Some(driver) = disk.get_mut_child("driver") {
        driver.attributes.retain(|name, _| !matches!(name.as_str(), "type" | "name" | "discard_no_unref"));
        remove_children(driver, |_| true);
    }
}

/// Path of the file of a disk, if it is one.
pub fn disk_file(xml: &str, target: &str) -> Result<Option<String>, XmlError> {
    let root = parse_domain(xml)?;
    let disks = at(&root, &["devices"]).into_iter().flat_map(|devices| children(devices, "disk"));
    let mut disks = disks.filter(|disk| attribute(disk, &["target"], "dev") == Some(target));
    Ok(disks.find_map(|disk| attribute(disk, &["source"], "file").map(str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::xml::{shadow_xml, shape};

    const LIVE: &str = "<domain type='qemu'><name>a</name><devices><disk type='block' device='disk'>\
        <driver name='qemu' type='qcow2' cache='none' discard='unmap'/><source dev='/dev/vg/a' index='3'/>\
        <backingStore/><mirror type='network' job='copy' ready='yes'><source protocol='nbd' name='e'/></mirror>\
        <target dev='vda' bus='virtio'/><serial>7</serial><alias name='virtio-disk0'/></disk>\
        <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/><readonly/></disk></devices></domain>";

    #[test]
    fn a_shadows_disk_is_a_raw_file_and_otherwise_the_same() {
        let files = [("vda".to_owned(), "/copies/vda.a.img".to_owned())];
        let xml = with_disk_files(LIVE, &files).unwrap();
        assert_eq!(disk_file(&xml, "vda").unwrap().as_deref(), Some("/copies/vda.a.img"));
        assert_eq!(disk_file(&xml, "sda").unwrap().as_deref(), Some("/iso"));
        for kept in ["cache=\"none\"", "discard=\"unmap\"", "<serial>7", "bus=\"virtio\"", "type=\"raw\""] {
            assert!(xml.contains(kept), "{kept}: {xml}");
        }
        for gone in ["/dev/vg/a", "mirror", "qcow2", "backingStore"] {
            assert!(!xml.contains(gone), "{gone}: {xml}");
        }
        assert_eq!(shape(&xml).unwrap(), shape(LIVE).unwrap(), "one shape");
        assert_eq!(shape(&shadow_xml(&xml).unwrap()).unwrap(), shape(LIVE).unwrap());
        assert_ne!(shape(&xml.replace("<serial>7", "<serial>8")).unwrap(), shape(LIVE).unwrap());
    }

    #[test]
    fn a_mirror_changes_nothing_of_the_guest() {
        let plain = LIVE.replace(" index='3'", "").replace("<backingStore/>", "");
        let start = plain.find("<mirror").unwrap();
        let end = plain.find("</mirror>").unwrap() + "</mirror>".len();
        let plain = [&plain[..start], &plain[end..]].concat();
        assert_eq!(without_mirrors(LIVE).unwrap(), without_mirrors(&plain).unwrap());
        assert!(with_disk_files("<domain/>", &[]).is_err());
    }
}

//! What a host's QEMU can run, from libvirt's capabilities.

use std::collections::BTreeSet;

use xmltree::{Element, EmitterConfig};

use super::XmlError;
use super::tree::{at, attribute, children, parse};

/// Machine types as `ARCH/NAME`, aliases and what they stand for, from `virsh capabilities`.
pub fn machine_types(capabilities: &str) -> Result<BTreeSet<String>, XmlError> {
    let root = parse(capabilities)?;
    let mut found = BTreeSet::new();
    for arch in children(&root, "guest").filter_map(|guest| guest.get_child("arch")) {
        let name = arch.attributes.get("name").map_or("", String::as_str);
        let mut take = |element: &Element| {
            for machine in children(element, "machine") {
                let text = machine.get_text().map(|text| text.trim().to_owned());
                let canonical = machine.attributes.get("canonical").cloned();
                found.extend(text.into_iter().chain(canonical).map(|machine| format!("{name}/{machine}")));
            }
        };
        take(arch);
        children(arch, "domain").for_each(take);
    }
    Ok(found)
}

/// CPU models that can be had under `accelerator` (`kvm`, `qemu`), as `ACCELERATOR/MODEL`, from `virsh domcapabilities`.
pub fn cpu_models(domain_capabilities: &str, accelerator: &str) -> Result<BTreeSet<String>, XmlError> {
    let root = parse(domain_capabilities)?;
    let Some(cpu) = root.get_child("cpu") else { return Ok(BTreeSet::new()) };
    let custom = |mode: &&Element| mode.attributes.get("name").is_some_and(|name| name == "custom");
    let usable = |model: &&Element| model.attributes.get("usable").is_some_and(|usable| usable == "yes");
    let models = children(cpu, "mode").filter(custom).flat_map(|mode| children(mode, "model")).filter(usable);
    let names = models.filter_map(|model| model.get_text().map(|text| format!("{accelerator}/{}", text.trim())));
    Ok(names.collect())
}

/// Machine type of a domain as in [`machine_types`].
pub(super) fn machine_type(root: &Element) -> Option<String> {
    let (arch, machine) = (attribute(root, &["os", "type"], "arch")?, attribute(root, &["os", "type"], "machine")?);
    Some(format!("{arch}/{machine}"))
}

/// CPU model of a domain as in [`cpu_models`]; `host-passthrough` with a mode of that name. None: whatever there is.
pub(super) fn cpu_model(root: &Element) -> Option<String> {
    let accelerator = root.attributes.get("type").map_or("", String::as_str);
    let cpu = root.get_child("cpu")?;
    match cpu.attributes.get("mode").map(String::as_str) {
        Some("host-passthrough") => Some(format!("{accelerator}/host-passthrough")),
        Some("maximum") => None,
        _ => at(cpu, &["model"])?.get_text().map(|text| format!("{accelerator}/{}", text.trim())),
    }
}

/// `text` as the element that libvirt keeps in a domain's metadata.
pub fn policy_element(text: &str) -> Result<String, XmlError> {
    let mut element = Element::new("policy");
    element.children.push(xmltree::XMLNode::Text(text.to_owned()));
    let mut bytes = Vec::new();
    let config = EmitterConfig::new().write_document_declaration(false);
    let malformed = |reason: String| XmlError::Malformed { reason };
    element.write_with_config(&mut bytes, config).map_err(|error| malformed(error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| malformed(error.to_string()))
}

/// What [`policy_element`] was made of.
pub fn policy_text(element: &str) -> Result<String, XmlError> {
    Ok(parse(element)?.get_text().map_or_else(String::new, |text| text.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_can_run_is_read_from_capabilities() {
        let capabilities =
            "<capabilities><host/><guest><os_type>hvm</os_type><arch name='x86_64'><wordsize>64</wordsize>
            <machine canonical='pc-q35-7.2' maxCpus='288'>q35</machine><machine maxCpus='1'>microvm</machine>
            <domain type='qemu'/><domain type='kvm'><machine>none</machine></domain></arch></guest></capabilities>";
        let names: Vec<String> = machine_types(capabilities).unwrap().into_iter().collect();
        assert_eq!(names, ["x86_64/microvm", "x86_64/none", "x86_64/pc-q35-7.2", "x86_64/q35"]);
        let domain = "<domainCapabilities><cpu><mode name='host-model' supported='yes'><model>Penryn</model></mode>
            <mode name='custom' supported='yes'><model usable='yes' vendor='Intel'>qemu64</model>
            <model usable='no'>Skylake</model></mode></cpu></domainCapabilities>";
        assert_eq!(cpu_models(domain, "qemu").unwrap().into_iter().collect::<Vec<_>>(), ["qemu/qemu64"]);
        assert!(machine_types("<a/>").unwrap().is_empty() && cpu_models("<a/>", "kvm").unwrap().is_empty());
        assert!(machine_types("<a>").is_err());
    }

    #[test]
    fn a_policy_of_any_text_comes_back() {
        for text in ["", "shadows = 2\nneed = [\"a<b\", \"c&d\"]", "group = \"größe\""] {
            let element = policy_element(text).unwrap();
            assert_eq!(policy_text(&element).unwrap(), text, "{element}");
        }
        assert!(policy_text("policy").is_err());
    }
}

//! NICs of a running guest, as far as holding their output is about them.

use super::XmlError;
use super::definition::Refusal;
use super::tree::{attribute, children, parse_domain};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputNic {
    pub mac: String,
    /// QEMU's name of the host's side.
    pub netdev: String,
    /// The host's device, if it is one of its own.
    pub device: Option<String>,
    /// Why its output cannot be held.
    pub refusal: Option<Refusal>,
}

/// The NICs in live XML (not migratable: that has no names).
pub fn output_nics(xml: &str) -> Result<Vec<OutputNic>, XmlError> {
    let root = parse_domain(xml)?;
    let on_kvm = root.attributes.get("type").is_some_and(|kind| kind == "kvm");
    let Some(devices) = root.get_child("devices") else { return Ok(Vec::new()) };
    let nic = |element| {
        let mac = attribute(element, &["mac"], "address").unwrap_or_default().to_lowercase();
        let alias = attribute(element, &["alias"], "name").unwrap_or_default();
        let virtio = attribute(element, &["model"], "type").is_some_and(|model| model.starts_with("virtio"));
        let driver = attribute(element, &["driver"], "name");
        let device = attribute(element, &["target"], "dev").map(str::to_owned);
        // Without a word about it libvirt takes vhost for virtio NICs of KVM guests where the kernel has it.
        let vhost = driver == Some("vhost") || virtio && on_kvm && driver != Some("qemu");
        let kind = element.attributes.get("type").map_or("", String::as_str);
        let refusal = match kind {
            "hostdev" | "vhostuser" | "vdpa" => Some(Refusal {
                reason: format!("packets of interface {mac} ({kind}) do not go through QEMU"),
                remedy: "output-commit needs an interface of type bridge, network, direct or ethernet".into(),
            }),
            _ if vhost => Some(Refusal {
                reason: format!("packets of interface {mac} do not go through QEMU but through the kernel's vhost"),
                remedy:
                    "output-commit needs <driver name='qemu'/> in the interface, which takes effect when the guest \
                         is started or the interface plugged anew"
                        .into(),
            }),
            _ => None,
        };
        OutputNic { mac, netdev: format!("host{alias}"), device, refusal }
    };
    Ok(children(devices, "interface").map(nic).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nics(domain: &str, interfaces: &str) -> Vec<OutputNic> {
        output_nics(&format!("<domain type='{domain}'><devices>{interfaces}</devices></domain>")).unwrap()
    }

    #[test]
    fn nics_that_bypass_qemu_are_refused_with_the_remedy() {
        let virtio = "<interface type='bridge'><mac address='52:54:00:AA:00:01'/><model type='virtio'/>\
                      <alias name='net3'/></interface>";
        let found = nics("qemu", virtio);
        assert_eq!((&*found[0].mac, &*found[0].netdev, &found[0].refusal), ("52:54:00:aa:00:01", "hostnet3", &None));
        let refused = nics("kvm", virtio)[0].refusal.clone().unwrap();
        assert!(refused.to_string().contains("<driver name='qemu'/>"), "{refused}");
        let with_driver = |name: &str| virtio.replace("<alias", &format!("<driver name='{name}'/><alias"));
        assert_eq!(nics("kvm", &with_driver("qemu"))[0].refusal, None);
        assert!(nics("qemu", &with_driver("vhost"))[0].refusal.is_some());
        assert_eq!(nics("kvm", &virtio.replace("virtio", "e1000"))[0].refusal, None);
        assert!(nics("kvm", &virtio.replace("bridge", "vdpa"))[0].refusal.is_some());
        assert!(nics("kvm", "").is_empty());
    }
}

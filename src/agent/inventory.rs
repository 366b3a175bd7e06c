//! What this host is able to do and what it hangs on, as far as it can be found out. What cannot is left out.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;

use crate::api::control::{Bridge, Inventory, Neighbour, NumaNode};
use crate::config::Config;
use crate::hypervisor::Hypervisor;

use super::libvirt::Libvirt;

/// It hardly changes; QEMU may be updated.
const EVERY: Duration = Duration::from_secs(60);
/// Until libvirt can be asked.
const FIRST_TRIES: Duration = Duration::from_millis(500);
/// A libvirt that has been asked so often, for a minute, and does not tell of KVM will not. On a busy host it looks for tens
/// of seconds.
const TRIES_FOR_KVM: u32 = 120;
const MAX_ITEMS: usize = 4096;

/// The newest one, for heartbeats.
pub(super) type Shared = Arc<Mutex<Option<Arc<Inventory>>>>;

/// Looks now and then until `shutdown`.
pub(super) async fn keep(config: Config, libvirt: Arc<Libvirt>, shared: Shared, mut shutdown: watch::Receiver<bool>) {
    let mut asked = 0;
    loop {
        let (config, libvirt) = (config.clone(), Arc::clone(&libvirt));
        let found = tokio::task::spawn_blocking(move || {
            let hypervisor = libvirt.get().ok();
            (take(&config, hypervisor.as_deref()), hypervisor.is_some())
        });
        let Ok((mut found, connected)) = found.await else { return };
        asked += u32::from(connected);
        let complete = connected && (asked >= TRIES_FOR_KVM || !lacks_kvm(&found.cpu_models));
        // What is not known yet is no reason to refuse a guest.
        if !complete {
            found.cpu_models.clear();
        }
        {
            let mut newest = super::lock(&shared);
            if newest.as_deref() != Some(&found) {
                *newest = Some(Arc::new(found));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(if complete { EVERY } else { FIRST_TRIES }) => (),
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
    }
}

/// This host has KVM, and libvirt does not tell of it: it may not have looked yet.
fn lacks_kvm(cpu_models: &BTreeSet<String>) -> bool {
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    kvm.is_ok() && !cpu_models.iter().any(|model| model.starts_with("kvm/") && !model.contains("host-passthrough/"))
}

fn take(config: &Config, hypervisor: Option<&Hypervisor>) -> Inventory {
    let processor = processor();
    let mut cpu_models = hypervisor.map(Hypervisor::cpu_models).unwrap_or_default();
    if !cpu_models.is_empty() {
        // The very same processor, for guests that see it as it is.
        cpu_models.insert(format!("kvm/host-passthrough/{processor}"));
    }
    Inventory {
        cpus: std::thread::available_parallelism().map_or(0, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
        processor,
        numa: numa(Path::new("/sys/devices/system/node")),
        vfs: virtual_functions(Path::new("/sys/class/net")),
        cpu_models,
        machine_types: hypervisor.map(Hypervisor::machine_types).unwrap_or_default(),
        labels: config.labels.iter().cloned().collect(),
        power: config.power.clone(),
        bridges: bridges(Path::new("/sys/class/net")),
        neighbours: neighbours(),
    }
}

/// Name of this host's processor, as the kernel tells it.
pub(super) fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(':')).map_or_else(String::new, |(_, name)| name.trim().to_owned())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().take(MAX_ITEMS);
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn numa(dir: &Path) -> Vec<NumaNode> {
    let node = |name: String| {
        let number = name.strip_prefix("node")?.parse().ok()?;
        let read = |file: &str| fs::read_to_string(dir.join(&name).join(file)).unwrap_or_default();
        let info = read("meminfo");
        let total = info.lines().find_map(|line| line.split_once("MemTotal:"))?.1;
        let kib: u64 = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(NumaNode { node: number, memory_mib: kib / 1024, cpus: read("cpulist").trim().to_owned() })
    };
    let mut nodes: Vec<NumaNode> = names(dir).into_iter().filter_map(node).collect();
    nodes.sort_by_key(|node| node.node);
    nodes
}

/// SR-IOV virtual functions that are switched on.
fn virtual_functions(net: &Path) -> u32 {
    let count =
        |name: &String| fs::read_to_string(net.join(name).join("device/sriov_numvfs")).ok()?.trim().parse().ok();
    names(net).iter().filter_map(count).fold(0, u32::saturating_add)
}

fn bridges(net: &Path) -> Vec<Bridge> {
    let is_bridge = |name: &String| net.join(name).join("bridge").is_dir();
    let bridge = |name: String| Bridge { ports: names(&net.join(&name).join("brif")), name };
    names(net).into_iter().filter(is_bridge).map(bridge).collect()
}

/// What lldpd has heard, where there is one.
fn neighbours() -> Vec<Neighbour> {
    let mut command = Command::new("timeout");
    command.args(["2", "lldpctl", "-f", "json0"]).stdin(Stdio::null()).stderr(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => parse_neighbours(&output.stdout),
        _ => Vec::new(),
    }
}

/// `json0` is the form in which everything is a list, however many there are.
fn parse_neighbours(json: &[u8]) -> Vec<Neighbour> {
    let Ok(value) = serde_json::from_slice::<Value>(json) else { return Vec::new() };
    let list = |value: &Value, key: &str| value.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let text = |value: &Value, key: &str| {
        let first = list(value, key).into_iter().next()?;
        Some(first.get("value")?.as_str()?.to_owned())
    };
    let interfaces =
        list(&value, "lldp").iter().flat_map(|lldp| list(lldp, "interface")).take(MAX_ITEMS).collect::<Vec<_>>();
    let neighbour = |interface: &Value| {
        let chassis = list(interface, "chassis").into_iter().next()?;
        let port = list(interface, "port").into_iter().next().unwrap_or_default();
        Some(Neighbour {
            interface: interface.get("name")?.as_str()?.to_owned(),
            switch: text(&chassis, "name").or_else(|| text(&chassis, "id"))?,
            port: text(&port, "id").unwrap_or_default(),
        })
    };
    interfaces.iter().filter_map(neighbour).collect()
}

/// The switch this host hangs on, if all that it heard of is one.
pub(crate) fn only_switch(neighbours: &[Neighbour]) -> Option<String> {
    let switches: BTreeSet<&String> = neighbours.iter().map(|neighbour| &neighbour.switch).collect();
    match switches.into_iter().collect::<Vec<_>>()[..] {
        [one] => Some(one.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_what_lldpd_tells() {
        let json = br#"{"lldp": [{"interface": [
            {"name": "eth0", "chassis": [{"id": [{"type": "mac", "value": "00:11"}], "name": [{"value": "leaf-1"}]}],
             "port": [{"id": [{"type": "ifname", "value": "Ethernet7"}]}]},
            {"name": "eth1", "chassis": [{"id": [{"type": "mac", "value": "00:22"}]}]},
            {"chassis": 5}]}]}"#;
        let found = parse_neighbours(json);
        let flat: Vec<_> = found.iter().map(|n| (n.interface.as_str(), n.switch.as_str(), n.port.as_str())).collect();
        assert_eq!(flat, [("eth0", "leaf-1", "Ethernet7"), ("eth1", "00:22", "")]);
        assert_eq!((only_switch(&found), only_switch(&found[..1])), (None, Some("leaf-1".into())));
        for odd in [&b""[..], b"null", b"{\"lldp\": 3}", b"{\"lldp\": [{\"interface\": {}}]}"] {
            assert!(parse_neighbours(odd).is_empty());
        }
    }

    #[test]
    fn this_machine_has_processors_and_memory() {
        let found = take(&Config::default(), None);
        assert!(found.cpus > 0 && found.machine_types.is_empty(), "{found:?}");
        assert!(found.numa.iter().all(|node| node.memory_mib > 0), "{found:?}");
    }
}

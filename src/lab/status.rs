//! What a lab looks like now, for people and for scripts.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::Serialize;

use super::host::{self, daemon_socket, libvirt_uri};
use super::init::ServiceStatus;
use super::namespace::netns_path;
use super::process::{ProcessRef, outer_pid};
use super::state::{CLIENT, CLIENT_IP, GuestState, LabState, MANAGER, NodeState, Role, node_run_link, node_var_dir};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    On,
    Off,
    /// Its first process ended without a power cut; `up` starts it again.
    Crashed,
}

#[derive(Debug, Serialize)]
pub struct LabStatus {
    pub name: String,
    pub hosts: Vec<NodeReport>,
    pub manager: Option<NodeReport>,
    pub client: ClientReport,
    pub cut_racks: Vec<String>,
    pub guests: BTreeMap<String, GuestState>,
}

#[derive(Debug, Serialize)]
pub struct NodeReport {
    pub name: String,
    pub rack: String,
    pub power: Power,
    pub link_cut: bool,
    pub ip: Ipv4Addr,
    /// Process 1 of the node, by its number outside.
    pub init_pid: Option<i32>,
    /// For `nsenter`: net, mnt, pid, uts, ipc.
    pub namespaces: BTreeMap<&'static str, PathBuf>,
    pub libvirt_uri: Option<String>,
    pub daemon_socket: PathBuf,
    /// The node's own `/run`, seen from outside.
    pub run_dir: PathBuf,
    pub log_dir: PathBuf,
    pub services: BTreeMap<String, ServiceReport>,
}

#[derive(Debug, Serialize)]
pub struct ServiceReport {
    /// By its number outside; none while it waits to be started again.
    pub pid: Option<i32>,
    pub restarts: u64,
    pub last_end: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct ClientReport {
    pub ip: Ipv4Addr,
    pub netns: PathBuf,
}

pub fn collect(state: &LabState) -> LabStatus {
    LabStatus {
        name: state.name.clone(),
        hosts: state.hosts().map(|n| report(state, n)).collect(),
        manager: state.node(MANAGER).ok().map(|n| report(state, n)),
        client: ClientReport { ip: CLIENT_IP, netns: netns_path(&state.name, CLIENT) },
        cut_racks: state.cut_racks.clone(),
        guests: state.guests.clone(),
    }
}

fn report(state: &LabState, node: &NodeState) -> NodeReport {
    let lab = &state.name;
    let init = node.init.filter(ProcessRef::is_alive);
    let power = match (node.init, init) {
        (None, _) => Power::Off,
        (_, Some(_)) => Power::On,
        _ => Power::Crashed,
    };
    let namespace = |init: ProcessRef, kind| (kind, PathBuf::from(format!("/proc/{}/ns/{kind}", init.pid)));
    let service = |(name, s): (String, ServiceStatus)| {
        let pid = s.pid.and_then(|pid| outer_pid(init?, pid));
        (name, ServiceReport { pid, restarts: s.restarts, last_end: s.last_end })
    };
    NodeReport {
        name: node.name.clone(),
        rack: node.rack.clone(),
        power,
        link_cut: node.link_cut,
        ip: node.ip,
        init_pid: init.map(|i| i.pid),
        namespaces: init
            .map(|i| ["net", "mnt", "pid", "uts", "ipc"].map(|kind| namespace(i, kind)).into())
            .unwrap_or_default(),
        libvirt_uri: (node.role == Role::Host).then(|| libvirt_uri(lab, &node.name)),
        daemon_socket: daemon_socket(lab, &node.name),
        run_dir: node_run_link(lab, &node.name),
        log_dir: node_var_dir(lab, &node.name).join("log"),
        services: init
            .and_then(host::status)
            .map(|s| s.services.into_iter().map(service).collect())
            .unwrap_or_default(),
    }
}

/// Number outside of a service of the node with this first process.
pub fn service_pid(init: ProcessRef, service: &str) -> Option<i32> {
    outer_pid(init, host::status(init)?.services.get(service)?.pid?)
}

impl LabStatus {
    /// As a table.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            " {:<9} {:<7} {:<8} {:<5} {:<12} {:<8} services\n",
            "Node", "Rack", "Power", "Link", "Address", "Init"
        );
        text += &"-".repeat(78);
        text.push('\n');
        for node in self.manager.iter().chain(&self.hosts) {
            let power = format!("{:?}", node.power).to_lowercase();
            let link = if node.link_cut || self.cut_racks.contains(&node.rack) { "cut" } else { "up" };
            let init = node.init_pid.map_or("-".into(), |p| p.to_string());
            let services: Vec<_> = node
                .services
                .iter()
                .map(|(name, s)| match (s.pid, s.restarts) {
                    (None, _) => format!("{name} (down)"),
                    (_, 0) => name.clone(),
                    (_, n) => format!("{name} ({n} restarts)"),
                })
                .collect();
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                " {:<9} {:<7} {power:<8} {link:<5} {:<12} {init:<8} {}",
                node.name,
                node.rack,
                node.ip,
                services.join(", ")
            );
        }
        let _ = writeln!(text, " {:<9} {:<7} {:<8} {:<5} {:<12}", "client", "spine", "on", "up", self.client.ip);
        if !self.guests.is_empty() {
            let _ = writeln!(text, "\n {:<16} {:<9} {:<14} {:>7}  workload", "Guest", "Made on", "Address", "Memory");
            text += &"-".repeat(78);
            text.push('\n');
            for (name, g) in &self.guests {
                let memory = format!("{} MiB", g.memory_mib);
                let _ = writeln!(text, " {name:<16} {:<9} {:<14} {memory:>8} {}", g.home, g.ip, g.workload);
            }
        }
        if let Some(host) = self.hosts.iter().find(|h| h.power == Power::On) {
            let _ = writeln!(text, "\nFrom outside, for {}:", host.name);
            let _ = writeln!(text, "  virsh -c '{}' list", host.libvirt_uri.as_deref().unwrap_or_default());
            let _ = writeln!(text, "  virt-shadow --connect {} hosts", host.daemon_socket.display());
        }
        text
    }
}

//! Network namespaces by name, the fabric of bridges in them, and processes started in namespaces of their own.
//!
//! ```text
//!   client   manager            fabric namespace
//!      \        |        ┌──────────────────────────────┐
//!       `-------`------->│ spine ── rack1 ── (port host1)│── uplink ─ br0 of host1 ─ taps of its guests
//!                        │       `─ rack2 ── (port host2)│── uplink ─ br0 of host2
//!                        └──────────────────────────────┘
//! ```
//! Nothing is connected to the machine's own network. A port of the fabric is named by the node at its other end, so
//! cutting a cable is taking that port down.

use std::fs::File;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};

use super::error::{LabError, Result};
use super::process::{in_netns, ns_inode, run, run_with_input};
use super::state::NET_PREFIX_LEN;

const NETNS_DIR: &str = "/run/netns";
pub const FABRIC: &str = "fabric";
pub const SPINE: &str = "spine";
/// Name inside a node of its end of the cable.
pub const UPLINK: &str = "uplink";
/// Bridge of a host, which its guests' taps join.
pub const HOST_BRIDGE: &str = "br0";
const FORWARDING_TIMEOUT: Duration = Duration::from_secs(10);
const FORWARDING_POLL: Duration = Duration::from_millis(5);
const BRIDGE_OPTIONS: &str = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";

pub fn netns_name(lab: &str, node: &str) -> String {
    format!("vsl.{lab}.{node}")
}

pub fn netns_path(lab: &str, node: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(netns_name(lab, node))
}

/// Names of the nodes of `lab` that have a network namespace.
pub fn list(lab: &str) -> Vec<String> {
    let prefix = netns_name(lab, "");
    let Ok(entries) = std::fs::read_dir(NETNS_DIR) else { return Vec::new() };
    entries.flatten().filter_map(|e| e.file_name().to_str()?.strip_prefix(&prefix).map(str::to_owned)).collect()
}

/// Makes the namespace with its loopback up and without IPv6, whose chatter would only blur measurements.
///
/// As `ip netns add` does it, so that `ip netns` knows it, but inside this process: a child would go on for a moment
/// after this process was killed, and mount its namespace over one of the next lab of this name.
pub fn add(lab: &str, node: &str) -> Result<()> {
    share_netns_dir()?;
    let path = netns_path(lab, node);
    File::create_new(&path).map_err(LabError::io("create", &path))?;
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(LabError::system("make a network namespace"))?;
        // Absent in a kernel without IPv6.
        for scope in ["all", "default"] {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1");
        }
        mount_at(Some("/proc/thread-self/ns/net"), &path, MsFlags::MS_BIND)
            .map_err(LabError::system(format!("mount {}", path.display())))
    })?;
    batch(lab, node, "link set lo up")
}

/// Makes what is mounted and unmounted in /run/netns so for every mount namespace of the machine.
fn share_netns_dir() -> Result<()> {
    let dir = Path::new(NETNS_DIR);
    std::fs::create_dir_all(dir).map_err(LabError::io("create", dir))?;
    let file = File::open(dir).map_err(LabError::io("open", dir))?;
    let _lock =
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| LabError::io("lock", dir)(errno.into()))?;
    let share = || mount_at(None, dir, MsFlags::MS_SHARED | MsFlags::MS_REC);
    match share() {
        // Not a mount point yet.
        Err(Errno::EINVAL) => mount_at(Some(NETNS_DIR), dir, MsFlags::MS_BIND | MsFlags::MS_REC).and_then(|()| share()),
        result => result,
    }
    .map_err(LabError::system(format!("share mounts in {NETNS_DIR}")))
}

fn mount_at(source: Option<&str>, target: &Path, flags: MsFlags) -> nix::Result<()> {
    mount(source, target, None::<&str>, flags, None::<&str>)
}

/// Ends every process in the namespace and removes it.
pub fn remove(lab: &str, node: &str) -> Result<()> {
    let path = netns_path(lab, node);
    if let Some(inode) = ns_inode(&path) {
        let left = in_netns(inode);
        left.iter().try_for_each(|p| p.kill())?;
        left.iter().try_for_each(|p| p.wait_end())?;
    }
    // Fails once nothing is mounted there.
    while umount2(&path, MntFlags::MNT_DETACH).is_ok() {}
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(LabError::io("remove", &path)(error)),
        _ => Ok(()),
    }
}

/// Runs `ip` commands, one a line, in the namespace of `node`.
fn batch(lab: &str, node: &str, lines: &str) -> Result<()> {
    run_with_input(Command::new("ip").args(["-n", &netns_name(lab, node), "-batch", "-"]), lines).map(drop)
}

/// Makes the spine and the racks' switches.
pub fn add_fabric(lab: &str, racks: &[String]) -> Result<()> {
    add(lab, FABRIC)?;
    let mut lines = format!("link add {SPINE} {BRIDGE_OPTIONS}\nlink set {SPINE} up\n");
    for rack in racks {
        let (down, up) = (spine_port(rack), rack_port(rack));
        lines += &format!(
            "link add {rack} {BRIDGE_OPTIONS}\nlink set {rack} up\n\
             link add {up} type veth peer name {down}\n\
             link set {up} master {rack} up\nlink set {down} master {SPINE} up\n"
        );
    }
    batch(lab, FABRIC, &lines)
}

/// Port of a rack's switch towards the spine.
pub fn rack_port(rack: &str) -> String {
    format!("{rack}-up")
}

/// The spine's port towards a rack.
pub fn spine_port(rack: &str) -> String {
    format!("{SPINE}-{rack}")
}

/// Connects a node to a switch of the fabric. With `bridged` its address is on its own bridge, else on the cable.
pub fn plug(lab: &str, node: &str, switch: &str, ip: std::net::Ipv4Addr, bridged: bool) -> Result<()> {
    let fabric = netns_name(lab, FABRIC);
    let [_, _, net, low] = ip.octets();
    let mac = |kind: u8| format!("02:77:{kind:02x}:00:{net:02x}:{low:02x}");
    let mut lines = format!(
        "link add {UPLINK} address {} type veth peer name {node} address {} netns {fabric}\nlink set {UPLINK} up\n",
        mac(1),
        mac(2)
    );
    let device = if bridged {
        lines += &format!(
            "link add {HOST_BRIDGE} address {} {BRIDGE_OPTIONS}\n\
             link set {UPLINK} master {HOST_BRIDGE}\nlink set {HOST_BRIDGE} up\n",
            mac(3)
        );
        HOST_BRIDGE
    } else {
        UPLINK
    };
    lines += &format!("address add {ip}/{NET_PREFIX_LEN} dev {device}\n");
    batch(lab, node, &lines)?;
    batch(lab, FABRIC, &format!("link set {node} master {switch}\nlink set {node} up\n"))
}

/// Removes a node's cable at once; the fate of its namespace, which the kernel ends later, no longer matters.
pub fn unplug(lab: &str, node: &str) -> Result<()> {
    batch(lab, FABRIC, &format!("link delete {node}\n"))
}

/// Takes a port of the fabric down or up: the other end loses or gets its carrier, both directions are dead or alive.
pub fn set_port(lab: &str, port: &str, up: bool) -> Result<()> {
    let state = if up { "up" } else { "down" };
    run(Command::new("ip").args(["-n", &netns_name(lab, FABRIC), "link", "set", port, state])).map(drop)
}

/// Waits until these interfaces, each (node, name), carry packets. The kernel finds carrier and lets a bridge's port
/// forward some time after a link was set up, mostly within a millisecond, at worst after a second.
pub fn wait_forwarding(lab: &str, interfaces: &[(&str, &str)]) -> Result<()> {
    let begin = Instant::now();
    for (node, interface) in interfaces {
        loop {
            let netns = netns_name(lab, node);
            let shown = run(Command::new("ip").args(["-n", &netns, "-d", "-o", "link", "show", interface]))?;
            let shown = String::from_utf8_lossy(&shown.stdout);
            if shown.contains(" state UP ") && (!shown.contains("bridge_slave") || shown.contains(" state forwarding "))
            {
                break;
            }
            if begin.elapsed() > FORWARDING_TIMEOUT {
                let what = format!("interface {interface} of {node} does not forward");
                let detail = shown.lines().next().unwrap_or_default().chars().take(200).collect();
                return Err(LabError::Timeout { what, waited_ms: begin.elapsed().as_millis(), detail });
            }
            std::thread::sleep(FORWARDING_POLL);
        }
    }
    Ok(())
}

/// Gives a node's cable IPv6, which it is made without; returns the number of the interface when its own address is there.
pub fn enable_ipv6(lab: &str, node: &str) -> Result<u32> {
    enter(&netns_path(lab, node), || {
        // Nobody else has this address, and there are no routers: it is of use at once, and quiet.
        for (setting, value) in [("accept_dad", "0"), ("router_solicitations", "0"), ("disable_ipv6", "0")] {
            let path = format!("/proc/sys/net/ipv6/conf/{UPLINK}/{setting}");
            std::fs::write(&path, value).map_err(LabError::io("write", path.as_ref()))?;
        }
        let begin = Instant::now();
        let path = Path::new("/proc/thread-self/net/if_inet6");
        while !has_link_local(&std::fs::read_to_string(path).map_err(LabError::io("read", path))?) {
            if begin.elapsed() > FORWARDING_TIMEOUT {
                let what = format!("interface {UPLINK} of {node} gets no IPv6 address");
                return Err(LabError::Timeout { what, waited_ms: begin.elapsed().as_millis(), detail: String::new() });
            }
            std::thread::sleep(FORWARDING_POLL);
        }
        if_nametoindex(UPLINK).map_err(LabError::system(format!("find interface {UPLINK} of {node}")))
    })?
}

/// Whether the uplink has a link-local address that may be used, in the words of `/proc/net/if_inet6`.
fn has_link_local(shown: &str) -> bool {
    const TENTATIVE: u8 = 0x40;
    shown.lines().any(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let flags = fields.get(4).and_then(|flags| u8::from_str_radix(flags, 16).ok());
        line.starts_with("fe80") && fields.last() == Some(&UPLINK) && flags.is_some_and(|flags| flags & TENTATIVE == 0)
    })
}

/// The address that a kernel gives an interface with this MAC by itself (RFC 4291, appendix A).
pub fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// Runs `work` on a thread of its own inside a network namespace; sockets made there stay there.
pub fn enter<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    let file = File::open(netns).map_err(LabError::io("open", netns))?;
    on_thread(move || {
        setns(file, CloneFlags::CLONE_NEWNET)
            .map_err(LabError::system(format!("enter network namespace {}", netns.display())))?;
        Ok(work())
    })
}

/// Namespaces are a thread's own: what `work` does to its thread's ends with the thread.
fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// Starts `command` as the first process of new pid, mount, uts and ipc namespaces, in the network of `netns`. Its
/// end ends all that it started.
pub fn spawn_node(netns: &Path, command: &mut Command) -> Result<Child> {
    enter(netns, || {
        // Only this thread changes, and it ends right after.
        let flags =
            CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWPID;
        unshare(flags).map_err(LabError::system("make namespaces"))?;
        command.spawn().map_err(LabError::system("start the node's first process"))
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_from_macs_and_are_waited_for() {
        assert_eq!(link_local([0x52, 0x54, 0, 0xeb, 0x64, 1]).to_string(), "fe80::5054:ff:feeb:6401");
        let line = |flags, device| format!("fe8000000000000010a85dfffef1f864 03 40 20 {flags}   {device}\n");
        assert!(has_link_local(&(line("80", "lo") + &line("80", UPLINK))));
        for not_yet in [String::new(), line("c0", UPLINK), line("80", "lo")] {
            assert!(!has_link_local(&not_yet), "{not_yet}");
        }
    }
}

//! A node's life: its files, its power.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::unistd::User;

use super::error::{LabError, Result};
use super::init::{InitSpec, NodeStatus, STATUS_PATH, ServiceSpec};
use super::namespace::{self, FABRIC, UPLINK};
use super::pki::{self, Authority};
use super::process::{self, ProcessRef};
use super::state::{CACHE_ROOT, LabState, MANAGER_IP, NodeState, QemuUser, Role, node_run_link, node_var_dir};
use crate::config::{AgentConfig, Config, DEFAULT_CONFIG_PATH, ManagerConfig};

/// Sync port of agents and control port of the manager, as in the configuration's defaults.
const SYNC_PORT: u16 = 7710;
const CONTROL_PORT: u16 = 7711;
/// How long the first process and then libvirtd may take; a busy machine with many hosts is slow.
const INIT_TIMEOUT: Duration = Duration::from_secs(20);
const LIBVIRT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a virtshadowd is waited for, and how often it may end meanwhile, before the lab goes on without.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(10);
const DAEMON_STARTS_MAX: u64 = 3;
const DAEMON: &str = "virtshadowd";
const POLL: Duration = Duration::from_millis(5);
/// Directories that a host keeps across a power cut, and where they appear on it.
const HOST_DIRS: [(&str, &str); 6] = [
    ("etc-libvirt", "/etc/libvirt"),
    ("var-lib-libvirt", "/var/lib/libvirt"),
    ("var-log-libvirt", "/var/log/libvirt"),
    ("var-cache-libvirt", "/var/cache/libvirt"),
    ("etc-virt-shadow", "/etc/virt-shadow"),
    ("var-lib-virt-shadow", "/var/lib/virt-shadow"),
];
/// Guests' consoles go here on every host, so a shadow finds the same path as its primary.
pub const CONSOLE_DIR: &str = "/var/log/libvirt/console";
/// The manager's topology file, on its node.
const TOPOLOGY: &str = "/etc/virt-shadow/topology.toml";
const CAPABILITIES: &str = "qemu/capabilities";

/// Programs of this project that a lab runs.
#[derive(Debug, Clone)]
pub struct Programs {
    pub lab: PathBuf,
    pub daemon: Option<PathBuf>,
    pub cli: Option<PathBuf>,
}

impl Programs {
    /// Looks in `VIRT_SHADOW_BIN_DIR`, else beside this executable (tests lie one directory below).
    pub fn find() -> Result<Self> {
        let own = std::env::current_exe().map_err(LabError::system("find this program's own file"))?;
        let beside = own.parent().unwrap_or(Path::new("/"));
        let dir = match std::env::var_os("VIRT_SHADOW_BIN_DIR") {
            Some(dir) => PathBuf::from(dir),
            None if beside.ends_with("deps") => beside.parent().unwrap_or(beside).into(),
            None => beside.into(),
        };
        let dir = dir.canonicalize().map_err(LabError::io("find", &dir))?;
        let at = |name: &str| Some(dir.join(name)).filter(|p| p.is_file());
        let lab = at("virt-shadow-lab").ok_or_else(|| LabError::Invalid {
            what: "program directory",
            value: dir.display().to_string(),
            reason: "has no virt-shadow-lab; set VIRT_SHADOW_BIN_DIR to where the programs are".into(),
        })?;
        Ok(Self { lab, daemon: at("virtshadowd"), cli: at("virt-shadow") })
    }
}

/// `qemu+unix:///system?socket=...` of a host, valid from outside of it.
pub fn libvirt_uri(lab: &str, host: &str) -> String {
    format!("qemu+unix:///system?socket={}", node_run_link(lab, host).join("libvirt/libvirt-sock").display())
}

pub fn daemon_socket(lab: &str, node: &str) -> PathBuf {
    node_run_link(lab, node).join("virt-shadow/virtshadowd.sock")
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(LabError::io("write", path))
}

fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(LabError::io("create", path))
}

/// Makes all files of a node that has never been started.
pub fn prepare(state: &LabState, node: &NodeState, programs: &Programs, authority: &Authority) -> Result<()> {
    let dir = node_var_dir(&state.name, &node.name);
    create_dir(&dir.join("log"))?;
    let mut binds = Vec::new();
    for (name, target) in HOST_DIRS {
        if node.role == Role::Host || target.contains("virt-shadow") {
            create_dir(&dir.join(name))?;
            binds.push((dir.join(name), PathBuf::from(target)));
        }
    }
    let known = state.nodes.iter().map(|n| format!("{} {}\n", n.ip, n.name)).collect::<String>();
    write(&dir.join("hosts"), &format!("127.0.0.1 localhost\n{known}"))?;
    binds.push((dir.join("hosts"), "/etc/hosts".into()));

    let mut services = Vec::new();
    let service = |name: &str, command: &[&str]| ServiceSpec {
        name: name.into(),
        command: command.iter().map(|w| w.to_string()).collect(),
        log: dir.join("log").join(format!("{name}.log")),
    };
    if node.role == Role::Host {
        prepare_libvirt(state, node, &dir, programs)?;
        services.push(service("libvirtd", &["libvirtd"]));
    }
    write_config(state, node, &dir)?;
    authority.issue(&node.name, node.ip.into(), &dir.join("etc-virt-shadow/pki"))?;
    if let (true, Some(daemon)) = (state.daemons, &programs.daemon) {
        let daemon = daemon.display().to_string();
        services.push(service(DAEMON, &[&daemon, "--config", DEFAULT_CONFIG_PATH]));
    }
    let spec = InitSpec { hostname: node.name.clone(), binds, services };
    let path = spec_path(&state.name, &node.name);
    let text = serde_json::to_string_pretty(&spec)
        .map_err(|e| LabError::Corrupt { path: path.clone(), reason: e.to_string() })?;
    write(&path, &text)
}

fn spec_path(lab: &str, node: &str) -> PathBuf {
    node_var_dir(lab, node).join("init.json")
}

fn prepare_libvirt(state: &LabState, node: &NodeState, dir: &Path, programs: &Programs) -> Result<()> {
    let etc = dir.join("etc-libvirt");
    let host_uuid = format!("host_uuid = \"{}\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n", node.uuid);
    write(&etc.join("libvirtd.conf"), &host_uuid)?;
    let (user, group, ownership) = match state.qemu_user {
        QemuUser::Root => ("root", "root", 0),
        QemuUser::LibvirtQemu => ("libvirt-qemu", "libvirt-qemu", 1),
    };
    // Shadows keep their RAM in shared files: these belong on tmpfs. One tmpfs per node, lost with its power.
    let qemu_conf = format!(
        "security_driver = \"none\"\nuser = \"{user}\"\ngroup = \"{group}\"\ndynamic_ownership = {ownership}\n\
         remember_owner = 0\ncgroup_controllers = []\nnamespaces = []\nstdio_handler = \"file\"\n\
         memory_backing_dir = \"/dev/shm\"\n"
    );
    write(&etc.join("qemu.conf"), &qemu_conf)?;
    create_dir(&etc.join("qemu"))?;
    let hooks = etc.join("hooks/qemu.d");
    create_dir(&hooks)?;
    if let Some(cli) = &programs.cli {
        let hook = hooks.join("virt-shadow");
        write(&hook, &format!("#!/bin/sh\nexec {} hook \"$@\"\n", cli.display()))?;
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).map_err(LabError::io("change mode of", &hook))?;
    }
    let console = dir.join("var-log-libvirt/console");
    create_dir(&console)?;
    if state.qemu_user == QemuUser::LibvirtQemu {
        let found = User::from_name(user).map_err(LabError::system(format!("look up user {user}")))?;
        let reason = "is not a user of this machine; install libvirt-daemon-system".into();
        let account = found.ok_or(LabError::Invalid { what: "QEMU user", value: user.into(), reason })?;
        chown(&console, Some(account.uid.as_raw()), Some(account.gid.as_raw()))
            .map_err(LabError::io("change owner of", &console))?;
    }
    // Asking a QEMU what it can do takes libvirtd a second: the first lab asks, later ones are told.
    copy_capabilities(&kept_capabilities(state.qemu_user), &dir.join("var-cache-libvirt").join(CAPABILITIES))
}

/// One place per user: what QEMU can do depends on whether its user may open /dev/kvm.
fn kept_capabilities(user: QemuUser) -> PathBuf {
    let name = match user {
        QemuUser::Root => "capabilities-root",
        QemuUser::LibvirtQemu => "capabilities-libvirt-qemu",
    };
    Path::new(CACHE_ROOT).join(name)
}

static COPIES: AtomicU64 = AtomicU64::new(0);

/// Copies libvirt's capability records; libvirtd itself checks whether they still fit this machine (where CPUID tells
/// on which CPU it was asked, they fit only half of the time).
fn copy_capabilities(from: &Path, to: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    create_dir(to)?;
    for entry in entries.flatten().filter(|e| e.path().extension().is_some_and(|x| x == "xml")) {
        // Two labs may keep the same record at a time, of one process as well.
        let number = COPIES.fetch_add(1, Ordering::Relaxed);
        let (target, new) = (to.join(entry.file_name()), to.join(format!("{}-{number}.new", std::process::id())));
        fs::copy(entry.path(), &new).map_err(LabError::io("copy", &entry.path()))?;
        fs::rename(&new, &target).map_err(LabError::io("replace", &target))?;
    }
    Ok(())
}

/// Keeps what the libvirtd of `host` found out for the labs to come.
pub fn keep_capabilities(state: &LabState, host: &str) -> Result<()> {
    let found = node_var_dir(&state.name, host).join("var-cache-libvirt").join(CAPABILITIES);
    copy_capabilities(&found, &kept_capabilities(state.qemu_user))
}

fn write_config(state: &LabState, node: &NodeState, dir: &Path) -> Result<()> {
    let is_host = node.role == Role::Host;
    let config = Config {
        host: node.name.clone(),
        rack: node.rack.clone(),
        labels: row(state, node).into_iter().collect(),
        agent: AgentConfig {
            enabled: is_host,
            manager: is_host.then(|| (MANAGER_IP, CONTROL_PORT).into()),
            sync_listen: (node.ip, SYNC_PORT).into(),
            record_dir: state.record_dir.clone(),
            ..AgentConfig::default()
        },
        manager: ManagerConfig {
            enabled: !is_host,
            listen: (node.ip, CONTROL_PORT).into(),
            topology: (!is_host && state.power_domains > 0).then(|| TOPOLOGY.into()),
            ..ManagerConfig::default()
        },
        transport: state.transport,
        tls: pki::config(Path::new("/etc/virt-shadow/pki")),
        ..Config::default()
    };
    if config.manager.topology.is_some() {
        write(&dir.join("etc-virt-shadow/topology.toml"), &topology(state))?;
    }
    let path = dir.join("etc-virt-shadow/virtshadowd.toml");
    let text = toml::to_string(&config)
        .map_err(|e| LabError::Corrupt { path: path.clone(), reason: format!("cannot be written: {e}") })?;
    write(&path, &text)
}

/// Label of a host: which of its rack it is, from `row1`.
fn row(state: &LabState, node: &NodeState) -> Option<String> {
    let of_rack = state.hosts().filter(|host| host.rack == node.rack);
    let number = of_rack.zip(1..).find(|(host, _)| host.name == node.name)?.1;
    Some(format!("row{number}"))
}

/// The site as the manager's file describes it.
fn topology(state: &LabState) -> String {
    let mut text = "survive = [\"rack\", \"switch\", \"power\"]\n".to_owned();
    for power in 1..=state.power_domains {
        text += &format!("[[power]]\nname = \"feed{power}\"\n");
    }
    for (number, rack) in super::raise::rack_names(state.racks).enumerate() {
        let power = number % usize::from(state.power_domains.max(1)) + 1;
        text += &format!("[[rack]]\nname = \"{rack}\"\npower = \"feed{power}\"\nlatency_us = 10\n");
    }
    for host in state.hosts() {
        text += &format!("[[host]]\nname = \"{}\"\nrack = \"{}\"\n", host.name, host.rack);
    }
    text
}

/// Plugs a node in and starts its first process. Returns once the node's services are being started.
pub fn power_on(lab: &str, node: &NodeState, programs: &Programs) -> Result<ProcessRef> {
    namespace::add(lab, &node.name)?;
    namespace::plug(lab, &node.name, &node.rack, node.ip, node.role == Role::Host)?;
    if node.link_cut {
        namespace::set_port(lab, &node.name, false)?;
    } else {
        namespace::wait_forwarding(lab, &[(FABRIC, &node.name), (&node.name, UPLINK)])?;
    }
    let log_path = node_var_dir(lab, &node.name).join("log/init.log");
    let log = OpenOptions::new().create(true).append(true).open(&log_path).map_err(LabError::io("open", &log_path))?;
    let errors = log.try_clone().map_err(LabError::io("open", &log_path))?;
    let mut command = Command::new(&programs.lab);
    command.args(["node-init".as_ref(), spec_path(lab, &node.name).as_os_str()]);
    command.stdin(Stdio::null()).stdout(log).stderr(errors).current_dir("/");
    let child = namespace::spawn_node(&namespace::netns_path(lab, &node.name), &mut command)?;
    let pid = child.id() as i32;
    let failed = |reason: String, waited: Duration| {
        let log = fs::read_to_string(&log_path).unwrap_or_default();
        let last = log.lines().last().unwrap_or("nothing in its log").to_owned();
        LabError::Timeout { what: format!("{}: {reason}", node.name), waited_ms: waited.as_millis(), detail: last }
    };
    let begin = Instant::now();
    let init = ProcessRef::of(pid).ok_or_else(|| failed("first process ended".into(), Duration::ZERO))?;
    while status(init).is_none() {
        if !init.is_alive() {
            init.wait_end()?;
            return Err(failed("first process ended".into(), begin.elapsed()));
        }
        if begin.elapsed() > INIT_TIMEOUT {
            init.kill()?;
            return Err(failed("first process is not ready".into(), begin.elapsed()));
        }
        std::thread::sleep(POLL);
    }
    let link = node_run_link(lab, &node.name);
    remove_if_there(&link)?;
    symlink(format!("/proc/{pid}/root/run"), &link).map_err(LabError::io("link", &link))?;
    Ok(init)
}

/// What the first process of a node tells about its services.
pub fn status(init: ProcessRef) -> Option<NodeStatus> {
    let path = format!("/proc/{}/root{STATUS_PATH}", init.pid);
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Waits until the host's libvirtd answers, and knows what its QEMU can do.
pub fn wait_libvirt(lab: &str, host: &str) -> Result<()> {
    let uri = libvirt_uri(lab, host);
    let begin = Instant::now();
    loop {
        match process::run(
            Command::new("virsh").args(["-c", &uri, "domcapabilities", "--virttype", "qemu"]).env("LC_ALL", "C"),
        ) {
            Ok(_) => return Ok(()),
            Err(error) if begin.elapsed() > LIBVIRT_TIMEOUT => {
                let log = node_var_dir(lab, host).join("log/libvirtd.log");
                return Err(LabError::Timeout {
                    what: format!("libvirtd of {host} does not answer"),
                    waited_ms: begin.elapsed().as_millis(),
                    detail: format!("{error}; see {}", log.display()),
                });
            }
            Err(_) => std::thread::sleep(POLL * 4),
        }
    }
}

/// Waits until the node's virtshadowd, if it is to run one, can be connected to. `false`: it does not start, or not
/// soon; the lab is useful without it, and its first process tries again for ever.
pub fn wait_daemon(lab: &str, node: &NodeState) -> bool {
    let begin = Instant::now();
    loop {
        let service = node.init.and_then(status).and_then(|s| s.services.get(DAEMON).cloned());
        let Some(service) = service else { return true };
        if UnixStream::connect(daemon_socket(lab, &node.name)).is_ok() {
            return true;
        }
        if service.restarts >= DAEMON_STARTS_MAX || begin.elapsed() > DAEMON_TIMEOUT {
            return false;
        }
        std::thread::sleep(POLL);
    }
}

/// Ends a node at once: its link first, so that no packet tells its peers, then all that runs on it. Returns when the
/// power went: the moment before the link went down.
pub fn power_cut(lab: &str, node: &NodeState) -> Result<Instant> {
    let has_netns = namespace::netns_path(lab, &node.name).exists();
    let cut = Instant::now();
    if has_netns {
        namespace::set_port(lab, &node.name, false)?;
    }
    if let Some(init) = node.init {
        init.kill()?;
        init.wait_end()?;
    }
    if has_netns {
        namespace::unplug(lab, &node.name)?;
        namespace::remove(lab, &node.name)?;
    }
    remove_if_there(&node_run_link(lab, &node.name))?;
    Ok(cut)
}

/// Removes a file or link that may be absent.
pub fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(LabError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

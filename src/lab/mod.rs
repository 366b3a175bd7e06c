//! Several hosts on one machine: namespaces, bridges, a libvirtd and a virtshadowd for each.
//!
//! A host is a set of namespaces (network, mount, pid, uts, ipc) with its own `/run`, `/etc/libvirt`, `/var/lib/...`
//! and a first process of ours (`init`). Killing that process is a power cut; starting it again finds the old `/var`.
//! Hosts hang on the bridge of their rack, racks on a spine, where the manager and the client are too (`namespace`).
//! Everything carries the lab's name, so several labs can be up at once; every lab uses the same addresses.
//!
//! ```text
//! /run/virt-shadow-lab/LAB/state.json      what there is (state)
//! /run/virt-shadow-lab/LAB/NODE            link to the node's own /run: libvirt/libvirt-sock, virt-shadow/*.sock
//! /var/lib/virt-shadow-lab/LAB/NODE/       what the node keeps without power: etc-*, var-*, log/
//! /var/cache/virt-shadow-lab/              guest image, libvirt's capability records; shared by labs, kept
//! /run/netns/vsl.LAB.{NODE,fabric,client}  networks
//! ```
//!
//! Tests use [`Lab`] itself; `virt-shadow-lab` is a thin face over it.

pub mod bench;
pub mod cli;
pub mod client;
pub mod demo;
mod error;
pub mod fleet;
mod guest;
pub mod history;
mod host;
mod image;
mod init;
mod namespace;
pub mod ping;
pub mod pki;
mod process;
mod raise;
mod state;
mod status;
mod watch;

use std::net::{Ipv4Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

pub use client::{DiskRecords, GUEST_PORT, GuestClient, GuestReply};
pub use error::{LabError, Result};
pub use guest::{Backing, GuestDisk, GuestOptions, Machine, StartedGuest, Workload};
pub use image::Software;
pub use process::ProcessRef;
pub use state::{CLIENT, GuestState, LabState, MANAGER, QemuUser};
pub use status::{LabStatus, NodeReport, Power};
pub use watch::{ClientWatch, WatchReport};

use host::Programs;
use namespace::{FABRIC, UPLINK};
use state::LabLock;

use crate::config::Transport;
use crate::packet::parse_mac;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A guest's first connection by IPv6.
const IPV6_WITHIN: Duration = Duration::from_secs(30);
/// Of a guest that boots: TCP itself would try again only after a second.
const PROBE_TIMEOUT: Duration = Duration::from_millis(200);
const CONNECT_POLL: Duration = Duration::from_millis(20);
/// How long a guest may take until its workload answers. Under TCG on a busy machine a boot of 4 s can take 30.
const GUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// What to raise.
#[derive(Debug, Clone)]
pub struct LabOptions {
    pub name: String,
    pub hosts: u8,
    /// Host i (from 1) is in rack (i - 1) % racks + 1.
    pub racks: u8,
    /// Rack i (from 1) hangs on power domain (i - 1) % power_domains + 1, and the manager has a topology file that says
    /// so; 0: hosts tell the manager their racks.
    pub power_domains: u8,
    pub qemu_user: QemuUser,
    /// How its daemons speak with each other; certificates are made in any case.
    pub transport: Transport,
    /// Whether virtshadowd runs on the hosts and the manager.
    pub daemons: bool,
    /// Where its agents record the epochs of guests, memory in the clear; for measuring codecs.
    pub record_dir: Option<PathBuf>,
    /// The lab lives no longer than this process: [`Lab`] removes it when dropped, and the next [`Lab::up`] of any
    /// process if this one dies before that.
    pub owned: bool,
    /// Progress lines on standard error.
    pub verbose: bool,
    /// Set from elsewhere (a signal) to stop raising and remove what there is.
    pub interrupt: Arc<AtomicBool>,
}

impl LabOptions {
    /// Three hosts in three racks, QEMU as root, with daemons, by hand.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            hosts: 3,
            racks: 3,
            power_domains: 0,
            qemu_user: QemuUser::Root,
            transport: Transport::Tls,
            daemons: true,
            record_dir: None,
            owned: false,
            verbose: false,
            interrupt: Arc::default(),
        }
    }

    /// As [`LabOptions::new`] for a test: owned by this process, with a name no other test process has.
    pub fn for_test(name: &str) -> Self {
        Self { owned: true, ..Self::new(&format!("t-{name}-{}", std::process::id())) }
    }
}

/// A lab that is up.
pub struct Lab {
    name: String,
    programs: Programs,
    owned: bool,
    verbose: bool,
}

impl Lab {
    /// Raises a lab, or finds it up as wished. What a crashed one left behind is removed first.
    pub fn up(options: &LabOptions) -> Result<Self> {
        require_root()?;
        let programs = Programs::find()?;
        if options.owned {
            raise::sweep();
        }
        raise::up(options, &programs)?;
        Ok(Self { name: options.name.clone(), programs, owned: options.owned, verbose: options.verbose })
    }

    /// Refers to a lab that is up; dropping this leaves it so.
    pub fn open(name: &str) -> Result<Self> {
        require_root()?;
        state::check_lab_name(name)?;
        let lab = Self { name: name.into(), programs: Programs::find()?, owned: false, verbose: false };
        lab.state().map(|_| lab)
    }

    /// Removes a lab, or what is left of it, with all its processes, networks and files.
    pub fn down(name: &str, keep_logs: bool) -> Result<Option<PathBuf>> {
        require_root()?;
        raise::down(name, keep_logs)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn state(&self) -> Result<LabState> {
        state::load(&self.name)?.ok_or_else(|| LabError::NotUp { lab: self.name.clone() })
    }

    /// Nodes, namespaces, sockets, processes, as they are now.
    pub fn status(&self) -> Result<LabStatus> {
        Ok(status::collect(&self.state()?))
    }

    /// Starts a guest on a host, and waits until its workload answers the client unless told not to.
    pub fn guest(&self, options: &GuestOptions, wait: bool) -> Result<StartedGuest> {
        options.check()?;
        self.state()?.running(&options.host)?;
        let on_disk = !options.disks.is_empty();
        let image = image::ensure(options.workload.software(), on_disk, &|line| self.say(line))?;
        let lock = LabLock::acquire(&self.name)?;
        let guest = lock.update(|state| {
            state.host(&options.host)?;
            let guest = options.enroll(state)?;
            state.guests.insert(options.name.clone(), guest.clone());
            Ok(guest)
        })?;
        let xml = options.xml(&guest, &image);
        let begin = Instant::now();
        let started = if let Err(error) = self.make_disks(options, image.data.as_deref()) {
            Err(error)
        } else if options.transient {
            self.virsh_with_input(&options.host, &["create", "/dev/stdin"], &xml)
        } else {
            self.virsh_with_input(&options.host, &["define", "/dev/stdin"], &xml)
                .and_then(|_| self.virsh(&options.host, &["start", &options.name]))
        };
        if let Err(error) = started {
            let _ = self.virsh(&options.host, &["undefine", &options.name]);
            lock.update(|state| Ok(state.guests.remove(&options.name)))?;
            return Err(error);
        }
        drop(lock);
        let boot_ms = match wait {
            true => {
                self.wait_guest(&options.name)?;
                Some(begin.elapsed().as_millis() as u64)
            }
            false => None,
        };
        let GuestState { uuid, ip, mac, .. } = guest;
        Ok(StartedGuest { name: options.name.clone(), host: options.host.clone(), uuid, ip, mac, boot_ms })
    }

    /// The first of them begins with that data.
    fn make_disks(&self, options: &GuestOptions, data: Option<&Path>) -> Result<()> {
        for (number, disk) in options.disks.iter().enumerate() {
            let script = disk.script(&options.name, number, data.filter(|_| number == 0));
            let output = self.exec(&options.host, &["sh", "-c", &script])?;
            if !output.status.success() {
                let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                return Err(LabError::Product(format!("cannot make a disk of {}: {reason}", options.name)));
            }
        }
        Ok(())
    }

    /// A script that runs among the programs of a software on this machine, with the folder `work` at /work, at the
    /// client's place in the network.
    pub fn at_client_with(&self, software: Software, work: &Path, script: &str) -> Result<Command> {
        let toolbox = image::toolbox(software, &|line| self.say(line))?;
        let inner = toolbox.command(work, script);
        let mut command = self.command(CLIENT, "unshare")?;
        command.args(inner.get_args()).env_clear().env("PATH", image::HOST_PATH);
        Ok(command)
    }

    /// Waits until the guest's workload answers the client; real software also has to have done some work.
    pub fn wait_guest(&self, name: &str) -> Result<GuestReply> {
        let guest = self.guest_state(name)?;
        let software = guest.workload.parse::<Workload>().is_ok_and(|workload| workload.software().is_some());
        let begin = Instant::now();
        loop {
            let reply = self.connect_within(guest.ip, GUEST_PORT, PROBE_TIMEOUT).and_then(|stream| {
                let mut client = GuestClient::new(stream);
                client
                    .set_timeout(Some(CONNECT_TIMEOUT))
                    .and_then(|()| client.status())
                    .map_err(LabError::system("ask the guest"))
            });
            let reply = reply.and_then(|reply| match reply {
                GuestReply { work: 0, errors: 0, .. } if software => {
                    Err(LabError::Product(format!("{} has not done anything yet", guest.workload)))
                }
                reply => Ok(reply),
            });
            match reply {
                Ok(reply) if software && reply.errors > 0 => {
                    let console = self.console_log(&guest.home, name);
                    let reason = format!("{} failed in the guest; its console: {}", guest.workload, console.display());
                    return Err(LabError::Product(reason));
                }
                Ok(reply) => return Ok(reply),
                Err(error) if begin.elapsed() > GUEST_TIMEOUT => {
                    let console = self.console_log(&guest.home, name);
                    let what = format!("guest {name} does not answer at {}", guest.ip);
                    let detail = format!("{error}; its console: {}", console.display());
                    return Err(LabError::Timeout { what, waited_ms: begin.elapsed().as_millis(), detail });
                }
                Err(_) => std::thread::sleep(CONNECT_POLL),
            }
        }
    }

    /// Removes a guest wherever it runs or is defined.
    pub fn remove_guest(&self, name: &str) -> Result<()> {
        self.guest_state(name)?;
        let state = self.state()?;
        for host in state.hosts().filter(|h| state.running(&h.name).is_ok()) {
            // Fails where the guest is not.
            let _ = self.virsh(&host.name, &["destroy", name]);
            let _ = self.virsh(&host.name, &["undefine", name]);
        }
        LabLock::acquire(&self.name)?.update(|state| Ok(state.guests.remove(name))).map(drop)
    }

    pub fn guest_state(&self, name: &str) -> Result<GuestState> {
        let state = self.state()?;
        state.guests.get(name).cloned().ok_or_else(|| LabError::Unknown {
            lab: self.name.clone(),
            what: "guest",
            name: name.into(),
            known: state.guests.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    /// A connection to a workload from the client's place in the network.
    pub fn guest_client(&self, ip: Ipv4Addr) -> Result<GuestClient> {
        self.connect_from_client(ip, GUEST_PORT).map(GuestClient::new)
    }

    /// The same over IPv6, at the address that the guest gives itself; the client has IPv6 from here on.
    pub fn guest_client_by_ipv6(&self, guest: &StartedGuest) -> Result<GuestClient> {
        let mac = parse_mac(&guest.mac).ok_or_else(|| LabError::Product(format!("{} is no MAC", guest.mac)))?;
        let interface = namespace::enable_ipv6(&self.name, CLIENT)?;
        let addr = SocketAddrV6::new(namespace::link_local(mac), GUEST_PORT, 0, interface);
        let netns = namespace::netns_path(&self.name, CLIENT);
        // On a busy machine a guest that has just booted may still be at seeing that nobody else has its address.
        let give_up_at = Instant::now() + IPV6_WITHIN;
        loop {
            match client::connect_in(&netns, addr.into(), CONNECT_TIMEOUT) {
                Err(_) if Instant::now() < give_up_at => std::thread::sleep(CONNECT_POLL),
                connected => return connected.map(GuestClient::new),
            }
        }
    }

    /// A TCP connection from the client's place in the network.
    pub fn connect_from_client(&self, ip: Ipv4Addr, port: u16) -> Result<std::net::TcpStream> {
        self.connect_within(ip, port, CONNECT_TIMEOUT)
    }

    /// Echoes from the client's place in the network.
    pub fn ping_from_client(&self, ip: Ipv4Addr) -> Result<ping::Ping> {
        ping::Ping::in_namespace(&namespace::netns_path(&self.name, CLIENT), ip)
    }

    fn connect_within(&self, ip: Ipv4Addr, port: u16, timeout: Duration) -> Result<std::net::TcpStream> {
        client::connect_in(&namespace::netns_path(&self.name, CLIENT), (ip, port).into(), timeout)
    }

    /// A client that asks the workload at `ip` every `interval` and measures what it sees.
    pub fn watch(&self, ip: Ipv4Addr, interval: Duration) -> Result<ClientWatch> {
        ClientWatch::start(namespace::netns_path(&self.name, CLIENT), ip, interval)
    }

    /// Ends a host (or the manager) as a power failure does; returns the moment. All of it is gone on return.
    pub fn power_cut(&self, node: &str) -> Result<Instant> {
        let lock = LabLock::acquire(&self.name)?;
        let mut state = lock.load()?;
        state.running(node)?;
        let cut = host::power_cut(&self.name, state.node(node)?)?;
        state.node_mut(node)?.init = None;
        lock.save(&state)?;
        Ok(cut)
    }

    /// Starts a node that has no power; its `/etc` and `/var` are as it left them.
    pub fn power_on(&self, node: &str) -> Result<()> {
        let lock = LabLock::acquire(&self.name)?;
        let mut state = lock.load()?;
        if state.running(node).is_ok() {
            let reason = "has power already".into();
            return Err(LabError::Invalid { what: "node", value: node.into(), reason });
        }
        raise::power_on(&lock, &mut state, node, &self.programs)
    }

    /// Cuts the cable of a node, or of a rack towards the spine; both directions are dead until healed.
    pub fn cut_link(&self, name: &str) -> Result<()> {
        self.set_link(name, true)
    }

    pub fn heal_link(&self, name: &str) -> Result<()> {
        self.set_link(name, false)
    }

    fn set_link(&self, name: &str, cut: bool) -> Result<()> {
        LabLock::acquire(&self.name)?.update(|state| {
            let rack = raise::rack_names(state.racks).find(|r| r == name);
            if let Some(rack) = rack {
                let (rack_port, spine_port) = (namespace::rack_port(&rack), namespace::spine_port(&rack));
                namespace::set_port(&self.name, &rack_port, !cut)?;
                if !cut {
                    namespace::wait_forwarding(&self.name, &[(FABRIC, &rack_port), (FABRIC, &spine_port)])?;
                }
                state.cut_racks.retain(|r| *r != rack);
                if cut {
                    state.cut_racks.push(rack);
                }
                return Ok(());
            }
            let has_power = state.running(name).is_ok();
            let node = state.node_mut(name)?;
            if has_power {
                namespace::set_port(&self.name, name, !cut)?;
                if !cut {
                    namespace::wait_forwarding(&self.name, &[(FABRIC, name), (name, UPLINK)])?;
                }
            }
            node.link_cut = cut;
            Ok(())
        })
    }

    /// A command to run on a node, with all of its namespaces, or at the `client`, with its network only.
    pub fn command(&self, node: &str, program: &str) -> Result<Command> {
        let mut command = Command::new("nsenter");
        if node == CLIENT {
            command.arg(format!("--net={}", namespace::netns_path(&self.name, CLIENT).display()));
        } else {
            let init = self.state()?.running(node)?;
            command.args(["-t", &init.pid.to_string(), "-m", "-u", "-i", "-n", "-p", "--wd=/"]);
        }
        command.args(["--", program]);
        Ok(command)
    }

    /// Runs a command on a node (or at the `client`) to its end; its exit code is in the output.
    pub fn exec(&self, node: &str, argv: &[&str]) -> Result<Output> {
        let (program, args) = argv.split_first().ok_or_else(|| LabError::Invalid {
            what: "command",
            value: String::new(),
            reason: "names no program".into(),
        })?;
        let mut command = self.command(node, program)?;
        command.args(args).output().map_err(LabError::system("run nsenter"))
    }

    /// Runs virsh against a host's libvirtd; returns its output.
    pub fn virsh(&self, host: &str, args: &[&str]) -> Result<String> {
        self.virsh_with_input(host, args, "")
    }

    fn virsh_with_input(&self, host: &str, args: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", &self.libvirt_uri(host)]).args(args).env("LC_ALL", "C");
        let output = process::run_with_input(&mut command, input)?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Usable from outside of the host while it has power.
    pub fn libvirt_uri(&self, host: &str) -> String {
        host::libvirt_uri(&self.name, host)
    }

    /// Socket of the REST API of a host's (or the manager's) virtshadowd, usable from outside.
    pub fn daemon_socket(&self, node: &str) -> PathBuf {
        host::daemon_socket(&self.name, node)
    }

    /// A service's process (`libvirtd`, `virtshadowd`), by its number outside; none while it is not running.
    pub fn service_pid(&self, node: &str, service: &str) -> Result<Option<i32>> {
        let init = self.state()?.running(node)?;
        Ok(status::service_pid(init, service))
    }

    /// Number outside of a process that a node's daemon has started with that word, as `gate`.
    pub fn companion_pid(&self, node: &str, word: &str) -> Result<Option<i32>> {
        Ok(self.service_pid(node, "virtshadowd")?.and_then(|daemon| process::child_with_word(daemon, word)))
    }

    /// Log of `init`, `libvirtd` or `virtshadowd` of a node.
    pub fn service_log(&self, node: &str, service: &str) -> PathBuf {
        state::node_var_dir(&self.name, node).join("log").join(format!("{service}.log"))
    }

    /// What a guest printed while it ran on this host.
    pub fn console_log(&self, host: &str, guest: &str) -> PathBuf {
        state::node_var_dir(&self.name, host).join("var-log-libvirt/console").join(format!("{guest}.log"))
    }

    fn say(&self, line: &str) {
        if self.verbose {
            eprintln!("lab {}: {line}", self.name);
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        match raise::down(&self.name, false) {
            // Taken down by hand meanwhile.
            Ok(_) | Err(LabError::NotUp { .. }) => {}
            Err(error) => eprintln!("lab {}: cannot be removed: {error}", self.name),
        }
    }
}

fn require_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(LabError::NotRoot) }
}

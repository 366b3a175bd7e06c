//! The command line of `virt-shadow-lab`.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::config::Transport;
use clap::{Parser, Subcommand, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use serde::Serialize;

use super::bench::{self, BenchOptions};
use super::error::{LabError, Result};
use super::guest::{Backing, GuestDisk, GuestOptions, Machine, Workload, memory_mib};
use super::{Lab, LabOptions, QemuUser, demo, image, init};

/// Several hosts on this one machine, each with its own network, libvirtd and virtshadowd, to try and to test
/// virt-shadow: with racks, guests that check their own memory, power cuts and cut cables. Needs root.
#[derive(Debug, Parser)]
#[command(name = "virt-shadow-lab", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Name of the lab; several can be up at once
    #[arg(long, global = true, default_value = DEFAULT_LAB, value_name = "LAB", env = "VIRT_SHADOW_LAB")]
    name: String,
    /// How to print results
    #[arg(long, global = true, default_value = "text", value_name = "FORMAT")]
    format: Format,
    #[command(subcommand)]
    command: LabCommand,
}

const DEFAULT_LAB: &str = "lab";

const EXAMPLES: &str = "\
Examples:
  virt-shadow-lab up                                     three hosts in three racks
  virt-shadow-lab guest web --host host1 --workload busy a guest that works and checks its memory
  virt-shadow-lab status --format json                   where everything is
  virt-shadow-lab exec host1 -- virsh list               a command on a host
  virt-shadow-lab ask web --verify                       the guest as its clients see it
  virt-shadow-lab power-cut host1                        host1 and its guests are gone at once
  virt-shadow-lab down                                   nothing is left";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Raise the lab: networks, hosts, manager, client; a lab that is up already is left as it is
    Up {
        /// Number of hosts: host1, host2, ...
        #[arg(long, default_value_t = 3, value_name = "N")]
        hosts: u8,
        /// Number of racks; hosts are dealt out to them in turn
        #[arg(long, default_value_t = 3, value_name = "M")]
        racks: u8,
        /// Number of power domains; racks are dealt out to them in turn, and the manager gets a topology file
        #[arg(long, default_value_t = 0, value_name = "P")]
        power_domains: u8,
        /// User that libvirt runs QEMU as
        #[arg(long, default_value = "root", value_name = "USER")]
        qemu_user: QemuUser,
        /// Without TLS between the daemons
        #[arg(long)]
        plain_tcp: bool,
        /// Raise hosts without virtshadowd
        #[arg(long)]
        no_daemon: bool,
    },
    /// Take the lab down and remove all of it
    Down {
        /// Leave the logs of hosts and guests in /var/log/virt-shadow-lab/LAB
        #[arg(long)]
        keep_logs: bool,
    },
    /// Show hosts, their power, sockets, processes and namespaces, and the guests made
    Status,
    /// Lose a host under a protected guest, in a lab of its own, and show what that costs
    Demo,
    /// Measure the product in labs of its own, beside what it can be compared with, and print a table
    Bench(BenchOptions),
    /// Start a new guest on a host and print its address
    Guest {
        /// Name of the guest
        guest: String,
        /// Host to start it on
        #[arg(long, value_name = "H")]
        host: String,
        /// Memory in MiB, or as 512M or 1G; 256 if not given, 1024 with redis, postgres or gcc (384 for a database on a disk)
        #[arg(long, value_name = "MIB", value_parser = memory_mib)]
        memory: Option<u32>,
        /// Virtual CPUs
        #[arg(long, default_value_t = 1, value_name = "N")]
        cpus: u32,
        /// What it does: idle, counter (CPU), dirty:RATE (pages/s written and checked), random[:RATE] (the
        /// same, incompressible), busy[:RATE] (counter and dirty); a region other than 64 MiB: dirty:RATE:MIB. Or real
        /// software under load: redis, postgres, gcc (packages are downloaded the first time); with a disk, redis and
        /// postgres keep their data there and leave the load to clients
        #[arg(long, default_value = "idle", value_name = "WORKLOAD")]
        workload: Workload,
        /// Machine type
        #[arg(long, default_value = "q35", value_name = "TYPE")]
        machine: Machine,
        /// Where QEMU takes the guest's memory from
        #[arg(long, default_value = "anonymous", value_name = "KIND")]
        backing: Backing,
        /// Give it a disk with an ext4 file system, on which it writes and checks fsync'd records, or has its data;
        /// twice for two disks
        #[arg(long, value_name = "MIB[:raw|qcow2]")]
        disk: Vec<GuestDisk>,
        /// Create it without a definition that outlives it
        #[arg(long)]
        transient: bool,
        /// Without the virtio balloon that libvirt gives every guest: less state to write and to load
        #[arg(long)]
        no_balloon: bool,
        /// Frames that its interface takes while nobody empties it: 256 (QEMU's usual), 512 or 1024
        #[arg(long, value_name = "FRAMES")]
        rx_queue: Option<u32>,
        /// Do not wait until it answers
        #[arg(long)]
        no_wait: bool,
    },
    /// Ask a guest's workload from the client: its counters, errors and whether its memory is right
    Ask {
        /// Name of the guest
        guest: String,
        /// Check the whole pattern in its memory first
        #[arg(long)]
        verify: bool,
    },
    /// Remove a guest from all hosts
    RemoveGuest {
        /// Name of the guest
        guest: String,
    },
    /// End a host, with all that runs on it, as a power failure does
    PowerCut {
        /// host1, host2, ... or manager
        node: String,
    },
    /// Start a host whose power was cut; its /etc and /var are as it left them, its /run is empty
    PowerOn {
        /// host1, host2, ... or manager
        node: String,
    },
    /// Cut the cable of a host, or that of a rack towards the spine
    CutLink {
        /// host1, ..., manager, rack1, ...
        node: String,
    },
    /// Connect a cut cable again
    HealLink {
        /// host1, ..., manager, rack1, ...
        node: String,
    },
    /// Run a command on a host, on the manager, or at the client; ends with its exit code
    Exec {
        /// host1, ..., manager or client
        node: String,
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Make the guests' kernel and initramfs, or find them in the cache
    #[command(hide = true)]
    Image {
        /// For this workload
        #[arg(default_value = "idle", value_name = "WORKLOAD")]
        workload: Workload,
    },
    /// First process of a node
    #[command(hide = true)]
    NodeInit { spec: PathBuf },
}

/// Runs the program; errors go to standard error.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let action = cli.action();
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: failed to {action}\nerror: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Cli {
    fn action(&self) -> String {
        let lab = &self.name;
        match &self.command {
            LabCommand::Up { .. } => format!("raise lab {lab}"),
            LabCommand::Down { .. } => format!("take lab {lab} down"),
            LabCommand::Demo => "run the demo".into(),
            LabCommand::Bench(_) => "run the benchmarks".into(),
            LabCommand::Status => format!("show lab {lab}"),
            LabCommand::Guest { guest, host, .. } => format!("start guest {guest} on {host}"),
            LabCommand::Ask { guest, .. } => format!("ask guest {guest}"),
            LabCommand::RemoveGuest { guest } => format!("remove guest {guest}"),
            LabCommand::PowerCut { node } => format!("cut the power of {node}"),
            LabCommand::PowerOn { node } => format!("start {node}"),
            LabCommand::CutLink { node } => format!("cut the link of {node}"),
            LabCommand::HealLink { node } => format!("heal the link of {node}"),
            LabCommand::Exec { node, .. } => format!("run a command on {node}"),
            LabCommand::Image { workload } => format!("make the image of guests that do {workload}"),
            LabCommand::NodeInit { .. } => "run a node".into(),
        }
    }

    fn run(self) -> Result<ExitCode> {
        let (name, json) = (self.name, self.format == Format::Json);
        let open = || Lab::open(&name);
        match self.command {
            LabCommand::Up { hosts, racks, power_domains, qemu_user, plain_tcp, no_daemon } => {
                let interrupt = watch_interrupt()?;
                let base = LabOptions::new(&name);
                let transport = if plain_tcp { Transport::PlainTcp } else { base.transport };
                let options = LabOptions {
                    hosts,
                    racks,
                    power_domains,
                    qemu_user,
                    transport,
                    daemons: !no_daemon,
                    verbose: true,
                    interrupt,
                    ..base
                };
                Lab::up(&options)?;
            }
            LabCommand::Down { keep_logs } => {
                match Lab::down(&name, keep_logs) {
                    Ok(None) => eprintln!("lab {name}: down"),
                    Ok(Some(dir)) => eprintln!("lab {name}: down; its logs are in {}", dir.display()),
                    // What was asked for is so: scripts may take down without looking first.
                    Err(LabError::NotUp { .. }) => eprintln!("lab {name}: was not up"),
                    Err(error) => return Err(error),
                }
            }
            LabCommand::Demo => {
                let began = Instant::now();
                let say = |line: &str| {
                    if !line.is_empty() {
                        eprintln!("[{:6.1} s] {line}", began.elapsed().as_secs_f64());
                    }
                };
                let report = demo::run(&own_name(&name, "demo"), watch_interrupt()?, &say)?;
                print(json, &report, || format!("\n{}", report.to_text()));
            }
            LabCommand::Bench(options) => {
                bench::run(&own_name(&name, "bench"), &options, json, watch_interrupt()?)?;
            }
            LabCommand::Status => {
                let status = open()?.status()?;
                print(json, &status, || status.to_text());
            }
            LabCommand::Guest {
                guest,
                host,
                memory,
                cpus,
                workload,
                machine,
                backing,
                disk,
                transient,
                no_balloon,
                rx_queue,
                no_wait,
            } => {
                let balloon = !no_balloon;
                let memory_mib = memory.unwrap_or_else(|| workload.default_memory_mib(!disk.is_empty()));
                let options = GuestOptions {
                    name: guest,
                    host,
                    memory_mib,
                    cpus,
                    workload,
                    machine,
                    backing,
                    disks: disk,
                    transient,
                    balloon,
                    rx_queue,
                };
                let mut lab = open()?;
                lab.verbose = true;
                let started = lab.guest(&options, !no_wait)?;
                if let Some(boot_ms) = started.boot_ms {
                    eprintln!("lab {name}: {} answers after {:.1} s", started.name, boot_ms as f64 / 1e3);
                }
                print(json, &started, || format!("{}\n", started.ip));
            }
            LabCommand::Ask { guest, verify } => {
                let lab = open()?;
                let mut client = lab.guest_client(lab.guest_state(&guest)?.ip)?;
                if verify {
                    client.verify().map_err(LabError::system("verify the guest's memory"))?;
                }
                let reply = client.status().map_err(LabError::system("ask the guest"))?;
                print(json, &reply, || {
                    format!(
                        "boot {}, up {:.1} s, {} units of work, {} pages written, {} checks, {} errors\n",
                        reply.boot,
                        reply.uptime_ms as f64 / 1e3,
                        reply.work,
                        reply.dirty,
                        reply.checks,
                        reply.errors
                    )
                });
            }
            LabCommand::RemoveGuest { guest } => open()?.remove_guest(&guest)?,
            LabCommand::PowerCut { node } => {
                let lab = open()?;
                let cut = lab.power_cut(&node)?;
                eprintln!(
                    "lab {name}: {node} has no power; all of it was gone within {} ms",
                    cut.elapsed().as_millis()
                );
            }
            LabCommand::PowerOn { node } => {
                let (lab, begin) = (open()?, Instant::now());
                lab.power_on(&node)?;
                eprintln!("lab {name}: {node} is up after {:.1} s", begin.elapsed().as_secs_f64());
            }
            LabCommand::CutLink { node } => open()?.cut_link(&node)?,
            LabCommand::HealLink { node } => open()?.heal_link(&node)?,
            LabCommand::Exec { node, command } => {
                let (program, args) = command.split_first().ok_or(LabError::Interrupted)?;
                // Replaces this process: terminal, signals and exit code are the command's own.
                let error = open()?.command(&node, program)?.args(args).exec();
                return Err(LabError::system("run nsenter")(error));
            }
            LabCommand::Image { workload } => {
                let image = image::ensure(workload.software(), false, &|line| eprintln!("{line}"))?;
                print(json, &image, || format!("{}\n{}\n", image.kernel.display(), image.initrd.display()));
            }
            LabCommand::NodeInit { spec } => match init::run(&spec)? {},
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print<T: Serialize>(json: bool, value: &T, text: impl Fn() -> String) {
    use std::io::Write;
    let json_text = || serde_json::to_string_pretty(value).unwrap_or_else(|e| format!("{{\"error\": \"{e}\"}}"));
    let text = if json { json_text() + "\n" } else { text() };
    // A reader that left (a closed pipe) wants no more.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Name of a lab that a command raises for itself: never the one raised by hand.
fn own_name(name: &str, purpose: &str) -> String {
    if name == DEFAULT_LAB { purpose.to_owned() } else { name.to_owned() }
}

/// From now on SIGINT and SIGTERM set the flag instead of ending the program.
fn watch_interrupt() -> Result<Arc<AtomicBool>> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().map_err(LabError::system("block signals"))?;
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            set.store(true, Ordering::Relaxed);
            eprintln!("interrupted; cleaning up");
        }
    });
    Ok(flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}

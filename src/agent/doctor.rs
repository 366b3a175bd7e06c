//! Can this host be a primary's or a shadow's host, with which tracker, and what is missing?

use std::fs;
use std::path::Path;

use nix::sys::statfs::TMPFS_MAGIC;

use crate::api::types::{DoctorCheck, DoctorReport};
use crate::capture::uffd;
use crate::config::{Config, TrackerChoice, Transport};
use crate::transport::Security;

use super::libvirt::Libvirt;

/// Oldest QEMU that tells host addresses of its RAM blocks.
const OLDEST_QEMU: (u32, u32, u32) = (8, 0, 0);
/// libvirt runs executables in this folder for every domain.
const HOOK_DIR: &str = "/etc/libvirt/hooks/qemu.d";

fn check(name: &str, outcome: Result<String, (String, String)>, required: bool) -> DoctorCheck {
    let (status, found, remedy) = match outcome {
        Ok(found) => ("ok", found, String::new()),
        Err((found, remedy)) => (if required { "missing" } else { "warning" }, found, remedy),
    };
    DoctorCheck { name: name.into(), status: status.into(), found, remedy }
}

/// What guests of this host would be tracked with, and why.
pub fn tracker(choice: TrackerChoice) -> (&'static str, String) {
    match (choice, uffd::probe()) {
        (TrackerChoice::Hash, _) => ("hash", "the configuration asks for it".into()),
        (_, Ok(())) => ("userfaultfd", "the kernel tracks writes exactly, at the least cost".into()),
        (TrackerChoice::Userfaultfd, Err(missing)) => ("none", missing),
        (_, Err(missing)) => ("hash", missing),
    }
}

/// Looks at everything. Blocks for a few milliseconds.
pub fn examine(config: &Config, libvirt: &Libvirt, manager_connected: bool) -> DoctorReport {
    let (tracker, tracker_why) = tracker(config.agent.tracker);
    let checks = vec![
        check("libvirt", libvirt_version(config, libvirt), true),
        check("qemu", qemu_version(libvirt), true),
        check("trace", may_trace(), true),
        check(
            "tracker",
            if tracker == "none" {
                let remedy = "set agent.tracker to auto, or use Linux 6.7 or newer";
                Err((format!("userfaultfd is asked for but not possible: {tracker_why}"), remedy.into()))
            } else if tracker == "hash" && config.agent.tracker != TrackerChoice::Hash {
                let remedy = "with Linux 6.7 or newer cuts are 100 times cheaper than by comparing hashes";
                Err((format!("hash: {tracker_why}"), remedy.into()))
            } else {
                Ok(format!("{tracker}: {tracker_why}"))
            },
            false,
        ),
        check("run_dir", tmpfs(&config.run_dir), false),
        check("memory", free_memory(), false),
        check("hook", hook(), false),
        check("transport", transport(config), false),
        check(
            "manager",
            if manager_connected {
                Ok("connected".into())
            } else {
                Err((
                    "not connected".into(),
                    "start virtshadowd with the manager role, or correct agent.manager".into(),
                ))
            },
            false,
        ),
    ];
    let ok = |name: &str| checks.iter().any(|check| check.name == name && check.status == "ok");
    let usable = ok("libvirt") && ok("qemu");
    DoctorReport {
        host: config.host.clone(),
        primary: usable && ok("trace") && tracker != "none",
        standby: usable,
        tracker: tracker.into(),
        checks,
    }
}

type Outcome = Result<String, (String, String)>;

fn version(v: (u32, u32, u32)) -> String {
    format!("{}.{}.{}", v.0, v.1, v.2)
}

fn libvirt_version(config: &Config, libvirt: &Libvirt) -> Outcome {
    match libvirt.get().and_then(|hypervisor| hypervisor.libvirt_version()) {
        Ok(found) => Ok(format!("libvirt {} at {}", version(found), config.agent.libvirt_uri)),
        Err(error) => Err((error.to_string(), "start libvirtd, or correct agent.libvirt_uri".into())),
    }
}

fn qemu_version(libvirt: &Libvirt) -> Outcome {
    match libvirt.get().and_then(|hypervisor| hypervisor.qemu_version()) {
        Ok(found) if found >= OLDEST_QEMU => Ok(format!("QEMU {}", version(found))),
        Ok(found) => Err((format!("QEMU {}", version(found)), "install QEMU 8.0 or newer".into())),
        Err(error) => Err((error.to_string(), "install qemu-system".into())),
    }
}

/// The daemon would not run with certificates that cannot be read; whether they name this host is another matter.
fn transport(config: &Config) -> Outcome {
    match config.transport {
        Transport::PlainTcp => Err((
            "plain-tcp: whoever reaches the network can read and change guests' memory".into(),
            "make certificates (docs/security.md) and set transport to tls".into(),
        )),
        Transport::Tls => match Security::speaks_for(&config.tls, &config.host) {
            Ok(()) => Ok(format!("tls, as {}", config.host)),
            Err(reason) => {
                Err((reason, format!("make certificates with dns_name = {} (docs/security.md)", config.host)))
            }
        },
    }
}

/// Reading QEMU's memory and making it open a pipe both need the right to trace it.
fn may_trace() -> Outcome {
    const CAP_SYS_PTRACE: u64 = 1 << 19;
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    if scope.trim() == "3" {
        let remedy = "kernel.yama.ptrace_scope cannot be lowered again; boot with a value below 3";
        return Err(("kernel.yama.ptrace_scope is 3: nobody may trace".into(), remedy.into()));
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let capabilities = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    if capabilities & CAP_SYS_PTRACE == 0 {
        return Err(("no CAP_SYS_PTRACE".into(), "run virtshadowd as root or with CAP_SYS_PTRACE".into()));
    }
    if !cfg!(target_arch = "x86_64") {
        return Err(("not an x86-64 host".into(), "primaries can only be on x86-64 hosts".into()));
    }
    Ok("CAP_SYS_PTRACE held".into())
}

fn tmpfs(run_dir: &Path) -> Outcome {
    match nix::sys::statfs::statfs(run_dir) {
        Ok(stat) if stat.filesystem_type() == TMPFS_MAGIC => Ok(format!("{} is tmpfs", run_dir.display())),
        Ok(_) => Err((
            format!("{} is not tmpfs", run_dir.display()),
            "put run_dir on tmpfs: each epoch of a shadow is written there before it is applied".into(),
        )),
        Err(error) => Err((format!("{}: {error}", run_dir.display()), "create run_dir, best on tmpfs".into())),
    }
}

/// Total and available memory, MiB.
pub fn memory_mib() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let value =
            text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
        value.unwrap_or(0) / 1024
    };
    (field("MemTotal:"), field("MemAvailable:"))
}

fn free_memory() -> Outcome {
    let (total, free) = memory_mib();
    let found = format!("{free} of {total} MiB available");
    if free < 256 { Err((found, "a shadow needs as much memory as its guest; free some".into())) } else { Ok(found) }
}

fn hook() -> Outcome {
    let path = Path::new(HOOK_DIR).join("virt-shadow");
    if path.exists() {
        return Ok(path.display().to_string());
    }
    Err((
        format!("{} is missing", path.display()),
        "install it: without it libvirt may start a guest here that a shadow has taken over elsewhere".into(),
    ))
}

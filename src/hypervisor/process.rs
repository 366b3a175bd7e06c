//! Which process is a domain's QEMU, told in a way that a recycled PID cannot fool.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use serde::{Deserialize, Serialize};

/// A descriptor of the process `pid`, or with `PIDFD_THREAD` in `flags` of a thread. Not wrapped by nix.
pub fn pidfd_open(pid: i32, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A QEMU process. PID and start time together name one process for as long as the host is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuProcess {
    pub pid: i32,
    /// Clock ticks after boot, field 22 of `/proc/PID/stat`.
    pub start_ticks: u64,
}

impl QemuProcess {
    /// The process that `thread` belongs to, which must have been started for the domain `uuid`.
    pub fn of_thread(thread: i32, uuid: &str) -> Result<Self, String> {
        let status = read(&format!("/proc/{thread}/status"))?;
        let pid = status
            .lines()
            .find_map(|line| line.strip_prefix("Tgid:"))
            .and_then(|value| value.trim().parse::<i32>().ok())
            .ok_or_else(|| format!("/proc/{thread}/status has no Tgid"))?;
        let process = Self { pid, start_ticks: start_ticks(pid)? };
        let cmdline = fs::read(format!("/proc/{pid}/cmdline")).map_err(|e| format!("/proc/{pid}/cmdline: {e}"))?;
        let ours = cmdline.split(|byte| *byte == 0).any(|argument| argument == uuid.as_bytes());
        if !ours {
            return Err(format!(
                "process {pid} does not run the domain {uuid}; is QEMU in another PID namespace than this program?"
            ));
        }
        Ok(process)
    }

    /// Whether this very process still exists and has not ended.
    pub fn is_alive(&self) -> bool {
        matches!(stat(self.pid), Ok((state, start_ticks)) if start_ticks == self.start_ticks && !"ZXx".contains(state))
    }
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

fn start_ticks(pid: i32) -> Result<u64, String> {
    stat(pid).map(|(_, ticks)| ticks)
}

/// State letter and start time of a process.
fn stat(pid: i32) -> Result<(char, u64), String> {
    let path = format!("/proc/{pid}/stat");
    parse_stat(&read(&path)?).ok_or_else(|| format!("{path} cannot be understood"))
}

fn parse_stat(stat: &str) -> Option<(char, u64)> {
    // The second field is the command in parentheses and may itself hold blanks and parentheses.
    let fields = &stat[stat.rfind(')')? + 1..];
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 22 of the whole line; the state is field 3.
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_recognised_until_it_ends() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // The parent may run on before the new program's arguments are in place.
        while fs::read(format!("/proc/{pid}/cmdline")).unwrap().is_empty() {
            std::thread::yield_now();
        }
        let process = QemuProcess { pid, start_ticks: start_ticks(pid).unwrap() };
        assert!(process.is_alive());
        assert!(!QemuProcess { start_ticks: process.start_ticks + 1, ..process }.is_alive());
        assert_eq!(QemuProcess::of_thread(pid, "60"), Ok(process));
        assert!(QemuProcess::of_thread(pid, "5f0ad1f9-1d3c-4d5b-9d0b-3f5f2f9f7a11").unwrap_err().contains("namespace"));
        child.kill().unwrap();
        // Not waited for yet: a zombie has ended although it has an entry in /proc.
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(!process.is_alive());
    }

    #[test]
    fn stat_with_odd_command_names_is_understood() {
        let line = "7 (qemu (a) b) R 1 7 7 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 3 0 123456 999 1";
        assert_eq!(parse_stat(line), Some(('R', 123_456)));
        assert_eq!(parse_stat("7 (x"), None);
        assert_eq!(parse_stat("7 (x) R 1"), None);
    }
}

//! Processes of a lab: identified so that a reused number is never mistaken for them, ended and waited for.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::error::{LabError, Result};

/// How long a killed process may take to be gone; QEMUs with much memory need the most.
const END_TIMEOUT: Duration = Duration::from_secs(10);
const END_POLL: Duration = Duration::from_millis(1);
/// Of a failed command's messages this much is shown.
const STDERR_SHOWN_CHARS: usize = 600;

/// A process by number and start time (clock ticks since boot), which together name it for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    pub pid: i32,
    pub start_ticks: u64,
}

/// State letter, parent and start time of `pid`, from /proc/PID/stat.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may hold anything: count fields behind its end.
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Processes that `parent` started and that run.
pub fn children(parent: i32) -> Vec<i32> {
    let is_child = |pid: &i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let of = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_ascii_whitespace().nth(1)?.parse().ok());
        of == Some(parent)
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

/// A child of process `parent` whose first argument is `word`.
pub fn child_with_word(parent: i32, word: &str) -> Option<i32> {
    let is_it = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(word.as_bytes())
    };
    children(parent).into_iter().find(is_it)
}

impl ProcessRef {
    /// Refers to a process that runs now; `None` if there is none.
    pub fn of(pid: i32) -> Option<Self> {
        stat(pid).map(|(_, start_ticks)| Self { pid, start_ticks })
    }

    pub fn current() -> Option<Self> {
        Self::of(std::process::id() as i32)
    }

    /// Whether it runs; a zombie has ended (and, if the first of a pid namespace, all in there with it).
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|(state, start)| start == self.start_ticks && state != 'Z' && state != 'X')
    }

    /// SIGKILL; returns without waiting.
    pub fn kill(&self) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(LabError::system(format!("kill process {}", self.pid))(errno)),
        }
    }

    /// Waits until it has ended; reaps it if it was started by this process.
    pub fn wait_end(&self) -> Result<()> {
        let begin = Instant::now();
        while self.is_alive() {
            if begin.elapsed() > END_TIMEOUT {
                let what = format!("process {} has not ended", self.pid);
                return Err(LabError::Timeout { what, waited_ms: begin.elapsed().as_millis(), detail: String::new() });
            }
            std::thread::sleep(END_POLL);
        }
        // ECHILD if another process started it, which then reaps it.
        let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
        Ok(())
    }
}

/// All processes in the network namespace with this inode number.
pub fn in_netns(inode: u64) -> Vec<ProcessRef> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| ns_inode(Path::new(&format!("/proc/{pid}/ns/net"))) == Some(inode))
        .filter_map(ProcessRef::of)
        .collect()
}

/// Inode of a namespace file, following its link.
pub fn ns_inode(path: &Path) -> Option<u64> {
    std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).ok()?).into()
}

/// Number outside of the process that has number `inner_pid` inside the pid namespace of `init`.
pub fn outer_pid(init: ProcessRef, inner_pid: i32) -> Option<i32> {
    let pid_ns = |pid: i32| ns_inode(Path::new(&format!("/proc/{pid}/ns/pid")));
    let wanted = pid_ns(init.pid)?;
    let mut pids = std::fs::read_dir("/proc").ok()?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.find(|pid: &i32| {
        let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
        let ns_pid = status.lines().find_map(|l| l.strip_prefix("NSpid:"));
        let inner = ns_pid.and_then(|l| l.split_ascii_whitespace().last()?.parse::<i32>().ok());
        inner == Some(inner_pid) && pid_ns(*pid) == Some(wanted)
    })
}

/// Runs a command to its end with nothing on standard input; fails unless it exits with 0.
pub fn run(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null());
    let output = command.output().map_err(LabError::system(format!("run {}", name_of(command))))?;
    check(command, output)
}

/// As [`run`], with `input` on standard input.
pub fn run_with_input(command: &mut Command, input: &str) -> Result<Output> {
    use std::io::Write;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(LabError::system(format!("run {}", name_of(command))))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A command that fails early closes the pipe: its exit code and messages tell more than EPIPE.
        let _ = pipe.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(LabError::system(format!("wait for {}", name_of(command))))?;
    check(command, output)
}

/// As [`run`], and shows each line of standard output as it comes.
pub fn run_for_lines(command: &mut Command, mut show: impl FnMut(&str)) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(LabError::system(format!("run {}", name_of(command))))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let messages = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What cannot be read of the messages is only missing from an error.
        let _ = stderr.map(|mut pipe| pipe.read_to_end(&mut bytes));
        bytes
    });
    for line in stdout.into_iter().flat_map(|pipe| BufReader::new(pipe).lines().map_while(std::io::Result::ok)) {
        show(&line);
    }
    let status = child.wait().map_err(LabError::system(format!("wait for {}", name_of(command))))?;
    let stderr = messages.join().unwrap_or_default();
    check(command, Output { status, stdout: Vec::new(), stderr }).map(drop)
}

fn name_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn check(command: &Command, output: Output) -> Result<Output> {
    if output.status.success() {
        return Ok(output);
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().chars().take(STDERR_SHOWN_CHARS).collect();
    Err(LabError::Command { command: name_of(command), outcome: output.status.to_string(), stderr })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_number_is_another_process() {
        let me = ProcessRef::current().unwrap();
        assert!(me.is_alive());
        assert!(!ProcessRef { start_ticks: me.start_ticks + 1, ..me }.is_alive());
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "that wait_end reaps it is what is tested")]
    fn a_zombie_has_ended_and_is_reaped() {
        let child = Command::new("true").spawn().unwrap();
        let Some(process) = ProcessRef::of(child.id() as i32) else { return };
        process.wait_end().unwrap();
        assert!(ProcessRef::of(process.pid).is_none_or(|p| p != process));
    }

    #[test]
    fn lines_are_shown_as_they_come_and_a_failure_after_them_is_told() {
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two; echo wrong >&2; exit 3"]);
        let error = run_for_lines(&mut command, |line| lines.push(line.to_owned())).unwrap_err().to_string();
        assert_eq!(lines, ["one", "two"]);
        assert!(error.contains("exit status: 3") && error.contains("wrong"), "{error}");
    }

    #[test]
    fn a_failed_command_is_named_with_its_message() {
        let error = run(Command::new("ls").arg("/nonexistent-dir")).unwrap_err().to_string();
        assert!(error.contains("ls /nonexistent-dir") && error.contains("No such file"), "{error}");
    }
}

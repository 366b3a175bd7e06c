//! Makes another process perform one system call, so that it is unharmed whatever happens to us meanwhile.
//!
//! ```text
//! thread of QEMU, stopped in a restartable system call (ppoll, futex, ...)
//!   1. below its stack's red zone we write:   | &__restore_rt | ucontext: the registers as they are | fpstate |
//!   2. one PTRACE_SETREGS points rip at a `syscall; ret` of its libc and rsp at that frame
//!   3. the thread runs: syscall -> ret -> __restore_rt -> rt_sigreturn -> where it was, all registers as before
//! ```
//! Step 2 is the only change of its registers, and from there on the thread finds its way back by itself: a tracer
//! that is killed at any instruction leaves a thread that either never noticed or makes the call and goes on. (The
//! usual way, stepping over a `syscall` and then restoring the registers, leaves QEMU with foreign registers when the
//! tracer dies in between.) The tracer waits with PTRACE_SYSCALL rather than single steps because the kernel undoes
//! the former, but not the latter, when a tracer dies.

use std::fs;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::time::{Duration, Instant};

use libc::{c_int, c_long, c_void, pid_t, user_fpregs_struct, user_regs_struct};

use crate::hypervisor::process::pidfd_open;

/// How long a thread may take to be found in a system call, and to come back from ours.
const ATTEMPTS_FOR: Duration = Duration::from_millis(400);
const STOP_WITHIN: Duration = Duration::from_millis(100);
/// Bytes below the stack pointer that belong to the interrupted function (System V ABI), and room for our frame.
const RED_ZONE: u64 = 128;
const FRAME_ROOM: u64 = 2048;

const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_EVENT_STOP: c_int = 128;
/// Kernel's internal results of an interrupted system call (include/linux/errno.h).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const USER_CS_64: u64 = 0x33;

#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    #[error("cannot trace process {pid}: {source} (needs CAP_SYS_PTRACE and kernel.yama.ptrace_scope below 3)")]
    Attach { pid: pid_t, source: io::Error },
    #[error("process {pid}: {what}: {source}")]
    Os { pid: pid_t, what: &'static str, source: io::Error },
    #[error("process {pid} is stopped by a signal; let it continue first (kill -CONT {pid})")]
    Stopped { pid: pid_t },
    #[error("process {pid}: no usable `syscall; ret` and `__restore_rt` found in its executable mappings")]
    NoGadget { pid: pid_t },
    #[error("process {pid} runs with a user shadow stack, which forbids the way we make it call")]
    ShadowStack { pid: pid_t },
    #[error("process {pid}: its main thread was in no system call for {} ms", ATTEMPTS_FOR.as_millis())]
    Busy { pid: pid_t },
    #[error("process {pid} ended")]
    Gone { pid: pid_t },
    #[error("process {pid}: an argument is longer than {SCRATCH_BYTES} bytes")]
    TooLong { pid: pid_t },
    #[error("process {pid}: {call} failed: {source}")]
    Call { pid: pid_t, call: &'static str, source: io::Error },
}

fn os(pid: pid_t, what: &'static str) -> impl Fn(io::Error) -> InjectError {
    move |source| InjectError::Os { pid, what, source }
}

/// A process whose main thread can be made to call.
#[derive(Debug)]
pub struct Target {
    pid: pid_t,
    pidfd: OwnedFd,
    memory: fs::File,
    syscall_ret: u64,
    restore_rt: u64,
}

/// A pipe that the other process made.
#[derive(Debug)]
pub struct RemotePipe {
    pub read_end: OwnedFd,
    /// Number of a descriptor of the other process that stands for the pipe without being an end of it (O_PATH): under
    /// `/proc/self/fd` that process opens the write end by it, and we see when it has closed that again.
    pub path_fd: i32,
}

impl Target {
    /// Finds what is needed in `pid`, without touching it.
    pub fn open(pid: pid_t) -> Result<Self, InjectError> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(|_| InjectError::Gone { pid })?;
        if status.lines().any(|line| line.starts_with("x86_Thread_features:") && line.contains("shstk")) {
            return Err(InjectError::ShadowStack { pid });
        }
        let pidfd = pidfd_open(pid, 0).map_err(os(pid, "pidfd_open"))?;
        let memory = fs::File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(|source| InjectError::Attach { pid, source })?;
        let (syscall_ret, restore_rt) = find_gadgets(pid, &memory)?;
        Ok(Self { pid, pidfd, memory, syscall_ret, restore_rt })
    }

    /// A userfaultfd over the address space of the other process; only this process holds it afterwards.
    pub fn userfaultfd(&self) -> Result<OwnedFd, InjectError> {
        const UFFD_USER_MODE_ONLY: u64 = 1;
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        let attempt = |flags| self.call("userfaultfd", libc::SYS_userfaultfd, [flags, 0, 0], &[], |_| Ok(()));
        // An unprivileged QEMU may have one for faults of user mode only; write protection in async mode is resolved
        // by the kernel whoever writes, so nothing is missed.
        let (number, ()) = match attempt(flags) {
            Err(InjectError::Call { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
                attempt(flags | UFFD_USER_MODE_ONLY)?
            }
            other => other?,
        };
        let fd = self.take_fd(number as i32);
        self.close(number as i32)?;
        fd
    }

    /// A pipe made by the other process, so that it has that process's owner and label.
    pub fn pipe(&self) -> Result<RemotePipe, InjectError> {
        let read_array = |at: u64| {
            let mut bytes = [0u8; 8];
            self.memory.read_exact_at(&mut bytes, at)?;
            let word = |i: usize| i32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
            Ok((word(0), word(4)))
        };
        let (_, (read_fd, write_fd)) =
            self.call("pipe2", libc::SYS_pipe2, [SCRATCH, libc::O_CLOEXEC as u64, 0], &[], read_array)?;
        let read_end = self.take_fd(read_fd);
        self.close(read_fd)?;
        let path = format!("/proc/self/fd/{write_fd}\0");
        let args = [libc::AT_FDCWD as u64, SCRATCH, (libc::O_PATH | libc::O_CLOEXEC) as u64];
        let opened = self.call("openat", libc::SYS_openat, args, path.as_bytes(), |_| Ok(()));
        self.close(write_fd)?;
        Ok(RemotePipe { read_end: read_end?, path_fd: opened?.0 as i32 })
    }

    /// Closes a descriptor of the other process.
    pub fn close(&self, fd: i32) -> Result<(), InjectError> {
        self.call("close", libc::SYS_close, [fd as u64, 0, 0], &[], |_| Ok(())).map(|_| ())
    }

    /// Our own copy of a descriptor of the other process.
    pub fn take_fd(&self, number: i32) -> Result<OwnedFd, InjectError> {
        // SAFETY: pidfd_getfd takes no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), number, 0) };
        if fd < 0 {
            return Err(os(self.pid, "pidfd_getfd")(io::Error::last_os_error()));
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
    }

    /// Makes the main thread call `number`; an argument equal to [`SCRATCH`] becomes the address of 64 scratch
    /// bytes, which begin with `input`, and which `read_result` may read before the thread goes on.
    fn call<T>(
        &self,
        name: &'static str,
        number: c_long,
        args: [u64; 3],
        input: &[u8],
        read_result: impl Fn(u64) -> io::Result<T>,
    ) -> Result<(i64, T), InjectError> {
        let pid = self.pid;
        let give_up_at = Instant::now() + ATTEMPTS_FOR;
        loop {
            let traced = Traced::seize(pid)?;
            let registers = traced.registers()?;
            if !in_system_call(&registers) {
                drop(traced);
                if Instant::now() > give_up_at {
                    return Err(InjectError::Busy { pid });
                }
                std::thread::sleep(Duration::from_micros(500));
                continue;
            }
            let scratch = self.prepare(&traced, &registers, (number, args), input)?;
            let result = traced.finish_system_call()?;
            if result < 0 {
                let source = io::Error::from_raw_os_error(-result as i32);
                return Err(InjectError::Call { pid, call: name, source });
            }
            let value = read_result(scratch).map_err(os(pid, "reading the result"))?;
            return Ok((result, value));
        }
    }

    /// Writes the frame and points the thread at it. Returns the scratch address.
    fn prepare(
        &self,
        traced: &Traced,
        registers: &user_regs_struct,
        (number, args): (c_long, [u64; 3]),
        input: &[u8],
    ) -> Result<u64, InjectError> {
        let pid = self.pid;
        let mut filled = [0; SCRATCH_BYTES];
        filled.get_mut(..input.len()).ok_or(InjectError::TooLong { pid })?.copy_from_slice(input);
        let frame_at = (registers.rsp - RED_ZONE - FRAME_ROOM) & !63;
        // The return slot sits 8 bytes before an aligned ucontext; then the FXSAVE image; then scratch.
        let context_at = frame_at + 64;
        let fpstate_at = frame_at + 512;
        let scratch = frame_at + 1536;
        let context = SignalContext::new(&resumed(registers), traced.signal_mask()?, fpstate_at);
        let fpstate = traced.fp_registers()?;
        let write = |bytes: &[u8], at: u64| self.memory.write_all_at(bytes, at).map_err(os(pid, "writing its stack"));
        write(as_bytes(&fpstate), fpstate_at)?;
        write(as_bytes(&context), context_at)?;
        write(&filled, scratch)?;
        write(&self.restore_rt.to_le_bytes(), context_at - 8)?;
        let arg = |value: u64| if value == SCRATCH { scratch } else { value };
        let mut calling = *registers;
        calling.rax = number as u64;
        calling.orig_rax = u64::MAX; // not in a system call: the kernel must not restart the interrupted one
        calling.rdi = arg(args[0]);
        calling.rsi = arg(args[1]);
        calling.rdx = arg(args[2]);
        calling.rip = self.syscall_ret;
        calling.rsp = context_at - 8;
        traced.set_registers(&calling)?;
        Ok(scratch)
    }
}

/// Stands for the address of the scratch bytes in the arguments of a call.
const SCRATCH: u64 = u64::MAX - 0x5ca7;
const SCRATCH_BYTES: usize = 64;

fn in_system_call(registers: &user_regs_struct) -> bool {
    registers.cs == USER_CS_64 && (registers.orig_rax as i64) >= 0
}

/// The registers with which the thread shall go on: the interrupted system call restarted as the kernel would, or,
/// where only the kernel could, ended with EINTR (every caller of poll or a futex must expect that).
fn resumed(registers: &user_regs_struct) -> user_regs_struct {
    let mut resumed = *registers;
    match registers.rax as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {
            resumed.rip -= 2; // back onto the two bytes of `syscall`
            resumed.rax = registers.orig_rax;
        }
        ERESTART_RESTARTBLOCK => resumed.rax = (-i64::from(libc::EINTR)) as u64,
        _ => {}
    }
    resumed
}

/// `struct ucontext` of the x86-64 kernel ABI (arch/x86/include/uapi/asm/{ucontext,sigcontext}.h), 304 bytes.
#[repr(C)]
struct SignalContext {
    flags: u64,
    link: u64,
    stack_sp: u64,
    /// An impossible value: the kernel ignores it and keeps the thread's own alternative stack.
    stack_flags: u64,
    stack_size: u64,
    /// r8-r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags
    registers: [u64; 18],
    cs: u16,
    gs: u16,
    fs: u16,
    ss: u16,
    err: u64,
    trapno: u64,
    oldmask: u64,
    cr2: u64,
    fpstate: u64,
    reserved: [u64; 8],
    sigmask: u64,
}

impl SignalContext {
    fn new(r: &user_regs_struct, sigmask: u64, fpstate: u64) -> Self {
        const UC_SIGCONTEXT_SS: u64 = 2;
        const UC_STRICT_RESTORE_SS: u64 = 4;
        Self {
            flags: UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS,
            link: 0,
            stack_sp: 0,
            stack_flags: 0x7f,
            stack_size: 0,
            registers: [
                r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx,
                r.rsp, r.rip, r.eflags,
            ],
            cs: r.cs as u16,
            gs: 0,
            fs: 0,
            ss: r.ss as u16,
            err: 0,
            trapno: 0,
            oldmask: 0,
            cr2: 0,
            fpstate,
            reserved: [0; 8],
            sigmask,
        }
    }
}

fn as_bytes<T>(value: &T) -> &[u8] {
    // SAFETY: used with repr(C) types of integers without padding (SignalContext, user_fpregs_struct) only; the
    // slice lives as long as the borrow.
    unsafe { std::slice::from_raw_parts(ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }
}

/// A thread under ptrace, stopped; dropped, it runs on.
struct Traced {
    pid: pid_t,
}

impl Traced {
    fn seize(pid: pid_t) -> Result<Self, InjectError> {
        const OPTIONS: usize = libc::PTRACE_O_TRACESYSGOOD as usize;
        // SAFETY: PTRACE_SEIZE takes options as its data, no pointers.
        if unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, ptr::null_mut::<c_void>(), OPTIONS as *mut c_void) } < 0 {
            return Err(InjectError::Attach { pid, source: io::Error::last_os_error() });
        }
        let traced = Self { pid };
        traced.request(libc::PTRACE_INTERRUPT, 0, "interrupting it")?;
        loop {
            let status = traced.wait()?;
            let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
            match (signal, event) {
                (libc::SIGTRAP, PTRACE_EVENT_STOP) => return Ok(traced),
                (_, PTRACE_EVENT_STOP) => return Err(InjectError::Stopped { pid }),
                // A signal on its way to the thread: deliver it and wait for our own stop.
                (signal, _) => traced.request(libc::PTRACE_CONT, signal as usize, "passing a signal on")?,
            }
        }
    }

    fn request(&self, request: libc::c_uint, data: usize, what: &'static str) -> Result<(), InjectError> {
        // SAFETY: only used with requests that take an integer as data and ignore the address.
        let result = unsafe { libc::ptrace(request, self.pid, ptr::null_mut::<c_void>(), data as *mut c_void) };
        if result < 0 { Err(os(self.pid, what)(io::Error::last_os_error())) } else { Ok(()) }
    }

    fn wait(&self) -> Result<c_int, InjectError> {
        let pid = self.pid;
        let give_up_at = Instant::now() + STOP_WITHIN;
        let mut status = 0;
        loop {
            // SAFETY: `status` outlives the call.
            match unsafe { libc::waitpid(pid, &mut status, libc::__WALL | libc::WNOHANG) } {
                0 if Instant::now() > give_up_at => {
                    let source = io::Error::from(io::ErrorKind::TimedOut);
                    return Err(InjectError::Os { pid, what: "waiting for it to stop", source });
                }
                0 => std::thread::sleep(Duration::from_micros(20)),
                n if n < 0 => return Err(os(pid, "waitpid")(io::Error::last_os_error())),
                _ if libc::WIFSTOPPED(status) => return Ok(status),
                _ => return Err(InjectError::Gone { pid }),
            }
        }
    }

    fn registers(&self) -> Result<user_regs_struct, InjectError> {
        // SAFETY: all-zero is a valid value of this plain struct of integers.
        let mut registers: user_regs_struct = unsafe { zeroed() };
        self.transfer(libc::PTRACE_GETREGS, 0, ptr::from_mut(&mut registers).cast(), "reading its registers")?;
        Ok(registers)
    }

    fn fp_registers(&self) -> Result<user_fpregs_struct, InjectError> {
        // SAFETY: as above.
        let mut registers: user_fpregs_struct = unsafe { zeroed() };
        self.transfer(libc::PTRACE_GETFPREGS, 0, ptr::from_mut(&mut registers).cast(), "reading its FP registers")?;
        Ok(registers)
    }

    fn signal_mask(&self) -> Result<u64, InjectError> {
        let mut mask = 0u64;
        self.transfer(PTRACE_GETSIGMASK, size_of::<u64>(), ptr::from_mut(&mut mask).cast(), "reading its signals")?;
        Ok(mask)
    }

    fn set_registers(&self, registers: &user_regs_struct) -> Result<(), InjectError> {
        let data = ptr::from_ref(registers).cast_mut().cast();
        self.transfer(libc::PTRACE_SETREGS, 0, data, "setting its registers")
    }

    fn transfer(
        &self,
        request: libc::c_uint,
        address: usize,
        data: *mut c_void,
        what: &'static str,
    ) -> Result<(), InjectError> {
        // SAFETY: each caller passes a pointer to a live value of the type and size that its request transfers.
        let result = unsafe { libc::ptrace(request, self.pid, address as *mut c_void, data) };
        if result < 0 { Err(os(self.pid, what)(io::Error::last_os_error())) } else { Ok(()) }
    }

    /// Lets the thread enter and leave the prepared call; its result, negative errno on failure.
    fn finish_system_call(&self) -> Result<i64, InjectError> {
        let mut stops = 0;
        let mut signal = 0;
        while stops < 2 {
            self.request(libc::PTRACE_SYSCALL, signal as usize, "letting it call")?;
            let stop = libc::WSTOPSIG(self.wait()?);
            if stop == libc::SIGTRAP | 0x80 {
                stops += 1;
                signal = 0;
            } else {
                signal = if stop == libc::SIGTRAP { 0 } else { stop };
            }
        }
        Ok(self.registers()?.rax as i64)
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ = self.request(libc::PTRACE_DETACH, 0, "letting it go");
    }
}

/// Addresses of `syscall; ret` and of `mov $15,%rax; syscall` (the C library's signal return) in the target's
/// executable file mappings. Any byte position will do: the CPU does not care where an instruction once began.
fn find_gadgets(pid: pid_t, memory: &fs::File) -> Result<(u64, u64), InjectError> {
    const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
    const RESTORE_RT: [&[u8]; 2] = [&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]];
    const LARGEST_TEXT: u64 = 64 << 20;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|_| InjectError::Gone { pid })?;
    let (mut syscall_ret, mut restore_rt) = (None, None);
    let executable = |line: &&str| line.contains(" r-xp ") && line.contains('/');
    // libc first: it has both, and QEMU's own text is large.
    let (libc, other): (Vec<&str>, Vec<&str>) =
        maps.lines().filter(executable).partition(|line| line.contains("/libc.") || line.contains("/libc-"));
    for line in libc.into_iter().chain(other) {
        let Some((start, end)) = range_of(line) else { continue };
        if end - start > LARGEST_TEXT {
            continue;
        }
        let mut text = vec![0; (end - start) as usize];
        if memory.read_exact_at(&mut text, start).is_err() {
            continue;
        }
        let find = |needle: &[u8]| text.windows(needle.len()).position(|w| w == needle).map(|at| start + at as u64);
        syscall_ret = syscall_ret.or_else(|| find(SYSCALL_RET));
        restore_rt = restore_rt.or_else(|| RESTORE_RT.iter().find_map(|needle| find(needle)));
        if let (Some(call), Some(restore)) = (syscall_ret, restore_rt) {
            return Ok((call, restore));
        }
    }
    Err(InjectError::NoGadget { pid })
}

fn range_of(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::{Command, Stdio};

    /// A process that sleeps in poll over and over and counts, so that a lost register would show.
    fn victim() -> std::process::Child {
        let program = "import select,os,sys\np=select.poll()\nn=0\nx=1.5\nprint('ready',flush=True)\nwhile True:\n p.poll(2)\n n+=1\n x=x*1.0000001\n os.write(1,b'.')\n";
        let mut child =
            Command::new("python3").args(["-u", "-c", program]).stdout(Stdio::piped()).spawn().expect("python3");
        let mut ready = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        child
    }

    #[test]
    fn the_kernel_abi_is_as_documented() {
        assert_eq!(size_of::<SignalContext>(), 304);
        assert_eq!(std::mem::offset_of!(SignalContext, sigmask), 296);
        assert_eq!(size_of::<user_fpregs_struct>(), 512);
    }

    #[test]
    fn a_process_calls_for_us_and_goes_on() {
        let mut child = victim();
        let target = Target::open(child.id() as pid_t).unwrap();
        for _ in 0..50 {
            let pipe = target.pipe().unwrap();
            let mut reader = fs::File::from(pipe.read_end);
            let path = format!("/proc/{}/fd/{}", child.id(), pipe.path_fd);
            for text in ["hello", "again"] {
                std::io::Write::write_all(&mut fs::File::options().write(true).open(&path).unwrap(), text.as_bytes())
                    .unwrap();
                // To the end: the writer's closing is seen.
                let mut read = String::new();
                reader.read_to_string(&mut read).unwrap();
                assert_eq!(read, text);
            }
            target.close(pipe.path_fd).unwrap();
        }
        // Still alive and at work: it writes its dots.
        let mut dots = [0; 10];
        child.stdout.as_mut().unwrap().read_exact(&mut dots).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_failed_call_is_reported_with_its_error() {
        let mut child = victim();
        let error = Target::open(child.id() as pid_t).unwrap().close(9999).unwrap_err();
        assert!(error.to_string().contains("close failed"), "{error}");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(Target::open(child.id() as pid_t), Err(InjectError::Gone { .. })));
    }
}

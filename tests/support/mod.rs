//! A lab with one protected guest and a client that never stops asking it: what the tests of whole hosts share.
#![allow(dead_code)] // Each test file uses its part.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virt_shadow::api::types::{GuestView, VerifyReport};
use virt_shadow::lab::fleet::{Fleet, FleetError};
use virt_shadow::lab::{ClientWatch, GuestOptions, Lab, LabOptions, MANAGER, QemuUser, StartedGuest};

pub const GUEST: &str = "busy";
pub const INTERVAL: Duration = Duration::from_millis(50);
/// How long protection may take to come back; far more than it needs, this machine may be busy.
pub const BACK_WITHIN: Duration = Duration::from_secs(60);
/// By then the manager knows that a host's agent, QEMU or link is gone.
const NOTICED_AFTER: Duration = Duration::from_millis(800);
const ASK_EVERY: Duration = Duration::from_millis(5);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A comparison that meets a connection just lost is made again for so long.
const VERIFY_WITHIN: Duration = Duration::from_secs(30);

/// One lab at a time: two would take each other's processor.
pub fn one_lab() -> MutexGuard<'static, ()> {
    static ONE_LAB: Mutex<()> = Mutex::new(());
    ONE_LAB.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Moments by a seed that is printed, so that a failure can be repeated.
pub struct Random(u64);

impl Random {
    pub fn from_env() -> Self {
        let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x5eed);
        println!("SEED={seed}");
        Self(seed)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    pub fn sleep_below_ms(&mut self, bound_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.below(bound_ms)));
    }
}

/// One guest on `host1`, its lab, and the client.
pub struct Bed {
    pub lab: Lab,
    pub fleet: Fleet,
    pub guest: StartedGuest,
    pub watch: ClientWatch,
    pub shadows: u32,
}

impl Bed {
    /// Hosts each in a rack of its own; the guest runs, not yet protected.
    pub fn raise(name: &str, hosts: u8, shadows: u32, qemu_user: QemuUser) -> Self {
        Self::raise_as(&LabOptions { hosts, racks: hosts, qemu_user, ..LabOptions::for_test(name) }, shadows)
    }

    pub fn raise_as(options: &LabOptions, shadows: u32) -> Self {
        let workload = "dirty:2000".parse().unwrap();
        let guest = GuestOptions { memory_mib: 256, workload, ..GuestOptions::new(GUEST, "host1") };
        Self::raise_guest(options, shadows, &guest)
    }

    pub fn raise_guest(options: &LabOptions, shadows: u32, guest: &GuestOptions) -> Self {
        Self::raise_guest_asked(options, shadows, guest, ASK_EVERY)
    }

    /// With a client that asks less or more often.
    pub fn raise_guest_asked(options: &LabOptions, shadows: u32, guest: &GuestOptions, ask_every: Duration) -> Self {
        let (hosts, lab) = (options.hosts, Lab::up(options).unwrap());
        let fleet = Fleet::of(&lab).unwrap();
        fleet.wait_hosts(hosts.into(), Duration::from_secs(30)).unwrap();
        let guest = lab.guest(guest, true).unwrap();
        let watch = lab.watch(guest.ip, ask_every).unwrap();
        watch.wait_answer_after(Instant::now(), Duration::from_secs(10)).expect("the guest answers");
        Self { lab, fleet, guest, watch, shadows }
    }

    /// Protects the guest, as soon as an agent that was killed is back.
    pub fn enable(&self) {
        let began = Instant::now();
        while let Err(error) = self.fleet.enable(GUEST, "host1", self.shadows, INTERVAL) {
            let passing = error.to_string().contains("not connected") && began.elapsed() < BACK_WITHIN;
            assert!(passing, "{error}");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    pub fn wait_protected(&self) -> GuestView {
        self.fleet.wait_protected(GUEST, BACK_WITHIN).unwrap()
    }

    /// Waits until protection is back: a view of it from before the fault was noticed will not do.
    pub fn wait_protection_goes_on(&self) -> GuestView {
        std::thread::sleep(NOTICED_AFTER);
        self.wait_protected()
    }

    /// The same for a guest that is smaller.
    pub fn assert_equal_disks(&self) -> VerifyReport {
        self.assert_equal_pages(40_000)
    }

    /// All shadows are equal to the guest.
    pub fn assert_equal(&self) -> VerifyReport {
        self.assert_equal_pages(65_536)
    }

    fn assert_equal_pages(&self, at_least: u64) -> VerifyReport {
        let began = Instant::now();
        loop {
            let last = match self.fleet.verify(GUEST) {
                Ok(report) => {
                    let different = report.shadows.iter().find(|s| s.pages_compared > 0 && !s.equal);
                    assert!(different.is_none(), "a shadow that lies: {report:?}");
                    if report.shadows.len() == self.shadows as usize && report.shadows.iter().all(|s| s.equal) {
                        assert!(report.shadows.iter().all(|s| s.pages_compared > at_least), "{report:?}");
                        return report;
                    }
                    format!("{report:?}")
                }
                Err(error) => error.to_string(),
            };
            assert!(began.elapsed() < VERIFY_WITHIN, "not compared: {last}");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The guest answers now, was never started anew, and found no fault in its memory.
    pub fn assert_guest_unharmed(&self) {
        let answer = self.watch.wait_answer_after(Instant::now(), Duration::from_secs(5));
        assert!(answer.is_some(), "the guest does not answer");
        let report = self.watch.report();
        // Not what went back: answers of two connections may overtake each other.
        assert_eq!((report.boots.len(), report.guest_errors), (1, 0), "{report:?}");
    }

    /// Waits until no host but `but` has a domain of the guest's.
    pub fn wait_no_domain_but_on(&self, but: &str) {
        let hosts: Vec<String> = self.lab.state().unwrap().hosts().map(|host| host.name.clone()).collect();
        let began = Instant::now();
        loop {
            let left: Vec<&String> = hosts.iter().filter(|host| *host != but && self.has_domain(host)).collect();
            if left.is_empty() {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "domains of {GUEST} are left on {left:?}");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    pub fn has_domain(&self, host: &str) -> bool {
        let listed = self.lab.virsh(host, &["list", "--name"]).unwrap();
        listed.lines().any(|name| name.trim() == GUEST)
    }

    pub fn shadow_hosts(&self) -> Vec<String> {
        self.fleet.info(GUEST).unwrap().shadows.into_iter().map(|shadow| shadow.host).collect()
    }

    /// Number outside of a service of a node, waited for while it is being started again.
    pub fn service(&self, node: &str, service: &str) -> Pid {
        let began = Instant::now();
        loop {
            if let Ok(Some(pid)) = self.lab.service_pid(node, service) {
                return Pid::from_raw(pid);
            }
            assert!(began.elapsed() < BACK_WITHIN, "{service} on {node} is not running");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn kill_agent(&self, node: &str) {
        let _ = kill(self.service(node, "virtshadowd"), Signal::SIGKILL);
    }

    /// The guard process of a host's agent.
    pub fn guard(&self, host: &str) -> Pid {
        self.child_of_agent(host, "guard")
    }

    /// The process of a host's agent that was started with that word.
    pub fn child_of_agent(&self, host: &str, first_word: &str) -> Pid {
        let found = self.lab.companion_pid(host, first_word).unwrap();
        Pid::from_raw(found.unwrap_or_else(|| panic!("the agent of {host} has no {first_word}")))
    }

    /// QEMU of the guest or of its shadow on a host.
    pub fn qemu(&self, host: &str) -> Pid {
        let init = self.lab.state().unwrap().running(host).unwrap().pid;
        let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let is_it = |pid: &i32| {
            let words = arguments(*pid);
            words.first().is_some_and(|program| program.contains("qemu-system"))
                && words.iter().any(|word| word.starts_with(&format!("guest={GUEST},")))
                && namespace(*pid) == namespace(init)
        };
        Pid::from_raw(processes().into_iter().find(is_it).unwrap_or_else(|| panic!("no QEMU of {GUEST} on {host}")))
    }

    /// Leaves the host's `/run` without a free byte, until the returned file is removed by [`Bed::empty_run`].
    pub fn fill_run(&self, host: &str) {
        let script = "set -e; used=$(df --output=used -k /run | tail -1); mount -o remount,size=$((used + 256))k /run; \
                      dd if=/dev/zero of=/run/filler bs=4k 2>/dev/null || true; ! echo full > /run/filler.more";
        let output = self.lab.exec(host, &["sh", "-c", script]).unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    pub fn empty_run(&self, host: &str) {
        let script = "rm -f /run/filler /run/filler.more && mount -o remount,size=50% /run";
        let output = self.lab.exec(host, &["sh", "-c", script]).unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// Leaves no free byte where the host's daemon keeps its records, until [`Bed::empty_records`].
    pub fn fill_records(&self, host: &str) {
        let script = "set -e; mount -t tmpfs -o size=256k full /mnt; cp -a /var/lib/virt-shadow/. /mnt/; \
                      mount --bind /mnt /var/lib/virt-shadow; dd if=/dev/zero of=/mnt/filler bs=4k 2>/dev/null || true; \
                      ! echo full > /var/lib/virt-shadow/filler.more";
        let output = self.lab.exec(host, &["sh", "-c", script]).unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    pub fn empty_records(&self, host: &str) {
        assert!(self.lab.exec(host, &["sh", "-c", "rm -f /mnt/filler*"]).unwrap().status.success());
    }

    /// `virt-shadow` as an operator on a host calls it: exit code, standard output, standard error.
    pub fn cli(&self, host: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
        let program = program("virt-shadow");
        let output = self.lab.command(host, &program).unwrap().args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    /// Longest silence of the guest since `from`, milliseconds.
    pub fn silence_ms(&self, from: Instant) -> f64 {
        self.watch.longest_silence(from, Instant::now()).as_secs_f64() * 1e3
    }
}

/// What the daemons and libvirt logged is shown when a test fails, as the lab is gone by then.
impl Drop for Bed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let nodes = self.lab.state().map(|state| state.hosts().map(|host| host.name.clone()).collect::<Vec<_>>());
        for node in nodes.unwrap_or_default().iter().map(String::as_str).chain([MANAGER]) {
            let log = std::fs::read_to_string(self.lab.service_log(node, "virtshadowd")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- virtshadowd of {node}:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        match self.fleet.events() {
            Ok(events) => events.iter().rev().take(30).rev().for_each(|event| {
                eprintln!("{} {} {:?} {}", event.time_ms, event.kind, event.host, event.message);
            }),
            Err(error) => eprintln!("no events: {error}"),
        }
    }
}

/// Whether the manager says that it knows no such protected guest.
pub fn is_not_protected(answer: &Result<GuestView, FleetError>) -> bool {
    matches!(answer, Err(FleetError::Answer { reason, .. }) if reason.contains("no protected guest"))
}

/// Path of a program of this project that was built with the tests.
pub fn program(name: &str) -> String {
    let own = std::env::current_exe().unwrap();
    let dir = own.parent().and_then(Path::parent).unwrap();
    dir.join(name).to_str().unwrap().to_owned()
}

fn processes() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn arguments(pid: i32) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

//! The lab itself: what it raises works, what it cuts is dead, what it takes down leaves nothing.
//!
//! Needs root, and fails without: a test that is skipped in silence proves nothing.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use virt_shadow::lab::{GuestOptions, Lab, LabError, LabOptions, MANAGER, Power, QemuUser};

const LAB: &str = env!("CARGO_BIN_EXE_virt-shadow-lab");

fn options(name: &str) -> LabOptions {
    assert!(nix::unistd::geteuid().is_root(), "tests of the lab make namespaces and bridges: run them as root");
    LabOptions { daemons: false, ..LabOptions::for_test(name) }
}

/// (number, start time) of every process in a network namespace of the lab.
fn processes(lab: &str) -> BTreeSet<(u32, String)> {
    let prefix = format!("vsl.{lab}.");
    let inodes: BTreeSet<u64> = netns(&prefix).iter().filter_map(|p| Some(fs::metadata(p).ok()?.ino())).collect();
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| inodes.contains(&m.ino())))
        .filter_map(|pid| Some((pid, start_time(pid)?)))
        .collect()
}

/// None of an ended process, also if it waits to be reaped.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    (fields[0] != "Z").then(|| fields[19].to_owned())
}

fn netns(prefix: &str) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Vec::new() };
    entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(prefix)).map(|e| e.path()).collect()
}

fn assert_nothing_left(lab: &str, before: &BTreeSet<(u32, String)>) {
    let alive: Vec<_> = before.iter().filter(|(pid, start)| start_time(*pid).as_ref() == Some(start)).collect();
    assert!(alive.is_empty(), "processes left: {alive:?}");
    assert_eq!(netns(&format!("vsl.{lab}.")), Vec::<std::path::PathBuf>::new());
    for root in ["/run/virt-shadow-lab", "/var/lib/virt-shadow-lab"] {
        assert!(!Path::new(root).join(lab).exists(), "{root}/{lab} is left");
        assert!(!Path::new(root).join(format!("{lab}.lock")).exists(), "lock of {lab} is left");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let of_lab = |l: &&str| l.contains(&format!("vsl.{lab}.")) || l.contains(&format!("virt-shadow-lab/{lab}/"));
    assert_eq!(mounts.lines().filter(of_lab).collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn a_guest_serves_dies_with_its_host_and_is_defined_when_the_host_is_back() {
    let lab = Lab::up(&options("basic")).unwrap();
    let status = lab.status().unwrap();
    let racks: Vec<_> = status.hosts.iter().map(|h| (h.name.as_str(), h.rack.as_str())).collect();
    assert_eq!(racks, [("host1", "rack1"), ("host2", "rack2"), ("host3", "rack3")]);

    let mut guest = GuestOptions::new("g1", "host1");
    guest.workload = "busy:500:16".parse().unwrap();
    let started = lab.guest(&guest, true).unwrap();
    let mut client = lab.guest_client(started.ip).unwrap();
    let first = client.status().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    client.verify().unwrap();
    let later = client.status().unwrap();
    assert!(later.work > first.work && later.dirty > first.dirty && later.counter > first.counter, "{later:?}");
    assert_eq!((later.errors, &later.boot), (0, &first.boot));
    assert!(matches!(lab.guest(&guest, true), Err(LabError::Invalid { .. })), "the same guest twice");
    lab.exec("host1", &["sh", "-c", "echo kept >/var/lib/virt-shadow/kept; echo lost >/run/lost"]).unwrap();

    let watch = lab.watch(started.ip, Duration::from_millis(5)).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let seen = watch.report();
    assert!(seen.answers > 10 && seen.boots.len() == 1 && seen.went_back == 0 && seen.guest_errors == 0, "{seen:?}");
    // What the watch sees of a guest that stands still for a while, and that its connection is kept.
    let begin = Instant::now();
    lab.virsh("host1", &["suspend", "g1"]).unwrap();
    std::thread::sleep(Duration::from_millis(400));
    let resumed = Instant::now();
    lab.virsh("host1", &["resume", "g1"]).unwrap();
    watch.wait_answer_after(resumed, Duration::from_secs(5)).expect("an answer after the resume");
    let silence = watch.longest_silence(begin, Instant::now());
    assert!((300..2000).contains(&silence.as_millis()), "{silence:?}");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(watch.report().connections_lost, 0);

    // The client's connection gets neither an answer nor an end: no packet leaves a host without power.
    client.set_timeout(Some(Duration::from_millis(300))).unwrap();
    let cut = lab.power_cut("host1").unwrap();
    println!("power cut: all gone after {} ms", cut.elapsed().as_millis());
    let silence = client.status().unwrap_err();
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock, "{silence}");
    assert_eq!(lab.status().unwrap().hosts[0].power, Power::Off);
    assert!(matches!(lab.exec("host1", &["true"]), Err(LabError::PoweredOff { .. })));
    assert!(matches!(lab.power_cut("host1"), Err(LabError::PoweredOff { .. })));

    lab.power_on("host1").unwrap();
    assert_eq!(lab.virsh("host1", &["domstate", "g1"]).unwrap(), "shut off");
    let output = lab.exec("host1", &["sh", "-c", "cat /var/lib/virt-shadow/kept; ls /run/lost"]).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "kept\n");
    assert!(!output.status.success(), "/run of a host must not survive its power");
    lab.virsh("host1", &["start", "g1"]).unwrap();
    assert_ne!(lab.wait_guest("g1").unwrap().boot, first.boot);
    watch.wait_answer_after(Instant::now(), Duration::from_secs(5)).expect("an answer of the guest started again");
    let seen = watch.report();
    assert!(seen.boots.len() == 2 && seen.connections_lost <= 1 && seen.longest_silence_ms > 1000.0, "{seen:?}");
    println!("{seen:?}");

    let (name, before) = (lab.name().to_owned(), processes(lab.name()));
    assert!(before.len() >= 7, "3 first processes, 3 libvirtd, 1 manager and a guest: {before:?}");
    drop(lab);
    assert_nothing_left(&name, &before);
}

#[test]
fn a_cut_cable_is_dead_in_both_directions_until_healed() {
    let lab = Lab::up(&LabOptions { hosts: 2, racks: 2, ..options("cable") }).unwrap();
    // Three tries: a neighbour that was asked for in vain is asked for again after a second.
    let reach = |from: &str, to: &str| {
        let ping = || lab.exec(from, &["busybox", "ping", "-c", "1", "-W", "1", to]).unwrap().status.success();
        (0..3).any(|_| ping())
    };
    let (host1, host2) = ("10.77.1.1", "10.77.1.2");
    assert!(reach("client", host1) && reach("host1", host2) && reach(MANAGER, host2) && reach("host2", "10.77.0.2"));
    lab.cut_link("host1").unwrap();
    assert!(!reach("client", host1) && !reach("host1", host2) && reach("client", host2));
    lab.heal_link("host1").unwrap();
    assert!(reach("client", host1));
    lab.cut_link("rack2").unwrap();
    assert!(!reach("host1", host2) && !reach("host2", "10.77.0.3") && reach("client", host1));
    lab.heal_link("rack2").unwrap();
    assert!(reach("host1", host2));
    // A cable that was cut stays so while its host has no power.
    lab.cut_link("host2").unwrap();
    lab.power_cut("host2").unwrap();
    lab.power_on("host2").unwrap();
    assert!(!reach("client", host2));
    lab.heal_link("host2").unwrap();
    assert!(reach("client", host2));
    assert!(matches!(lab.cut_link("host7"), Err(LabError::Unknown { .. })));
}

#[test]
fn services_that_are_killed_come_back_and_guests_stay() {
    let lab = Lab::up(&LabOptions { hosts: 1, qemu_user: QemuUser::LibvirtQemu, ..options("services") }).unwrap();
    let started = lab.guest(&GuestOptions::new("g1", "host1"), true).unwrap();
    let mut client = lab.guest_client(started.ip).unwrap();
    let libvirtd = lab.service_pid("host1", "libvirtd").unwrap().unwrap();
    assert_eq!(fs::read_to_string(format!("/proc/{libvirtd}/comm")).unwrap().trim(), "libvirtd");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(libvirtd), nix::sys::signal::Signal::SIGKILL).unwrap();
    let begin = Instant::now();
    while lab.virsh("host1", &["domstate", "g1"]).ok().as_deref() != Some("running") {
        assert!(begin.elapsed() < Duration::from_secs(10), "libvirtd has not come back with its guest");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_ne!(lab.service_pid("host1", "libvirtd").unwrap(), Some(libvirtd));
    assert_eq!(lab.status().unwrap().hosts[0].services["libvirtd"].restarts, 1);
    assert_eq!(client.status().unwrap().errors, 0);

    // A first process that dies by itself is a crash: `up` starts the node again.
    let init = lab.status().unwrap().hosts[0].init_pid.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(init), nix::sys::signal::Signal::SIGKILL).unwrap();
    while lab.status().unwrap().hosts[0].power == Power::On {}
    assert_eq!(lab.status().unwrap().hosts[0].power, Power::Crashed);
    let again = LabOptions {
        name: lab.name().into(),
        owned: false,
        ..LabOptions { hosts: 1, qemu_user: QemuUser::LibvirtQemu, ..options("services") }
    };
    Lab::up(&again).unwrap();
    assert_eq!(lab.virsh("host1", &["domstate", "g1"]).unwrap(), "shut off");
    let other = Lab::up(&LabOptions { hosts: 2, ..again });
    assert!(matches!(other, Err(LabError::Invalid { .. })), "a lab that is up with other options");
}

#[test]
fn up_that_is_interrupted_or_killed_leaves_nothing_that_matters() {
    let base = options("killed");
    base.interrupt.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(Lab::up(&base), Err(LabError::Interrupted)));
    assert_nothing_left(&base.name, &BTreeSet::new());

    let lab = |args: &[&str]| {
        let mut command = Command::new(LAB);
        command.args(["--name", &base.name]).args(args).stderr(Stdio::piped());
        command
    };
    struct Down<'a>(&'a str);
    impl Drop for Down<'_> {
        fn drop(&mut self) {
            let _ = Lab::down(self.0, false);
        }
    }
    let _down = Down(&base.name);
    let mut before = BTreeSet::new();
    for (round, delay_ms) in [5, 15, 30, 60, 90, 130].into_iter().enumerate() {
        let mut up = lab(&["up", "--no-daemon"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        before.extend(processes(&base.name));
        let signal = ["INT", "KILL"][round % 2];
        Command::new("kill").args([&format!("-{signal}"), &up.id().to_string()]).status().unwrap();
        let end = up.wait().unwrap();
        before.extend(processes(&base.name));
        // Killed by the signal: it came before the program was ready for it, and before it did anything.
        if signal == "INT" && end.code() == Some(1) {
            assert_nothing_left(&base.name, &before);
        }
    }
    // Whatever the last one left, the next one works.
    let up = lab(&["up", "--no-daemon"]).output().unwrap();
    assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
    let status = lab(&["status", "--format", "json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["hosts"].as_array().unwrap().len(), 3);
    assert!(Path::new(status["hosts"][0]["namespaces"]["net"].as_str().unwrap()).exists());
    before.extend(processes(&base.name));
    // Whoever wants a lab of its own does not get this one.
    let refused = lab(&["bench", "pause"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains(&format!("--name {} down", base.name)), "{said}");
    assert!(lab(&["status"]).status().unwrap().success());
    assert!(lab(&["down"]).status().unwrap().success());
    assert_nothing_left(&base.name, &before);
    let late = lab(&["exec", "host1", "--", "true"]).output().unwrap();
    assert_eq!(late.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&late.stderr).contains("is not up"));
}

#[test]
fn a_lab_that_a_process_works_with_is_refused_to_another() {
    let lab = Lab::up(&LabOptions { hosts: 1, ..options("taken") }).unwrap();
    let refused = Command::new(LAB).args(["--name", lab.name(), "bench", "output"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let (name, pid) = (format!("lab {} is up already", lab.name()), format!("process {} ", std::process::id()));
    assert!(!refused.status.success() && said.contains(&name) && said.contains(&pid), "{said}");
    let same = LabOptions { hosts: 1, name: lab.name().into(), ..options("taken") };
    assert!(matches!(Lab::up(&same), Err(LabError::UpAlready { .. })));
    assert_eq!(lab.status().unwrap().hosts[0].power, Power::On);
}

#[test]
fn labs_of_dead_tests_are_swept() {
    // A lab whose owner is a process that no longer runs, as a killed test leaves it.
    let mut dead = options("dead");
    dead.hosts = 1;
    let lab = Lab::up(&dead).unwrap();
    let path = format!("/run/virt-shadow-lab/{}/state.json", dead.name);
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["owner"]["start_ticks"] = 1.into();
    fs::write(&path, state.to_string()).unwrap();
    let before = processes(&dead.name);
    assert!(!before.is_empty());
    let other = Lab::up(&LabOptions { hosts: 1, ..options("sweeper") }).unwrap();
    assert_nothing_left(&dead.name, &before);
    assert_eq!(other.status().unwrap().hosts.len(), 1);
    drop(lab);
}

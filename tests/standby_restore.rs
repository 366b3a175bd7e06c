//! A shadow on a real libvirt and QEMU: made, filled, left alone by its agent, found again, promoted; and the guest
//! goes on. Capture is done here by hand (stop, save, read), so that only the standby is under test.
//!
//! A lab of two hosts without daemons is raised. What an agent would do on a host is done by this same program, run
//! again in that host's namespaces (`inside`, told by the environment what to do).
//!
//! `VIRT_SHADOW_ROUNDS=20 cargo test --test standby_restore promoted -- --nocapture` measures promotions.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use virt_shadow::hypervisor::xml::shape;
use virt_shadow::hypervisor::{Domain, DomainState, Hypervisor, HypervisorError, XmlKind};
use virt_shadow::lab::{Backing, GuestClient, GuestOptions, Lab, LabOptions, Machine, QemuUser};
use virt_shadow::standby::{Adopted, Shadow, ShadowDescription, StandbyError, Timings};
use vmsync::{PAGE_SIZE, RamBlock, RamLayout};

const STEP: &str = "VIRT_SHADOW_TEST_STEP";
const FOLDER: &str = "VIRT_SHADOW_TEST_FOLDER";
const GUEST: &str = "guest1";
/// On the hosts' own tmpfs.
const RUN_DIR: &str = "/run/virt-shadow-test";
const DISK_DIR: &str = "/var/lib/virt-shadow/disks";

/// A lab with one guest, and a folder that all its hosts see.
struct Stage {
    lab: Lab,
    folder: PathBuf,
}

impl Stage {
    fn new(name: &str) -> Option<Self> {
        Self::with(name, QemuUser::Root, GuestOptions::new(GUEST, "host1"))
    }

    fn with(name: &str, qemu_user: QemuUser, mut guest: GuestOptions) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: a lab needs root");
            return None;
        }
        let options = LabOptions { hosts: 2, racks: 2, daemons: false, qemu_user, ..LabOptions::for_test(name) };
        let lab = Lab::up(&options).unwrap();
        guest.workload = "dirty:2000:64".parse().unwrap();
        lab.guest(&guest, true).unwrap();
        let folder = std::env::temp_dir().join(format!("virt-shadow-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        // QEMU writes its state there, whoever it runs as.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        Some(Self { lab, folder })
    }

    /// Runs one step of [`inside`] on a host; returns what it printed.
    fn run(&self, host: &str, step: &str) -> String {
        let program = std::env::current_exe().unwrap();
        let mut command: Command = self.lab.command(host, program.to_str().unwrap()).unwrap();
        command.args(["inside", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        command.env(STEP, step).env(FOLDER, &self.folder);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{step} on {host}: {text}");
        text.into_owned()
    }

    fn client(&self) -> GuestClient {
        let ip = self.lab.guest_state(GUEST).unwrap().ip;
        let begun = Instant::now();
        loop {
            match self.lab.guest_client(ip) {
                Ok(mut client) => {
                    client.set_timeout(Some(Duration::from_secs(10))).unwrap();
                    return client;
                }
                Err(error) if begun.elapsed() > Duration::from_secs(20) => panic!("{error}"),
                Err(_) => {}
            }
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[test]
fn a_promoted_guest_goes_on_from_host_to_host() {
    let Some(stage) = Stage::new("promoted") else { return };
    let rounds = std::env::var("VIRT_SHADOW_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    move_to_and_fro(&stage, rounds);
}

/// The other machine type, two CPUs, memory that was shared all along, and QEMU run by libvirt's default user.
#[test]
fn so_does_another_kind_of_guest_under_another_user() {
    let mut guest = GuestOptions::new(GUEST, "host1");
    (guest.machine, guest.backing, guest.cpus) = (Machine::Pc, Backing::Memfd, 2);
    let Some(stage) = Stage::with("user", QemuUser::LibvirtQemu, guest) else { return };
    move_to_and_fro(&stage, 2);
}

fn move_to_and_fro(stage: &Stage, rounds: usize) {
    let mut client = stage.client();
    let first = client.status().unwrap();
    let mut running_us = Vec::new();
    for round in 0..rounds {
        let (from, to) = if round % 2 == 0 { ("host1", "host2") } else { ("host2", "host1") };
        let before = client.status().unwrap();
        stage.run(from, "save");
        stage.run(to, "fill");
        // Another process takes over, as after a restart of the agent.
        stage.run(to, "promote");
        // One connection all along: nothing is lost when the state is the last one.
        let after = client.status().unwrap();
        assert_eq!((after.boot.as_str(), after.errors), (first.boot.as_str(), 0), "{after:?}");
        assert!(after.counter >= before.counter, "{before:?} {after:?}");
        let timings = fs::read_to_string(stage.folder.join("timings")).unwrap();
        println!("round {round}: {timings}");
        running_us.push(serde_json::from_str::<serde_json::Value>(&timings).unwrap()["running_us"].as_u64().unwrap());
    }
    println!("{}", client.verify().unwrap());
    running_us.sort_unstable();
    println!("promotions: p50 {} us, max {} us", running_us[rounds / 2], running_us[rounds - 1]);
    assert!(running_us[rounds / 2] < 200_000, "{running_us:?}");
}

#[test]
fn what_must_not_happen_does_not() {
    let Some(stage) = Stage::new("refusals") else { return };
    stage.run("host1", "leave-running-guests-alone");
    stage.run("host1", "save");
    stage.run("host2", "refuse-other-memory");
    stage.run("host2", "report-a-failed-load");
    stage.run("host2", "fill");
    stage.run("host2", "give-up");
    stage.run("host2", "fill");
    let libvirtd = stage.lab.service_pid("host2", "libvirtd").unwrap().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(libvirtd), nix::sys::signal::Signal::SIGKILL).unwrap();
    stage.run("host2", "promote-paused");
    let mut client = stage.client();
    assert!(client.verify().unwrap().contains("errors=0"));
}

/// An agent that dies in the middle of a promotion leaves a guest that runs or a shadow that can still be promoted.
#[test]
fn a_promotion_survives_the_death_of_its_agent() {
    let Some(stage) = Stage::new("death") else { return };
    stage.run("host1", "save");
    let mut outcomes = Vec::new();
    for delay_us in [0, 300, 1_000, 3_000, 8_000, 20_000] {
        stage.run("host2", "fill");
        stage.run("host2", &format!("die-promoting:{delay_us}"));
        let text = stage.run("host2", "find-and-remove");
        let outcome = text.split("outcome: ").nth(1).and_then(|rest| rest.lines().next()).unwrap().to_owned();
        outcomes.push((delay_us, outcome));
    }
    println!("{outcomes:?}");
    assert_eq!(outcomes[0].1, "waiting", "{outcomes:?}");
    assert!(outcomes.iter().all(|(_, outcome)| outcome != "none"), "{outcomes:?}");
}

/// libvirtd dies when the state has just been written: the guest runs, and that is what is reported.
#[test]
fn a_promotion_survives_the_death_of_libvirtd() {
    let Some(stage) = Stage::new("libvirtd") else { return };
    stage.run("host1", "save");
    stage.run("host2", "fill");
    stage.run("host2", "promote-without-libvirtd");
    let mut client = stage.client();
    assert!(client.verify().unwrap().contains("errors=0"));
}

#[test]
#[ignore = "run by the other tests in the namespaces of a host"]
fn inside() {
    let Ok(step) = std::env::var(STEP) else { return };
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let hypervisor = connect();
    match step.as_str() {
        "save" => save(&hypervisor, &folder),
        "fill" => fill(&hypervisor, &folder),
        "promote" => promote(&hypervisor, &folder),
        "promote-paused" => promote_paused(&hypervisor, &folder),
        "give-up" => give_up(&hypervisor, &folder),
        "refuse-other-memory" => refuse_other_memory(&hypervisor, &folder),
        "report-a-failed-load" => report_a_failed_load(&hypervisor, &folder),
        "leave-running-guests-alone" => leave_running_guests_alone(&hypervisor),
        "find-and-remove" => find_and_remove(&hypervisor, &folder),
        "promote-without-libvirtd" => promote_without_libvirtd(&hypervisor, &folder),
        other => match other.split_once(':') {
            Some(("die-promoting", delay_us)) => die_promoting(&hypervisor, &folder, delay_us.parse().unwrap()),
            _ => panic!("unknown step {other}"),
        },
    }
}

/// libvirtd may just be starting again.
fn connect() -> Arc<Hypervisor> {
    let begun = Instant::now();
    loop {
        match Hypervisor::connect("qemu:///system") {
            Ok(hypervisor) => return hypervisor,
            Err(error) if begun.elapsed() > Duration::from_secs(20) => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn blocks_of(domain: &Domain) -> Vec<RamBlock> {
    let blocks = domain.ram_blocks().unwrap();
    blocks.into_iter().map(|block| RamBlock { name: block.name, len_bytes: block.used }).collect()
}

/// Stops the guest for good and keeps its definition, device state and memory in `folder`.
fn save(hypervisor: &Hypervisor, folder: &Path) {
    let domain = hypervisor.lookup(GUEST).unwrap();
    let process = domain.process().unwrap();
    domain.suspend().unwrap();
    let state = folder.join("state");
    domain.qmp_call("xen-save-devices-state", json!({"filename": state, "live": false})).unwrap();
    fs::write(folder.join("live.xml"), domain.xml(XmlKind::Migratable).unwrap()).unwrap();
    fs::write(folder.join("inactive.xml"), domain.xml(XmlKind::Inactive).unwrap()).unwrap();
    let layout = RamLayout::new(blocks_of(&domain)).unwrap();
    fs::write(folder.join("layout"), layout.encode()).unwrap();
    let memory = File::open(format!("/proc/{}/mem", process.pid)).unwrap();
    let mut pages = BufWriter::with_capacity(1 << 20, File::create(folder.join("pages")).unwrap());
    let mut page = [0; PAGE_SIZE];
    let hvas: Vec<u64> = domain.ram_blocks().unwrap().iter().map(|block| block.hva).collect();
    for linear in 0..layout.total_pages() {
        let addr = layout.addr(linear).unwrap();
        memory.read_exact_at(&mut page, hvas[addr.block.as_usize()] + addr.page.byte_offset()).unwrap();
        if page != [0; PAGE_SIZE] {
            pages.write_all(&linear.to_le_bytes()).unwrap();
            pages.write_all(&page).unwrap();
        }
    }
    pages.flush().unwrap();
    domain.destroy().unwrap();
}

fn saved(folder: &Path) -> (ShadowDescription, RamLayout) {
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let layout = RamLayout::decode(&fs::read(folder.join("layout")).unwrap()).unwrap();
    let live_xml = read("live.xml");
    let uuid = live_xml.split("<uuid>").nth(1).unwrap()[..36].to_owned();
    (ShadowDescription { uuid, name: GUEST.into(), live_xml, inactive_xml: Some(read("inactive.xml")) }, layout)
}

/// Calls `visit` with the number and content of every page that is not zero.
fn for_each_saved_page(folder: &Path, mut visit: impl FnMut(u64, &[u8; PAGE_SIZE])) {
    let mut pages = BufReader::with_capacity(1 << 20, File::open(folder.join("pages")).unwrap());
    let (mut number, mut page) = ([0; 8], [0; PAGE_SIZE]);
    while pages.read_exact(&mut number).is_ok() {
        pages.read_exact(&mut page).unwrap();
        visit(u64::from_le_bytes(number), &page);
    }
}

fn prepare(hypervisor: &Arc<Hypervisor>, folder: &Path) -> Shadow {
    let (description, layout) = saved(folder);
    Shadow::prepare(hypervisor, &description, &layout, Path::new(RUN_DIR), Path::new(DISK_DIR)).unwrap()
}

/// Makes the shadow, writes the image and leaves it.
fn fill(hypervisor: &Arc<Hypervisor>, folder: &Path) {
    let (description, layout) = saved(folder);
    assert!(Shadow::keep(hypervisor, &description, &layout, Path::new(RUN_DIR)).unwrap().is_none());
    let mut shadow = prepare(hypervisor, folder);
    let domain = hypervisor.lookup(GUEST).unwrap();
    assert_eq!(domain.state().unwrap().0, DomainState::Paused);
    assert_eq!(shape(&domain.xml(XmlKind::Migratable).unwrap()), shape(&description.live_xml));
    assert!(shadow.fits(&description, &layout).unwrap());
    assert_eq!(shadow.process().pid, domain.pid().unwrap());
    shadow.image().for_each_page(|addr, page| assert_eq!(page, &[0; PAGE_SIZE], "{addr}")).unwrap();
    for_each_saved_page(folder, |linear, page| {
        shadow.image_mut().write_page(layout.addr(linear).unwrap(), page).unwrap();
    });
    fs::write(shadow.directory().join("journal"), "staged").unwrap();
    // Asking again finds the same shadow and leaves its memory alone.
    let process = shadow.process();
    drop(shadow);
    let shadow = prepare(hypervisor, folder);
    assert_eq!(shadow.process(), process);
    let mut expected = vec![[0; PAGE_SIZE]; layout.total_pages() as usize];
    for_each_saved_page(folder, |linear, page| expected[linear as usize] = *page);
    let mut different = 0;
    shadow
        .image()
        .for_each_page(|addr, page| different += u64::from(*page != expected[layout.linear(addr).unwrap() as usize]))
        .unwrap();
    assert_eq!(different, 0);
}

fn adopt(hypervisor: &Arc<Hypervisor>, folder: &Path) -> Shadow {
    match Shadow::adopt(hypervisor, &saved(folder).0.uuid, Path::new(RUN_DIR)).unwrap() {
        Adopted::Waiting(shadow) => *shadow,
        other => panic!("{other:?}"),
    }
}

/// Takes the shadow over as a new agent does, and promotes it.
fn promote(hypervisor: &Arc<Hypervisor>, folder: &Path) {
    let shadow = adopt(hypervisor, folder);
    let state = fs::read(folder.join("state")).unwrap();
    let directory = shadow.directory();
    let promotion = shadow.promote(hypervisor, &state, true).unwrap().finish(&[]);
    let Timings { written_us, running_us, verified_us, announce_us, define_us, total_us } = promotion.timings;
    let timings = json!({"written_us": written_us, "running_us": running_us, "verified_us": verified_us,
        "announce_us": announce_us, "define_us": define_us, "total_us": total_us, "state": state.len()});
    fs::write(folder.join("timings"), timings.to_string()).unwrap();
    let domain = hypervisor.lookup(GUEST).unwrap();
    check_promoted(&domain, &promotion.warnings, &directory);
    assert_eq!(domain.state().unwrap().0, DomainState::Running);
    let inactive = domain.xml(XmlKind::Inactive).unwrap();
    let original = fs::read_to_string(folder.join("inactive.xml")).unwrap();
    assert_eq!(shape(&inactive), shape(&original));
    assert_eq!((inactive.contains("incoming"), inactive.contains("memfd")), (false, original.contains("memfd")));
}

fn check_promoted(domain: &Domain, warnings: &[String], directory: &Path) {
    assert!(warnings.is_empty(), "{warnings:?}");
    assert!(!directory.exists());
    assert!(domain.is_persistent().unwrap());
    assert!(matches!(Shadow::adopt(&connect(), domain.uuid(), Path::new(RUN_DIR)), Ok(Adopted::None)));
    let again = Shadow::remove(&connect(), domain.uuid(), Path::new(RUN_DIR));
    assert!(matches!(again, Err(StandbyError::Occupied { .. })), "{again:?}");
}

/// A guest that was suspended when it was cut stays so until an operator resumes it, also when an operator had told
/// the waiting shadow to run.
fn promote_paused(hypervisor: &Arc<Hypervisor>, folder: &Path) {
    let shadow = adopt(hypervisor, folder);
    let domain = hypervisor.lookup(GUEST).unwrap();
    domain.resume().unwrap();
    let directory = shadow.directory();
    let promotion = shadow.promote(hypervisor, &fs::read(folder.join("state")).unwrap(), false).unwrap().finish(&[]);
    check_promoted(&domain, &promotion.warnings, &directory);
    assert_eq!(domain.run_state().unwrap(), "paused");
    let state = domain.state().unwrap();
    assert_eq!(state.0, DomainState::Paused, "{state:?}");
    domain.resume().unwrap();
    assert_eq!(domain.run_state().unwrap(), "running");
}

/// Ends this process `delay_us` after a promotion began, or right before it for 0.
fn die_promoting(hypervisor: &Arc<Hypervisor>, folder: &Path, delay_us: u64) {
    let shadow = adopt(hypervisor, folder);
    let state = fs::read(folder.join("state")).unwrap();
    if delay_us == 0 {
        // As if it had died between writing its record and writing the state.
        let path = shadow.directory().join("state.json");
        let record = fs::read_to_string(&path).unwrap();
        fs::write(path, record.replace("\"waiting\"", "\"promoting\"")).unwrap();
        return;
    }
    std::thread::spawn(move || {
        let began = Instant::now();
        while began.elapsed() < Duration::from_micros(delay_us) {}
        // SAFETY: ends the process at once, as a crash would; that nothing is cleaned up is the point. Exit code 0
        // is for the caller, who sees no difference.
        unsafe { libc::_exit(0) };
    });
    let _ = shadow.promote(hypervisor, &state, true).map(|started| started.finish(&[]));
    std::thread::sleep(Duration::from_secs(1));
}

fn find_and_remove(hypervisor: &Arc<Hypervisor>, folder: &Path) {
    let uuid = saved(folder).0.uuid;
    let outcome = match Shadow::adopt(hypervisor, &uuid, Path::new(RUN_DIR)).unwrap() {
        Adopted::Waiting(shadow) => {
            // It is as good as before.
            let promotion =
                shadow.promote(hypervisor, &fs::read(folder.join("state")).unwrap(), true).unwrap().finish(&[]);
            assert!(promotion.warnings.is_empty(), "{:?}", promotion.warnings);
            "waiting"
        }
        Adopted::Promoted(promotion) => {
            assert!(promotion.warnings.is_empty(), "{:?}", promotion.warnings);
            "promoted"
        }
        // It was quicker than its death.
        Adopted::None if hypervisor.lookup(GUEST).is_ok() => "finished",
        Adopted::None => "none",
    };
    println!("outcome: {outcome}");
    if let Ok(domain) = hypervisor.lookup(GUEST) {
        assert_eq!(domain.run_state().unwrap(), "running");
        assert!(domain.is_persistent().unwrap());
        domain.destroy().unwrap();
        domain.undefine().unwrap();
    }
}

fn promote_without_libvirtd(hypervisor: &Arc<Hypervisor>, folder: &Path) {
    let shadow = adopt(hypervisor, folder);
    let state = fs::read(folder.join("state")).unwrap();
    // Of this host alone: its processes are a PID namespace of their own.
    let numbers = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse::<i32>().ok());
    let is_libvirtd = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "libvirtd\n");
    let libvirtd = nix::unistd::Pid::from_raw(numbers.into_iter().find(is_libvirtd).unwrap());
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_micros(1_500));
        nix::sys::signal::kill(libvirtd, nix::sys::signal::Signal::SIGKILL).unwrap();
    });
    let promotion = shadow.promote(hypervisor, &state, true).unwrap().finish(&[]);
    println!("{promotion:?}");
    assert_eq!(connect().lookup(GUEST).unwrap().run_state().unwrap(), "running");
}

fn give_up(hypervisor: &Arc<Hypervisor>, folder: &Path) {
    let shadow = adopt(hypervisor, folder);
    let (directory, process) = (shadow.directory(), shadow.process());
    let uuid = shadow.uuid().to_owned();
    drop(shadow);
    Shadow::remove(hypervisor, &uuid, Path::new(RUN_DIR)).unwrap();
    assert!(!process.is_alive() && !directory.exists());
    assert!(matches!(hypervisor.lookup(GUEST), Err(HypervisorError::NotFound { .. })));
    Shadow::remove(hypervisor, &uuid, Path::new(RUN_DIR)).unwrap();
    assert!(matches!(Shadow::adopt(hypervisor, &uuid, Path::new(RUN_DIR)), Ok(Adopted::None)));
}

fn refuse_other_memory(hypervisor: &Arc<Hypervisor>, folder: &Path) {
    let (description, layout) = saved(folder);
    let mut blocks = layout.blocks().to_vec();
    blocks.push(RamBlock { name: "memdimm0".into(), len_bytes: 128 << 20 });
    let layout = RamLayout::new(blocks).unwrap();
    let error =
        Shadow::prepare(hypervisor, &description, &layout, Path::new(RUN_DIR), Path::new(DISK_DIR)).unwrap_err();
    assert!(matches!(error, StandbyError::Layout { .. }) && error.to_string().contains("memdimm0"), "{error}");
    assert!(hypervisor.running_domains().unwrap().is_empty());
}

fn report_a_failed_load(hypervisor: &Arc<Hypervisor>, folder: &Path) {
    let shadow = prepare(hypervisor, folder);
    let uuid = shadow.uuid().to_owned();
    let state = fs::read(folder.join("state")).unwrap();
    let refused = shadow.promote(hypervisor, b"no state", true).unwrap_err();
    assert!(matches!(refused, StandbyError::DeviceState { .. }), "{refused}");
    // Nothing was written: the shadow still waits.
    let shadow = adopt(hypervisor, folder);
    let error = shadow.promote(hypervisor, &state[..state.len() / 2], true).unwrap_err();
    println!("{error}");
    assert!(matches!(error, StandbyError::NotLoaded { .. }), "{error}");
    Shadow::remove(hypervisor, &uuid, Path::new(RUN_DIR)).unwrap();
    assert!(hypervisor.running_domains().unwrap().is_empty());
}

fn leave_running_guests_alone(hypervisor: &Arc<Hypervisor>) {
    let domain = hypervisor.lookup(GUEST).unwrap();
    let description = ShadowDescription {
        uuid: domain.uuid().into(),
        name: GUEST.into(),
        live_xml: domain.xml(XmlKind::Migratable).unwrap(),
        inactive_xml: None,
    };
    let layout = RamLayout::new(blocks_of(&domain)).unwrap();
    let process = domain.process().unwrap();
    for _ in 0..2 {
        let error =
            Shadow::prepare(hypervisor, &description, &layout, Path::new(RUN_DIR), Path::new(DISK_DIR)).unwrap_err();
        assert!(matches!(error, StandbyError::Occupied { .. }), "{error}");
        domain.suspend().unwrap();
    }
    domain.resume().unwrap();
    assert!(process.is_alive() && domain.process().unwrap() == process);
}

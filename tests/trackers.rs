//! Guests that are tracked or run in other ways than usual: by comparing hashes, without preferred threads, and under KVM.

use std::cell::RefCell;
use std::fs;
use std::time::Duration;

use virt_shadow::api::types::GuestView;
use virt_shadow::lab::fleet::Fleet;
use virt_shadow::lab::{GuestOptions, Lab, LabOptions};

const WITHIN: Duration = Duration::from_secs(60);

/// QEMU's process of a guest on a host of the lab.
fn qemu(lab: &Lab, host: &str, guest: &str) -> i32 {
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let init = lab.state().unwrap().running(host).unwrap().pid;
    let named = format!("guest={guest},");
    let is_it = |pid: &i32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split('\0').any(|word| word.starts_with(&named)) && namespace(*pid) == namespace(init)
    };
    let numbers = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.into_iter().find(is_it).expect("QEMU runs")
}

/// Names of a process's threads that have another scheduling policy than the usual one (proc_pid_stat(5), field 41).
fn preferred_threads(pid: i32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let stats = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
    let preferred = |stat: &String| {
        let (name, fields) = stat.rsplit_once(')')?;
        (fields.split_whitespace().nth(38)? != "0").then(|| name.rsplit_once('(').unwrap_or_default().1.to_owned())
    };
    stats.filter_map(|stat| preferred(&stat)).collect()
}

fn preferred_by_agent(lab: &Lab) -> Vec<String> {
    let agent = lab.service_pid("host1", "virtshadowd").unwrap().expect("the agent runs");
    let guard = lab.companion_pid("host1", "guard").unwrap().expect("the guard runs");
    [agent, guard].into_iter().flat_map(preferred_threads).collect()
}

/// Also with `priority = "usual"`: then nothing is preferred, ours or QEMU's.
#[test]
fn a_host_without_write_tracking_compares_hashes() {
    let lab = Lab::up(&LabOptions { hosts: 2, racks: 2, ..LabOptions::for_test("hash") }).unwrap();
    let fleet = Fleet::of(&lab).unwrap();
    fleet.wait_hosts(2, WITHIN).unwrap();
    assert_ne!(preferred_by_agent(&lab), [""; 0], "threads hurry unless they are told not to");
    let change = "s/tracker = .*/tracker = \"hash\"/; s/priority = .*/priority = \"usual\"/";
    let config = ["sed", "-i", change, "/etc/virt-shadow/virtshadowd.toml"];
    assert!(lab.exec("host1", &config).unwrap().status.success());
    // The lab's init starts it again, with the changed file.
    let pid = lab.service_pid("host1", "virtshadowd").unwrap().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    fleet.wait_hosts(2, WITHIN).unwrap();
    let workload = "dirty:1000:16".parse().unwrap();
    let options = GuestOptions { memory_mib: 128, workload, ..GuestOptions::new("old", "host1") };
    lab.guest(&options, true).unwrap();
    fleet.enable("old", "host1", 1, Duration::from_millis(200)).unwrap();
    let view = fleet.wait_protected("old", WITHIN).unwrap();
    assert_eq!(view.capture.tracker, "hash", "{}", view.capture.tracker_reason);
    let epoch = view.capture.epoch;
    let (qemu, preferred) = (qemu(&lab, "host1", "old"), RefCell::new(Vec::new()));
    let look = |view: &GuestView| {
        preferred.borrow_mut().extend(preferred_threads(qemu));
        view.capture.epoch > epoch + 20
    };
    fleet.wait("old", "more epochs", WITHIN, look).unwrap();
    let mut preferred = preferred.into_inner();
    preferred.extend(preferred_by_agent(&lab));
    assert_eq!(preferred, [""; 0], "although the configuration says \"usual\"");
    let report = fleet.verify("old").unwrap();
    assert!(report.shadows.iter().all(|shadow| shadow.equal), "{report:?}");
}

/// 64 KiB that count in real mode: `cx` goes up and is written to the first word of 64 pages from 64 KiB on.
fn counting_firmware() -> Vec<u8> {
    const CODE: &[u8] = &[
        0x31, 0xc9, // xor cx, cx
        0x41, // outer: inc cx
        0xbb, 0x00, 0x10, // mov bx, 0x1000
        0xba, 0x40, 0x00, // mov dx, 64
        0x8e, 0xdb, // inner: mov ds, bx
        0x89, 0x0e, 0x00, 0x00, // mov [0], cx
        0x81, 0xc3, 0x00, 0x01, // add bx, 0x100
        0x4a, // dec dx
        0x75, 0xf3, // jnz inner
        0xeb, 0xea, // jmp outer
    ];
    let mut image = vec![0x90; 65536];
    image[..CODE.len()].copy_from_slice(CODE);
    image[0xfff0..0xfff5].copy_from_slice(&[0xea, 0x00, 0x00, 0x00, 0xf0]); // jmp f000:0000
    image
}

fn counter(lab: &Lab, host: &str) -> u64 {
    let text = lab.virsh(host, &["qemu-monitor-command", "--hmp", "tiny", "xp /1hx 0x10000"]).unwrap();
    let word = text.trim().rsplit(' ').next().unwrap().trim_start_matches("0x");
    u64::from_str_radix(word, 16).unwrap_or_else(|_| panic!("not a counter: {text:?}"))
}

#[test]
fn a_guest_under_kvm_is_captured_and_goes_on_elsewhere() {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("no KVM here ({error}): nothing to show");
        return;
    }
    let lab = Lab::up(&LabOptions { hosts: 2, racks: 2, ..LabOptions::for_test("kvm") }).unwrap();
    let fleet = Fleet::of(&lab).unwrap();
    fleet.wait_hosts(2, WITHIN).unwrap();
    // A folder that all hosts of the lab see, as they would a firmware package.
    let firmware = std::env::temp_dir().join(format!("virt-shadow-firmware-{}.bin", std::process::id()));
    fs::write(&firmware, counting_firmware()).unwrap();
    let xml = format!(
        "<domain type='kvm'><name>tiny</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
         <os><type arch='x86_64' machine='pc'>hvm</type><loader readonly='yes' type='rom'>{}</loader></os>
         <features/><on_crash>destroy</on_crash>
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><memballoon model='none'/></devices></domain>",
        firmware.display()
    );
    let file = std::env::temp_dir().join(format!("virt-shadow-tiny-{}.xml", std::process::id()));
    fs::write(&file, xml).unwrap();
    lab.virsh("host1", &["define", file.to_str().unwrap()]).unwrap();
    lab.virsh("host1", &["start", "tiny"]).unwrap();
    assert_ne!(counter(&lab, "host1"), counter(&lab, "host1"), "it counts");

    fleet.enable("tiny", "host1", 1, Duration::from_millis(50)).unwrap();
    let view = fleet.wait_protected("tiny", WITHIN).unwrap();
    assert_eq!(view.capture.tracker, "userfaultfd");
    let epoch = view.capture.epoch;
    let view = fleet.wait("tiny", "more epochs", WITHIN, |view| view.capture.epoch > epoch + 20).unwrap();
    assert!((64..128).contains(&view.capture.dirty_pages.last), "64 pages are written: {:?}", view.capture);
    let report = fleet.verify("tiny").unwrap();
    assert!(report.shadows.iter().all(|shadow| shadow.equal), "{report:?}");
    let moved = fleet.switchover("tiny", Some("host2")).unwrap();
    println!("KVM guest moved, stood still {:?} ms", moved.pause_ms);
    assert_ne!(counter(&lab, "host2"), counter(&lab, "host2"), "it goes on counting");
    fs::remove_file(firmware).unwrap();
    fs::remove_file(file).unwrap();
}

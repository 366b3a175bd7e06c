//! A guest with a disk: memory, devices and disk come back of one moment, and its writes go on whatever happens to us.
//! `VIRT_SHADOW_ROUNDS` sets how often the power is cut.

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use support::{BACK_WITHIN, Bed, GUEST, Random, one_lab};
use virt_shadow::api::types::GuestView;
use virt_shadow::lab::{DiskRecords, GuestOptions, LabOptions, QemuUser};

const IMAGES: &str = "/var/lib/virt-shadow/disks";

fn rounds() -> u32 {
    std::env::var("VIRT_SHADOW_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

fn guest(disk: &str) -> GuestOptions {
    let workload = "dirty:500".parse().unwrap();
    let disks = vec![disk.parse().unwrap()];
    GuestOptions { memory_mib: 160, workload, disks, ..GuestOptions::new(GUEST, "host1") }
}

fn raise(name: &str, hosts: u8, user: QemuUser, disk: &str) -> Bed {
    let options = LabOptions { hosts, racks: hosts, qemu_user: user, ..LabOptions::for_test(name) };
    Bed::raise_guest(&options, 1, &GuestOptions { workload: "dirty:500:32".parse().unwrap(), ..guest(disk) })
}

/// All records that the guest wrote are on its disk, and right.
fn records(bed: &Bed) -> DiskRecords {
    let began = Instant::now();
    loop {
        let answer = bed.lab.guest_client(bed.guest.ip).map_err(|e| e.to_string()).and_then(|mut client| {
            client.set_timeout(Some(BACK_WITHIN)).and_then(|()| client.records()).map_err(|e| e.to_string())
        });
        match answer {
            Ok(records) => return records,
            Err(error) if error.contains("bad") || began.elapsed() > BACK_WITHIN => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Records written by now.
fn written(bed: &Bed) -> u64 {
    bed.lab.guest_client(bed.guest.ip).unwrap().status().unwrap().records
}

fn wait_written(bed: &Bed, more: u64) {
    let (before, began) = (written(bed), Instant::now());
    while written(bed) < before + more {
        assert!(began.elapsed() < BACK_WITHIN, "the guest does not get on with writing");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs on a host; what it printed.
fn run(bed: &Bed, host: &str, script: &str) -> String {
    let output = bed.lab.exec(host, &["sh", "-c", script]).unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn images(bed: &Bed, host: &str) -> String {
    run(bed, host, &format!("ls {IMAGES}/* 2>/dev/null || true"))
}

/// The file system that the guest would find if it were started now: after its journal was replayed nothing is wrong.
fn check_file_system(bed: &Bed, host: &str) {
    let script = format!(
        "set -e; virsh -q suspend {GUEST}; image=$(virsh -q domblklist {GUEST} | awk '$1 == \"vda\" {{print $2}}'); \
         cp --sparse=always $image /var/tmp/checked.$$; virsh -q resume {GUEST}; \
         e2fsck -p /var/tmp/checked.$$ || [ $? = 1 ]; e2fsck -fn /var/tmp/checked.$$; rm /var/tmp/checked.$$"
    );
    run(bed, host, &script);
}

#[test]
fn disk_and_memory_of_one_moment_outlive_their_host() {
    let _one = one_lab();
    let mut random = Random::from_env();
    let bed = raise("disk-failover", 3, QemuUser::Root, "64");
    bed.enable();
    let mut view: GuestView = bed.wait_protected();
    let mut before = records(&bed);
    for round in 0..rounds() {
        wait_written(&bed, 100);
        bed.assert_equal_disks();
        random.sleep_below_ms(300);
        let host = view.primary.host.clone();
        let cut = bed.lab.power_cut(&host).unwrap();
        bed.watch.wait_answer_after(cut + Duration::from_millis(60), BACK_WITHIN).expect("the guest answers");
        let after = records(&bed);
        println!("round {round}: {before:?} before, {after:?} after the power of {host} was cut");
        assert!(after.durable >= before.durable, "what was committed is there");
        assert_eq!(after.recovered, 0, "it was not booted");
        bed.lab.power_on(&host).unwrap();
        bed.fleet.wait_hosts(3, BACK_WITHIN).unwrap();
        bed.fleet.wait(GUEST, "another primary", BACK_WITHIN, |view| view.primary.host != host).unwrap();
        view = bed.wait_protection_goes_on();
        check_file_system(&bed, &view.primary.host);
        before = after;
    }
    // A move on purpose loses nothing, and the host that was left keeps the next shadow.
    let to = bed.shadow_hosts().remove(0);
    let at = written(&bed);
    bed.fleet.switchover(GUEST, Some(&to)).unwrap();
    assert!(records(&bed).durable >= at);
    let view = bed.wait_protection_goes_on();
    assert_eq!(view.primary.host, to);
    bed.assert_equal_disks();
    bed.assert_guest_unharmed();

    // Only the disk that the guest has is left, and it is a guest's disk as any other.
    let shadow = bed.shadow_hosts().remove(0);
    bed.fleet.disable(GUEST).unwrap();
    assert_eq!(images(&bed, &to).lines().count(), 1, "{}", images(&bed, &to));
    let on_shadow = images(&bed, &shadow);
    assert!(on_shadow.lines().count() <= 1, "{on_shadow}");
    let jobs = run(&bed, &to, &format!("virsh -q blockjob {GUEST} vda"));
    assert!(jobs.is_empty() || jobs.contains("No current"), "{jobs}");
    let durable = written(&bed);
    run(&bed, &to, &format!("virsh -q destroy {GUEST} && virsh -q start {GUEST}"));
    bed.lab.wait_guest(GUEST).unwrap();
    let booted = records(&bed);
    assert!(booted.recovered >= durable, "{booted:?} after a start, {durable} before");
    bed.lab.remove_guest(GUEST).unwrap();
}

#[test]
fn the_guest_writes_on_without_us_and_protection_comes_back() {
    let _one = one_lab();
    let bed = raise("disk-faults", 2, QemuUser::LibvirtQemu, "48:qcow2");
    bed.enable();
    bed.wait_protected();
    bed.assert_equal_disks();

    bed.kill_agent("host1");
    wait_written(&bed, 100);
    bed.wait_protection_goes_on();
    bed.assert_equal_disks();

    // The guest's writes go through the agent, which stands still: they go on before it does.
    let agent = bed.service("host1", "virtshadowd");
    kill(agent, Signal::SIGSTOP).unwrap();
    let stopped = Instant::now();
    wait_written(&bed, 100);
    println!("100 records {} ms after the agent was stopped", stopped.elapsed().as_millis());
    kill(agent, Signal::SIGCONT).unwrap();
    bed.wait_protection_goes_on();
    bed.assert_equal_disks();

    // An operator ends the job.
    run(&bed, "host1", &format!("virsh -q blockjob {GUEST} vda --abort"));
    wait_written(&bed, 100);
    bed.wait_protection_goes_on();

    // The guard is killed, too.
    kill(bed.guard("host1"), Signal::SIGKILL).unwrap();
    wait_written(&bed, 100);
    bed.wait_protection_goes_on();
    bed.assert_equal_disks();
    let checked = records(&bed);
    println!("{checked:?}");
    bed.assert_guest_unharmed();
}

#[test]
fn a_shadow_without_room_says_so_and_the_guest_notices_nothing() {
    let _one = one_lab();
    let bed = raise("disk-full", 2, QemuUser::Root, "64");
    run(&bed, "host2", &format!("mkdir -p {IMAGES} && mount -t tmpfs -o size=128k,mode=711 full {IMAGES}"));
    bed.enable();
    let full = |view: &GuestView| view.shadows.iter().any(|shadow| shadow.reason.contains("no room"));
    bed.fleet.wait(GUEST, "a shadow without room", BACK_WITHIN, full).unwrap();
    wait_written(&bed, 100);
    run(&bed, "host2", &format!("mount -o remount,size=200m {IMAGES}"));
    bed.wait_protected();
    bed.assert_equal_disks();
    records(&bed);
    bed.assert_guest_unharmed();
}

//! A guest with a disk: memory, devices and disk come back of one moment, and its writes go on whatever happens to us.
//! `VIRT_SHADOW_ROUNDS` sets how often the power is cut.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use support::{BACK_WITHIN, Bed, GUEST, INTERVAL, Random, one_lab};
use virt_shadow::api::types::{Consistency, ConsistencyMode, GuestView};
use virt_shadow::lab::{DiskRecords, GuestOptions, LabOptions, QemuUser};

const IMAGES: &str = "/var/lib/virt-shadow/disks";

fn rounds() -> u32 {
    std::env::var("VIRT_SHADOW_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// With two disks records are on one, and the blocks that they name on the other.
fn raise(name: &str, hosts: u8, user: QemuUser, disks: &[&str]) -> Bed {
    let options = LabOptions { hosts, racks: hosts, qemu_user: user, ..LabOptions::for_test(name) };
    let workload = "dirty:500:32".parse().unwrap();
    let disks = disks.iter().map(|disk| disk.parse().unwrap()).collect();
    let guest = GuestOptions { memory_mib: 160, workload, disks, ..GuestOptions::new(GUEST, "host1") };
    Bed::raise_guest(&options, 1, &guest)
}

/// All records that the guest wrote are on its disk, and right.
fn records(bed: &Bed) -> DiskRecords {
    let began = Instant::now();
    loop {
        let answer = bed.lab.guest_client(bed.guest.ip).map_err(|e| e.to_string()).and_then(|mut client| {
            client.set_timeout(Some(BACK_WITHIN)).and_then(|()| client.records()).map_err(|e| e.to_string())
        });
        match answer {
            Ok(records) => {
                // None is being written meanwhile. Further ones: a disk newer than the memory.
                assert_eq!(records.checked, records.durable, "{records:?}");
                return records;
            }
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

/// The file systems that the guest would find if it were started now: after their journals were replayed nothing is wrong.
fn check_file_systems(bed: &Bed, host: &str) {
    let script = format!(
        "set -e; copies=$(mktemp -d); virsh -q suspend {GUEST}; \
         for image in $(virsh -q domblklist {GUEST} | awk '{{print $2}}'); do \
           cp --sparse=always $image $(mktemp -p $copies); done; virsh -q resume {GUEST}; \
         for copy in $copies/*; do e2fsck -p $copy || [ $? = 1 ]; e2fsck -fn $copy; done; rm -r $copies"
    );
    run(bed, host, &script);
}

/// The longest that a record took since this was asked last, by the guest's clock, milliseconds.
fn longest_stall_ms(bed: &Bed) -> f64 {
    let answer = bed.lab.guest_client(bed.guest.ip).unwrap().ask("stall").unwrap();
    answer.strip_prefix("stall longest_us=").and_then(|text| text.parse::<f64>().ok()).expect(&answer) / 1e3
}

/// Runs a fault, and prints how long the guest's writes stood still at most meanwhile.
fn measure_stall(bed: &Bed, what: &str, fault: impl FnOnce()) {
    longest_stall_ms(bed);
    fault();
    wait_written(bed, 100);
    let stall = longest_stall_ms(bed);
    println!("{what}: the longest write of the guest took {stall:.0} ms (the guard's bound is 800 ms)");
    // The bound is not asserted on a machine that others use; a write that waits for us is.
    assert!(stall < 10_000.0, "{what}");
}

#[test]
fn disk_and_memory_of_one_moment_outlive_their_host() {
    let _one = one_lab();
    let mut random = Random::from_env();
    let bed = raise("disk-failover", 3, QemuUser::Root, &["64", "32"]);
    bed.enable();
    let mut view: GuestView = bed.wait_protected();
    let mut before = records(&bed);
    for round in 0..rounds() {
        wait_written(&bed, 100);
        bed.assert_equal_disks();
        random.sleep_below_ms(300);
        let host = view.primary.host.clone();
        // Every other time it goes on without its link: whatever it had under way ends in the middle.
        let link_only = round % 2 == 1;
        let cut = if link_only {
            bed.lab.cut_link(&host).unwrap();
            Instant::now()
        } else {
            bed.lab.power_cut(&host).unwrap()
        };
        bed.watch.wait_answer_after(cut + Duration::from_millis(60), BACK_WITHIN).expect("the guest answers");
        let after = records(&bed);
        println!(
            "round {round}: {before:?} before, {after:?} after {host} lost its {}",
            if link_only { "link" } else { "power" }
        );
        assert!(after.durable >= before.durable, "what was committed is there");
        assert_eq!(after.recovered, 0, "it was not booted");
        let back = if link_only { bed.lab.heal_link(&host) } else { bed.lab.power_on(&host) };
        back.unwrap();
        bed.fleet.wait_hosts(3, BACK_WITHIN).unwrap();
        bed.fleet.wait(GUEST, "another primary", BACK_WITHIN, |view| view.primary.host != host).unwrap();
        view = bed.wait_protection_goes_on();
        check_file_systems(&bed, &view.primary.host);
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
    assert_eq!(images(&bed, &to).lines().count(), 2, "{}", images(&bed, &to));
    let on_shadow = images(&bed, &shadow);
    assert!(on_shadow.lines().count() <= 2, "{on_shadow}");
    for disk in ["vda", "vdb"] {
        let jobs = run(&bed, &to, &format!("virsh -q blockjob {GUEST} {disk}"));
        assert!(jobs.is_empty() || jobs.contains("No current"), "{jobs}");
    }
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
    let bed = raise("disk-faults", 2, QemuUser::LibvirtQemu, &["48:qcow2"]);
    bed.enable();
    bed.wait_protected();
    bed.assert_equal_disks();

    bed.kill_agent("host1");
    wait_written(&bed, 100);
    bed.wait_protection_goes_on();
    bed.assert_equal_disks();

    // The guest's writes go through the agent, which stands still: they go on before it does.
    let agent = bed.service("host1", "virtshadowd");
    measure_stall(&bed, "agent stopped", || kill(agent, Signal::SIGSTOP).unwrap());
    kill(agent, Signal::SIGCONT).unwrap();
    bed.wait_protection_goes_on();
    bed.assert_equal_disks();

    // An operator ends the job.
    run(&bed, "host1", &format!("virsh -q blockjob {GUEST} vda --abort"));
    wait_written(&bed, 100);
    bed.wait_protection_goes_on();

    // The same while the guest's output is held.
    let consistency = Consistency { mode: ConsistencyMode::OutputCommit, ..Consistency::default() };
    bed.fleet.enable_with(GUEST, "host1", 1, INTERVAL, consistency).unwrap();
    let wait_holding = || {
        let holding = |view: &GuestView| view.capture.output.gate == "holding" && view.capture.output.reason.is_empty();
        bed.wait_protection_goes_on();
        bed.fleet.wait(GUEST, "output held", BACK_WITHIN, holding).unwrap();
    };
    wait_holding();
    measure_stall(&bed, "agent killed while it holds output", || bed.kill_agent("host1"));
    wait_holding();
    let agent = bed.service("host1", "virtshadowd");
    measure_stall(&bed, "agent stopped while it holds output", || kill(agent, Signal::SIGSTOP).unwrap());
    kill(agent, Signal::SIGCONT).unwrap();
    wait_holding();
    bed.assert_equal_disks();
    bed.fleet.enable(GUEST, "host1", 1, INTERVAL).unwrap();
    bed.wait_protection_goes_on();

    // The guard is killed, too.
    kill(bed.guard("host1"), Signal::SIGKILL).unwrap();
    wait_written(&bed, 100);
    bed.wait_protection_goes_on();
    bed.assert_equal_disks();
    let checked = records(&bed);
    println!("{checked:?}");
    let log = std::fs::read_to_string(bed.lab.service_log("host2", "virtshadowd")).unwrap();
    assert!(!log.contains("broke the protocol"), "{log}");
    bed.assert_guest_unharmed();
}

#[test]
fn a_shadow_without_room_says_so_and_the_guest_notices_nothing() {
    let _one = one_lab();
    let bed = raise("disk-full", 2, QemuUser::Root, &["64"]);
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

#[test]
fn memory_and_disks_go_back_to_one_epoch() {
    let _one = one_lab();
    let bed = raise("disk-rewind", 2, QemuUser::Root, &["64", "32"]);
    go_back(&bed, &[]);
}

#[test]
fn so_they_do_while_output_is_held() {
    let _one = one_lab();
    let bed = raise("disk-rewind-held", 2, QemuUser::Root, &["64"]);
    let mut old = bed.lab.guest_client(bed.guest.ip).unwrap();
    old.set_timeout(Some(Duration::from_secs(5))).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // It is told of what is then undone: the guest's past knows nothing of this connection's last bytes.
        let asking = scope.spawn(|| {
            let mut answers = 0u32;
            let mut highest = 0;
            while !stop.load(Ordering::Relaxed) {
                match old.status() {
                    Ok(answer) => (answers, highest) = (answers + 1, answer.counter.max(highest)),
                    Err(error) => return format!("{answers} answers, counter {highest}, then: {error}"),
                }
            }
            format!("{answers} answers, none missing")
        });
        go_back(&bed, &["--consistency", "output-commit", "--quorum", "all", "--on-loss", "consistency"]);
        stop.store(true, Ordering::Relaxed);
        println!("a client that asked all the time, on one connection: {}", asking.join().unwrap());
    });

    // What is told from here on stays true again, over a power cut of the new primary's host.
    bed.fleet.wait_hosts(2, BACK_WITHIN).unwrap();
    let holding = |view: &GuestView| view.capture.output.gate == "holding" && view.capture.output.reason.is_empty();
    bed.fleet.wait(GUEST, "output held", BACK_WITHIN, holding).unwrap();
    let mut client = bed.lab.guest_client(bed.guest.ip).unwrap();
    client.set_timeout(Some(Duration::from_secs(20))).unwrap();
    let began = Instant::now();
    let mut told = client.status().unwrap();
    while began.elapsed() < Duration::from_secs(1) {
        told = client.status().unwrap();
    }
    bed.lab.power_cut("host2").unwrap();
    let after = client.status().expect("the connection lives on");
    assert!(after.counter >= told.counter && after.records >= told.records, "told {told:?}, then {after:?}");
    let back = records(&bed);
    assert!(back.durable >= told.records, "{back:?}, {told:?}");
    check_file_systems(&bed, "host1");
    bed.assert_guest_unharmed();
}

/// Notes something, lets time go by, and goes back to the note: all of the guest is as it was then.
fn go_back(bed: &Bed, options: &[&str]) {
    let enable = [&["enable", GUEST, "--keep", "10min,256M", "--wait", "120"], options].concat();
    let (code, _, errors) = bed.cli("host1", &enable);
    assert_eq!(code, Some(0), "{errors}");
    bed.wait_protected();
    let mut client = bed.lab.guest_client(bed.guest.ip).unwrap();
    client.ask("note before the mistake").unwrap();
    let epoch = bed.assert_equal_disks().epoch;
    let then = client.status().unwrap();
    // By the guest's clock, so that nobody takes one moment for the other.
    wait_written(bed, 200);
    while client.status().unwrap().uptime_ms < then.uptime_ms + 3_000 {
        std::thread::sleep(Duration::from_millis(50));
    }
    client.ask("note after the mistake").unwrap();
    bed.assert_equal_disks();
    let ordered = Instant::now();
    bed.fleet.go_back(GUEST, epoch).unwrap();
    bed.lab.wait_guest(GUEST).unwrap();
    let mut client = bed.lab.guest_client(bed.guest.ip).unwrap();
    assert_eq!(client.ask("note").unwrap(), "note before the mistake");
    let now = client.status().unwrap();
    assert!(now.uptime_ms <= then.uptime_ms + ordered.elapsed().as_millis() as u64, "{now:?} from {then:?}");
    assert_eq!((&now.boot, now.errors), (&then.boot, 0));
    // Read from the disks, and not one record more than the memory knows of.
    let back = records(bed);
    println!("back at epoch {epoch}: {} records then, {back:?} now", then.records);
    client.verify().unwrap();
    let view = bed.wait_protection_goes_on();
    assert_eq!(view.primary.host, "host2");
    check_file_systems(bed, "host2");
    bed.assert_equal_disks();
    bed.assert_guest_unharmed();
}

#[test]
fn a_damaged_shadow_is_repaired_and_not_promoted() {
    let _one = one_lab();
    let bed = raise("disk-damage", 2, QemuUser::Root, &["64"]);
    bed.enable();
    bed.wait_protected();
    bed.assert_equal_disks();
    // In a part of the disk that the guest does not use: nothing writes over it.
    let flip = format!("printf x | dd of=$(ls {IMAGES}/*/vda.*.img) bs=1 seek=$((60 << 20)) conv=notrunc 2>&1");
    run(&bed, "host2", &flip);
    let began = Instant::now();
    let report = loop {
        match bed.fleet.verify(GUEST) {
            Ok(report) if report.shadows.iter().any(|shadow| shadow.pages_compared > 0) => break report,
            outcome => assert!(began.elapsed() < BACK_WITHIN, "not compared: {outcome:?}"),
        }
    };
    let shadow = &report.shadows[0];
    assert!(!shadow.equal && shadow.difference.contains("1 pages, the first at 0x3c00000 of disk:vda"), "{shadow:?}");
    let told =
        |kind: &str| bed.fleet.events().unwrap().iter().any(|event| event.kind == kind && event.level == "alarm");
    while !told("shadow-damaged") {
        assert!(began.elapsed() < BACK_WITHIN, "no event");
        std::thread::sleep(Duration::from_millis(50));
    }
    bed.wait_protection_goes_on();
    bed.assert_equal_disks();
    let cut = bed.lab.power_cut("host1").unwrap();
    bed.watch.wait_answer_after(cut + Duration::from_millis(60), BACK_WITHIN).expect("the guest answers");
    records(&bed);
    let byte =
        format!("dd if=$(ls {IMAGES}/*/vda.*.img | head -1) bs=1 skip=$((60 << 20)) count=1 2>/dev/null | od -An -tx1");
    assert_eq!(run(&bed, "host2", &byte), "00");
    bed.assert_guest_unharmed();
}

//! A shadow is the guest: after many epochs of a busy guest all memory and device state are equal, at random moments,
//! and again after it moved to another host and back with its clients connected.

use std::time::{Duration, Instant};

use virt_shadow::lab::fleet::Fleet;
use virt_shadow::lab::{GuestOptions, Lab, LabOptions, Workload};

const INTERVAL: Duration = Duration::from_millis(50);
const EPOCHS: u64 = 1000;
const COMPARISONS: u64 = 20;

fn assert_equal(fleet: &Fleet, shadows: usize) {
    let report = fleet.verify("busy").unwrap();
    assert_eq!(report.shadows.len(), shadows, "{report:?}");
    for shadow in &report.shadows {
        assert!(shadow.equal && shadow.pages_compared > 65_536, "{report:?}");
    }
}

#[test]
fn shadows_of_a_busy_guest_are_equal_and_stay_so_when_it_moves() {
    let lab = Lab::up(&LabOptions::for_test("equal")).unwrap();
    let fleet = Fleet::through(&lab, "host1").unwrap();
    fleet.wait_hosts(3, Duration::from_secs(20)).unwrap();
    let workload: Workload = "dirty:4000".parse().unwrap();
    let options = GuestOptions { memory_mib: 256, workload, ..GuestOptions::new("busy", "host1") };
    let guest = lab.guest(&options, true).unwrap();
    let mut client = lab.guest_client(guest.ip).unwrap();
    client.set_timeout(Some(Duration::from_secs(20))).unwrap();
    let boot = client.status().unwrap().boot;

    fleet.enable("busy", "host1", 2, INTERVAL).unwrap();
    let view = fleet.wait_protected("busy", Duration::from_secs(60)).unwrap();

    // Moments spread over the epochs by a fixed seed: a failure can be repeated.
    let (first, mut random) = (view.capture.epoch, 0x5eed_u64);
    for round in 1..=COMPARISONS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = first + round * EPOCHS / COMPARISONS - (random >> 33) % (EPOCHS / COMPARISONS);
        fleet.wait("busy", "enough epochs", Duration::from_secs(120), |view| view.capture.epoch >= at).unwrap();
        assert_equal(&fleet, 2);
    }
    let view = fleet
        .wait("busy", "all epochs", Duration::from_secs(120), |view| view.capture.epoch >= first + EPOCHS)
        .unwrap();
    println!(
        "after {EPOCHS} epochs: pauses {:?} us, {:?} dirty pages",
        view.capture.pause_us, view.capture.dirty_pages
    );

    for to in ["host2", "host1"] {
        let began = Instant::now();
        let report = fleet.switchover("busy", Some(to)).unwrap();
        assert_eq!((report.to.as_str(), report.epochs_lost), (to, 0), "{report:?}");
        println!("to {to}: guest stood still for {:?} ms, all of it took {:?}", report.pause_ms, began.elapsed());
        // The same connection: nothing was lost on it, and the guest is the one that ran before.
        let reply = client.status().unwrap();
        assert_eq!((reply.boot.as_str(), reply.errors), (boot.as_str(), 0));
        let view = fleet.wait_protected("busy", Duration::from_secs(60)).unwrap();
        assert_eq!(view.primary.host, to);
        assert_equal(&fleet, 2);
    }
    client.verify().unwrap();

    fleet.disable("busy").unwrap();
    let after = client.status().unwrap();
    assert_eq!(after.boot, boot);
    for host in ["host2", "host3"] {
        assert_eq!(lab.virsh(host, &["list", "--name"]).unwrap().trim(), "", "a shadow is left on {host}");
    }
}

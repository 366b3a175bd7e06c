//! A guest outlives its QEMU and its host, again and again, as the same guest, and its redundancy comes back.
//! `VIRT_SHADOW_ROUNDS` sets how often (CI: a few; `make bench BENCH=failover` does 20 of each and measures).

use std::time::{Duration, Instant};

use virt_shadow::lab::fleet::Fleet;
use virt_shadow::lab::{GuestOptions, Lab, LabOptions};

const WITHIN: Duration = Duration::from_secs(60);

fn rounds() -> u32 {
    std::env::var("VIRT_SHADOW_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

#[test]
fn a_guest_outlives_its_qemu_and_its_host() {
    let lab = Lab::up(&LabOptions { hosts: 4, racks: 4, ..LabOptions::for_test("failover") }).unwrap();
    let fleet = Fleet::of(&lab).unwrap();
    fleet.wait_hosts(4, WITHIN).unwrap();
    let workload = "dirty:2000".parse().unwrap();
    let guest = lab.guest(&GuestOptions { workload, ..GuestOptions::new("web", "host1") }, true).unwrap();
    let client = lab.watch(guest.ip, Duration::from_millis(5)).unwrap();
    fleet.enable("web", "host1", 2, Duration::from_millis(50)).unwrap();
    let mut term = fleet.wait_protected("web", WITHIN).unwrap().term;

    for round in 0..2 * rounds() {
        let before = fleet.wait_protected("web", WITHIN).unwrap();
        let host = before.primary.host.clone();
        let cut = if round % 2 == 0 {
            let kill = ["sh", "-c", "kill -9 $(cat /run/libvirt/qemu/web.pid)"];
            let now = Instant::now();
            assert!(lab.exec(&host, &kill).unwrap().status.success());
            now
        } else {
            lab.power_cut(&host).unwrap()
        };
        // What was on its way when the guest died may still arrive.
        let answer = client.wait_answer_after(cut + Duration::from_millis(60), WITHIN);
        let answer = answer.unwrap_or_else(|| panic!("round {round}: no answer; {:?}", fleet.events()));
        let after = fleet.wait("web", "another primary", WITHIN, |view| view.primary.host != host).unwrap();
        assert_eq!(after.term, term + 1, "promoted once");
        term = after.term;
        println!("round {round}: {host} -> {}, answer after {answer:?}", after.primary.host);
        if round % 2 == 1 {
            lab.power_on(&host).unwrap();
            fleet.wait_hosts(4, WITHIN).unwrap();
            // It remembers that it ran this guest; it must not do so again.
            let start = lab.virsh(&host, &["start", "web"]);
            assert!(start.is_err(), "a host that came back started a guest that runs elsewhere");
        }
    }
    let view = fleet.wait_protected("web", WITHIN).unwrap();
    assert_eq!(view.shadows.len(), 2);
    assert!(fleet.verify("web").unwrap().shadows.iter().all(|shadow| shadow.equal));
    let seen = client.report();
    assert_eq!((seen.boots.len(), seen.guest_errors), (1, 0), "{seen:?}");
    lab.guest_client(guest.ip).unwrap().verify().unwrap();
    let running: Vec<String> = (1..=4)
        .map(|n| format!("host{n}"))
        .filter(|host| lab.virsh(host, &["domstate", "web"]).is_ok_and(|state| state.trim() == "running"))
        .collect();
    assert_eq!(running, [view.primary.host], "one copy runs");
}

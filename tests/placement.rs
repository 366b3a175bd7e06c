//! Ten guests with policies of their own on six hosts in three racks and two power domains: where their shadows go, why,
//! and where they go when a whole rack is lost.

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use virt_shadow::api::types::{GuestState, GuestView, PlanView};
use virt_shadow::lab::fleet::{Fleet, describe};
use virt_shadow::lab::{GuestOptions, Lab, LabOptions};

const GUESTS: usize = 10;
const WITHIN: Duration = Duration::from_secs(90);
const NAMESPACE: &str = "urn:virt-shadow:policy:1";
/// Besides `interval_ms=1000`; by the number of the guest.
const POLICIES: [&[&str]; GUESTS] = [
    &["need=row1"],
    &["avoid=row1"],
    &["group=web"],
    &["group=web"],
    &["priority=4"],
    &["latency_us=100"],
    &["apart=rack", "priority=2"],
    &["group=db", "need=row2"],
    &["group=db"],
    &[],
];

fn name(number: usize) -> String {
    format!("g{number}")
}

/// Hosts are dealt out to racks in turn, racks to power domains.
fn place(host: &str) -> (usize, usize, usize) {
    let number: usize = host.strip_prefix("host").and_then(|number| number.parse().ok()).unwrap();
    let rack = (number - 1) % 3;
    (rack + 1, rack % 2 + 1, (number - 1) / 3 + 1)
}

struct Site {
    lab: Lab,
    fleet: Fleet,
}

impl Site {
    /// `virt-shadow` as an operator on a host calls it.
    fn cli(&self, host: &str, arguments: &[&str]) -> Result<String, String> {
        let mut command = self.lab.command(host, &support::program("virt-shadow")).unwrap();
        let output = command.args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn plan(&self, host: &str, arguments: &[&str]) -> PlanView {
        let all = [&["plan", "--explain", "--format", "json"], arguments].concat();
        serde_json::from_str(&self.cli(host, &all).unwrap()).unwrap()
    }

    /// Waits until all guests have all their shadows again.
    fn wait_whole(&self, what: &str) -> BTreeMap<String, GuestView> {
        let began = Instant::now();
        loop {
            let views: Vec<GuestView> = (0..GUESTS).map(|number| self.fleet.info(&name(number)).unwrap()).collect();
            let open: Vec<String> = views
                .iter()
                .filter(|view| view.state != GuestState::Protected || view.shadows.len() != 1)
                .map(|view| format!("{} {}", view.domain, describe(view)))
                .collect();
            if open.is_empty() {
                println!("{what}: all protected after {:.1} s", began.elapsed().as_secs_f64());
                return views.into_iter().map(|view| (view.domain.clone(), view)).collect();
            }
            assert!(began.elapsed() < WITHIN, "{what}: {open:#?}\n{:#?}", self.fleet.events().unwrap());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Every shadow is where the site and the policies allow.
    fn assert_placed(&self, views: &BTreeMap<String, GuestView>) {
        let shadow = |number: usize| views[&name(number)].shadows[0].host.as_str();
        for view in views.values() {
            let (primary, shadow) = (place(&view.primary.host), place(&view.shadows[0].host));
            assert_ne!((primary.0, primary.1), (shadow.0, shadow.1), "{}", view.domain);
            assert_ne!(primary.1, shadow.1, "{}: one power domain", view.domain);
        }
        assert_eq!((place(shadow(0)).2, place(shadow(1)).2, place(shadow(7)).2), (1, 2, 2), "labels");
        for (a, b) in [(2, 3), (7, 8)] {
            let [a, b] = [a, b].map(|number| &views[&name(number)]);
            let hosts = [&a.primary.host, &a.shadows[0].host, &b.primary.host, &b.shadows[0].host];
            assert!(!hosts[2..].contains(&hosts[1]) && hosts[0] != hosts[3], "a group on one host: {hosts:?}");
        }
    }

    /// `plan --explain` answers for each host, and its counts sum to all of them.
    fn assert_explained(&self, host: &str) -> PlanView {
        let plan = self.plan(host, &[]);
        assert_eq!((plan.hosts, plan.guests.len(), plan.moves), (6, GUESTS, 0), "{plan:#?}");
        for guest in &plan.guests {
            let [shadow] = &guest.shadows[..] else { panic!("{guest:#?}") };
            let mut hosts: Vec<&str> = shadow.verdicts.iter().map(|verdict| verdict.host.as_str()).collect();
            hosts.sort();
            assert_eq!(hosts, ["host1", "host2", "host3", "host4", "host5", "host6"], "{}", guest.domain);
            let chosen: Vec<_> = shadow.verdicts.iter().filter(|verdict| verdict.verdict == "chosen").collect();
            assert!(chosen.len() == 1 && shadow.host.as_ref() == Some(&chosen[0].host), "{guest:#?}");
            assert_eq!(shadow.host, shadow.now, "what stands stays");
            let barred = shadow.verdicts.iter().filter(|verdict| verdict.verdict == "barred");
            assert!(barred.clone().all(|verdict| !verdict.reasons.is_empty() && !verdict.remedy.is_empty()));
            assert!(barred.count() >= 2, "the primary's rack at least: {guest:#?}");
        }
        plan
    }
}

#[test]
fn ten_guests_are_placed_by_their_policies_and_again_when_a_rack_is_lost() {
    let _lab = support::one_lab();
    let options = LabOptions { hosts: 6, racks: 3, power_domains: 2, ..LabOptions::for_test("placement") };
    let lab = Lab::up(&options).unwrap();
    let site = Site { fleet: Fleet::of(&lab).unwrap(), lab };
    site.fleet.wait_hosts(6, WITHIN).unwrap();
    let home = |number: usize| format!("host{}", number % 6 + 1);
    for number in 0..GUESTS {
        site.lab
            .guest(&GuestOptions { memory_mib: 96, ..GuestOptions::new(&name(number), &home(number)) }, false)
            .unwrap();
    }
    // What hosts can do has been found out by now.
    let hosts = site.fleet.hosts().unwrap();
    for host in &hosts {
        let inventory = host.inventory.as_ref().unwrap_or_else(|| panic!("{} told nothing of itself", host.host));
        assert!(inventory.cpus > 0 && inventory.machine_types.contains("x86_64/q35"), "{inventory:?}");
        assert!(inventory.cpu_models.contains("qemu/qemu64") && inventory.labels.len() == 1, "{inventory:?}");
    }
    (0..GUESTS).for_each(|number| drop(site.lab.wait_guest(&name(number)).unwrap()));

    // Policies are kept with the definition before there is any protection, and what cannot be met is said at once.
    for (number, policy) in POLICIES.iter().enumerate() {
        let (guest, host) = (name(number), home(number));
        let set = [&["policy", &guest, "--set", "interval_ms=1000"], *policy].concat();
        site.cli(&host, &set).unwrap();
    }
    let error = site.cli("host1", &["policy", "g0", "--set", "priority=9"]).unwrap_err();
    assert!(error.contains("priority: 9 is outside 1 to 4"), "{error}");
    let two = site.plan("host5", &["g4", "--shadows", "2"]);
    let second = two.guests[0].shadows.iter().find(|shadow| shadow.host.is_none()).expect("no room for two");
    assert_eq!(second.counts.values().sum::<u64>(), 6, "{second:#?}");
    assert!(second.nearest.is_some() && !second.remedy.is_empty());
    let error = site.cli("host5", &["enable", "g4", "--shadows", "2"]).unwrap_err();
    assert!(error.contains("2 shadows wanted, 1 possible; of 6 hosts") && error.contains("nearest remedy"), "{error}");
    (0..GUESTS).for_each(|number| drop(site.cli(&home(number), &["enable", &name(number)]).unwrap()));

    let before = site.wait_whole("enabled");
    site.assert_placed(&before);
    assert!(before.values().all(|view| view.interval_ms == 1_000), "the policy's interval");
    site.assert_explained("host3");
    let text = site.cli("host3", &["plan", "g0", "--explain"]).unwrap();
    println!("{text}");
    assert!(text.contains("(6 hosts: ") && text.contains("1 chosen"), "{text}");

    // A whole rack without power.
    let cut = Instant::now();
    for host in ["host1", "host4"] {
        site.lab.power_cut(host).unwrap();
    }
    let lost = |view: &GuestView| [&view.primary.host, &view.shadows[0].host].iter().any(|host| place(host).0 == 1);
    let affected = before.values().filter(|view| lost(view)).count();
    assert!(affected >= 4, "{affected}");
    for view in before.values().filter(|view| place(&view.primary.host).0 == 1) {
        let gone = |now: &GuestView| now.primary.host == view.shadows[0].host;
        site.fleet.wait(&view.domain, "promoted", WITHIN, gone).unwrap();
    }
    println!("promoted after {:.1} s", cut.elapsed().as_secs_f64());
    for view in before.values().filter(|view| lost(view)) {
        let elsewhere = |now: &GuestView| now.shadows.iter().all(|shadow| place(&shadow.host).0 != 1);
        site.fleet
            .wait(&view.domain, "another shadow", WITHIN, |now| !now.shadows.is_empty() && elsewhere(now))
            .unwrap();
    }
    let after = site.wait_whole("a rack lost");
    println!(
        "redundancy is back {:.1} s after the rack was lost; {affected} guests were concerned",
        cut.elapsed().as_secs_f64()
    );
    site.assert_placed(&after);
    let unconcerned = before.values().filter(|view| !lost(view));
    for view in unconcerned {
        assert_eq!(after[&view.domain].shadows[0].host, view.shadows[0].host, "{} was moved for nothing", view.domain);
    }
    let plan = site.assert_explained("host3");
    let down = |name: &str| {
        let verdicts = plan.guests.iter().flat_map(|guest| &guest.shadows[0].verdicts);
        verdicts.filter(|verdict| verdict.host == name).all(|verdict| verdict.reasons[0] == "down")
    };
    assert!(down("host1") && down("host4"));

    // The policy went along with the guest, and its memory did.
    let moved = &after["g0"];
    assert_ne!(moved.primary.host, "host1");
    let kept = site.lab.virsh(&moved.primary.host, &["metadata", "g0", NAMESPACE]).unwrap();
    assert!(kept.contains("need = \"row1\""), "{kept}");
    assert!(site.cli("host3", &["policy", "g0"]).unwrap().contains("need = \"row1\""));
    let report = site.fleet.verify("g0").unwrap();
    assert!(report.shadows.len() == 1 && report.shadows[0].equal, "{report:?}");
    for number in 0..GUESTS {
        site.lab.wait_guest(&name(number)).unwrap();
    }

    // What a changed policy asks for is carried out; what cannot be is explained and changes nothing.
    let policy = ["policy", "g9", "--set", "need=row1", "apart=room"];
    site.cli("host3", &policy).unwrap();
    let why = site.fleet.wait("g9", "explanation", WITHIN, |view| view.reason.contains("of 6 hosts")).unwrap();
    println!("{}", why.reason);
    assert_eq!(why.shadows.len(), 1, "the old shadow is better than none");
    site.cli("host3", &["policy", "g9", "--clear"]).unwrap();
    site.wait_whole("policy cleared");
}

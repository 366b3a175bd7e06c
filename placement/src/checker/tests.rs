use super::*;
use crate::instance::parse;

/// Six hosts in three racks of one room; two guests of 4 GiB on host 0, warm shadows.
fn instance() -> Instance {
    let json = r#"{"format": "shadow-place/1", "survive": ["rack"],
        "params": {"tiers": [{"name": "warm", "mem_pm": 300, "far_pm": 700, "cpu_pm": 20, "vf": 0}],
            "cost": {"cpu": 8, "far": 1, "move": 5, "net_room": 100, "net_xroom": 300, "net_xregion": 1000,
                "unplaced_fixed": 2000000, "unplaced_mem": 60, "unplaced_first": 2, "bal_host": 100, "bal_rack": 1000,
                "bal_knots": [[600, 1]]}},
        "regions": [{"lat": 1500, "in": 1000, "out": 1000}],
        "rooms": [{"region": 0, "lat": 30, "in": 1000, "out": 1000}],
        "racks": [{"room": 0, "switch": 0, "power": 0, "lat": 6, "in": 1000, "out": 1000},
            {"room": 0, "switch": 1, "power": 1, "lat": 6, "in": 1000, "out": 1000},
            {"room": 0, "switch": 2, "power": 2, "lat": 6, "in": 1000, "out": 1000}],
        "hosts": [], "vms": []}"#;
    let mut instance: Instance = serde_json::from_str(json).unwrap();
    let host = r#"{"rack": 0, "state": "up", "cpu_cap": 16000, "mem_cap": 16384, "cpu": 8000, "mem": 8192, "far": 65536,
        "vf": 4, "in": 100, "out": 100, "gen": 1, "labels": 0, "mem_cost": 10}"#;
    let vm = r#"{"p": 0, "cpu": 2000, "mem": 4096, "vf": 0, "w": 1, "gen": 1, "need": 0, "avoid": 0, "grp": -1,
        "copies": [{"t": 0, "lat": 100, "div": "rack", "bw": 40, "cur": -1}]}"#;
    for rack in [0, 0, 1, 1, 2, 2] {
        let mut host: crate::instance::Host = serde_json::from_str(host).unwrap();
        host.rack = rack;
        instance.hosts.push(host);
    }
    for _ in 0..2 {
        instance.vms.push(serde_json::from_str(vm).unwrap());
    }
    parse(&serde_json::to_vec(&instance).unwrap()).unwrap()
}

fn plan(hosts: &[&[i64]]) -> Plan {
    Plan { place: hosts.iter().map(|hosts| hosts.to_vec()).collect(), ..Plan::default() }
}

fn broken(instance: &Instance, hosts: &[&[i64]]) -> Vec<&'static str> {
    check(instance, &plan(hosts)).unwrap().violations.into_keys().collect()
}

#[test]
fn a_valid_plan_is_priced_term_by_term() {
    let report = check(&instance(), &plan(&[&[2], &[4]])).unwrap();
    assert!(report.is_feasible(), "{report:?}");
    // 30 % of 4096 is 1228.8, so 1229 held and 2867 reserved on each host: nothing is shared.
    assert_eq!(report.terms.mem, 2 * 10 * 4096);
    assert_eq!(report.terms.far, 2 * 2868);
    assert_eq!(report.terms.cpu, 2 * 8 * 2000);
    assert_eq!(report.terms.net, 2 * 40 * 100);
    // Memory: 8192 + 4096 of 16384 are 750 thousandths, of which 150 above the knot; CPU 625 thousandths.
    assert_eq!(report.terms.balance, 2 * 100 * (150 + 25));
    assert_eq!((report.terms.unplaced, report.terms.churn, report.unplaced, report.moved), (0, 0, 0, 0));
}

#[test]
fn guests_that_fail_together_do_not_share_a_reserve_and_others_do() {
    let mut instance = instance();
    let together = check(&instance, &plan(&[&[2], &[2]])).unwrap();
    assert_eq!(together.terms.mem, 10 * 2 * 4096);
    instance.vms[1].primary = 4;
    let apart = check(&instance, &plan(&[&[2], &[2]])).unwrap();
    assert_eq!(apart.terms.mem, 10 * (2 * 1229 + 2867));
}

#[test]
fn every_rule_of_a_site_is_checked() {
    let change = |f: fn(&mut Instance)| {
        let mut changed = instance();
        f(&mut changed);
        broken(&changed, &[&[2], &[-1]])
    };
    assert_eq!(change(|_| ()), [""; 0]);
    assert_eq!(change(|i| i.hosts[2].state = HostState::Down), ["down"]);
    assert_eq!(change(|i| i.hosts[2].state = HostState::Drain), ["drain"]);
    assert_eq!(
        change(|i| {
            i.hosts[2].state = HostState::Drain;
            i.vms[0].copies[0].current = 2;
        }),
        [""; 0]
    );
    assert_eq!(change(|i| i.vms[0].generation = 2), ["gen"]);
    assert_eq!(change(|i| i.vms[0].need = 1), ["label"]);
    assert_eq!(
        change(|i| {
            i.vms[0].avoid = 2;
            i.hosts[2].labels = 2;
        }),
        ["label"]
    );
    assert_eq!(change(|i| i.racks[1].switch = 0), ["domain"]);
    assert_eq!(change(|i| i.racks[1].power = 0), ["domain"]);
    assert_eq!(change(|i| i.vms[0].copies[0].apart = Level::Room), ["div"]);
    assert_eq!(change(|i| i.vms[0].copies[0].latency_us = 35), ["latency"]);
    assert_eq!(change(|i| i.vms[0].copies[0].latency_us = 36), [""; 0]);
}

#[test]
fn every_amount_is_checked() {
    let change = |f: fn(&mut Instance)| {
        let mut changed = instance();
        f(&mut changed);
        broken(&changed, &[&[2], &[2]])
    };
    assert_eq!(change(|_| ()), [""; 0]);
    assert_eq!(change(|i| i.hosts[2].memory_mib = 8191), ["mem"]);
    assert_eq!(change(|i| i.hosts[2].far_mib = 5735), ["far"]);
    assert_eq!(change(|i| i.hosts[2].cpu_milli = 3999), ["cpu"]);
    assert_eq!(change(|i| i.vms[0].vfs = 5), ["vf"]);
    assert_eq!(change(|i| i.hosts[2].in_mbit = 79), ["bw_host"]);
    assert_eq!(change(|i| i.racks[1].in_mbit = 79), ["bw_rack"]);
    assert_eq!(change(|i| i.hosts[0].out_mbit = 79), ["bw_src"]);
    assert_eq!(change(|i| i.racks[0].out_mbit = 79), ["bw_src"]);
}

#[test]
fn siblings_and_groups_are_kept_apart() {
    let mut instance = instance();
    let second = instance.vms[0].copies[0].clone();
    instance.vms[0].copies.push(second);
    assert_eq!(broken(&instance, &[&[2, 3], &[-1]]), ["sibling"]);
    assert_eq!(broken(&instance, &[&[2, 4], &[-1]]), [""; 0]);
    instance.vms[0].group = 7;
    instance.vms[1].group = 7;
    assert_eq!(broken(&instance, &[&[2, -1], &[2]]), ["group"]);
    instance.vms[1].primary = 3;
    assert_eq!(broken(&instance, &[&[3, -1], &[4]]), ["group"]);
}

#[test]
fn a_move_and_a_shadow_left_out_have_their_price() {
    let mut instance = instance();
    instance.vms[0].copies[0].current = 2;
    let report = check(&instance, &plan(&[&[4], &[-1]])).unwrap();
    assert_eq!((report.moved, report.terms.churn), (1, 5 * 4096));
    assert_eq!((report.unplaced, report.terms.unplaced), (1, 2 * (2_000_000 + 60 * 4096)));
    instance.hosts[2].state = HostState::Down;
    assert_eq!(check(&instance, &plan(&[&[4], &[-1]])).unwrap().moved, 0);
}

#[test]
fn the_audit_finds_what_would_have_fitted_and_wrong_claims() {
    let mut instance = instance();
    let mut left_out = plan(&[&[2], &[-1]]);
    assert_eq!(
        audit(&instance, &left_out, 10).unwrap(),
        Audit { audited: 1, not_maximal: 1, claims_wrong: 0, unexplained: 1 }
    );
    for host in &mut instance.hosts {
        host.far_mib = 2868;
    }
    instance.hosts[3].state = HostState::Down;
    instance.hosts[4].state = HostState::Down;
    instance.hosts[5].state = HostState::Down;
    let claim = |down, domain, far| {
        BTreeMap::from([("down".to_owned(), down), ("domain".to_owned(), domain), ("far".to_owned(), far)])
    };
    left_out.reasons.insert("1:0".into(), claim(3, 2, 1));
    assert_eq!(audit(&instance, &left_out, 10).unwrap(), Audit { audited: 1, ..Audit::default() });
    left_out.reasons.insert("1:0".into(), claim(2, 3, 1));
    assert_eq!(audit(&instance, &left_out, 10).unwrap().claims_wrong, 1);
}

#[test]
fn a_plan_of_another_shape_is_refused() {
    let instance = instance();
    assert!(matches!(check(&instance, &plan(&[&[2]])), Err(PlanError::Guests { .. })));
    assert!(matches!(check(&instance, &plan(&[&[2], &[]])), Err(PlanError::Copies { guest: 1, .. })));
    assert!(matches!(check(&instance, &plan(&[&[2], &[6]])), Err(PlanError::Host { host: 6, .. })));
    assert!(matches!(check(&instance, &plan(&[&[2], &[-2]])), Err(PlanError::Host { host: -2, .. })));
}

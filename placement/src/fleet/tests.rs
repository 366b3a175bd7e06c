use std::collections::BTreeSet;

use super::*;
use crate::instance::HostState;
use crate::solver::{OneByOne, Options, Reason, Verdict};
use crate::units::{GuestId, HostName};

/// Three racks of two hosts, two power domains.
const SITE: &str = r#"
survive = ["rack", "power"]
[[room]]
name = "hall"
latency_us = 40
[[power]]
name = "feed-a"
[[power]]
name = "feed-b"
[[rack]]
name = "r1"
power = "feed-a"
latency_us = 8
[[rack]]
name = "r2"
power = "feed-b"
latency_us = 8
in_mbit = 1000
[[rack]]
name = "r3"
power = "feed-b"
latency_us = 10
[[host]]
name = "a1"
rack = "r1"
[[host]]
name = "a2"
rack = "r1"
[[host]]
name = "b1"
rack = "r2"
labels = ["ssd"]
[[host]]
name = "b2"
rack = "r2"
[[host]]
name = "c1"
rack = "r3"
labels = "ssd"
[[host]]
name = "c2"
rack = "r3"
"#;

#[test]
fn a_topology_is_read() {
    let site = Topology::parse(SITE).unwrap();
    let host = HostName::from("c1");
    assert_eq!(site.hosts().count(), 6);
    assert_eq!(site.rack_of(&host), Some("r3"));
    assert_eq!(site.room_of(&host), Some(("hall", "region")));
    assert_eq!(site.rack_of(&"d1".into()), None);
}

#[test]
fn a_topology_that_is_malformed_or_contradicts_itself_is_refused_with_the_line() {
    // What is changed, to what, which text is then at fault, and what is said.
    let cases = [
        (
            "rack = \"r3\"\nlabels",
            "rack = \"r4\"\nlabels",
            "rack = \"r4\"",
            "rack: there is no rack r4; there are: r1, r2, r3",
        ),
        ("name = \"a2\"", "name = \"a1\"", "\"a1\"", "name: there is another host a1"),
        ("name = \"r2\"", "name = \"r1\"", "\"r1\"\npower = \"feed-b\"", "name: there is another rack r1"),
        ("in_mbit = 1000", "in_mbit = 0", "in_mbit", "in_mbit: 0 is outside 1 to 536870912"),
        ("in_mbit = 1000", "in_mbit = \"fast\"", "in_mbit", "in_mbit: has to be a whole number, not string"),
        ("in_mbit = 1000", "inmbit = 1000", "inmbit", "inmbit: no such key here"),
        ("latency_us = 40", "latency_us = -1", "latency_us = -1", "latency_us: -1 is outside 0 to 10000000"),
        ("[[room]]", "[room]", "[room]", "has to be written as [[room]]"),
        ("[\"rack\", \"power\"]", "[\"rack\", \"luck\"]", "survive", "survive: \"luck\" is none of rack"),
        ("power = \"feed-a\"", "power = \"feed-c\"", "power = \"feed-c\"", "power: there is no power feed-c"),
        ("name = \"b1\"", "name = \"b1", "name = \"b1\n", ""),
        ("labels = \"ssd\"", "labels = [\"\"]", "labels = [\"\"]", "labels: \"\" is no name"),
        ("name = \"feed-b\"\n", "", "[[power]]\n[[rack]]", "name is missing"),
        ("name = \"c2\"", "name = \"c2\"\nlatency_us = 5", "latency_us = 5", "latency_us: hosts have none"),
    ];
    for (from, to, fault, reason) in cases {
        assert!(SITE.contains(from), "{from}");
        let changed = SITE.replacen(from, to, 1);
        let error = Topology::parse(&changed).unwrap_err();
        assert!(error.reason.contains(reason), "{to}: {error:?}");
        let line = 1 + changed[..changed.rfind(fault).unwrap()].matches('\n').count();
        assert_eq!(error.line, line, "{to}: {error:?}");
    }
    assert!(Topology::parse("").unwrap_err().reason.contains("no [[host]] at all"));
}

#[test]
fn a_policy_is_read_and_its_defaults_are_a_hot_shadow_in_another_rack() {
    assert_eq!(Policy::parse("").unwrap(), Policy::of(1));
    let text = "shadows = 2\ntiers = [\"hot\", \"cold\"]\napart = \"room\"\nlatency_us = [200, 2000]\ninterval_ms = 50\n\
                need = \"ssd\"\navoid = [\"old\"]\ngroup = \"web\"\npriority = 3";
    let policy = Policy::parse(text).unwrap();
    let tiers: Vec<Tier> = policy.shadows.iter().map(|shadow| shadow.tier).collect();
    assert_eq!(tiers, [Tier::Hot, Tier::Cold]);
    assert!(policy.shadows.iter().all(|shadow| shadow.apart == crate::instance::Level::Room));
    assert_eq!(policy.shadows[1].latency_us, Some(2000));
    assert_eq!((policy.interval_ms, policy.priority, policy.group.as_deref()), (Some(50), 3, Some("web")));
}

#[test]
fn a_policy_that_is_malformed_or_contradicts_itself_is_refused_with_the_line() {
    let cases = [
        ("shadows = 9", 1, "shadows: 9 is outside 0 to 8"),
        ("shadows = 3\ntiers = [\"hot\", \"warm\"]", 2, "tiers: 2 given for 3 shadows"),
        ("tiers = \"tepid\"", 1, "tiers: \"tepid\" is none of hot, warm, cold"),
        ("\nneed = [\"ssd\"]\navoid = [\"ssd\"]", 3, "avoid: ssd is needed and avoided"),
        ("apart = \"planet\"", 1, "apart: \"planet\" is none of rack, room, region"),
        ("priority = 5", 1, "priority: 5 is outside 1 to 4"),
        ("latency_us = 0", 1, "latency_us: 0 is outside"),
        ("shadow = 1", 1, "shadow: no such key here"),
        ("shadows = 1\nshadows = 2", 2, "duplicate key"),
    ];
    for (text, line, reason) in cases {
        let error = Policy::parse(text).unwrap_err();
        assert!(error.reason.contains(reason), "{text}: {error:?}");
        assert_eq!(error.line, line, "{text}: {error:?}");
    }
}

fn hosts() -> Vec<HostFacts> {
    ["a1", "a2", "b1", "b2", "c1", "c2"]
        .map(|name| HostFacts::with_memory(name.into(), Capacity { total: 65_536, free: 16_384 }))
        .to_vec()
}

fn guest(id: &str, primary: &str, policy: &str) -> GuestFacts {
    GuestFacts::with_memory(id.into(), primary.into(), 4_096, Policy::parse(policy).unwrap())
}

fn planned(hosts: &[HostFacts], guests: &[GuestFacts]) -> FleetPlan {
    plan(&Topology::parse(SITE).unwrap(), hosts, guests, &Options::default(), &OneByOne).unwrap()
}

fn names(plan: &FleetPlan, guest: &str) -> Vec<String> {
    let hosts = plan.hosts_of(&GuestId::from(guest)).unwrap();
    hosts.iter().map(|host| host.as_ref().map_or("-".into(), ToString::to_string)).collect()
}

/// How a manager uses it: what it knows goes in, orders and explanations come out.
#[test]
fn the_manager_asks_for_hosts_and_explains_them() {
    let mut guests = vec![guest("g1", "a1", "need = \"ssd\""), guest("g2", "b1", "shadows = 2")];
    let first = planned(&hosts(), &guests);
    assert!(["b1", "c1"].contains(&names(&first, "g1")[0].as_str()));
    // The power domains leave room for one shadow of g2: b1, b2, c1 and c2 are on one feed.
    let [one, two] = &names(&first, "g2")[..] else { panic!() };
    assert!(one.starts_with('a') != two.starts_with('a') && [one, two].contains(&&"-".to_owned()), "{one} {two}");
    assert_eq!(first.refusals.len(), 1);
    let refusal = &first.refusals[0];
    assert_eq!(refusal.counts.values().sum::<u64>(), 6);
    assert_eq!(refusal.counts[&Reason::Domain], 4);
    assert_eq!(refusal.counts[&Reason::Sibling], 2);
    assert!(refusal.to_string().starts_with("no host for shadow"), "{refusal}");
    let third = "nearest remedy: add a host in a third power domain, apart from those of the primary and its other \
                 shadows, or ask for fewer shadows";
    assert!(refusal.to_string().ends_with(third), "{refusal}");

    // What was chosen is told back the next time, and stays.
    for guest in &mut guests {
        guest.shadows = first.hosts_of(&guest.id).unwrap().to_vec();
    }
    let again = planned(&hosts(), &guests);
    assert_eq!(again.placements, first.placements);
    assert_eq!(again.moves, []);

    // Its host goes down: the shadow is made elsewhere, and nothing that stands is moved.
    let gone = first.hosts_of(&"g1".into()).unwrap()[0].clone().unwrap();
    let mut fewer = hosts();
    fewer.iter_mut().find(|host| host.name == gone).unwrap().state = HostState::Down;
    let primary = &mut guests[1].primary;
    if *primary == gone {
        *primary = "b2".into();
    }
    let after = planned(&fewer, &guests);
    let now = after.hosts_of(&"g1".into()).unwrap()[0].clone().unwrap();
    assert!(now != gone && ["b1", "c1"].contains(&now.as_str()));
    assert_eq!(after.moves, []);

    // Why, host by host.
    let verdicts = after.explain(&"g1".into(), 0).unwrap();
    assert_eq!(verdicts.len(), 6);
    for (host, verdict) in &verdicts {
        let text = verdict.to_string();
        match host.as_str() {
            "a1" | "a2" => assert!(text.contains("in the primary's rack"), "{host}: {text}"),
            "b2" | "c2" => assert!(text.contains("without what the guest asks for"), "{host}: {text}"),
            _ if *host == now => assert_eq!(*verdict, Verdict::Chosen),
            _ => assert!(text.starts_with("down"), "{host}: {text}"),
        }
    }
    assert!(after.explain(&"g1".into(), 1).is_none() && after.explain(&"g3".into(), 0).is_none());
}

#[test]
fn a_guest_goes_only_where_it_can_run_and_is_not_refused() {
    let mut hosts = hosts();
    for host in &mut hosts {
        host.machine_types = BTreeSet::from(["pc-q35-7.2".to_owned()]);
        host.cpu_models = BTreeSet::from(["Skylake-Server".to_owned()]);
    }
    hosts[2].machine_types.insert("pc-q35-9.0".into());
    hosts[4].machine_types.insert("pc-q35-9.0".into());
    hosts[4].cpu_models.clear();
    let mut guest = guest("g", "a1", "");
    guest.machine_type = Some("pc-q35-9.0".into());
    guest.cpu_model = Some("Icelake-Server".into());
    assert_eq!(names(&planned(&hosts, &[guest.clone()]), "g"), ["c1"]);
    guest.excluded.insert("c1".into());
    let plan = planned(&hosts, &[guest]);
    assert_eq!(names(&plan, "g"), ["-"]);
    assert_eq!(plan.refusals[0].counts[&Reason::Label], 6);
}

#[test]
fn hosts_without_an_agent_get_nothing_and_strangers_are_named() {
    let mut hosts = hosts();
    hosts.retain(|host| host.name.as_str() != "c1" && host.name.as_str() != "c2");
    hosts.push(HostFacts::with_memory("z9".into(), Capacity::UNKNOWN));
    let plan = planned(&hosts, &[guest("g", "b1", "")]);
    assert!(names(&plan, "g")[0].starts_with('a'));
    assert_eq!(plan.unknown_hosts, [HostName::from("z9")]);
    let error =
        super::plan(&Topology::parse(SITE).unwrap(), &hosts, &[guest("g", "z9", "")], &Options::default(), &OneByOne);
    assert!(matches!(error, Err(FleetError::UnknownPrimary { .. })));
}

#[test]
fn room_is_kept_for_promotions_and_shared_by_guests_that_do_not_fail_together() {
    // Warm shadows of 4 GiB hold 1,248 MiB and need 2,912 more when promoted: with 5,600 MiB a host has room for two
    // if their primaries are in different racks, and for one if not.
    let site = Topology::from_racks((0..4).map(|n| (format!("h{n}").into(), format!("r{n}"))));
    let mut hosts: Vec<HostFacts> = (0..4)
        .map(|n| HostFacts::with_memory(format!("h{n}").into(), Capacity { total: 65_536, free: 5_600 }))
        .collect();
    hosts[0].memory.free = 0;
    hosts[1].memory.free = 0;
    hosts[3].state = HostState::Down;
    let warm = |id: &str, primary: &str| {
        GuestFacts::with_memory(id.into(), primary.into(), 4_096, Policy::parse("tiers = \"warm\"").unwrap())
    };
    let refused =
        |guests: &[GuestFacts]| plan(&site, &hosts, guests, &Options::default(), &OneByOne).unwrap().refusals.len();
    assert_eq!(refused(&[warm("a", "h0"), warm("b", "h1")]), 0);
    assert_eq!(refused(&[warm("a", "h0"), warm("b", "h0")]), 1);
}

/// What is said to help when a guest on a1 of three racks, r1 to r3, with two hosts each, has no host for a shadow.
#[test]
fn what_helps_is_said_for_each_reason() {
    let racks = |racks: [&str; 6]| {
        Topology::from_labels(
            ["a1", "a2", "b1", "b2", "c1", "c2"].into_iter().zip(racks).map(|(host, rack)| HostLabels {
                host: host.into(),
                rack: rack.into(),
                power: None,
                switch: None,
            }),
        )
    };
    let three = racks(["r1", "r1", "r2", "r2", "r3", "r3"]);
    let one_switch = Topology::from_labels(["a1", "a2", "b1", "b2", "c1", "c2"].map(|host| HostLabels {
        host: host.into(),
        rack: host[..1].into(),
        power: None,
        switch: Some("leaf".into()),
    }));
    let remedy = |site: &Topology, hosts: &[HostFacts], guests: &[GuestFacts]| {
        let plan = plan(site, hosts, guests, &Options::default(), &OneByOne).unwrap();
        assert_eq!(plan.refusals.len(), 1, "{:?}", plan.refusals);
        let counted: u64 = plan.refusals[0].counts.values().sum();
        assert_eq!(counted, 6);
        plan.refusals[0].remedy().unwrap()
    };
    let all = |change: &dyn Fn(&mut HostFacts)| {
        let mut hosts = hosts();
        hosts[2..].iter_mut().for_each(change);
        hosts
    };
    let one = |policy: &str| vec![guest("g", "a1", policy)];
    let fourth = "add a host in a fourth rack, apart from those of the primary and its other shadows, or ask for fewer \
                  shadows";
    assert_eq!(remedy(&three, &hosts(), &one("shadows = 3")), fourth);
    let second = "add a host in a second rack, apart from that of the primary";
    assert_eq!(remedy(&racks(["r"; 6]), &hosts(), &one("")), second);
    assert_eq!(
        remedy(&one_switch, &hosts(), &one("")),
        "add a host in a second switch, apart from that of the primary"
    );
    // A rack that is down is a rack: to bring it back helps.
    let down = all(&|host| host.state = HostState::Down);
    assert_eq!(remedy(&three, &down, &one("")), "on b1: bring it or its agent back");
    let silent = all(&|host| host.state = HostState::Drain);
    assert_eq!(remedy(&three, &silent, &one("")), "on b1: have its agent report again, or end its drain");
    let full = all(&|host| host.memory.free = 4_000);
    assert_eq!(remedy(&three, &full, &one("")), "on b1: free 160 MiB of memory");
    // Room for two things is made more easily than a primary is moved.
    let busy = all(&|host| (host.memory.free, host.cpu) = (4_000, Capacity { total: 8_000, free: 500 }));
    let mut large = one("");
    large[0].cpu_milli = 2_000;
    assert_eq!(remedy(&three, &busy, &large), "on b1: free 160 MiB of memory; and free 1500 milli-vCPU");
    let label = "on b1: give it the labels, CPU model and machine type that the guest asks for";
    assert_eq!(remedy(&three, &hosts(), &one("need = \"ssd\"")), label);
    let apart = "on b1: let the policy's apart be less than the room or region";
    assert_eq!(remedy(&three, &hosts(), &one("apart = \"room\"")), apart);
    let late = remedy(&three, &hosts(), &one("latency_us = 2"));
    assert!(late.starts_with("on b1: let the policy's latency_us be ") && late.ends_with(" more"), "{late}");
    // The group's other members are on b1 and c1, or have their shadows there.
    let mut group =
        vec![guest("h", "b1", "group = \"web\"\nshadows = 0"), guest("i", "c1", "group = \"web\"\nshadows = 0")];
    group.push(guest("g", "a1", "group = \"web\""));
    let small = all(&|host| {
        if ["b2", "c2"].contains(&host.name.as_str()) {
            host.state = HostState::Down;
            host.machine_types = BTreeSet::from(["none".to_owned()]);
        }
    });
    group[2].machine_type = Some("q35".into());
    let off = "on b1: move the guest of the same group off it, or take one out of the group";
    assert_eq!(remedy(&three, &small, &group), off);
}

#[test]
fn a_plan_that_breaks_a_rule_is_not_let_through() {
    let guests = [guest("g1", "a1", ""), guest("g2", "b1", "")];
    let topology = Topology::parse(SITE).unwrap();
    let instance = super::translate::instance(&topology, &hosts(), &guests).unwrap();
    let place = |one: i64, two: i64| crate::instance::Plan { place: vec![vec![one], vec![two]], ..Default::default() };
    super::plan::verify(&instance, &place(2, 0)).unwrap();
    for (one, two, rule) in [(1, 0, "domain"), (2, 3, "domain"), (2, 9, "host")] {
        let refused = super::plan::verify(&instance, &place(one, two)).unwrap_err();
        assert!(matches!(&refused, FleetError::Refused { examples } if examples[0].contains(rule)), "{refused}");
    }
}

#[test]
fn a_policy_is_changed_key_by_key_and_written_as_it_was_read() {
    let empty = Policy::default();
    assert_eq!(empty.to_string(), "");
    let policy =
        empty.changed(&["shadows=2", "apart=rack,room", "need=ssd", "group=web \"1\"", "latency_us=200"]).unwrap();
    let text =
        "shadows = 2\napart = [\"rack\", \"room\"]\nlatency_us = 200\nneed = \"ssd\"\ngroup = \"web \\\"1\\\"\"\n";
    assert_eq!(policy.to_string(), text);
    assert_eq!(Policy::parse(text).unwrap(), policy);
    assert_eq!(serde_json::from_str::<Policy>(&serde_json::to_string(&policy).unwrap()).unwrap(), policy);
    // A list for two shadows says nothing of three.
    let more = policy.changed(&["shadows=3", "need="]).unwrap();
    assert_eq!(more.to_string(), "shadows = 3\nlatency_us = 200\ngroup = \"web \\\"1\\\"\"\n");
    assert_eq!(policy.resized(1).shadows, policy.shadows[..1]);
    for (change, reason) in [
        ("shadows", "not KEY=VALUE"),
        ("colour=red", "no such key"),
        ("shadows=many", "has to be a whole number"),
        ("shadows=9", "outside 0 to 8"),
        ("tiers=[\"hot\"", "tiers=[\"hot\""),
        ("apart=rack,room,region", "3 given for 2 shadows"),
        ("avoid=ssd", "needed and avoided"),
    ] {
        let error = policy.changed(&[change]).unwrap_err();
        assert!(error.reason.contains(reason), "{change}: {error}");
    }
}

#[test]
fn hosts_tell_their_racks_switches_and_feeds() {
    let host = |name: &str, rack: &str, power: Option<&str>, switch: Option<&str>| HostLabels {
        host: name.into(),
        rack: rack.into(),
        power: power.map(Into::into),
        switch: switch.map(Into::into),
    };
    let site = Topology::from_labels([
        host("a", "r1", Some("feed"), None),
        host("b", "r2", None, Some("leaf")),
        host("c", "r3", Some("feed"), Some("leaf")),
        host("d", "r4", None, None),
    ]);
    let facts: Vec<HostFacts> = ["a", "b", "c", "d"]
        .map(|name| HostFacts::with_memory(name.into(), Capacity { total: 65_536, free: 16_384 }))
        .to_vec();
    let guest = GuestFacts::with_memory("g".into(), "c".into(), 1_024, Policy::default());
    let plan = plan(&site, &facts, &[guest], &Options::default(), &OneByOne).unwrap();
    assert_eq!(names(&plan, "g"), ["d"], "a is on its feed, b on its switch");
}

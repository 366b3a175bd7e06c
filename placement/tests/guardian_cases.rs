//! What the guardian makes of the accidents it is there for, one by one, in virtual time.

mod world;

use placement::fleet::Policy;
use placement::guardian::{Leave, Needs, Order, Phase, Reply, Request, RequestError, Wish};
use placement::term::Role;
use world::{World, wish};

/// `web` on h1 with `shadows` shadows, all following.
fn protected(hosts: usize, racks: usize, shadows: u32) -> World {
    let mut world = World::new(1, hosts, racks);
    world.run_ms(500);
    let id = world.enable("web", "h1", shadows);
    assert!(world.run_until(5_000, |world| world.is_whole("web")), "{:#?}", world.log);
    assert_eq!(world.answers[&id], Ok(Reply::Enabled));
    // Until heartbeats have told it to the manager.
    world.run_ms(500);
    world
}

fn name(text: &str) -> placement::HostName {
    text.into()
}

#[test]
fn a_power_cut_moves_the_guest_within_a_second_and_a_half_and_restores_redundancy() {
    let mut world = protected(3, 3, 2);
    let (cut_us, old_term) = (world.now_us, world.plan("web").unwrap().term);
    world.power_cut(&name("h1"));
    assert!(world.run_until(1_500, |world| world.runs_on("web").is_some()), "{:#?}", world.log);
    assert!(world.now_us - cut_us >= 800_000, "not before it was silent and then asked");
    world.run_ms(50);
    let plan = world.plan("web").unwrap();
    assert_eq!((plan.term, plan.seats.len()), (old_term.next(), 1), "one promotion, the other shadow stays");
    world.run_ms(3_000);
    assert_eq!(world.promised.len(), 1);
    // Two wanted, but only one other rack has power: told, and mended when the old host comes back.
    let reason = world.guardian.as_ref().unwrap().guest(&"web".into()).unwrap().reason();
    assert!(reason.contains("on h1: bring it or its agent back"), "{reason}");
    world.power_on(&name("h1"));
    assert!(world.run_until(10_000, |world| world.is_whole("web")), "{:#?}", world.log);
    assert_eq!(world.hosts[&name("h1")].role(&"web".into()).unwrap().0, Role::Shadow);
}

#[test]
fn a_killed_qemu_is_replaced_at_once() {
    let mut world = protected(2, 2, 1);
    let died_us = world.now_us;
    world.kill_guest(&name("h1"), &"web".into());
    assert!(world.run_until(100, |world| world.runs_on("web") == Some(&name("h2"))), "{:#?}", world.log);
    assert!(world.now_us - died_us < 50_000);
    assert!(world.run_until(5_000, |world| world.is_whole("web")), "the old host keeps the shadow now");
}

#[test]
fn a_silent_agent_is_not_a_dead_host() {
    let mut world = protected(3, 3, 1);
    world.crash_agent(&name("h1"), 20_000_000);
    world.run_ms(19_000);
    assert_eq!(world.runs_on("web"), Some(&name("h1")));
    assert!(world.promised.is_empty(), "nothing may be promoted: {:#?}", world.log);
    assert!(world.log.iter().any(|line| line.contains("agent-silent")));
    assert!(world.run_until(10_000, |world| world.is_whole("web")));
}

#[test]
fn a_manager_that_is_restarted_takes_nobody_for_dead() {
    let mut world = protected(3, 3, 2);
    world.crash_manager(5_000_000);
    world.run_ms(20_000);
    assert!(world.is_whole("web") && world.promised.is_empty(), "{:#?}", world.log);
}

#[test]
fn a_host_that_is_lost_while_no_manager_runs_is_noticed_afterwards() {
    let mut world = protected(3, 3, 1);
    world.crash_manager(3_000_000);
    world.run_ms(1_000);
    world.power_cut(&name("h1"));
    assert!(world.run_until(6_000, |world| world.runs_on("web").is_some()), "{:#?}", world.log);
    assert_eq!(world.promised.len(), 1);
}

#[test]
fn an_answer_that_is_lost_is_asked_for_again_from_the_same_host() {
    let mut world = protected(3, 3, 2);
    world.lost_replies = 100;
    world.strikes = |order| matches!(order, Order::Promote { .. });
    world.kill_guest(&name("h1"), &"web".into());
    assert!(world.run_until(3_000, |world| world.runs_on("web").is_some()), "{:#?}", world.log);
    world.lost_replies = 0;
    assert!(world.run_until(15_000, |world| world.is_whole("web")), "{:#?}", world.log);
    assert_eq!(world.promised.len(), 1, "one host, one term");
}

#[test]
fn a_definite_no_passes_the_turn_with_a_further_term() {
    let mut world = protected(3, 3, 2);
    world.refusals = 100;
    world.kill_guest(&name("h1"), &"web".into());
    world.run_ms(1_000);
    assert!(matches!(world.plan("web").unwrap().phase, Phase::Lost { .. }), "{:#?}", world.log);
    assert_eq!(world.promised.len(), 2, "each shadow was asked once, with a term of its own");
    // An operator who mended what was wrong tries again.
    world.refusals = 0;
    let id =
        world.request(Request::Promote { guest: "web".into(), to: Some("h3".into()), force: false, back_to: None });
    assert!(world.run_until(1_000, |world| world.runs_on("web") == Some(&name("h3"))), "{:#?}", world.log);
    world.run_ms(100);
    assert!(matches!(&world.answers[&id], Ok(Reply::Moved { to, .. }) if *to == name("h3")));
}

#[test]
fn a_lost_guest_that_is_started_again_by_hand_is_protected_again_even_if_nobody_tells() {
    let mut world = protected(3, 3, 2);
    for host in ["h1", "h2", "h3"] {
        world.power_cut(&name(host));
    }
    for host in ["h1", "h2", "h3"] {
        world.power_on(&name(host));
    }
    world.run_ms(5_000);
    assert!(matches!(world.plan("web").unwrap().phase, Phase::Lost { .. }), "{:#?}", world.log);
    assert!(world.start_guest(&name("h1"), &"web".into()));
    world.forget_events();
    assert!(world.run_until(8_000, |world| world.is_whole("web")), "{:#?}", world.log);
}

#[test]
fn the_newest_commit_takes_over() {
    let mut world = protected(3, 3, 2);
    // h2's agent is away for a moment, so its commits stand still; h3's go on.
    world.crash_agent(&name("h2"), 300_000);
    world.run_ms(250);
    world.kill_guest(&name("h1"), &"web".into());
    assert!(world.run_until(2_000, |world| world.runs_on("web").is_some()));
    assert_eq!(world.runs_on("web"), Some(&name("h3")), "{:#?}", world.log);
}

#[test]
fn a_switchover_loses_nothing_and_goes_there_and_back() {
    let mut world = protected(2, 2, 1);
    for to in ["h2", "h1", "h2"] {
        let id = world.request(Request::Switchover { guest: "web".into(), to: None });
        assert!(world.run_until(2_000, |world| world.answers.contains_key(&id)));
        let Ok(Reply::Moved { to: moved, epochs_lost: 0, pause_us: Some(pause_us), .. }) = &world.answers[&id] else {
            panic!("{:?}", world.answers[&id]);
        };
        assert!(*moved == name(to) && *pause_us >= 1_000 && *pause_us < 100_000);
        assert!(world.run_until(5_000, |world| world.is_whole("web")), "{:#?}", world.log);
        world.run_ms(500);
    }
    assert_eq!(world.promised.len(), 3);
}

#[test]
fn a_switchover_that_fails_is_undone() {
    let mut world = protected(2, 2, 1);
    world.refusals = 100;
    world.strikes = |order| matches!(order, Order::FinalCut { .. });
    let id = world.request(Request::Switchover { guest: "web".into(), to: None });
    world.run_ms(500);
    assert!(matches!(&world.answers[&id], Err(RequestError::Failed(why)) if why.contains("goes on on h1")));
    assert!(world.is_whole("web") && world.promised.is_empty(), "{:#?}", world.log);
    world.strikes = |order| matches!(order, Order::Promote { .. });
    let id = world.request(Request::Switchover { guest: "web".into(), to: None });
    world.run_ms(500);
    assert!(matches!(&world.answers[&id], Err(RequestError::Failed(why)) if why.contains("goes on on h1")));
    assert_eq!(world.plan("web").unwrap().term.0, 3, "above the term that was given to h2");
    assert!(world.run_until(1_000, |world| world.is_whole("web")), "{:#?}", world.log);
}

#[test]
fn a_guest_that_is_shut_down_is_not_failed_over_and_protected_again_when_it_starts() {
    let mut world = protected(3, 3, 2);
    world.stop_guest(&name("h1"), &"web".into());
    world.run_ms(3_000);
    let plan = world.plan("web").unwrap();
    assert!(matches!(plan.phase, Phase::Stopped { .. }) && plan.seats.is_empty() && plan.former.is_empty());
    assert!(world.promised.is_empty());
    assert!(world.start_guest(&name("h1"), &"web".into()));
    assert!(world.run_until(5_000, |world| world.is_whole("web")), "{:#?}", world.log);
}

#[test]
fn a_migrated_guest_is_protected_where_it_went_even_if_it_ran_there_before() {
    let mut world = protected(4, 4, 2);
    for _ in 0..4 {
        let plan = world.plan("web").unwrap().clone();
        let free = |host: &&placement::HostName| **host != plan.primary && !plan.seats.contains(*host);
        let to = world.hosts.keys().find(free).unwrap().clone();
        world.migrate_guest(&plan.primary, &to, &"web".into());
        assert!(world.run_until(5_000, |world| world.is_whole("web")), "{:#?}", world.log);
        assert_eq!(world.plan("web").unwrap().primary, to);
    }
}

#[test]
fn a_host_that_comes_back_does_not_start_what_runs_elsewhere() {
    let mut world = protected(3, 3, 1);
    world.power_cut(&name("h1"));
    assert!(world.run_until(2_000, |world| world.runs_on("web").is_some()));
    world.power_on(&name("h1"));
    for _ in 0..50 {
        world.run_ms(50);
        assert!(!world.start_guest(&name("h1"), &"web".into()));
    }
    assert_ne!(world.hosts[&name("h1")].role(&"web".into()).unwrap().0, Role::Primary);
}

#[test]
fn a_host_that_reboots_faster_than_it_is_missed_has_lost_its_guest() {
    let mut world = protected(3, 3, 1);
    world.power_cut(&name("h1"));
    world.power_on(&name("h1"));
    assert!(world.run_until(4_000, |world| world.runs_on("web").is_some()), "{:#?}", world.log);
    assert_ne!(world.runs_on("web"), Some(&name("h1")));
    assert_eq!(world.promised.len(), 1);
}

#[test]
fn a_dead_shadow_host_is_replaced_from_another_rack() {
    let mut world = protected(3, 3, 1);
    let seat = world.plan("web").unwrap().seats.first().unwrap().clone();
    world.power_cut(&seat);
    assert!(world.run_until(15_000, |world| world.is_whole("web")), "{:#?}", world.log);
    let plan = world.plan("web").unwrap();
    assert!(!plan.seats.contains(&seat) && plan.former[&seat] == Leave::Drop && world.promised.is_empty());
    world.power_on(&seat);
    world.run_ms(3_000);
    assert!(world.plan("web").unwrap().former.is_empty() && world.hosts[&seat].role(&"web".into()).is_none());
}

#[test]
fn promote_names_switchover_while_the_primary_answers_and_force_stops_it_first() {
    let mut world = protected(2, 2, 1);
    let id = world.request(Request::Promote { guest: "web".into(), to: None, force: false, back_to: None });
    world.run_ms(100);
    assert!(
        matches!(&world.answers[&id], Err(RequestError::Conflict(why)) if why.contains("virt-shadow switchover web"))
    );
    let id = world.request(Request::Promote { guest: "web".into(), to: None, force: true, back_to: None });
    assert!(world.run_until(1_000, |world| world.answers.contains_key(&id)), "{:#?}", world.log);
    assert!(world.answers[&id].is_ok() && world.runs_on("web") == Some(&name("h2")));
}

#[test]
fn requests_that_cannot_be_met_say_why() {
    let mut world = protected(3, 3, 2);
    let ask = |world: &mut World, request| {
        let id = world.request(request);
        world.run_ms(100);
        world.answers[&id].clone().expect_err("must be refused").to_string()
    };
    let enable = |guest: &str, shadows, on: &[&str], interval_ms| {
        let on = on.iter().copied().map(placement::HostName::from).collect();
        Request::Enable(Wish { interval_ms, on, ..wish(guest, "h1", shadows) })
    };
    for (request, words) in [
        (enable("db", 3, &[], 50), "3 shadows wanted, 2 possible"),
        (enable("db", 0, &[], 50), "1 to 8"),
        (enable("db", 1, &[], 1), "interval of 1 ms"),
        (enable("db", 1, &["h2", "h3"], 50), "2 hosts named for 1 shadows"),
        (enable("db", 2, &["h2", "h2"], 50), "named twice"),
        (enable("db", 1, &["h9"], 50), "unknown (h9)"),
        (Request::Disable { guest: "db".into() }, "not protected"),
        (Request::Switchover { guest: "web".into(), to: Some("h1".into()) }, "on h1 already"),
        (Request::Switchover { guest: "web".into(), to: Some("h9".into()) }, "it has: h2, h3"),
    ] {
        let why = ask(&mut world, request);
        assert!(why.contains(words), "{why}");
    }
    assert!(world.plan("db").is_none());
}

#[test]
fn disabling_clears_all_hosts_those_too_that_come_back_later() {
    let mut world = protected(3, 3, 2);
    world.power_cut(&name("h3"));
    world.run_ms(2_000);
    let id = world.request(Request::Disable { guest: "web".into() });
    world.run_ms(500);
    assert!(matches!(&world.answers[&id], Ok(Reply::Disabled { message }) if message.contains("h3")));
    assert_eq!(world.runs_on("web"), Some(&name("h1")), "it runs on");
    assert!(world.guardian.as_ref().unwrap().guest(&"web".into()).is_none());
    world.power_on(&name("h3"));
    world.run_ms(2_000);
    assert!(world.plan("web").is_none(), "forgotten: {:#?}", world.log);
    assert!(world.hosts.values().all(|host| host.role(&"web".into()).is_none()));
    // Enabled again, it goes on above all terms that were ever used; and a host that nobody remembers is told.
    world.enable("web", "h1", 2);
    assert!(world.run_until(5_000, |world| world.is_whole("web")), "{:#?}", world.log);
    assert_eq!(world.plan("web").unwrap().term.0, 2);
    world.power_cut(&name("h2"));
    world.run_ms(2_000);
    world.request(Request::Disable { guest: "web".into() });
    world.run_ms(500);
    world.crash_manager(100_000);
    let plan = world.saved.remove(&"web".into()).unwrap();
    world.forgotten.insert(plan.id, plan.term);
    world.power_on(&name("h2"));
    world.run_ms(5_000);
    assert!(world.saved.is_empty() && world.hosts.values().all(|host| host.role(&"web".into()).is_none()));
}

#[test]
fn fewer_shadows_are_given_up_and_more_are_made_when_asked_for() {
    let mut world = protected(4, 4, 3);
    for shadows in [1, 2, 3] {
        world.enable("web", "h1", shadows);
        world.run_ms(50);
        assert!(world.run_until(5_000, |world| world.is_whole("web")), "{:#?}", world.log);
        assert_eq!(world.plan("web").unwrap().seats.len(), shadows as usize);
    }
}

/// A host of each of four racks; `r0` and `r1` on one power feed, `r2` and `r3` on the other.
const TWO_FEEDS: &str = r#"
survive = ["rack", "power"]
[[power]]
name = "a"
[[power]]
name = "b"
[[rack]]
name = "r0"
power = "a"
[[rack]]
name = "r1"
power = "a"
[[rack]]
name = "r2"
power = "b"
[[rack]]
name = "r3"
power = "b"
[[host]]
name = "h1"
rack = "r0"
[[host]]
name = "h2"
rack = "r1"
[[host]]
name = "h3"
rack = "r2"
[[host]]
name = "h4"
rack = "r3"
"#;

fn seats(world: &World, guest: &str) -> Vec<String> {
    world.plan(guest).unwrap().seats.iter().map(ToString::to_string).collect()
}

fn asked(world: &mut World, request: Request) -> Result<Reply, RequestError> {
    let id = world.request(request);
    assert!(world.run_until(2_000, |world| world.answers.contains_key(&id)), "{:#?}", world.log);
    world.answers[&id].clone()
}

#[test]
fn a_promotion_waits_for_no_plan() {
    let mut world = protected(4, 4, 2);
    // A plan is asked for that takes for ever, and meanwhile the guest dies.
    world.plan_us = 3_600_000_000;
    let seat = world.plan("web").unwrap().seats.first().unwrap().clone();
    let plans = world.plans;
    world.power_cut(&seat);
    assert!(world.run_until(10_000, |world| world.plans > plans), "{:#?}", world.log);
    let died_us = world.now_us;
    world.kill_guest(&name("h1"), &"web".into());
    assert!(world.run_until(1_000, |world| world.runs_on("web").is_some()), "{:#?}", world.log);
    assert!(world.now_us - died_us < 50_000, "{} us", world.now_us - died_us);
}

#[test]
fn a_plan_that_the_checker_refuses_is_told_loudly_and_not_executed() {
    let mut world = protected(4, 4, 1);
    world.plans_refused = true;
    let seat = world.plan("web").unwrap().seats.first().unwrap().clone();
    world.power_cut(&seat);
    let error = asked(&mut world, Request::Enable(wish("db", "h1", 1))).unwrap_err();
    assert!(matches!(&error, RequestError::Failed(why) if why.contains("the checker refused the plan")), "{error}");
    world.run_ms(30_000);
    assert!(world.plan("db").is_none());
    assert_eq!(seats(&world, "web"), [seat.to_string()], "what there is stays as it is");
    let alarms = world.log.iter().filter(|line| line.contains("plan-refused")).count();
    assert_eq!(alarms, 1, "told once, not every time: {:#?}", world.log);
    world.plans_refused = false;
    assert!(world.run_until(70_000, |world| world.is_whole("web")), "{:#?}", world.log);
}

#[test]
fn a_shadow_that_cannot_stay_is_given_up_only_when_its_successor_follows() {
    let mut world = protected(4, 4, 1);
    assert_eq!(seats(&world, "web"), ["h2"]);
    // The operator tells that h1 and h2 hang on one feed.
    world.restart_with(TWO_FEEDS);
    for _ in 0..4_000 {
        world.run_ms(5);
        let plan = world.plan("web").unwrap();
        let follow = plan.seats.iter().filter(|host| world.hosts[*host].follows(&plan.id, plan.term)).count();
        assert!(follow >= 1, "without any shadow for a while: {:#?}", world.log);
    }
    let moves = world.log.iter().filter(|line| line.contains("shadow-moves")).count();
    assert!(moves == 1 && world.is_whole("web"), "{:#?}", world.log);
    let [seat] = &seats(&world, "web")[..] else { panic!("{:?}", seats(&world, "web")) };
    assert!(["h3", "h4"].contains(&seat.as_str()));
    assert!(world.hosts[&name("h2")].role(&"web".into()).is_none(), "the old one is gone");
}

#[test]
fn named_hosts_are_taken_or_refused_with_the_reason() {
    let mut world = World::new(1, 6, 3);
    world.run_ms(500);
    world.enable("web", "h1", 1);
    world.run_ms(500);
    let on = |hosts: &[&str]| {
        Request::Enable(Wish {
            on: hosts.iter().copied().map(placement::HostName::from).collect(),
            ..wish("web", "h1", 2)
        })
    };
    assert_eq!(asked(&mut world, on(&["h6", "h5"])), Ok(Reply::Enabled));
    assert_eq!(seats(&world, "web"), ["h5", "h6"]);
    assert_eq!(asked(&mut world, on(&["h3"])), Ok(Reply::Enabled));
    assert!(seats(&world, "web").contains(&"h3".to_owned()), "{:?}", seats(&world, "web"));
    for (hosts, words) in [
        (["h4", "h2"], "h4 cannot keep a shadow: in the primary's rack"),
        (["h2", "h5"], "cannot keep a shadow: in the rack, switch or power domain of another shadow"),
    ] {
        let error = asked(&mut world, on(&hosts)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert!(world.run_until(5_000, |world| world.is_whole("web")), "{:#?}", world.log);
}

#[test]
fn a_guest_goes_only_where_its_policy_and_its_machine_let_it() {
    let mut world = World::new(1, 5, 5);
    for (host, label) in [("h2", "hdd"), ("h3", "ssd"), ("h4", "ssd"), ("h5", "ssd")] {
        world.hosts.get_mut(&name(host)).unwrap().abilities.labels.insert(label.into());
    }
    for host in ["h1", "h2", "h4"] {
        world.hosts.get_mut(&name(host)).unwrap().abilities.machine_types.insert("x86_64/pc-q35-9.0".into());
    }
    world.hosts.get_mut(&name("h3")).unwrap().abilities.machine_types.insert("x86_64/pc-q35-7.2".into());
    world.run_ms(1_000);
    let needs = Needs { machine_type: Some("x86_64/pc-q35-9.0".into()), ..Needs::default() };
    let ssd = |shadows: u32| Wish {
        needs: needs.clone(),
        policy: Policy::parse("need = \"ssd\"").unwrap().resized(shadows as usize),
        ..wish("web", "h1", shadows)
    };
    assert!(world.start_guest(&name("h1"), &"web".into()));
    // Of h5 nobody knows what it can run, which is not held against it.
    assert_eq!(asked(&mut world, Request::Enable(ssd(2))), Ok(Reply::Enabled));
    assert_eq!(seats(&world, "web"), ["h4", "h5"]);
    let error = asked(&mut world, Request::Enable(ssd(3))).unwrap_err().to_string();
    assert!(error.contains("3 shadows wanted, 2 possible") && error.contains("(h1, h2, h3)"), "{error}");
    assert!(world.run_until(5_000, |world| world.is_whole("web")), "{:#?}", world.log);
    // Another policy: what may not stay moves, without a moment without shadows.
    let policy = Policy::parse("need = \"hdd\"").unwrap();
    let request = Request::SetPolicy { guest: "web".into(), policy: policy.clone() };
    assert_eq!(asked(&mut world, request), Ok(Reply::PolicySet));
    assert!(world.run_until(5_000, |world| seats(world, "web") == ["h2"]), "{:#?}", world.log);
    assert!(world.run_until(5_000, |world| world.is_whole("web")), "{:#?}", world.log);
    assert_eq!(world.plan("web").unwrap().policy, policy, "saved");
    let warm = Request::SetPolicy { guest: "web".into(), policy: Policy::parse("tiers = \"warm\"").unwrap() };
    assert!(asked(&mut world, warm).unwrap_err().to_string().contains("tier warm cannot be kept yet"));
}

#[test]
fn a_rack_is_lost_and_all_guests_find_other_shadows_in_the_right_power_domain() {
    let mut world = World::new(7, 6, 3);
    world.topology = Some(placement::fleet::Topology::parse(SIX_HOSTS).unwrap());
    world.crash_manager(10_000);
    world.run_ms(1_000);
    let guests: Vec<String> = (0..10).map(|number| format!("g{number}")).collect();
    for (number, guest) in guests.iter().enumerate() {
        let primary = format!("h{}", number % 6 + 1);
        world.enable(guest, &primary, 1);
    }
    let whole = |world: &World| guests.iter().all(|guest| world.is_whole(guest));
    assert!(world.run_until(10_000, whole), "{:#?}", world.log);
    // r0 shares its feed with r2, so those that stand on r1 need r2 now.
    world.power_cut(&name("h1"));
    world.power_cut(&name("h4"));
    assert!(world.run_until(20_000, whole), "{:#?}", world.log);
    for guest in &guests {
        let plan = world.plan(guest).unwrap();
        let rack = |host: &placement::HostName| world.hosts[host].intro.rack.clone();
        let mut racks: Vec<String> = plan.seats.iter().chain([&plan.primary]).map(rack).collect();
        racks.sort();
        assert_eq!(racks, ["r1", "r2"], "{guest}");
    }
    // The other one: nothing is left on the second feed, which is told for each host.
    world.power_cut(&name("h2"));
    world.power_cut(&name("h5"));
    world.run_ms(20_000);
    for guest in &guests {
        assert!(world.runs_on(guest).is_some(), "{guest} does not run");
        let reason = world.guardian.as_ref().unwrap().guest(&guest.as_str().into()).unwrap().reason();
        assert!(reason.contains("1 shadow wanted, 0 possible; of 6 hosts: 4 down"), "{reason}");
        assert!(reason.contains("bring it or its agent back"), "{reason}");
    }
}

/// Two hosts in each of three racks; the first and the third on one feed.
const SIX_HOSTS: &str = r#"
survive = ["rack", "power"]
[[power]]
name = "a"
[[power]]
name = "b"
[[rack]]
name = "r0"
power = "a"
[[rack]]
name = "r1"
power = "b"
[[rack]]
name = "r2"
power = "a"
[[host]]
name = "h1"
rack = "r0"
[[host]]
name = "h2"
rack = "r1"
[[host]]
name = "h3"
rack = "r2"
[[host]]
name = "h4"
rack = "r0"
[[host]]
name = "h5"
rack = "r1"
[[host]]
name = "h6"
rack = "r2"
"#;

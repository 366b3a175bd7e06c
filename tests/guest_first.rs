//! The guest first: whatever happens to the agents, the guard, libvirtd, the shadows and the manager, the guest answers
//! all along, is promoted nowhere, and is protected again by itself once the cause is gone.

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use support::{BACK_WITHIN, Bed, GUEST, Random, is_not_protected};
use virt_shadow::lab::fleet::Fleet;
use virt_shadow::lab::{MANAGER, QemuUser};

/// Of a guest whose agent fails; the watchdog lets a stopped one go after 300 ms.
const SILENCE_MAX_MS: f64 = 2_000.0;
const PRIMARY: &str = "host1";

/// Does `fault` to a protected guest, and checks that it noticed nothing and is protected again afterwards.
fn trial(bed: &Bed, name: &str, fault: impl FnOnce()) {
    let term = bed.wait_protected().term;
    let began = Instant::now();
    fault();
    let view = bed.wait_protection_goes_on();
    let back = began.elapsed();
    bed.assert_equal();
    bed.assert_guest_unharmed();
    let silence_ms = bed.silence_ms(began);
    println!("{name:<58} longest silence {silence_ms:>6.1} ms, protected again after {:.1} s", back.as_secs_f64());
    assert_eq!((view.term, view.primary.host.as_str()), (term, PRIMARY), "{name}: the guest was promoted");
    assert!(silence_ms < SILENCE_MAX_MS, "{name}: the guest was silent for {silence_ms} ms");
}

/// Scheduling policy of QEMU's main thread: 0 is the usual one (proc_pid_stat(5), field 41).
fn policy_of_qemu(bed: &Bed) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", bed.qemu(PRIMARY))).unwrap();
    let (_, behind_the_name) = stat.rsplit_once(')').unwrap();
    behind_the_name.split_whitespace().nth(38).unwrap().parse().unwrap()
}

/// Real-time priority is for cuts: whoever died in one, it must not stay.
fn assert_qemu_is_scheduled_as_usual(bed: &Bed) {
    let began = Instant::now();
    while policy_of_qemu(bed) != 0 {
        assert!(began.elapsed() < Duration::from_secs(5), "QEMU's main thread keeps its real-time priority");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn stop_and_continue(bed: &Bed, node: &str, pause: Duration) {
    let agent = bed.service(node, "virtshadowd");
    kill(agent, Signal::SIGSTOP).unwrap();
    std::thread::sleep(pause);
    kill(agent, Signal::SIGCONT).unwrap();
}

/// Ends protection, although the primary's agent may be killed meanwhile.
fn disable(bed: &Bed) {
    let began = Instant::now();
    loop {
        let _ = bed.fleet.disable(GUEST);
        if is_not_protected(&bed.fleet.info(GUEST)) {
            return bed.wait_no_domain_but_on(PRIMARY);
        }
        assert!(began.elapsed() < BACK_WITHIN, "the guest is still protected");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn the_primarys_agent_fails_at_any_moment() {
    let _lab = support::one_lab();
    let mut random = Random::from_env();
    let bed = Bed::raise("agent", 3, 2, QemuUser::Root);
    bed.enable();

    for round in 1..=5 {
        trial(&bed, &format!("SIGKILL of the agent while streaming, {round}"), || {
            random.sleep_below_ms(200);
            bed.kill_agent(PRIMARY);
        });
    }
    for round in 1..=2 {
        trial(&bed, &format!("SIGSTOP of the agent for 2 s while streaming, {round}"), || {
            random.sleep_below_ms(200);
            stop_and_continue(&bed, PRIMARY, Duration::from_secs(2));
        });
    }
    trial(&bed, "SIGSTOP of the agent for 5 s", || stop_and_continue(&bed, PRIMARY, Duration::from_secs(5)));
    trial(&bed, "SIGKILL of the agent while it stands still", || {
        let agent = bed.service(PRIMARY, "virtshadowd");
        random.sleep_below_ms(100);
        kill(agent, Signal::SIGSTOP).unwrap();
        std::thread::sleep(Duration::from_millis(400));
        kill(agent, Signal::SIGKILL).unwrap();
    });
    for round in 1..=2 {
        trial(&bed, &format!("SIGKILL of the agent while verifying, {round}"), || {
            std::thread::scope(|scope| {
                // Its answer is an error: the agent it asked is gone.
                scope.spawn(|| Fleet::of(&bed.lab).unwrap().verify(GUEST).map(drop));
                random.sleep_below_ms(600);
                bed.kill_agent(PRIMARY);
            });
        });
    }
    // During injection, the tracker's preparation and the first copy.
    for (round, within_ms) in [100, 400, 1_000, 2_500].into_iter().enumerate() {
        let began = Instant::now();
        disable(&bed);
        bed.enable();
        random.sleep_below_ms(within_ms);
        bed.kill_agent(PRIMARY);
        let name = format!("SIGKILL of the agent while enabling, {}", round + 1);
        trial(&bed, &name, || assert!(bed.silence_ms(began) < SILENCE_MAX_MS));
    }
    for round in 1..=2 {
        let began = Instant::now();
        disable(&bed);
        bed.enable();
        random.sleep_below_ms(1_500);
        stop_and_continue(&bed, PRIMARY, Duration::from_secs(2));
        let name = format!("SIGSTOP of the agent for 2 s while enabling, {round}");
        trial(&bed, &name, || assert!(bed.silence_ms(began) < SILENCE_MAX_MS));
    }
    for round in 1..=3 {
        let began = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| Fleet::of(&bed.lab).unwrap().disable(GUEST).map(drop));
            random.sleep_below_ms(60);
            bed.kill_agent(PRIMARY);
        });
        disable(&bed);
        assert_qemu_is_scheduled_as_usual(&bed);
        bed.assert_guest_unharmed();
        let silence_ms = bed.silence_ms(began);
        println!("SIGKILL of the agent while disabling, {round}: longest silence {silence_ms:.1} ms");
        assert!(silence_ms < SILENCE_MAX_MS, "{silence_ms}");
        bed.enable();
        bed.wait_protected();
    }
    bed.assert_equal();
    // Seen to be preferred at least once in a while: cuts are on 20 times a second.
    let began = Instant::now();
    while policy_of_qemu(&bed) == 0 {
        assert!(began.elapsed() < Duration::from_secs(20), "QEMU's main thread never hurries");
    }
    disable(&bed);
    assert_qemu_is_scheduled_as_usual(&bed);
    bed.assert_guest_unharmed();
}

#[test]
fn all_around_the_guest_fails() {
    let _lab = support::one_lab();
    let mut random = Random::from_env();
    let bed = Bed::raise("around", 4, 2, QemuUser::Root);
    bed.enable();

    for round in 1..=3 {
        trial(&bed, &format!("SIGKILL of the guard, {round}"), || {
            random.sleep_below_ms(200);
            kill(bed.guard(PRIMARY), Signal::SIGKILL).unwrap();
        });
        assert_qemu_is_scheduled_as_usual(&bed);
    }
    trial(&bed, "SIGSTOP of the guard for 2 s", || {
        let guard = bed.guard(PRIMARY);
        kill(guard, Signal::SIGSTOP).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        // It may have been replaced, and ended, meanwhile.
        let _ = kill(guard, Signal::SIGCONT);
    });
    for round in 1..=3 {
        trial(&bed, &format!("SIGKILL of libvirtd on the primary's host, {round}"), || {
            random.sleep_below_ms(200);
            kill(bed.service(PRIMARY, "libvirtd"), Signal::SIGKILL).unwrap();
        });
    }
    trial(&bed, "SIGKILL of libvirtd on a shadow's host", || {
        kill(bed.service(&bed.shadow_hosts()[0], "libvirtd"), Signal::SIGKILL).unwrap();
    });
    for round in 1..=2 {
        trial(&bed, &format!("SIGKILL of a shadow's QEMU, {round}"), || {
            random.sleep_below_ms(200);
            kill(bed.qemu(&bed.shadow_hosts()[round % 2]), Signal::SIGKILL).unwrap();
        });
    }
    trial(&bed, "SIGKILL of a shadow's agent", || bed.kill_agent(&bed.shadow_hosts()[1]));
    for round in 1..=2 {
        trial(&bed, &format!("SIGKILL of the manager, {round}"), || {
            bed.kill_agent(MANAGER);
            random.sleep_below_ms(500);
        });
    }
    trial(&bed, "SIGSTOP of the manager for 3 s", || stop_and_continue(&bed, MANAGER, Duration::from_secs(3)));
    trial(&bed, "full /run on the primary's host for 2 s", || {
        bed.fill_run(PRIMARY);
        std::thread::sleep(Duration::from_secs(2));
        bed.empty_run(PRIMARY);
    });
    trial(&bed, "full /run on a shadow's host for 2 s", || {
        let host = &bed.shadow_hosts()[0];
        bed.fill_run(host);
        std::thread::sleep(Duration::from_secs(2));
        bed.empty_run(host);
    });
    for host in [PRIMARY.to_owned(), bed.shadow_hosts()[1].clone()] {
        let name = format!("full disk under the records of {host}, SIGKILL of its agent");
        trial(&bed, &name, || {
            bed.fill_records(&host);
            bed.kill_agent(&host);
            std::thread::sleep(Duration::from_secs(3));
            bed.empty_records(&host);
        });
    }
    trial(&bed, "power cut of a shadow's host", || {
        let host = &bed.shadow_hosts()[0];
        bed.lab.power_cut(host).unwrap();
        random.sleep_below_ms(3_000);
        bed.lab.power_on(host).unwrap();
    });
    trial(&bed, "cut of the link of a shadow's host for 3 s", || {
        let host = &bed.shadow_hosts()[1];
        bed.lab.cut_link(host).unwrap();
        std::thread::sleep(Duration::from_secs(3));
        bed.lab.heal_link(host).unwrap();
    });
    bed.fleet.wait_hosts(4, BACK_WITHIN).unwrap();
    disable(&bed);
    bed.assert_guest_unharmed();
}

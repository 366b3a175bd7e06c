//! `output-commit` with real guests: what a client was told stays true over power cuts of the host, and the guest's
//! output goes on whatever becomes of agent, gate and shadows.

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{BACK_WITHIN, Bed, GUEST, INTERVAL, Random, one_lab};
use virt_shadow::api::types::{Consistency, ConsistencyMode, EventView, GuestState, GuestView, OnLoss, Quorum};
use virt_shadow::lab::fleet::Fleet;
use virt_shadow::lab::history::{Act, Call, is_linearizable};
use virt_shadow::lab::{CLIENT, GuestOptions, Lab, LabOptions, QemuUser};

/// How long output may stay away when something of ours fails: the bound is 200 ms, this machine may be busy.
const OPEN_WITHIN: Duration = Duration::from_millis(900);

fn output_commit(quorum: Quorum, on_loss: OnLoss) -> Consistency {
    Consistency { mode: ConsistencyMode::OutputCommit, quorum, on_loss }
}

fn enable(bed: &Bed, consistency: Consistency) {
    bed.fleet.enable_with(GUEST, "host1", bed.shadows, INTERVAL, consistency).unwrap();
    wait_holding(bed);
}

fn wait_holding(bed: &Bed) -> GuestView {
    bed.wait_protected();
    let holding = |view: &GuestView| view.capture.output.gate == "holding" && view.capture.output.reason.is_empty();
    bed.fleet.wait(GUEST, "output held", BACK_WITHIN, holding).unwrap()
}

/// The gate process of the guest on a host.
fn gate(bed: &Bed, host: &str) -> Pid {
    bed.child_of_agent(host, "gate")
}

#[test]
fn what_a_client_was_told_stays_true_over_power_cuts() {
    let _one_lab = one_lab();
    let mut random = Random::from_env();
    let bed = Bed::raise("told", 3, 1, QemuUser::Root);
    enable(&bed, output_commit(Quorum::All, OnLoss::Consistency));
    // In turn; both last over all power cuts.
    let mut clients = [bed.lab.guest_client(bed.guest.ip).unwrap(), bed.lab.guest_client_by_ipv6(&bed.guest).unwrap()];
    for client in &mut clients {
        client.set_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    let mut told = clients[1].status().unwrap();
    let rounds: u32 = std::env::var("ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(3);
    // Whether a request is under way when the power goes is chance: on until one was.
    let is_it = |event: &EventView| event.kind == "inbound-replayed";
    let replayed = || bed.fleet.events().unwrap().into_iter().filter(is_it).count();
    let mut round = 0;
    while round < rounds || replayed() == 0 {
        assert!(round < rounds + 12, "no frame was replayed in {round} rounds");
        round += 1;
        let host = wait_holding(&bed).primary.host;
        let (client, protocol) = (&mut clients[round as usize % 2], ["IPv4", "IPv6"][round as usize % 2]);
        let cut_at = Instant::now() + Duration::from_millis(300 + random.below(500));
        let (mut cut, mut asked, mut longest) = (None, 0u32, Duration::ZERO);
        // The same connection all the time: before, during and after the power cut.
        while cut.is_none_or(|cut: Instant| cut.elapsed() < Duration::from_secs(2)) {
            if cut.is_none() && Instant::now() >= cut_at {
                cut = Some(bed.lab.power_cut(&host).unwrap());
            }
            let began = Instant::now();
            let answer =
                client.status().unwrap_or_else(|error| panic!("round {round}: {protocol}: it is lost: {error}"));
            longest = longest.max(began.elapsed());
            assert!(
                answer.counter >= told.counter && answer.uptime_ms >= told.uptime_ms && answer.boot == told.boot,
                "round {round}: told {told:?}, then {answer:?}"
            );
            assert_eq!(answer.errors, 0);
            told = answer;
            asked += 1;
        }
        let now_on = bed.fleet.info(GUEST).unwrap().primary.host;
        println!(
            "round {round}: {host} -> {now_on}, {asked} answers by {protocol}, longest wait {longest:?}, {} replays",
            replayed()
        );
        assert_ne!(now_on, host);
        bed.lab.power_on(&host).unwrap();
        bed.fleet.wait_hosts(3, BACK_WITHIN).unwrap();
    }
    // What had reached the former host was not lost with it, and nothing was replayed twice.
    assert!(replayed() <= round as usize, "{} times in {round} rounds", replayed());
    // The gate came back by itself on each new primary.
    wait_holding(&bed);
    let released = |view: &GuestView| view.capture.output.released_frames_total > 0;
    bed.fleet.wait(GUEST, "frames that were held", BACK_WITHIN, released).unwrap();
    bed.lab.guest_client(bed.guest.ip).unwrap().verify().unwrap();
}

#[test]
fn registers_are_linearizable_over_a_failover() {
    const REGISTERS: u64 = 4;
    const CLIENTS: u64 = 8;
    let _one_lab = one_lab();
    let bed = Bed::raise("linear", 2, 1, QemuUser::Root);
    enable(&bed, output_commit(Quorum::All, OnLoss::Consistency));
    let (clock, stop) = (Instant::now(), AtomicBool::new(false));
    let histories: Mutex<BTreeMap<u64, Vec<Call>>> = Mutex::default();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (bed, stop, histories) = (&bed, &stop, &histories);
            scope.spawn(move || {
                let mut connection = bed.lab.guest_client(bed.guest.ip).unwrap();
                connection.set_timeout(Some(Duration::from_secs(20))).unwrap();
                for number in 1u64.. {
                    let register = (client + number) % REGISTERS;
                    let written = (number % 2 == 0).then_some(client << 32 | number);
                    let began = clock.elapsed().as_nanos() as u64;
                    let answer = match written {
                        Some(value) => connection.ask(&format!("put r{register} {value}")),
                        None => connection.ask(&format!("get r{register}")),
                    };
                    let ended = clock.elapsed().as_nanos() as u64;
                    let answer = answer.unwrap_or_else(|error| panic!("a connection is lost: {error}"));
                    let act = match written {
                        Some(value) => {
                            assert_eq!(answer, "ok");
                            Act::Write(value)
                        }
                        None => Act::Read(answer.parse().unwrap()),
                    };
                    let call = Call { began, ended: Some(ended), act };
                    histories.lock().unwrap().entry(register).or_default().push(call);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        std::thread::sleep(Duration::from_millis(1_500));
        bed.lab.power_cut("host1").unwrap();
        bed.fleet.wait(GUEST, "another primary", BACK_WITHIN, |view| view.primary.host == "host2").unwrap();
        std::thread::sleep(Duration::from_millis(1_500));
        stop.store(true, Ordering::Relaxed);
    });
    for (register, calls) in histories.into_inner().unwrap() {
        println!("register {register}: {} calls", calls.len());
        assert!(calls.len() > 20);
        assert!(is_linearizable(calls.clone(), 0), "register {register} went back: {calls:?}");
    }
}

#[test]
#[ignore = "downloads packages"]
fn redis_loses_nothing_that_was_acknowledged() {
    const CONNECTIONS: usize = 50;
    let _one_lab = one_lab();
    let mut random = Random::from_env();
    let rounds: u32 = std::env::var("ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(3);
    let lab = Lab::up(&LabOptions { hosts: 3, racks: 3, ..LabOptions::for_test("redis-told") }).unwrap();
    let fleet = Fleet::of(&lab).unwrap();
    fleet.wait_hosts(3, BACK_WITHIN).unwrap();
    let mut options = GuestOptions::new("redis", "host1");
    options.workload = "redis".parse().unwrap();
    options.memory_mib = options.workload.default_memory_mib(false);
    let guest = lab.guest(&options, true).unwrap();
    let consistency = output_commit(Quorum::All, OnLoss::Consistency);
    fleet.enable_with("redis", "host1", 1, INTERVAL, consistency).unwrap();
    let holding = |view: &GuestView| view.state == GuestState::Protected && view.capture.output.gate == "holding";
    let (stop, acknowledged) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for number in 0..CONNECTIONS {
            let stream = lab.connect_from_client(guest.ip, 6379).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            let mut redis = Redis(BufReader::new(stream));
            let (stop, acknowledged) = (&stop, &acknowledged);
            scope.spawn(move || {
                // Keys of this connection alone: what it was told last is what there must be.
                for count in 1u64.. {
                    assert_eq!(redis.ask(&format!("INCR told:count:{number}")), format!(":{count}"));
                    assert_eq!(redis.ask(&format!("SET told:value:{number} {count}")), "+OK");
                    assert_eq!(redis.ask(&format!("GETRANGE told:value:{number} 0 -1")), count.to_string());
                    acknowledged.fetch_add(3, Ordering::Relaxed);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        let cuts = || {
            for round in 0..rounds {
                let host = fleet.wait("redis", "output held", 2 * BACK_WITHIN, holding).unwrap().primary.host;
                let before = acknowledged.load(Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1_000 + random.below(2_000)));
                let held = acknowledged.load(Ordering::Relaxed) - before;
                lab.power_cut(&host).unwrap();
                fleet.wait("redis", "another primary", BACK_WITHIN, |view| view.primary.host != host).unwrap();
                lab.power_on(&host).unwrap();
                fleet.wait_hosts(3, BACK_WITHIN).unwrap();
                println!("round {round}: {held} acknowledgements while held, {CONNECTIONS} connections alive");
            }
            std::thread::sleep(Duration::from_secs(1));
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(cuts));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    println!("{} acknowledgements, none lost", acknowledged.into_inner());
}

/// One connection to redis.
struct Redis(BufReader<TcpStream>);

impl Redis {
    fn ask(&mut self, command: &str) -> String {
        self.0.get_mut().write_all(format!("{command}\r\n").as_bytes()).unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        if line.starts_with('$') {
            line.clear();
            self.0.read_line(&mut line).unwrap();
        }
        assert!(line.ends_with("\r\n"), "the connection is lost");
        line.trim_end().to_owned()
    }
}

#[test]
fn output_goes_on_whatever_fails() {
    let _one_lab = one_lab();
    let bed = Bed::raise("goes-on", 2, 1, QemuUser::Root);
    enable(&bed, output_commit(Quorum::Any, OnLoss::Availability));

    // A stopped agent.
    let from = Instant::now();
    let agent = bed.service("host1", "virtshadowd");
    kill(agent, Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(1_200));
    kill(agent, Signal::SIGCONT).unwrap();
    report_silence(&bed, "agent stopped", from);
    wait_holding(&bed);

    // A stopped gate is told to go on; if somebody insists, the agent ends it and takes the filters out.
    let (from, stopped) = (Instant::now(), gate(&bed, "host1"));
    kill(stopped, Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(1_200));
    report_silence(&bed, "gate stopped", from);
    wait_holding(&bed);
    let from = Instant::now();
    while kill(stopped, Signal::SIGSTOP).is_ok() {
        assert!(from.elapsed() < BACK_WITHIN, "a gate that is stopped for good is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(1_200));
    report_silence(&bed, "gate stopped for good", from);
    wait_holding(&bed);

    let from = Instant::now();
    kill(gate(&bed, "host1"), Signal::SIGKILL).unwrap();
    std::thread::sleep(Duration::from_millis(1_200));
    report_silence(&bed, "gate killed", from);
    let opened = wait_holding(&bed).capture.output.opened_total;
    assert!(opened >= 3, "opened {opened} times");

    // A killed agent: its gate opens, and the next agent's takes its place.
    let from = Instant::now();
    let former = gate(&bed, "host1");
    bed.kill_agent("host1");
    std::thread::sleep(Duration::from_millis(1_200));
    report_silence(&bed, "agent killed", from);
    wait_holding(&bed);
    wait_ended(former);

    // All shadows lost.
    let from = Instant::now();
    bed.lab.power_cut("host2").unwrap();
    std::thread::sleep(Duration::from_millis(1_200));
    report_silence(&bed, "shadow lost", from);
    let open = |view: &GuestView| view.capture.output.gate == "open";
    bed.fleet.wait(GUEST, "an open gate", BACK_WITHIN, open).unwrap();
    assert!(bed.fleet.events().unwrap().iter().any(|event| event.kind == "output-open" && event.level == "alarm"));
    bed.lab.power_on("host2").unwrap();
    wait_holding(&bed);

    // Another mode, and back; then no protection at all: nothing of ours stays in QEMU.
    bed.fleet.enable(GUEST, "host1", 1, INTERVAL).unwrap();
    bed.fleet.wait(GUEST, "no gate", BACK_WITHIN, |view| view.capture.output.gate.is_empty()).unwrap();
    assert_eq!(filters(&bed, "host1"), "");
    enable(&bed, output_commit(Quorum::Any, OnLoss::Availability));
    assert_ne!(filters(&bed, "host1"), "");
    bed.fleet.disable(GUEST).unwrap();
    assert_eq!(filters(&bed, "host1"), "");
    bed.assert_guest_unharmed();
}

#[test]
fn with_consistency_first_nothing_leaves_without_its_quorum() {
    let _one_lab = one_lab();
    let bed = Bed::raise("strict", 2, 1, QemuUser::Root);
    enable(&bed, output_commit(Quorum::All, OnLoss::Consistency));
    let mut client = bed.lab.guest_client(bed.guest.ip).unwrap();
    let told = client.status().unwrap();
    bed.lab.power_cut("host2").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    client.set_timeout(Some(Duration::from_millis(1_500))).unwrap();
    assert!(client.status().is_err(), "an answer left that no shadow knows of");
    // Not even while one agent takes over from another.
    bed.kill_agent("host1");
    let from = Instant::now();
    assert_eq!(bed.watch.wait_answer_after(from, Duration::from_secs(3)), None, "an answer left unseen");
    bed.lab.power_on("host2").unwrap();
    wait_holding(&bed);
    let answer = bed.lab.guest_client(bed.guest.ip).unwrap().status().unwrap();
    assert!(answer.counter > told.counter && answer.boot == told.boot);
    bed.assert_guest_unharmed();
}

/// Frames on their way to that interface are seen, for a replay.
fn wait_seen(bed: &Bed, mac: &str) {
    let output = |argv: &[&str]| String::from_utf8(bed.lab.exec("host1", argv).unwrap().stdout).unwrap();
    let began = Instant::now();
    loop {
        // The host's end of a tap has another first byte.
        let links = output(&["ip", "-o", "link"]);
        let index = links.lines().find(|link| link.contains(&mac[2..])).and_then(|link| link.split(':').next());
        let sockets = output(&["cat", "/proc/net/packet"]);
        if index.is_some_and(|index| sockets.lines().any(|socket| socket.split_whitespace().nth(4) == Some(index))) {
            return;
        }
        assert!(began.elapsed() < BACK_WITHIN, "no socket sees frames for {mac}:\n{links}{sockets}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What is left in QEMU of that interface's filters and sockets.
fn left_of(bed: &Bed, host: &str, netdev: &str) -> String {
    let sockets = bed.lab.virsh(host, &["qemu-monitor-command", GUEST, r#"{"execute":"query-chardev"}"#]).unwrap();
    let ours = sockets.split('"').filter(|word| word.starts_with("virt-shadow-")).collect::<Vec<_>>().join(" ");
    let all = format!("{} {ours}", filters(bed, host));
    all.split(' ').filter(|name| name.contains(netdev)).collect::<Vec<_>>().join(" ")
}

#[test]
fn an_interface_that_is_plugged_in_is_held_and_unplugged_leaves_nothing() {
    const MAC: &str = "52:54:00:99:99:98";
    let _one_lab = one_lab();
    let bed = Bed::raise("plugged", 2, 1, QemuUser::Root);
    enable(&bed, output_commit(Quorum::All, OnLoss::Consistency));
    let script = "ip address add 10.99.0.1/24 dev $(ip -o -4 address | awk '/10\\.77\\.0\\.3/ { print $2 }')";
    let output = bed.lab.exec(CLIENT, &["sh", "-c", script]).unwrap();
    assert!(output.status.success(), "{output:?}");
    let wait_told = |words: &str, times: usize| {
        let is_it = |event: &EventView| event.kind == "output-interface" && event.message.contains(words);
        let began = Instant::now();
        loop {
            let told: Vec<EventView> = bed.fleet.events().unwrap_or_default().into_iter().filter(is_it).collect();
            if told.len() >= times {
                return println!("{}", told[times - 1].message);
            }
            assert!(began.elapsed() < BACK_WITHIN, "no event says {words:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    for round in 1..=2 {
        let device = ["bridge", "br0", "--model", "virtio", "--mac", MAC, "--live"];
        bed.lab.virsh("host1", &[["attach-interface", GUEST].as_slice(), &device].concat()).unwrap();
        wait_told(&format!("interface {MAC} is held"), round);
        assert_eq!(left_of(&bed, "host1", "hostnet1").split(' ').count(), 4, "{}", left_of(&bed, "host1", "hostnet1"));
        wait_holding(&bed);
        wait_seen(&bed, MAC);
        if round == 1 {
            what_leaves_by_it_is_held(&bed, MAC);
        }
        bed.lab.virsh("host1", &["detach-interface", GUEST, "bridge", "--mac", MAC, "--live"]).unwrap();
        wait_told(&format!("interface {MAC} is gone"), round);
        assert_eq!(left_of(&bed, "host1", "hostnet1"), "");
        wait_holding(&bed);
        wait_seen(&bed, &bed.guest.mac);
    }
    // Those of the first one were there all along.
    assert_eq!(left_of(&bed, "host1", "hostnet0").split(' ').count(), 4);
    bed.assert_guest_unharmed();
}

fn what_leaves_by_it_is_held(bed: &Bed, mac: &str) {
    let mut first = bed.lab.guest_client(bed.guest.ip).unwrap();
    first.set_timeout(Some(Duration::from_secs(20))).unwrap();
    let answer = first.ask(&format!("nic {mac} 10.99.0.2/24")).unwrap();
    assert!(answer.starts_with("ok nic "), "{answer}");
    let mut client = bed.lab.guest_client("10.99.0.2".parse().unwrap()).unwrap();
    client.set_timeout(Some(Duration::from_millis(1_500))).unwrap();
    client.status().unwrap();
    bed.lab.power_cut("host2").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(client.status().is_err(), "an answer left by the new interface that no shadow knows of");
    bed.lab.power_on("host2").unwrap();
    bed.wait_protection_goes_on();
    wait_holding(bed);
    bed.lab.guest_client("10.99.0.2".parse().unwrap()).unwrap().status().unwrap();
}

fn report_silence(bed: &Bed, what: &str, from: Instant) {
    let silence = bed.watch.longest_silence(from, Instant::now());
    println!("{what}: output away for {silence:?} at most");
    assert!(silence < OPEN_WITHIN, "{what}: {silence:?}");
}

fn filters(bed: &Bed, host: &str) -> String {
    let query = r#"{"execute":"qom-list","arguments":{"path":"/objects"}}"#;
    let answer = bed.lab.virsh(host, &["qemu-monitor-command", GUEST, query]).unwrap();
    answer.split('"').filter(|word| word.starts_with("virt-shadow-")).collect::<Vec<_>>().join(" ")
}

fn wait_ended(process: Pid) {
    let began = Instant::now();
    while kill(process, None).is_ok() {
        assert!(began.elapsed() < BACK_WITHIN, "process {process} is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}

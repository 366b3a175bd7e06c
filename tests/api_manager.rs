//! The manager over its real sockets, with pretended agents: what it orders, when, and what it tells.

mod api;

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{Daemon, Dir, FakeAgent, UUID};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use virt_shadow::api::control::{Command, GuestEvent, Role, ToAgent};
use virt_shadow::api::frame::{read_frame, write_frame};

const ANY: std::net::SocketAddr = std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A manager and three hosts in three racks; `web` runs on h1.
async fn fleet(name: &str) -> (Dir, Daemon, [Arc<FakeAgent>; 3]) {
    let dir = Dir::new(name);
    let daemon = Daemon::start(&dir.0, ANY).await;
    let agents = [("h1", "r1"), ("h2", "r2"), ("h3", "r3")].map(|(h, r)| FakeAgent::start(h, r, daemon.control));
    agents[0].table().runs.push(UUID.into());
    agents[0].table().domains.insert("web".into(), Vec::new());
    daemon.until("/v1/hosts", "three hosts up", |hosts| count(hosts, "state", "up") == 3).await;
    (dir, daemon, agents)
}

fn count(list: &Value, key: &str, value: &str) -> usize {
    list.as_array().map_or(0, |list| list.iter().filter(|item| item[key] == value).count())
}

async fn protect(daemon: &Daemon, shadows: u32) -> Value {
    let (status, view) = daemon.call("POST", "/v1/guests", json!({ "domain": "web", "shadows": shadows })).await;
    assert_eq!(status, 200, "{view}");
    daemon.until("/v1/guests/web", "protected", |guest| guest["state"] == "protected").await
}

fn died(term: u64) -> GuestEvent {
    GuestEvent::Died { uuid: UUID.into(), term, detail: "SIGKILL".into(), last_epoch: 103 }
}

#[tokio::test(flavor = "multi_thread")]
async fn enable_is_carried_out_and_shown() {
    let (_dir, daemon, agents) = fleet("enable").await;
    let guest = protect(&daemon, 2).await;
    for (key, value) in [
        ("domain", json!("web")),
        ("uuid", json!(UUID)),
        ("term", json!(1)),
        ("primary", json!({ "host": "h1", "rack": "r1" })),
        ("shadows_wanted", json!(2)),
        ("interval_ms", json!(50)),
        ("mirror_mib", json!(256)),
        ("keep", json!({"epochs": 0, "age_ms": 0, "mib": 0})),
        ("memory_bytes", json!(1u64 << 30)),
    ] {
        assert_eq!(guest[key], value, "{key}");
    }
    let shadow = &guest["shadows"][0];
    assert_eq!(
        (&shadow["host"], &shadow["state"], &shadow["tier"]),
        (&json!("h2"), &json!("following"), &json!("hot"))
    );
    for key in ["pause_us", "dirty_pages", "raw_bytes_total", "wire_bytes_total", "tracker"] {
        assert!(!guest[key].is_null(), "{key} is missing");
    }
    // Shadows were accepted before the primary was told to reach them, at their addresses.
    let protects: Vec<Command> = agents[0].table().commands.clone();
    let Some(Command::Protect { shadows, term: 1, .. }) = protects.last() else { panic!("{protects:?}") };
    assert_eq!(
        shadows.iter().map(|target| target.addr).collect::<Vec<_>>(),
        [agents[1].sync_addr(), agents[2].sync_addr()]
    );
    // By UUID it is the same, and a second enable changes it.
    assert_eq!(daemon.get(&format!("/v1/guests/{}", UUID.to_uppercase())).await["domain"], "web");
    protect(&daemon, 1).await;
    daemon.until("/v1/hosts", "one shadow", |hosts| hosts[1]["shadows"] == 1 && hosts[2]["shadows"] == 0).await;

    let (status, report) = daemon.call("POST", "/v1/guests/web/verify", json!({})).await;
    assert_eq!((status, &report["shadows"][0]["equal"]), (200, &json!(true)));

    let (status, _) = daemon.call("DELETE", "/v1/guests/web", Value::Null).await;
    assert_eq!((status, daemon.get("/v1/guests").await), (200, json!([])));
    assert!(agents[0].runs() && agents.iter().all(|agent| agent.table().roles.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_with_the_reason() {
    let (_dir, daemon, agents) = fleet("refusals").await;
    agents[1].table().domains.insert("db".into(), vec!["disk vda is writable: not mirrored yet".into()]);
    agents[2].table().domains.insert("off".into(), Vec::new());
    agents[1].table().runs.push(UUID.into());
    for (method, path, body, status, code, words) in [
        ("POST", "/v1/guests", json!({ "domain": "nosuch" }), 404, "not-found", "no domain nosuch"),
        ("POST", "/v1/guests", json!({ "domain": "off" }), 409, "not-running", "virsh start off"),
        ("POST", "/v1/guests", json!({ "domain": "db" }), 409, "refused", "disk vda is writable"),
        (
            "POST",
            "/v1/guests",
            json!({ "domain": "web", "shadows": 3 }),
            409,
            "refused",
            "3 shadows wanted, 2 possible",
        ),
        ("POST", "/v1/guests", json!({ "domain": "web", "shadows": 9 }), 400, "invalid", "1 to 8"),
        ("POST", "/v1/guests", json!({ "domain": "web", "on": ["h9"] }), 409, "refused", "unknown (h9)"),
        ("POST", "/v1/guests", json!({ "domian": "web" }), 400, "invalid", "domian"),
        ("POST", "/v1/guests", json!([1]), 400, "invalid", "request"),
        ("GET", "/v1/guests/a%2Fb", Value::Null, 404, "not-found", "a/b"),
        ("GET", "/v1/guests/%zz", Value::Null, 400, "invalid", "UTF-8"),
        ("POST", "/v1/guests/web/promote", json!({}), 404, "not-found", "no protected guest web"),
        ("POST", "/v1/guests/web/switchover", json!({ "force": true }), 400, "invalid", "promote"),
        ("GET", "/v1/events?since=x", Value::Null, 400, "invalid", "not a number"),
        ("PUT", "/v1/hosts", Value::Null, 405, "method-not-allowed", "PUT"),
        ("GET", "/v2/hosts", Value::Null, 404, "not-found", "/v2/hosts"),
        ("GET", "/v1/doctor", Value::Null, 503, "unavailable", "no agent"),
    ] {
        let (found, answer) = daemon.call(method, path, body).await;
        let text = answer["message"].as_str().unwrap_or_default().to_owned();
        assert_eq!((found, &answer["code"]), (status, &json!(code)), "{method} {path}: {text}");
        assert!(text.contains(words), "{method} {path}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_qemu_is_promoted_once_and_redundancy_comes_back() {
    let (_dir, daemon, agents) = fleet("died").await;
    protect(&daemon, 2).await;
    agents[2].table().committed = 105;
    agents[0].table().runs.clear();
    let began = Instant::now();
    // The same death told twice, as after a reconnection.
    agents[0].event(died(1));
    agents[0].event(died(1));
    while !agents[2].runs() {
        assert!(began.elapsed() < Duration::from_secs(5), "the newest commit, h3's, must take over");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let took = began.elapsed();
    println!("told to promoted: {took:?}");
    assert!(took < Duration::from_secs(1));
    let guest = daemon.until("/v1/guests/web", "whole again", |guest| guest["state"] == "protected").await;
    assert_eq!((&guest["term"], &guest["primary"]["host"]), (&json!(2), &json!("h3")));
    assert_eq!(agents[0].table().roles[UUID], (Role::Shadow, 2), "the old host keeps a shadow now");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((agents[1].promotions(), agents[2].promotions()), (vec![], vec![2]));
    let kinds = daemon.event_kinds().await;
    assert_eq!(kinds.iter().filter(|kind| *kind == "guest-promoted").count(), 1, "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_power_is_replaced_a_silent_agent_is_not() {
    let (_dir, daemon, agents) = fleet("silence").await;
    protect(&daemon, 1).await;
    agents[0].kill();
    daemon.until("/v1/hosts", "agent silent", |hosts| hosts[0]["state"] == "agent-silent").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(agents.iter().all(|agent| agent.promotions().is_empty()));
    let (status, error) = daemon.call("POST", "/v1/guests/web/promote", json!({ "force": true })).await;
    assert_eq!((status, &error["code"]), (409, &json!("conflict")), "{error}");
    // Now nobody answers there any more; but one of the others still reaches it.
    agents[0].power_cut();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(agents.iter().all(|agent| agent.promotions().is_empty()), "a witness spoke for it");
    agents[1..].iter().for_each(|agent| agent.table().unreachable = true);
    let guest = daemon.until("/v1/guests/web", "promoted", |guest| guest["primary"]["host"] == "h2").await;
    assert_eq!(guest["term"], 2);
    daemon.until("/v1/hosts", "down", |hosts| hosts[0]["state"] == "down").await;
    daemon
        .until("/v1/guests/web", "whole", |guest| guest["state"] == "protected" && guest["shadows"][0]["host"] == "h3")
        .await;
    // It comes back with its old record, and is told.
    let agent = FakeAgent::start("h1", "r1", daemon.control);
    agent.table().roles.insert(UUID.into(), (Role::Primary, 1));
    agent.kill();
    agent.connect("r1", daemon.control);
    let began = Instant::now();
    while agent.table().roles.get(UUID) != Some(&(Role::Retired, 2)) {
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", agent.table().roles);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let why = agent.link().may_start(UUID).unwrap_err().reason;
    assert!(why.contains("elsewhere"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_ends_during_a_failover_goes_on_with_the_same_host_and_term() {
    let (_dir, daemon, agents) = fleet("restart").await;
    protect(&daemon, 2).await;
    agents[1].table().mute_promotion = true;
    agents[1].table().committed = 200;
    agents[0].table().runs.clear();
    agents[0].event(died(1));
    daemon.until("/v1/guests/web", "failing over", |guest| guest["state"] == "failing-over").await;
    let began = Instant::now();
    while agents[1].promotions().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // It obeyed, and nobody heard of it.
    let daemon = daemon.restart(Duration::from_millis(600)).await;
    agents[1].table().mute_promotion = false;
    let guest = daemon.until("/v1/guests/web", "whole", |guest| guest["state"] == "protected").await;
    assert_eq!((&guest["term"], &guest["primary"]["host"]), (&json!(2), &json!("h2")));
    assert!(agents[1].promotions().iter().all(|term| *term == 2) && agents[2].promotions().is_empty());
    let kinds = daemon.event_kinds().await;
    assert!(!kinds.iter().any(|kind| kind == "host-down"), "a restart takes nobody for dead: {kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_happens_while_no_manager_runs_is_told_to_the_next() {
    let (_dir, daemon, agents) = fleet("away").await;
    protect(&daemon, 1).await;
    let (path, control) = (daemon.socket.clone(), daemon.control);
    let restarted = tokio::spawn(daemon.restart(Duration::from_millis(800)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    agents[0].table().runs.clear();
    agents[0].event(died(1));
    let daemon = restarted.await.unwrap();
    assert_eq!((&daemon.socket, daemon.control), (&path, control));
    daemon.until("/v1/guests/web", "promoted", |guest| guest["primary"]["host"] == "h2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_back_to_an_epoch_only_if_a_shadow_keeps_it() {
    let (_dir, daemon, agents) = fleet("back").await;
    protect(&daemon, 2).await;
    agents[2].table().kept = vec![41, 42, 100];
    let (_, shadows) = daemon.call("GET", "/v1/guests/web/epochs", Value::Null).await;
    let epochs = |at: usize| shadows[at]["epochs"].as_array().unwrap().len();
    assert_eq!((epochs(0), epochs(1)), (0, 3), "{shadows}");

    for (body, words) in [
        (json!({"epoch": 40, "force": true}), "h2 has none; h3 has 3 from 41 to 100"),
        (json!({"epoch": 42, "force": true, "to": "h2"}), "not kept"),
        (json!({"epoch": 42}), "--force"),
        (json!({"epoch": -1, "force": true}), "u64"),
    ] {
        let (status, error) = daemon.call("POST", "/v1/guests/web/promote", body).await;
        assert!(status >= 400 && error["message"].as_str().unwrap().contains(words), "{error}");
    }
    assert!(agents[0].runs(), "nothing was stopped");
    let (_, report) = daemon.call("POST", "/v1/guests/web/promote", json!({"epoch": 42, "force": true})).await;
    assert_eq!((&report["to"], &report["epoch"]), (&json!("h3"), &json!(42)), "{report}");
    assert!(!agents[0].runs() && agents[2].runs());
    let back = |command: &Command| matches!(command, Command::Promote { back_to: Some(42), after_epoch: 0, .. });
    assert_eq!(agents[2].table().commands.iter().filter(|command| back(command)).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switchover_reports_the_pause() {
    let (_dir, daemon, agents) = fleet("switchover").await;
    protect(&daemon, 1).await;
    let (status, report) = daemon.call("POST", "/v1/guests/web/switchover", json!({ "to": "h2" })).await;
    assert_eq!((status, &report["to"], &report["epochs_lost"]), (200, &json!("h2"), &json!(0)), "{report}");
    let pause_ms = report["pause_ms"].as_f64().unwrap();
    assert!((2.0..200.0).contains(&pause_ms), "{pause_ms}");
    assert!(agents[1].runs());
    let guest = daemon.until("/v1/guests/web", "whole", |guest| guest["state"] == "protected").await;
    assert_eq!(guest["shadows"][0]["host"], "h1");
    assert!(!agents[0].runs(), "the old copy was retired before it became a shadow");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_guest_is_left_alone_until_it_starts() {
    let (_dir, daemon, agents) = fleet("stopped").await;
    protect(&daemon, 1).await;
    agents[0].table().runs.clear();
    agents[0].event(GuestEvent::Stopped { uuid: UUID.into(), term: 1, how: "shutdown".into() });
    let guest = daemon.until("/v1/guests/web", "stopped", |guest| guest["state"] == "stopped").await;
    assert!(guest["reason"].as_str().unwrap().contains("protection resumes when it starts"));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(agents[1].promotions().is_empty() && agents[1].table().roles.is_empty());
    agents[0].table().runs.push(UUID.into());
    agents[0].event(GuestEvent::Started { uuid: UUID.into(), domain: "web".into() });
    daemon.until("/v1/guests/web", "protected again", |guest| guest["state"] == "protected").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_forwarded_from_hosts_without_the_manager() {
    let (dir, daemon, agents) = fleet("forward").await;
    let socket = dir.0.join("h1.sock");
    let listener = virt_shadow::api::server::listen(&socket).await.unwrap();
    let (_stop, shutdown) = tokio::sync::watch::channel(false);
    let backend = virt_shadow::api::server::Backend { host: "h1".into(), manager: None, agent: Some(agents[0].link()) };
    tokio::spawn(virt_shadow::api::server::serve(listener, backend, shutdown));
    let client = virt_shadow::api::client::Client::new(&socket);
    let hosts: Value = client.get("/v1/hosts").await.unwrap();
    assert_eq!(count(&hosts, "state", "up"), 3);
    let report: Value = client.get("/v1/doctor").await.unwrap();
    assert_eq!(report["host"], "h1");
    let error = client.get::<Value>("/v1/guests/web").await.unwrap_err();
    assert!(error.to_string().contains("no protected guest web"));
    // A name that several hosts know means the domain of the host where the order is given.
    for agent in &agents[1..] {
        agent.table().domains.insert("web".into(), Vec::new());
    }
    let view: Value = client.post("/v1/guests", &json!({ "domain": "web" })).await.unwrap();
    assert_eq!(view["primary"]["host"], "h1");
    let hook: Value = client.get(&format!("/v1/hook?uuid={UUID}&name=web")).await.unwrap();
    assert_eq!(hook, json!({ "allowed": true, "undecided": false, "reason": "" }));
    drop(daemon);
    let began = Instant::now();
    let error = client.get::<Value>("/v1/hosts").await.unwrap_err();
    assert!(error.to_string().contains("manager") && began.elapsed() < Duration::from_secs(5), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_waited_for() {
    let (_dir, daemon, agents) = fleet("events").await;
    let since = daemon.get("/v1/events").await.as_array().unwrap().last().unwrap()["seq"].as_u64().unwrap();
    let path = format!("/v1/events?since={since}&wait_ms=10000&limit=1");
    let (client, began) = (daemon.client.clone(), Instant::now());
    let waiting = tokio::spawn(async move { client.get::<Value>(&path).await.unwrap() });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (level, name) = ("warning".to_owned(), "watchdog-fired".to_owned());
    agents[1].event(GuestEvent::Notice { uuid: None, level, name, message: "a\u{1b}[2Jb".into() });
    let events = waiting.await.unwrap();
    assert_eq!((&events[0]["kind"], &events[0]["host"]), (&json!("watchdog-fired"), &json!("h2")));
    assert!((300..5_000).contains(&(began.elapsed().as_millis() as u64)));
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_sockets_hurts_nobody() {
    let (_dir, daemon, agents) = fleet("garbage").await;
    protect(&daemon, 2).await;
    let frame = |text: &str| {
        let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    };
    let long = vec![b'x'; 200_000];
    let hello = r#"{"type":"hello","control_version":1,"version":"x","host":"h 9","rack":"r","sync_port":1,"tracker":"","records":[]}"#;
    for bytes in [
        &b""[..],
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 64],
        &frame(""),
        &frame("{}"),
        &frame(r#"{"type":"heartbeat","seq":1}"#),
        &frame(hello),
        &frame("[[[[[[[["),
        &long,
    ] {
        let mut stream = TcpStream::connect(daemon.control).await.unwrap();
        // The manager may close before all is written.
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await.unwrap();
    }
    for bytes in
        [&b"\0\0\0"[..], b"GET", b"POST /v1/guests HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n{", &[0xff; 4096], &long]
    {
        let mut stream = UnixStream::connect(&daemon.socket).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(15), stream.read_to_end(&mut rest)).await.unwrap();
    }
    assert_eq!(daemon.get("/v1/guests/web").await["state"], "protected");
    assert!(agents.iter().all(|agent| *agent.link().connected().borrow()));
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_of_another_version_or_with_a_taken_name_are_told_so() {
    let (_dir, daemon, _agents) = fleet("versions").await;
    let hello = |host: &str, version: u32| {
        json!({ "type": "hello", "control_version": version, "version": "9.9", "host": host, "rack": "r", "sync_port": 1,
                "tracker": "", "records": [] })
    };
    let ask = |hello: Value, from: [u8; 4]| async move {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        let mut stream = socket.connect(daemon.control).await.unwrap();
        write_frame(&mut stream, &hello).await.unwrap();
        match read_frame::<ToAgent>(&mut stream).await.unwrap() {
            Some(ToAgent::Refused { reason }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let ask = &ask;
    let reason = ask(hello("h4", 2), [127, 0, 0, 1]).await;
    assert!(reason.contains("version 2") && reason.contains("same virtshadowd on all hosts"), "{reason}");
    let reason = ask(hello("h1", 1), [127, 0, 0, 9]).await;
    assert!(reason.contains("is connected from 127.0.0.1 already"), "{reason}");
}

const SITE: &str = "[[power]]\nname = \"a\"\n[[power]]\nname = \"b\"\n[[rack]]\nname = \"r1\"\npower = \"a\"\n[[rack]]\nname = \"r2\"\npower = \"a\"\n\
                    [[rack]]\nname = \"r3\"\npower = \"b\"\n[[host]]\nname = \"h1\"\nrack = \"r1\"\n[[host]]\nname = \"h2\"\nrack = \"r2\"\n[[host]]\n\
                    name = \"h3\"\nrack = \"r3\"\nlabels = \"ssd\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_topology_file_decides_and_a_bad_one_keeps_the_manager_from_starting() {
    let dir = Dir::new("topology");
    std::fs::create_dir_all(&dir.0).unwrap();
    std::fs::write(dir.0.join("topology.toml"), SITE.replace("power = \"b\"", "power = \"c\"")).unwrap();
    let (_stop, shutdown) = tokio::sync::watch::channel(false);
    let options = virt_shadow::manager::Options {
        listen: ANY,
        database: dir.0.join("manager.sqlite"),
        heartbeat_ms: 50,
        settings: Default::default(),
        topology: Some(dir.0.join("topology.toml")),
        compare_every: Duration::ZERO,
        security: virt_shadow::transport::Security::Plain,
    };
    let error = virt_shadow::manager::Manager::start(options, shutdown).await.err().unwrap().to_string();
    assert!(error.contains("topology.toml, line 13: power: there is no power c; there are: a, b"), "{error}");

    std::fs::write(dir.0.join("topology.toml"), SITE).unwrap();
    let daemon = Daemon::start(&dir.0, ANY).await;
    let agents = ["h1", "h2", "h3", "h4"].map(|host| FakeAgent::start(host, "r9", daemon.control));
    agents[0].table().runs.push(UUID.into());
    agents[0].table().domains.insert("web".into(), Vec::new());
    daemon.until("/v1/hosts", "four hosts up", |hosts| count(hosts, "state", "up") == 4).await;
    // A plan of a guest that is not protected changes nothing; h2 is on its feed, h4 not in the file.
    let plan = daemon.get("/v1/plan?domain=web&shadows=2&explain=1").await;
    assert_eq!((&plan["hosts"], &plan["unknown_hosts"]), (&json!(3), &json!(["h4"])));
    let shadows = plan["guests"][0]["shadows"].as_array().unwrap();
    assert_eq!(shadows.iter().filter(|shadow| shadow["host"] == "h3").count(), 1, "{plan:#}");
    for shadow in shadows {
        let verdicts = shadow["verdicts"].as_array().unwrap();
        assert_eq!((verdicts.len(), &verdicts[1]["reasons"][0]), (3, &json!("domain")), "{plan:#}");
        if shadow["host"].is_null() {
            let counted: u64 = shadow["counts"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
            assert!(counted == 3 && !shadow["nearest"].is_null(), "{plan:#}");
        }
    }
    assert_eq!(daemon.get("/v1/guests").await, json!([]));
    protect(&daemon, 1).await;
    assert_eq!(daemon.get("/v1/guests/web").await["shadows"][0]["host"], "h3");
    let all = daemon.get("/v1/plan").await;
    assert_eq!((&all["moves"], &all["guests"][0]["shadows"][0]["now"]), (&json!(0), &json!("h3")));
    for (path, words) in [
        ("/v1/plan?shadows=2", "of which domain"),
        ("/v1/plan?domain=web&shadows=9", "1 to 8"),
        ("/v1/plan?explain=maybe", "neither 0 nor 1"),
        ("/v1/plan?colour=red", "colour"),
    ] {
        let (status, answer) = daemon.call("GET", path, Value::Null).await;
        assert!(status == 400 && answer["message"].as_str().unwrap().contains(words), "{path}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shadows_are_compared_with_their_guest_without_anybody_asking() {
    let (_dir, daemon, agents) = fleet("scrub").await;
    protect(&daemon, 1).await;
    let daemon = daemon.restart_comparing(Duration::from_millis(500)).await;
    let began = Instant::now();
    let compared = || agents[0].table().commands.iter().filter(|c| matches!(c, Command::Verify { .. })).count();
    while compared() < 3 {
        assert!(began.elapsed() < Duration::from_secs(30), "compared {} times", compared());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(daemon.get("/v1/guests/web").await["domain"], "web");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_kept_with_the_domain_and_carried_out() {
    let (_dir, daemon, agents) = fleet("policy").await;
    let path = "/v1/guests/web/policy";
    assert_eq!(daemon.get(path).await["policy"], "");
    // Before it is protected: enable takes number and interval from it.
    let set = json!({ "set": ["shadows=2", "interval_ms=200", "priority=2"] });
    let (status, view) = daemon.call("POST", path, set).await;
    let text = "shadows = 2\ninterval_ms = 200\npriority = 2\n";
    assert_eq!((status, &view["policy"], &view["protected"]), (200, &json!(text), &json!(false)));
    assert_eq!(agents[0].table().policy, text, "kept with the definition");
    let (status, guest) = daemon.call("POST", "/v1/guests", json!({ "domain": "web" })).await;
    assert_eq!((status, &guest["shadows_wanted"], &guest["interval_ms"]), (200, &json!(2), &json!(200)), "{guest}");
    daemon.until("/v1/guests/web", "protected", |guest| guest["state"] == "protected").await;
    // Of a protected guest: carried out at once, given along with the next order, and known after a restart.
    let (status, _) = daemon.call("POST", path, json!({ "set": ["shadows=1"] })).await;
    assert_eq!(status, 200);
    daemon.until("/v1/guests/web", "one shadow", |guest| guest["shadows"].as_array().unwrap().len() == 1).await;
    let daemon = daemon.restart(Duration::from_millis(200)).await;
    assert_eq!(daemon.get(path).await["policy"], "interval_ms = 200\npriority = 2\n");
    daemon.until("/v1/guests/web", "protected", |guest| guest["state"] == "protected").await;
    let has_it = |command: &Command| matches!(command, Command::Protect { policy, .. } if policy.contains("priority"));
    assert!(agents[0].table().commands.iter().any(has_it));
    for (body, status, words) in [
        (json!({ "set": ["shadows=nine"] }), 400, "whole number"),
        (json!({ "policy": "need = \"a\"\navoid = \"a\"" }), 400, "line 2: avoid: a is needed and avoided"),
        (json!({ "set": ["tiers=cold"] }), 409, "cannot be kept yet"),
        (json!({ "colour": 1 }), 400, "colour"),
    ] {
        let (found, answer) = daemon.call("POST", path, body.clone()).await;
        let text = answer["message"].as_str().unwrap_or_default();
        assert!(found == status && text.contains(words), "{body}: {found} {answer}");
    }
    let (status, view) = daemon.call("POST", path, json!({ "policy": "" })).await;
    assert_eq!((status, &view["policy"]), (200, &json!("")));
}

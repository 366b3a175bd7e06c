//! An agent's link, against a manager played by the test.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use virt_shadow::api::control::{Command, Done, GuestEvent, GuestRecord, Heartbeat, Outcome, ToAgent, ToManager};
use virt_shadow::api::frame::{read_frame, write_frame};
use virt_shadow::api::link::{
    AgentLink, AgentStatus, CommandHandler, LinkOptions, MAX_COMMANDS_IN_FLIGHT, StartRefusal,
};
use virt_shadow::api::types::ApiError;
use virt_shadow::transport::{PeerName, Security};

/// Obeys by name: `hang` never ends, `block` blocks its thread, `panic` panics, anything else is done.
struct Agent(AtomicU32);

impl AgentStatus for Agent {
    fn tracker(&self) -> String {
        "none".into()
    }
    fn records(&self) -> Vec<GuestRecord> {
        Vec::new()
    }
    fn heartbeat(&self) -> Heartbeat {
        Heartbeat::default()
    }
}

impl CommandHandler for Agent {
    async fn handle(&self, command: Command) -> Result<Done, ApiError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        match command {
            Command::DropShadow { uuid } if uuid == "hang" => std::future::pending().await,
            Command::DropShadow { uuid } if uuid == "block" => std::thread::sleep(Duration::from_millis(700)),
            Command::DropShadow { uuid } if uuid == "panic" => panic!("a bug in a command"),
            Command::DropShadow { uuid } if uuid == "no" => return Err(ApiError::new("refused", "no")),
            _ => (),
        }
        Ok(Done::Nothing)
    }
    fn may_start(&self, _: &str) -> Result<(), StartRefusal> {
        Ok(())
    }
}

struct Played {
    listener: TcpListener,
    link: AgentLink,
    agent: Arc<Agent>,
    stop: watch::Sender<bool>,
}

async fn play() -> Played {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let manager = listener.local_addr().unwrap();
    let (stop, shutdown) = watch::channel(false);
    let agent = Arc::new(Agent(AtomicU32::new(0)));
    let options = LinkOptions {
        manager,
        manager_name: PeerName::Address(manager.ip()),
        security: Security::Plain,
        host: "h1".into(),
        rack: "r1".into(),
        sync_port: 7710,
        sync_ip: None,
    };
    let link = AgentLink::start(options, agent.clone(), agent.clone(), shutdown).unwrap();
    Played { listener, link, agent, stop }
}

impl Played {
    /// Takes the agent's next connection and welcomes it.
    async fn welcome(&self) -> TcpStream {
        let (mut stream, _) =
            tokio::time::timeout(Duration::from_secs(5), self.listener.accept()).await.unwrap().unwrap();
        assert!(matches!(next(&mut stream).await, Some(ToManager::Hello(hello)) if hello.host == "h1"));
        let welcome = ToAgent::Welcome { heartbeat_ms: 20, version: "test".into() };
        write_frame(&mut stream, &welcome).await.unwrap();
        stream
    }
}

async fn next(stream: &mut TcpStream) -> Option<ToManager> {
    tokio::time::timeout(Duration::from_secs(5), read_frame(stream)).await.expect("something is sent").unwrap()
}

async fn order(stream: &mut TcpStream, id: u64, uuid: &str) {
    let command = Command::DropShadow { uuid: uuid.into() };
    write_frame(stream, &ToAgent::Request { id, command }).await.unwrap();
}

fn event(term: u64) -> GuestEvent {
    GuestEvent::Stopped { uuid: "u".into(), term, how: "shutdown".into() }
}

#[tokio::test(flavor = "current_thread")]
async fn heartbeats_go_on_whatever_commands_do() {
    let played = play().await;
    let mut stream = played.welcome().await;
    for (id, uuid) in [(1, "hang"), (2, "panic"), (3, "no"), (4, "yes")] {
        order(&mut stream, id, uuid).await;
    }
    let (mut beats, mut answered) = (0, Vec::new());
    while beats < 10 || answered.len() < 2 {
        match next(&mut stream).await.unwrap() {
            ToManager::Heartbeat(heartbeat) => {
                beats += 1;
                assert_eq!(heartbeat.seq, beats);
            }
            ToManager::Reply { id, outcome } => answered.push((id, matches!(outcome, Outcome::Ok(_)))),
            other => panic!("{other:?}"),
        }
    }
    answered.sort();
    assert_eq!(answered, [(3, false), (4, true)], "a panic is no answer, as what was done is unknown");
    // Even with the only thread of the agent's runtime in a command that blocks it: read on one that is not its.
    order(&mut stream, 5, "block").await;
    let mut stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    let reader = std::thread::spawn(move || {
        let (began, mut bytes) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_millis(500) {
            bytes += std::io::Read::read(&mut stream, &mut [0; 64]).unwrap();
        }
        bytes
    });
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(reader.join().unwrap() > 10 * 60, "heartbeats stopped while a command blocked");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_beyond_the_limit_are_refused_and_answers_of_a_lost_session_are_not_sent() {
    let played = play().await;
    let mut stream = played.welcome().await;
    for id in 0..MAX_COMMANDS_IN_FLIGHT as u64 + 1 {
        order(&mut stream, id, "hang").await;
    }
    let refused = loop {
        if let ToManager::Reply { id, outcome: Outcome::Error(error) } = next(&mut stream).await.unwrap() {
            break (id, error.code);
        }
    };
    assert_eq!(refused, (MAX_COMMANDS_IN_FLIGHT as u64, "unavailable".to_owned()));
    drop(stream);
    let mut stream = played.welcome().await;
    order(&mut stream, 9, "yes").await;
    let first = loop {
        match next(&mut stream).await.unwrap() {
            ToManager::Reply { id, outcome } => break (id, matches!(outcome, Outcome::Error(_))),
            ToManager::Heartbeat(_) => (),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(first, (9, true), "commands of the lost session still count");
    assert_eq!(played.agent.0.load(Ordering::Relaxed), MAX_COMMANDS_IN_FLIGHT as u32);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_in_order_and_until_acknowledged_again() {
    let played = play().await;
    (1..=3).for_each(|term| played.link.event(event(term)));
    let mut stream = played.welcome().await;
    let terms = async |stream: &mut TcpStream, count: usize| {
        let mut terms = Vec::new();
        while terms.len() < count {
            if let ToManager::Event { seq, event: GuestEvent::Stopped { term, .. } } = next(stream).await.unwrap() {
                terms.push((seq, term));
            }
        }
        terms
    };
    assert_eq!(terms(&mut stream, 3).await, [(1, 1), (2, 2), (3, 3)]);
    write_frame(&mut stream, &ToAgent::EventSeen { seq: 2 }).await.unwrap();
    // Until the acknowledgement has been read.
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(stream);
    played.link.event(event(4));
    let mut stream = played.welcome().await;
    assert_eq!(terms(&mut stream, 2).await, [(3, 3), (4, 4)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_answered_or_fail_but_never_hang() {
    let played = play().await;
    let mut stream = played.welcome().await;
    let call = |timeout_ms| {
        let link = played.link.clone();
        let timeout = Duration::from_millis(timeout_ms);
        tokio::spawn(async move { link.api("GET", "/v1/hosts", serde_json::Value::Null, timeout).await })
    };
    let asked = async |stream: &mut TcpStream| loop {
        if let ToManager::Api { id, path, .. } = next(stream).await.unwrap() {
            assert_eq!(path, "/v1/hosts");
            break id;
        }
    };
    let answered = call(5_000);
    let id = asked(&mut stream).await;
    write_frame(&mut stream, &ToAgent::ApiReply { id, status: 200, body: serde_json::json!([1]) }).await.unwrap();
    assert_eq!(answered.await.unwrap().unwrap(), (200, serde_json::json!([1])));

    let error = call(200).await.unwrap().unwrap_err();
    assert!(error.code == "unavailable" && error.message.contains("did not answer"), "{error}");

    let cut_off = call(5_000);
    asked(&mut stream).await;
    asked(&mut stream).await;
    drop(stream);
    assert!(cut_off.await.unwrap().unwrap_err().message.contains("was lost"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_agent_waits_and_a_stopped_one_goes() {
    let played = play().await;
    let (mut stream, _) = played.listener.accept().await.unwrap();
    next(&mut stream).await;
    write_frame(&mut stream, &ToAgent::Refused { reason: "other version".into() }).await.unwrap();
    let again = tokio::time::timeout(Duration::from_secs(1), played.listener.accept()).await;
    assert!(again.is_err() && !*played.link.connected().borrow(), "a refusal is not answered by hammering");
    played.stop.send_replace(true);
    let error = played.link.api("GET", "/", serde_json::Value::Null, Duration::from_millis(100)).await.unwrap_err();
    assert_eq!(error.code, "unavailable");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_died_is_not_started_before_the_manager_has_decided() {
    let played = play().await;
    let mut stream = played.welcome().await;
    assert!(played.link.may_start("u").is_ok());
    played.link.event(GuestEvent::Died { uuid: "u".into(), term: 3, detail: "SIGKILL".into(), last_epoch: 1 });
    let refusal = played.link.may_start("u").unwrap_err();
    let why = &refusal.reason;
    assert!(refusal.undecided);
    assert!(why.contains("term 3") && why.contains("virt-shadow info u"), "{why}");
    let protect = |term| {
        let (uuid, domain) = ("u".to_owned(), "web".to_owned());
        Command::Protect {
            uuid,
            domain,
            term,
            interval_ms: 50,
            budget: Default::default(),
            policy: String::new(),
            mirror_mib: 256,
            consistency: Default::default(),
            shadows: Vec::new(),
        }
    };
    for (id, term, decided) in [(1, 3, false), (2, 4, true)] {
        write_frame(&mut stream, &ToAgent::Request { id, command: protect(term) }).await.unwrap();
        while !matches!(next(&mut stream).await, Some(ToManager::Reply { id: answered, .. }) if answered == id) {}
        assert_eq!(played.link.may_start("u").is_ok(), decided, "an order that is older than the death says nothing");
    }
}

/// What comes by migration runs at its source until it runs here.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_comes_by_migration_may_start_once() {
    let played = play().await;
    played.link.event(GuestEvent::Died { uuid: "u".into(), term: 3, detail: "SIGKILL".into(), last_epoch: 1 });
    assert!(played.link.may_start("u").is_err());
    played.link.note_incoming("u");
    assert!(played.link.may_start("other").is_ok());
    assert!(played.link.may_start("u").is_ok());
    assert!(played.link.may_start("u").is_err(), "one start for one migration");
}

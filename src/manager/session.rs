//! One agent's connection, from its first byte to its last. What comes over it is checked, not trusted.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use placement::HostName;
use placement::guardian::{Event, HostIntro};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;

use super::core::Input;
use super::links::{MAX_OUTGOING, NewLink};
use super::{Manager, translate};
use crate::api::control::{AgentHello, CONTROL_VERSION, GuestEvent, ToAgent, ToManager};
use crate::api::frame::{FrameError, read_frame, write_frame};
use crate::transport::control::{self, ControlStream};

/// Connections at a time, those included that have not said who they are.
const MAX_CONNECTIONS: usize = 1024;
/// REST calls of one agent that are worked on at a time.
const MAX_CALLS: usize = 64;
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// An agent that says nothing for this long is disconnected; it was suspected long before.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_RECORDS: usize = 10_000;

/// Accepts agents until `shutdown`.
pub(super) async fn accept(manager: Manager, listener: TcpListener, mut shutdown: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = shutdown.wait_for(|stop| *stop) => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: others are freed in a while.
                tracing::warn!("control port: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(%peer, "control port: {MAX_CONNECTIONS} connections already");
            continue;
        };
        let (manager, mut shutdown) = (manager.clone(), shutdown.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = serve(&manager, stream, peer) => (),
                _ = shutdown.wait_for(|stop| *stop) => (),
            }
            drop(place);
        });
    }
}

#[derive(Debug, thiserror::Error)]
enum Rejected {
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("no Hello within {} s", HELLO_TIMEOUT.as_secs())]
    Silent,
    #[error("closed before it said Hello")]
    Closed,
    #[error("did not say Hello first")]
    OutOfTurn,
    #[error("{0}")]
    Told(String),
}

async fn serve(manager: &Manager, stream: TcpStream, peer: SocketAddr) {
    let local = stream.local_addr().map_or(peer.ip(), |addr| addr.ip());
    let accepted = timeout(HELLO_TIMEOUT, control::accept(manager.security(), stream, WRITE_TIMEOUT)).await;
    let (mut stream, identity) = match accepted {
        Ok(Ok(accepted)) => accepted,
        Ok(Err(error)) => return tracing::warn!(%peer, "control port: {error}"),
        Err(_) => return tracing::warn!(%peer, "control port: no handshake within {} s", HELLO_TIMEOUT.as_secs()),
    };
    let greeted = greet(&mut stream).await.and_then(|hello| match identity.speaks_for(&hello.host) {
        Ok(()) => Ok(hello),
        Err(reason) => Err(Rejected::Told(reason)),
    });
    let hello = match greeted {
        Ok(hello) => hello,
        Err(rejected) => {
            if let Rejected::Told(reason) = &rejected {
                let refused = ToAgent::Refused { reason: reason.clone() };
                let _ = timeout(WRITE_TIMEOUT, write_frame(&mut stream, &refused)).await;
            }
            return tracing::warn!(%peer, "control port: {rejected}");
        }
    };
    let host = HostName::from(&*hello.host);
    let ended = session(manager, stream, (peer, local), hello).await;
    tracing::info!(%host, %peer, "agent disconnected: {ended}");
}

/// The first message, checked.
async fn greet(stream: &mut Box<dyn ControlStream>) -> Result<AgentHello, Rejected> {
    let first = timeout(HELLO_TIMEOUT, read_frame(stream)).await.map_err(|_| Rejected::Silent)??;
    let hello = match first {
        Some(ToManager::Hello(hello)) => hello,
        Some(_) => return Err(Rejected::OutOfTurn),
        None => return Err(Rejected::Closed),
    };
    let told = |reason: String| Err(Rejected::Told(reason));
    if hello.control_version != CONTROL_VERSION {
        return told(format!(
            "agent of {} (virtshadowd {}) speaks version {} of the control protocol, this manager (virtshadowd {}) \
             version {CONTROL_VERSION}; run the same virtshadowd on all hosts",
            hello.host,
            hello.version,
            hello.control_version,
            env!("CARGO_PKG_VERSION")
        ));
    }
    let plain = |name: &str| {
        (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    if !plain(&hello.host) || !plain(&hello.rack) {
        return told(format!(
            "host {:?} in rack {:?}: names are 1 to 64 letters, digits, '-', '_' or '.'",
            hello.host, hello.rack
        ));
    }
    if hello.records.len() > MAX_RECORDS {
        return told(format!("{} records are more than {MAX_RECORDS}", hello.records.len()));
    }
    Ok(hello)
}

async fn session(
    manager: &Manager,
    mut stream: Box<dyn ControlStream>,
    (peer, local): (SocketAddr, IpAddr),
    hello: AgentHello,
) -> String {
    let host = HostName::from(&*hello.host);
    let (out, outgoing) = mpsc::channel(MAX_OUTGOING);
    let sync_addr = SocketAddr::new(hello.sync_ip.unwrap_or(peer.ip()), hello.sync_port);
    let link = NewLink { out: out.clone(), peer: peer.ip(), local, sync_addr };
    let alive_within = Duration::from_millis(manager.settings().suspect_ms);
    let serial = match manager.links().register(&host, link, alive_within) {
        Ok(serial) => serial,
        Err(reason) => {
            let refused = ToAgent::Refused { reason: reason.clone() };
            let _ = timeout(WRITE_TIMEOUT, write_frame(&mut stream, &refused)).await;
            return reason;
        }
    };
    let welcome =
        ToAgent::Welcome { heartbeat_ms: manager.heartbeat_ms(), version: env!("CARGO_PKG_VERSION").to_owned() };
    let ended = match timeout(WRITE_TIMEOUT, write_frame(&mut stream, &welcome)).await {
        Ok(Ok(())) => {
            tracing::info!(%host, %peer, rack = hello.rack, "agent connected");
            let intro = HostIntro {
                name: host.clone(),
                rack: hello.rack,
                probe_addr: SocketAddr::new(peer.ip(), hello.sync_port),
                sync_addr,
            };
            let records = hello.records.iter().map(translate::record).collect();
            let about = super::core::AgentAbout { version: hello.version, tracker: hello.tracker };
            let hello = Input::Hello { serial, event: Event::Hello { intro, records }, host: host.clone(), about };
            manager.tell(hello).await;
            let (reader, mut writer) = tokio::io::split(stream);
            let session = Session { manager, host: &host, serial, out };
            tokio::select! {
                ended = session.read(reader) => ended,
                ended = write(&mut writer, outgoing) => ended,
            }
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "takes nothing".into(),
    };
    manager.links().unregister(&host, serial);
    manager.tell(Input::Disconnected { host, serial }).await;
    ended
}

struct Session<'a> {
    manager: &'a Manager,
    host: &'a HostName,
    serial: u64,
    out: mpsc::Sender<ToAgent>,
}

impl Session<'_> {
    async fn read(&self, mut reader: impl AsyncRead + Unpin) -> String {
        let calls = Arc::new(Semaphore::new(MAX_CALLS));
        loop {
            let message = match timeout(IDLE_TIMEOUT, read_frame(&mut reader)).await {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => return "closed by the agent".into(),
                Ok(Err(error)) => return error.to_string(),
                Err(_) => return format!("silent for {} s", IDLE_TIMEOUT.as_secs()),
            };
            if !self.manager.links().heard(self.host, self.serial) {
                return "replaced by a newer connection".into();
            }
            match message {
                ToManager::Hello(_) => return "said Hello twice".into(),
                ToManager::Heartbeat(heartbeat) => {
                    self.manager.tell(Input::Heartbeat { host: self.host.clone(), heartbeat }).await;
                }
                ToManager::Event { seq, event } => self.event(seq, event).await,
                ToManager::Reply { id, outcome } => {
                    self.manager.links().replied(self.host, self.serial, id, outcome);
                }
                ToManager::Api { id, method, path, body } => {
                    let (manager, out) = (self.manager.clone(), self.out.clone());
                    let place = calls.clone().try_acquire_owned();
                    tokio::spawn(async move {
                        let (status, body) = match &place {
                            Ok(_) => manager.api(&method, &path, body).await,
                            Err(_) => super::api::failure(&crate::api::types::ApiError::new(
                                "unavailable",
                                format!("{MAX_CALLS} calls of this host are worked on already"),
                            )),
                        };
                        let _ = out.send(ToAgent::ApiReply { id, status, body }).await;
                    });
                }
            }
        }
    }

    async fn event(&self, seq: u64, event: GuestEvent) {
        tracing::debug!(host = %self.host, seq, ?event, "event");
        let seen = (self.out.clone(), seq);
        self.manager.tell(Input::Reported { host: self.host.clone(), event, seen }).await;
    }
}

async fn write(writer: &mut (impl AsyncWrite + Unpin), mut outgoing: mpsc::Receiver<ToAgent>) -> String {
    while let Some(message) = outgoing.recv().await {
        let fits = match &message {
            // An answer that is too long is an error of its own, not the end of the connection.
            ToAgent::ApiReply { id, .. } => match crate::api::frame::encode_frame(&message) {
                Err(FrameError::TooLong { bytes }) => {
                    let error = crate::api::types::ApiError::new(
                        "failed",
                        format!("the answer of {bytes} bytes is too long to be forwarded; ask on the manager's host"),
                    );
                    let (status, body) = super::api::failure(&error);
                    ToAgent::ApiReply { id: *id, status, body }
                }
                _ => message,
            },
            _ => message,
        };
        match timeout(WRITE_TIMEOUT, write_frame(writer, &fits)).await {
            Ok(Ok(())) => (),
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return format!("takes nothing for {} s", WRITE_TIMEOUT.as_secs()),
        }
    }
    "replaced by a newer connection".into()
}

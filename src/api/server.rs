//! The REST API on a unix socket: JSON over HTTP/1.1. Who may open the socket may give orders.
//!
//! What concerns this host alone is answered here; everything else by the manager, in this process or over the agent's
//! link. The socket is a door for anybody with permission, so everything is bounded: connections, time for a request's
//! head, its body, and the answer.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use super::control::{CONTROL_VERSION, Command, Done};
use super::link::AgentLink;
use super::percent;
use super::types::ApiError;
use crate::manager::Manager;

/// Longest request body, bytes.
pub const MAX_BODY_BYTES: usize = 64 << 10;
const MAX_CONNECTIONS: usize = 256;
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than anything the manager itself allows.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(150);
const DOCTOR_TIMEOUT: Duration = Duration::from_secs(30);

/// What answers on this host.
#[derive(Clone)]
pub struct Backend {
    pub host: String,
    /// Present with the manager role.
    pub manager: Option<Manager>,
    /// Present with the agent role.
    pub agent: Option<AgentLink>,
}

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("{path}: another virtshadowd answers there; stop it first, or give this one its own `socket`")]
    InUse { path: PathBuf },
    #[error("{path} exists and is no socket; move it away")]
    NotASocket { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// Takes the socket at `path`: removes one that nobody answers on, makes its directory, mode 0660.
pub async fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let io = |source| ListenError::Io { path: path.into(), source };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(io)?;
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => (),
        Err(error) => return Err(io(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket { path: path.into() }),
        Ok(_) => match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(io)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => (),
            // A full backlog is an answer as well.
            Ok(_) | Err(_) => return Err(ListenError::InUse { path: path.into() }),
        },
    }
    let listener = UnixListener::bind(path).map_err(io)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(io)?;
    Ok(listener)
}

/// Serves until `shutdown`.
pub async fn serve(listener: UnixListener, backend: Backend, mut shutdown: watch::Receiver<bool>) {
    let router = Router::new().fallback(answer).layer(DefaultBodyLimit::max(MAX_BODY_BYTES)).with_state(backend);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = shutdown.wait_for(|stop| *stop) => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("API socket: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!("API socket: {MAX_CONNECTIONS} connections already");
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        let mut shutdown = shutdown.clone();
        tokio::spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!("API socket: {error}");
                },
                _ = shutdown.wait_for(|stop| *stop) => (),
            }
            drop(place);
        });
    }
}

async fn answer(State(backend): State<Backend>, request: Request) -> Response {
    let (status, value) = match read(request).await {
        Ok((method, path, body)) => backend.api(&method, &path, body).await,
        Err(error) => crate::manager::api::failure(&error),
    };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, [(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

/// Method, path with query, and body of a request.
async fn read(request: Request) -> Result<(String, String, Value), ApiError> {
    use axum::extract::FromRequest;
    let method = request.method().to_string();
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let body = match tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, &())).await {
        Ok(Ok(body)) => body,
        Ok(Err(rejection)) => {
            return Err(ApiError::new("invalid", format!("body (at most {MAX_BODY_BYTES} bytes): {rejection}")));
        }
        Err(_) => {
            return Err(ApiError::new("invalid", format!("body did not come within {} s", BODY_TIMEOUT.as_secs())));
        }
    };
    let body = match body.as_ref() {
        [] => Value::Null,
        bytes => serde_json::from_slice(bytes)
            .map_err(|error| ApiError::new("invalid", format!("body is not JSON: {error}")))?,
    };
    Ok((method, path, body))
}

impl Backend {
    /// Answers one call. -> HTTP status, body
    pub async fn api(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let (route, query) = path.split_once('?').unwrap_or((path, ""));
        let here = match (method, route) {
            ("GET", "/v1/version") => Ok(self.version()),
            ("GET", "/v1/doctor") => self.doctor().await,
            ("GET", "/v1/hook") => self.hook(query),
            _ => return self.fleet(method, path, body).await,
        };
        match here {
            Ok(value) => (200, value),
            Err(error) => crate::manager::api::failure(&error),
        }
    }

    fn version(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "control_version": CONTROL_VERSION,
            "host": self.host,
            "manager": self.manager.is_some(),
            "agent": self.agent.is_some(),
        })
    }

    fn link(&self) -> Result<&AgentLink, ApiError> {
        self.agent
            .as_ref()
            .ok_or_else(|| ApiError::new("unavailable", format!("{} has the manager role only, no agent", self.host)))
    }

    async fn doctor(&self) -> Result<Value, ApiError> {
        let link = self.link()?;
        match tokio::time::timeout(DOCTOR_TIMEOUT, link.local(Command::Doctor)).await {
            Ok(Ok(Done::Doctor(report))) => serde_json::to_value(&report)
                .map_err(|error| ApiError::new("failed", format!("report of {}: {error}", self.host))),
            Ok(Ok(_)) => Err(ApiError::new("failed", "the agent answered something else than a report")),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ApiError::new(
                "failed",
                format!("checks of {} did not end within {} s", self.host, DOCTOR_TIMEOUT.as_secs()),
            )),
        }
    }

    /// May libvirt start a guest here? Or (`operation=migrate`) one is about to come by migration.
    fn hook(&self, query: &str) -> Result<Value, ApiError> {
        let [uuid, _name, operation] = percent::query(Some(query), ["uuid", "name", "operation"])
            .map_err(|key| ApiError::new("invalid", format!("hook knows uuid, name and operation, not {key:?}")))?;
        let Some(uuid) = uuid else { return Err(ApiError::new("invalid", "hook needs the uuid of the guest")) };
        let uuid = uuid.to_ascii_lowercase();
        let refusal = self.agent.as_ref().and_then(|link| match operation.as_deref() {
            Some("migrate") => {
                link.note_incoming(&uuid);
                None
            }
            _ => link.may_start(&uuid).err(),
        });
        let undecided = refusal.as_ref().is_some_and(|refusal| refusal.undecided);
        let reason = refusal.as_ref().map_or("", |refusal| &refusal.reason);
        Ok(json!({ "allowed": refusal.is_none(), "undecided": undecided, "reason": reason }))
    }

    /// What the manager answers, wherever it is.
    async fn fleet(&self, method: &str, path: &str, mut body: Value) -> (u16, Value) {
        // A domain is looked for first on the host where the order was given.
        if (method, path) == ("POST", "/v1/guests")
            && self.agent.is_some()
            && let Some(request) = body.as_object_mut()
            && request.get("host").is_none_or(Value::is_null)
        {
            request.insert("host".into(), self.host.clone().into());
        }
        if let Some(manager) = &self.manager {
            return manager.api(method, path, body).await;
        }
        let forwarded = match self.link() {
            Ok(link) => link.api(method, path, body, FORWARD_TIMEOUT).await,
            Err(error) => Err(error),
        };
        forwarded.unwrap_or_else(|error| crate::manager::api::failure(&error))
    }
}

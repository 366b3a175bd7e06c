//! What `virt-shadow` speaks to a daemon with: one HTTP request per connection over its unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use super::types::ApiError;

/// Longest answer taken, bytes.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Longer than anything a daemon allows.
const TIMEOUT: Duration = Duration::from_secs(200);

/// Why there is no answer, or not the wished one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to {socket}: {source}; {remedy}")]
    Connect { socket: PathBuf, source: io::Error, remedy: &'static str },
    #[error("{socket}: {detail}")]
    Broken { socket: PathBuf, detail: String },
    /// The daemon's own words.
    #[error("{0}")]
    Api(ApiError),
}

/// A daemon's socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.into(), timeout: TIMEOUT }
    }

    /// Gives up after `timeout`.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.typed("GET", path, None).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_value(body).map_err(|error| self.broken(error))?;
        self.typed("POST", path, Some(body)).await
    }

    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.typed("DELETE", path, None).await
    }

    async fn typed<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> Result<T, ClientError> {
        let (status, answer) = self.call(method, path, body).await?;
        if status != 200 {
            let error = serde_json::from_value(answer.clone())
                .unwrap_or_else(|_| ApiError::new("failed", format!("HTTP status {status}: {answer}")));
            return Err(ClientError::Api(error));
        }
        serde_json::from_value(answer).map_err(|error| self.broken(format!("answer not understood: {error}")))
    }

    /// One request. -> HTTP status, body
    pub async fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<(u16, Value), ClientError> {
        match tokio::time::timeout(self.timeout, self.exchange(method, path, body)).await {
            Ok(result) => result,
            Err(_) => Err(self.broken(format!("no answer within {} s", self.timeout.as_secs_f32()))),
        }
    }

    async fn exchange(&self, method: &str, path: &str, body: Option<Value>) -> Result<(u16, Value), ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|source| self.no_connection(source))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(error))?;
        // Ends with the sender; what fails there is told to the sender as well.
        let connection = tokio::spawn(connection);
        let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "virtshadowd")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(error))?;
        let response = sender.send_request(request).await.map_err(|error| self.broken(error))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
            .collect()
            .await
            .map_err(|error| self.broken(error))?
            .to_bytes();
        connection.abort();
        let value = serde_json::from_slice(&body).map_err(|error| self.broken(format!("no JSON: {error}")))?;
        Ok((status, value))
    }

    fn no_connection(&self, source: io::Error) -> ClientError {
        let remedy = match source.kind() {
            io::ErrorKind::PermissionDenied => "be root or in the group of the socket",
            _ => "is virtshadowd running? (--connect or VIRT_SHADOW_SOCKET names another socket)",
        };
        ClientError::Connect { socket: self.socket.clone(), source, remedy }
    }

    fn broken(&self, detail: impl ToString) -> ClientError {
        ClientError::Broken { socket: self.socket.clone(), detail: detail.to_string() }
    }
}

//! The same for the runtime's streams: between agents and their manager.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::tls::{PeerIdentity, PeerName, Security};

/// A control connection, encrypted or not.
pub trait ControlStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> ControlStream for S {}

/// Connects to the manager. `unacknowledged_for`: bytes that stay so this long end the connection.
pub async fn connect(
    security: &Security,
    addr: SocketAddr,
    peer: &PeerName,
    unacknowledged_for: Duration,
) -> io::Result<Box<dyn ControlStream>> {
    let stream = TcpStream::connect(addr).await?;
    tune(&stream, unacknowledged_for);
    match security {
        Security::Plain => Ok(Box::new(stream)),
        Security::Tls(credentials) => {
            let connector = TlsConnector::from(credentials.client.clone());
            Ok(Box::new(connector.connect(peer.server_name()?, stream).await?))
        }
    }
}

/// Takes an agent's connection.
pub async fn accept(
    security: &Security,
    stream: TcpStream,
    unacknowledged_for: Duration,
) -> io::Result<(Box<dyn ControlStream>, PeerIdentity)> {
    tune(&stream, unacknowledged_for);
    match security {
        Security::Plain => Ok((Box::new(stream), PeerIdentity::Unknown)),
        Security::Tls(credentials) => {
            let stream = TlsAcceptor::from(credentials.server.clone()).accept(stream).await?;
            let peer = PeerIdentity::shown(stream.get_ref().1.peer_certificates());
            Ok((Box::new(stream), peer))
        }
    }
}

fn tune(stream: &TcpStream, unacknowledged_for: Duration) {
    let socket = socket2::SockRef::from(stream);
    // Best effort: without these a lost peer is noticed later.
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_user_timeout(Some(unacknowledged_for));
}

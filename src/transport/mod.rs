//! Streams between hosts: TLS 1.3 over TCP with bounded waits, so that a dead peer is noticed.
//!
//! ```text
//! tls      who may speak with us, and as whom      stream   between agents, for two threads
//!                                                  control  between an agent and its manager, for the runtime
//! ```

mod tls;

pub mod control;
pub mod stream;

pub use tls::{PeerIdentity, PeerName, Security, TlsError};

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

/// A peer that takes longer to accept a connection is tried again later.
pub const CONNECT_WITHIN: Duration = Duration::from_millis(1_000);
/// Bytes that stay unacknowledged this long end the connection: the link or the peer is gone.
const UNACKNOWLEDGED_FOR: Duration = Duration::from_millis(3_000);

/// Sets what every stream between agents has: no delay of small messages, and an end when the peer is silent.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_FOR))?;
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(2)).with_interval(Duration::from_secs(1)).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}

/// Whether the kernel of a host answers at all: a connection, its refusal and its reset all count, silence does not.
/// Tries several times: one lost packet is not silence, and the kernel itself repeats it only after a second.
pub fn answers(addr: SocketAddr, within: Duration) -> bool {
    const TRIES: u32 = 3;
    let each = (within / TRIES).max(Duration::from_millis(1));
    (0..TRIES).any(|_| {
        let tried = Instant::now();
        match TcpStream::connect_timeout(&addr, each) {
            Ok(_) => true,
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset) => {
                true
            }
            Err(_) => {
                // No route, say, fails at once; it may be there a moment later.
                std::thread::sleep(each.saturating_sub(tried.elapsed()));
                false
            }
        }
    })
}

//! Does a host answer at all?

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout_at};

/// Between attempts that failed at once, such as for lack of a route.
const AGAIN: Duration = Duration::from_millis(50);

/// Tries to connect until `timeout` has passed. True if anything comes back from that host: an accepted connection, or
/// a refusal, which its kernel sends even when no agent listens.
pub async fn answers(addr: SocketAddr, timeout: Duration) -> bool {
    let end = Instant::now() + timeout;
    loop {
        match timeout_at(end, TcpStream::connect(addr)).await {
            Ok(Ok(_)) => return true,
            Ok(Err(error)) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset) => {
                return true;
            }
            // Routers and our own kernel say "unreachable"; that is nobody's sign of life.
            Ok(Err(_)) if Instant::now() + AGAIN < end => sleep(AGAIN).await,
            Ok(Err(_)) => {
                tokio::time::sleep_until(end).await;
                return false;
            }
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_and_a_refusal_are_answers() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        assert!(answers(addr, Duration::from_secs(2)).await);
        drop(listener);
        assert!(answers(addr, Duration::from_secs(2)).await);
    }

    #[tokio::test]
    async fn an_address_nobody_has_does_not_answer() {
        // TCP cannot connect to the broadcast address, so each attempt fails at once and is repeated.
        let began = std::time::Instant::now();
        assert!(!answers(([255, 255, 255, 255], 9).into(), Duration::from_millis(200)).await);
        assert!(began.elapsed() >= Duration::from_millis(190));
    }
}

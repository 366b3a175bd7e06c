//! Does a host answer at all?

use std::net::SocketAddr;
use std::time::Duration;

use crate::transport;

/// [`transport::answers`] off the runtime: within `timeout`, several attempts.
pub async fn answers(addr: SocketAddr, timeout: Duration) -> bool {
    tokio::task::spawn_blocking(move || transport::answers(addr, timeout)).await.unwrap_or(false)
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

//! Frames of the control protocol: a be32 length, then that many bytes of JSON.
//!
//! Nothing read here is trusted: the length is checked before memory is taken for it, and a value that does not
//! parse ends the connection, as the stream cannot be told to be in step any more.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::control::MAX_FRAME_BYTES;

/// Why a frame could not be read or written. After any of these the connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("a frame of {bytes} bytes is longer than the limit of {MAX_FRAME_BYTES}")]
    TooLong { bytes: usize },
    #[error("a frame of {bytes} bytes is not what the control protocol knows: {detail}")]
    Malformed { bytes: usize, detail: String },
}

/// Reads one frame; `None` when the peer closed the connection between frames.
///
/// Not safe to cancel: half a frame would be lost. Give it a task of its own.
pub async fn read_frame<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> Result<Option<T>, FrameError> {
    let mut head = [0; 4];
    if from.read(&mut head[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..]).await?;
    let bytes = u32::from_be_bytes(head) as usize;
    if bytes > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong { bytes });
    }
    // Grows with what really arrives, so that four bytes of garbage do not cost 4 MiB.
    let mut body = Vec::new();
    from.take(bytes as u64).read_to_end(&mut body).await?;
    if body.len() < bytes {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    serde_json::from_slice(&body).map(Some).map_err(|error| FrameError::Malformed { bytes, detail: error.to_string() })
}

/// The bytes of one frame.
pub fn encode_frame(value: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, value)
        .map_err(|error| FrameError::Malformed { bytes: 0, detail: error.to_string() })?;
    let bytes = frame.len() - 4;
    if bytes > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong { bytes });
    }
    frame[..4].copy_from_slice(&(bytes as u32).to_be_bytes());
    Ok(frame)
}

/// Writes one frame with a single call, so that small ones leave as one segment.
pub async fn write_frame(to: &mut (impl AsyncWrite + Unpin), value: &impl Serialize) -> Result<(), FrameError> {
    Ok(to.write_all(&encode_frame(value)?).await?)
}

#[cfg(test)]
mod tests {
    use super::super::control::*;
    use super::super::types::ApiError;
    use super::*;

    #[tokio::test]
    async fn every_shape_of_message_survives_the_wire() {
        let event = GuestEvent::Died { uuid: "u".into(), term: 3, detail: "SIGKILL".into(), last_epoch: 9 };
        let messages = vec![
            ToManager::Event { seq: 7, event },
            ToManager::Heartbeat(Heartbeat { seq: 1, ..Heartbeat::default() }),
            ToManager::Reply { id: 4, outcome: Outcome::Ok(Done::Promoted { epoch: 8, took_us: 1 }) },
            ToManager::Reply { id: 5, outcome: Outcome::Ok(Done::Nothing) },
            ToManager::Reply { id: 6, outcome: Outcome::Error(ApiError::new("refused", "no")) },
            ToManager::Reply { id: 7, outcome: Outcome::Ok(Done::Shadow { status: None }) },
            ToManager::Api { id: 1, method: "GET".into(), path: "/v1/hosts".into(), body: serde_json::Value::Null },
        ];
        let mut wire = Vec::new();
        for message in &messages {
            write_frame(&mut wire, message).await.unwrap();
        }
        let mut reader = &wire[..];
        for message in &messages {
            let got: ToManager = read_frame(&mut reader).await.unwrap().unwrap();
            assert_eq!(serde_json::to_value(&got).unwrap(), serde_json::to_value(message).unwrap());
        }
        assert!(read_frame::<ToManager>(&mut reader).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn bad_frames_are_refused_without_taking_memory_for_them() {
        let mut long = &[0xff, 0xff, 0xff, 0xff, b'{'][..];
        assert!(matches!(read_frame::<ToManager>(&mut long).await, Err(FrameError::TooLong { .. })));
        let mut torn = &[0, 0, 0, 9, b'{'][..];
        assert!(matches!(read_frame::<ToManager>(&mut torn).await, Err(FrameError::Io(_))));
        let mut torn_head = &[0, 0][..];
        assert!(matches!(read_frame::<ToManager>(&mut torn_head).await, Err(FrameError::Io(_))));
        let mut garbage = &[0, 0, 0, 2, b'{', b'x'][..];
        assert!(matches!(read_frame::<ToManager>(&mut garbage).await, Err(FrameError::Malformed { .. })));
        assert!(matches!(encode_frame(&"x".repeat(MAX_FRAME_BYTES)), Err(FrameError::TooLong { .. })));
    }
}

//! What this crate refuses.

use thiserror::Error;

/// A series' layout no model can work with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ShapeError {
    #[error("a step of 0 seconds: give the seconds between two samples")]
    NoStep,
    #[error("a horizon of {given} steps: give 1 to {most}")]
    Horizon { given: usize, most: usize },
    #[error("a season of {given} samples: give 2 to {most}")]
    Season { given: usize, most: usize },
    #[error("a history of {given} samples: give {least} (two seasons and the horizon) to {most}")]
    Capacity { given: usize, least: usize, most: usize },
}

/// Stored bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    #[error("not a stored {what}: the first bytes are others")]
    Foreign { what: &'static str },
    #[error("stored {what} of format {found}, this version reads {oldest} to {newest}: learn it anew from its samples")]
    Format { what: &'static str, found: u16, oldest: u16, newest: u16 },
    #[error("stored {what} ends after {at} bytes, in the middle of {field}")]
    Short { what: &'static str, field: &'static str, at: usize },
    #[error("stored {what} is damaged: its checksum does not match")]
    Damaged { what: &'static str },
    #[error("stored {what}: {field} is out of range")]
    Range { what: &'static str, field: &'static str },
    #[error("stored {what}: {count} bytes follow its end")]
    Trailing { what: &'static str, count: usize },
    #[error("stored history: {0}")]
    Shape(#[from] ShapeError),
}

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
    #[error("a history of {given} samples: two seasons and the horizon need {least}")]
    Capacity { given: usize, least: usize },
}

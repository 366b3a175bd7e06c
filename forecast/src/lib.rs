//! What comes next: forecasts of utilisation, traffic and demand with intervals that mean what they say.
//!
//! Pure and deterministic: no clock, file, socket, thread or random source. Samples go in, forecasts come out; the same
//! samples and settings give the same forecast on every run.
#![forbid(unsafe_code)]

pub mod codec;
pub mod cost;
pub mod derived;
pub mod error;
pub mod events;
pub mod features;
pub mod history;
pub mod hybrid;
pub mod models;
pub mod quantiles;
pub mod random;
pub mod series;

pub use history::{History, Shape};
pub use hybrid::Hybrid;
pub use quantiles::{Forecast, LEVELS, Quantiles};

//! The REST API (JSON over a unix socket) and the control protocol between agents and their manager.
pub mod client;
pub mod control;
pub mod frame;
pub mod link;
pub mod percent;
pub mod server;
pub mod types;

//! The REST API (JSON over a unix socket) and the control protocol between agents and their manager.
pub mod control;
pub mod frame;
pub mod link;
pub mod types;

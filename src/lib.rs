//! virt-shadow: shadows of running virtual machines on stock libvirt, QEMU and KVM.
//!
//! This crate acts; it holds no policy. `vmsync` decides about epochs and streams, `placement` about hosts and
//! terms. See `docs/architecture.md` for the picture.
pub mod agent;
pub mod api;
pub mod capture;
pub mod cli;
pub mod config;
pub mod disk;
pub mod hypervisor;
pub mod lab;
pub mod manager;
pub mod output;
pub mod packet;
pub mod standby;
pub mod transport;

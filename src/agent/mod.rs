//! The host agent: a thin driver around `vmsync` for primaries and shadows, and the link to the manager.

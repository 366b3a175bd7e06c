//! Streams between hosts.

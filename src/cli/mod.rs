//! The `virt-shadow` command line.

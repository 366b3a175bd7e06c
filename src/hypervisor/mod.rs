//! The only place that knows libvirt, its monitor pass-through and its FFI.

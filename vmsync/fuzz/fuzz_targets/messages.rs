//! Any bytes as a stream of messages, either way.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsync::message::{SourceBody, TargetBody};
use vmsync::wire::Decoder;

fuzz_target!(|bytes: &[u8]| {
    let mut from_source = Decoder::<SourceBody>::new();
    from_source.push(bytes);
    while let Ok(Some(_)) = from_source.next() {}
    let mut from_target = Decoder::<TargetBody>::new();
    for chunk in bytes.chunks(7) {
        from_target.push(chunk);
        while let Ok(Some(_)) = from_target.next() {}
    }
});

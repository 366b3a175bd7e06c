//! Any bytes behind a journal's header: a prefix of whole epochs, or none.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsync::journal::{encode_header, scan};
use vmsync::{GuestUuid, RamBlock, RamLayout};

fuzz_target!(|bytes: &[u8]| {
    let guest = GuestUuid::from_bytes([1; 16]);
    let layout = RamLayout::new(vec![RamBlock { name: "a".into(), len_bytes: 40 * 4096 }]).expect("a plain layout");
    let mut journal = encode_header(guest, &layout);
    journal.extend_from_slice(bytes);
    let found = scan(&journal, guest, &layout).expect("the header is right");
    assert!(found.sealed_len_bytes as usize <= journal.len());
    let _ = scan(bytes, guest, &layout);
});

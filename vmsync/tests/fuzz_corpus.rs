//! What the fuzzers of `vmsync/fuzz` found interesting, replayed: a decoder takes it or refuses it, in bounded memory
//! and without a panic. One line of hexadecimal digits an input.

use vmsync::codec::{FrameDecoder, KnownPages};
use vmsync::journal::{encode_header, scan};
use vmsync::message::{SourceBody, TargetBody};
use vmsync::wire::{Body, Decoder};
use vmsync::{DeviceState, GuestUuid, PAGE_SIZE, RamBlock, RamLayout};

fn inputs(text: &str) -> Vec<Vec<u8>> {
    let unhex = |line: &str| {
        (0..line.len()).step_by(2).map(|i| u8::from_str_radix(&line[i..i + 2], 16).unwrap()).collect::<Vec<u8>>()
    };
    let inputs: Vec<_> = text.lines().map(unhex).collect();
    assert!(inputs.len() >= 10, "{} inputs", inputs.len());
    inputs
}

fn layout() -> RamLayout {
    let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * PAGE_SIZE as u64 };
    RamLayout::new(vec![block("a", 30), block("b", 10)]).unwrap()
}

#[test]
fn frames() {
    let mut taken = 0;
    for bytes in inputs(include_str!("../../fixtures/vmsync/fuzz-frame.hex")) {
        let Ok(frame) = FrameDecoder::new().decode(&bytes, &layout()) else { continue };
        taken += 1;
        let mut pages = vec![[0; PAGE_SIZE]; 40];
        frame.iter().for_each(|(addr, page)| page.apply(&mut pages[layout().linear(addr).unwrap() as usize]));
        // Changes of a page that is not what they were made from are told; nothing else may be wrong with it.
        let _ = KnownPages::zero(&layout()).accept(&frame);
        assert!(KnownPages::unknown(&layout()).accept(&frame).is_ok());
    }
    assert!(taken >= 5, "{taken} taken");
}

#[test]
fn device_states() {
    let former = DeviceState { running: true, bytes: (0..3000u32).map(|i| ((i * 7) >> 3) as u8).collect() };
    for bytes in inputs(include_str!("../../fixtures/vmsync/fuzz-device-state.hex")) {
        if let Ok(state) = DeviceState::decode(&bytes, Some(&former)) {
            assert!(state.bytes.len() <= 16 << 20);
        }
    }
}

#[test]
fn journals() {
    let guest = GuestUuid::from_bytes([1; 16]);
    for bytes in inputs(include_str!("../../fixtures/vmsync/fuzz-journal.hex")) {
        let journal = [encode_header(guest, &layout()), bytes].concat();
        let found = scan(&journal, guest, &layout()).unwrap();
        assert!(found.sealed_len_bytes as usize <= journal.len());
    }
}

#[test]
fn messages() {
    fn read_all<B: Body>(bytes: &[u8]) {
        let mut decoder = Decoder::<B>::new();
        decoder.push(bytes);
        while let Ok(Some(_)) = decoder.next() {}
    }
    for bytes in inputs(include_str!("../../fixtures/vmsync/fuzz-messages.hex")) {
        read_all::<SourceBody>(&bytes);
        read_all::<TargetBody>(&bytes);
    }
}

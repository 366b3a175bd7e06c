//! Any bytes as an undo record and as a state record: refused, or read within the layout.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsync::history::UndoRecord;
use vmsync::state_record::StateRecord;
use vmsync::{DeviceState, GuestUuid, RamBlock, RamLayout};

fuzz_target!(|bytes: &[u8]| {
    let guest = GuestUuid::from_bytes([1; 16]);
    let layout = RamLayout::new(vec![RamBlock { name: "a".into(), len_bytes: 40 * 4096 }]).expect("a plain layout");
    let _ = StateRecord::decode(bytes, guest);
    let Ok(record) = UndoRecord::read(bytes, guest, &layout) else { return };
    let newer = DeviceState { running: true, bytes: (0..3000u32).map(|i| (i * 7 >> 3) as u8).collect() };
    let _ = record.device_state(&newer);
    for frame in record.frames(&layout).flatten() {
        assert!(frame.iter().all(|(addr, _)| layout.linear(addr).is_some()));
    }
});

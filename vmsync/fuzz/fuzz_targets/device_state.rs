//! Any bytes as a device state, against a former one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsync::DeviceState;

fuzz_target!(|bytes: &[u8]| {
    let former = DeviceState { running: true, bytes: (0..3000u32).map(|i| (i * 7 >> 3) as u8).collect() };
    if let Ok(state) = DeviceState::decode(bytes, Some(&former)) {
        let mut again = Vec::new();
        state.encode(Some(&former), &mut again).expect("it was short enough to be decoded");
        assert_eq!(DeviceState::decode(&again, Some(&former)).expect("just encoded"), state);
    }
});

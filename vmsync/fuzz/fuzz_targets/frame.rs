//! Any bytes as a page frame: refused, or applied within the layout.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsync::codec::{FrameDecoder, KnownPages};
use vmsync::{PAGE_SIZE, RamBlock, RamLayout};

fuzz_target!(|bytes: &[u8]| {
    let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * PAGE_SIZE as u64 };
    let layout = RamLayout::new(vec![block("a", 30), block("b", 10)]).expect("a plain layout");
    let Ok(frame) = FrameDecoder::new().decode(bytes, &layout) else { return };
    let mut pages = vec![[0; PAGE_SIZE]; 40];
    for (addr, content) in frame.iter() {
        content.apply(&mut pages[layout.linear(addr).expect("the decoder checked it") as usize]);
    }
    let mut known = KnownPages::zero(&layout);
    let _ = known.accept(&frame);
});

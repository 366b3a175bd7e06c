//! How others code the same pages.

use vmsync::{PAGE_SIZE, Page};
use zstd::bulk::{Compressor, Decompressor};

use super::recording::{Recording, staged};
use super::{Measured, cpu_s};

const BLOCK_BYTES: usize = 256 << 10;

/// Codes all blocks of all counted epochs, into memory that is there already.
fn blocks(
    recording: &Recording,
    mut encode: impl FnMut(&[u8], &mut Vec<u8>) -> usize,
    mut decode: impl FnMut(&[u8], &mut [u8]) -> usize,
) -> Measured {
    let mut measured = Measured::NOTHING;
    // More than any of these coders makes of a block that does not shrink.
    let mut packed = Vec::with_capacity(2 * BLOCK_BYTES);
    let (mut decoded, mut buffer) = (vec![0; BLOCK_BYTES], Vec::new());
    for epoch in &recording.epochs[1..] {
        let pages = staged(epoch, &mut buffer);
        for block in pages.bytes().chunks(BLOCK_BYTES) {
            let mut len = 0;
            measured.encode_s += cpu_s(|| len = encode(block, &mut packed));
            measured.decode_s += cpu_s(|| assert_eq!(decode(&packed[..len], &mut decoded), block.len()));
            assert!(decoded[..block.len()] == *block);
            measured.raw_bytes += block.len() as u64;
            measured.packed_bytes += len as u64;
        }
        buffer = pages.into_parts().1;
    }
    measured
}

pub(super) fn zstd(recording: &Recording, level: i32) -> Measured {
    let mut compressor = Compressor::new(level).expect("memory for zstd");
    let mut decompressor = Decompressor::new().expect("memory for zstd");
    blocks(
        recording,
        |block, packed| compressor.compress_to_buffer(block, packed).expect("room for it"),
        |packed, out| decompressor.decompress_to_buffer(packed, out).expect("its own block"),
    )
}

pub(super) fn lz4(recording: &Recording) -> Measured {
    blocks(
        recording,
        |block, packed| {
            packed.resize(packed.capacity(), 0);
            lz4_flex::block::compress_into(block, packed).expect("room for it")
        },
        |packed, out| lz4_flex::block::decompress_into(packed, out).expect("its own block"),
    )
}

pub(super) fn memcpy(recording: &Recording) -> Measured {
    let (mut copy, mut buffer) = (vec![0; BLOCK_BYTES], Vec::new());
    let mut to = move |block: &[u8]| {
        copy[..block.len()].copy_from_slice(block);
        std::hint::black_box(&copy);
    };
    let mut measured = Measured::NOTHING;
    for epoch in &recording.epochs[1..] {
        let pages = staged(epoch, &mut buffer);
        let bytes = pages.bytes();
        measured.encode_s += cpu_s(|| bytes.chunks(BLOCK_BYTES).for_each(&mut to));
        measured.raw_bytes += bytes.len() as u64;
        measured.packed_bytes += bytes.len() as u64;
        buffer = pages.into_parts().1;
    }
    measured
}

/// QEMU's XBZRLE in kind: runs of equal and of new bytes in turn, each with a length in LEB128; a page that would not
/// shrink goes as it is. Its cache is ideal here: it holds all pages. 8 bytes a page for its header.
pub(super) fn xbzrle(recording: &Recording) -> Measured {
    let mut measured = Measured::NOTHING;
    let (mut cache, mut shadow, mut buffer) = (recording.memory(), recording.memory(), Vec::new());
    let (cache, shadow) = (cache.as_chunks_mut::<PAGE_SIZE>().0, shadow.as_chunks_mut::<PAGE_SIZE>().0);
    let (mut out, mut ends) = (Vec::new(), Vec::new());
    for (i, epoch) in recording.epochs.iter().enumerate() {
        out.clear();
        ends.clear();
        let pages = staged(epoch, &mut buffer);
        let index = |addr| recording.layout.linear(addr).expect("checked") as usize;
        let encode_s = cpu_s(|| {
            for (addr, page) in pages.iter() {
                xbzrle_page(&mut cache[index(addr)], page, &mut out);
                ends.push(out.len());
            }
        });
        let decode_s = cpu_s(|| {
            let mut start = 0;
            for (addr, end) in epoch.pages.addrs().iter().zip(&ends) {
                xbzrle_apply(&mut shadow[index(*addr)], &out[start..*end]);
                start = *end;
            }
        });
        buffer = pages.into_parts().1;
        assert!(epoch.pages.iter().all(|(addr, page)| shadow[index(addr)] == *page));
        if i > 0 {
            measured.encode_s += encode_s;
            measured.decode_s += decode_s;
            measured.raw_bytes += epoch.pages.bytes().len() as u64;
            measured.packed_bytes += (out.len() + 8 * epoch.pages.len()) as u64;
        }
    }
    measured
}

fn xbzrle_page(old: &mut Page, new: &Page, out: &mut Vec<u8>) {
    let start = out.len();
    let mut at = 0;
    while at < PAGE_SIZE {
        let equal = run(old, new, at, true);
        if at + equal == PAGE_SIZE {
            break;
        }
        let changed = run(old, new, at + equal, false);
        leb128(out, equal);
        leb128(out, changed);
        out.extend_from_slice(&new[at + equal..at + equal + changed]);
        at += equal + changed;
        if out.len() - start >= PAGE_SIZE {
            out.truncate(start);
            out.extend_from_slice(new);
            break;
        }
    }
    *old = *new;
}

/// Length of the run from `at` on: equal bytes, or different ones. Word by word where it can, as QEMU does.
fn run(old: &Page, new: &Page, at: usize, equal: bool) -> usize {
    let mut end = at;
    while end < PAGE_SIZE {
        if equal && end.is_multiple_of(8) && old[end..end + 8] == new[end..end + 8] {
            end += 8;
        } else if (old[end] == new[end]) == equal {
            end += 1;
        } else {
            break;
        }
    }
    end - at
}

fn xbzrle_apply(page: &mut Page, mut bytes: &[u8]) {
    if bytes.len() == PAGE_SIZE {
        page.copy_from_slice(bytes);
        return;
    }
    let mut at = 0;
    while !bytes.is_empty() {
        at += take_leb128(&mut bytes);
        let len = take_leb128(&mut bytes);
        page[at..at + len].copy_from_slice(&bytes[..len]);
        bytes = &bytes[len..];
        at += len;
    }
}

fn leb128(out: &mut Vec<u8>, value: usize) {
    if value < 0x80 {
        out.push(value as u8);
    } else {
        out.extend_from_slice(&[value as u8 | 0x80, (value >> 7) as u8]);
    }
}

fn take_leb128(bytes: &mut &[u8]) -> usize {
    let low = usize::from(bytes[0]);
    if low < 0x80 {
        *bytes = &bytes[1..];
        return low;
    }
    let value = low & 0x7f | usize::from(bytes[1]) << 7;
    *bytes = &bytes[2..];
    value
}

//! What coding epochs costs, ours and others' ways, on the same bytes:
//!
//! ```text
//! cargo run --release -p vmsync --example codec_bench [-- OPTIONS] [FILE ...]
//!   --mirror full|MIB   memory for previous contents; may be repeated
//!   --level N           zstd level of whole pages
//!   --only TEXT         of the made-up epochs those with TEXT in their names
//!   --ours              no others
//! ```
//! FILE is a capture as `vmsync::codec::capture` describes it. Without one, epochs are made up whose statistics are
//! those of real guests; they say what the code can do, not what a guest will see. The first epoch of each capture
//! fills the mirrors and is not counted. Speeds are bytes of dirty pages a second of this thread's CPU time.
#![allow(clippy::disallowed_types, clippy::disallowed_methods)] // a program, not a part of the crate

mod peers;
mod synth;

use std::fs::File;
use std::io::BufReader;
use std::process::ExitCode;

use nix::time::{ClockId, clock_gettime};
use vmsync::codec::capture::{CaptureReader, CapturedEpoch};
use vmsync::codec::{CodecStats, Encoder, FrameDecoder, KnownPages, MirrorBudget, PageContent};
use vmsync::hashes::HashSeed;
use vmsync::{PAGE_SIZE, Page, PageAddr, PageBatch, RamLayout};

/// Seconds of CPU time that each measurement is repeated for.
const AT_LEAST_SECONDS: f64 = 0.3;

pub struct Capture {
    pub name: String,
    pub layout: RamLayout,
    pub epochs: Vec<CapturedEpoch>,
}

/// What one coder made of a capture.
pub struct Measured {
    pub raw_bytes: u64,
    pub packed_bytes: u64,
    pub encode_seconds: f64,
    pub decode_seconds: f64,
}

impl Measured {
    fn print(&self, name: &str) {
        let gigabytes = self.raw_bytes as f64 / 1e9;
        let speed = |seconds: f64| if seconds > 0.0 { format!("{:.2}", gigabytes / seconds) } else { "-".into() };
        let ratio = self.raw_bytes as f64 / self.packed_bytes.max(1) as f64;
        let (encode, decode) = (speed(self.encode_seconds), speed(self.decode_seconds));
        println!("  {name:<34} {ratio:>8.2} {encode:>8} {decode:>8}");
    }
}

fn main() -> ExitCode {
    let (mut mirrors, mut level, mut files, mut only, mut ours_only) = (vec![], 1, vec![], String::new(), false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_default();
        match arg.as_str() {
            "--mirror" => match value().as_str() {
                "full" => mirrors.push(MirrorBudget::Full),
                mib => mirrors.push(MirrorBudget::Bytes(mib.parse::<u64>().unwrap_or(64) << 20)),
            },
            "--only" => only = value(),
            "--ours" => ours_only = true,
            "--level" => level = value().parse().unwrap_or(1),
            _ => files.push(arg),
        }
    }
    if mirrors.is_empty() {
        mirrors = vec![MirrorBudget::Full, MirrorBudget::Bytes(64 << 20), MirrorBudget::Bytes(16 << 20)];
    }
    if files.is_empty() {
        println!("no captures given: made-up epochs with the statistics of real guests");
        for capture in synth::all().filter(|c| only.is_empty() || c.name.contains(&only)) {
            bench(&capture, &mirrors, level, ours_only);
        }
    }
    for file in files {
        match load(&file) {
            Ok(capture) => bench(&capture, &mirrors, level, ours_only),
            Err(error) => {
                eprintln!("{file}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn load(file: &str) -> Result<Capture, Box<dyn std::error::Error>> {
    let mut reader = CaptureReader::new(BufReader::new(File::open(file)?))?;
    let mut epochs = Vec::new();
    while let Some(epoch) = reader.next_epoch()? {
        epochs.push(epoch);
    }
    if epochs.len() < 2 {
        return Err("a capture needs at least two epochs".into());
    }
    Ok(Capture { name: file.into(), layout: reader.layout().clone(), epochs })
}

fn bench(capture: &Capture, mirrors: &[MirrorBudget], level: i32, ours_only: bool) {
    let pages: usize = capture.epochs[1..].iter().map(|e| e.pages.len()).sum();
    let count = capture.epochs.len() - 1;
    println!("\n{}: {count} epochs of {} pages", capture.name, pages / count);
    println!("  {:<34} {:>8} {:>8} {:>8}", "coder", "ratio", "enc GB/s", "dec GB/s");
    for budget in mirrors {
        let name = match budget {
            MirrorBudget::Full => format!("ours, level {level}, full mirror"),
            MirrorBudget::Bytes(bytes) => format!("ours, level {level}, mirror {} MiB", bytes >> 20),
        };
        ours(capture, *budget, level).print(&name);
    }
    if ours_only {
        return;
    }
    if level > 0 {
        ours(capture, MirrorBudget::Full, -3).print("ours, level -3, full mirror");
    }
    for level in [-5, 1, 3] {
        peers::zstd_blocks(capture, level).print(&format!("zstd {level}, blocks of 256 KiB"));
    }
    peers::lz4(capture).print("LZ4, blocks of 256 KiB");
    peers::xbzrle(capture).print("XBZRLE-like, all pages cached");
    peers::memcpy(capture).print("memcpy of the pages");
}

fn ours(capture: &Capture, budget: MirrorBudget, level: i32) -> Measured {
    let mut measured = Measured { raw_bytes: 0, packed_bytes: 0, encode_seconds: 0.0, decode_seconds: 0.0 };
    let mut stats = CodecStats::default();
    while measured.encode_seconds < AT_LEAST_SECONDS {
        let mut encoder = Encoder::new(&capture.layout, budget, HashSeed::new(7), level);
        let mut shadow = Shadow::new(&capture.layout);
        let mut buffer = Vec::new();
        for (i, epoch) in capture.epochs.iter().enumerate() {
            let mut frames = Vec::new();
            let pages = staged(epoch, &mut buffer);
            let encode_seconds = cpu_seconds(|| {
                encoder.begin_cut();
                for (addr, page) in pages.iter() {
                    encoder.page(addr, page);
                }
                frames = encoder.finish();
            });
            let decode_seconds = cpu_seconds(|| shadow.receive(&frames));
            buffer = pages.into_parts().1;
            if i > 0 {
                measured.encode_seconds += encode_seconds;
                measured.decode_seconds += decode_seconds;
                measured.raw_bytes += epoch.pages.bytes().len() as u64;
                measured.packed_bytes += frames.iter().map(|f| f.len() as u64).sum::<u64>();
            }
        }
        shadow.check(capture);
        stats = encoder.stats();
    }
    let all = stats.pages_same + stats.pages_filled + stats.pages_patched + stats.pages_whole;
    let share = |pages: u64| format!("{:.1} %", pages as f64 * 100.0 / all.max(1) as f64);
    let (same, filled) = (share(stats.pages_same), share(stats.pages_filled));
    let (patched, whole) = (share(stats.pages_patched), share(stats.pages_whole));
    println!(
        "  of all pages, the first epoch's too: {same} as before, {filled} one word, {patched} patched, {whole} whole"
    );
    measured
}

/// The epoch's pages as a cut leaves them: just copied, into the same buffer each time.
pub fn staged(epoch: &CapturedEpoch, buffer: &mut Vec<u8>) -> PageBatch {
    buffer.clear();
    buffer.extend_from_slice(epoch.pages.bytes());
    PageBatch::from_parts(epoch.pages.addrs().to_vec(), std::mem::take(buffer)).expect("as many bytes as it had")
}

/// The memory of a shadow: frames are checked, decoded and applied as an agent does it.
struct Shadow {
    layout: RamLayout,
    pages: Vec<Page>,
    known: KnownPages,
    decoder: FrameDecoder,
}

impl Shadow {
    fn new(layout: &RamLayout) -> Self {
        let pages = vec![[0; PAGE_SIZE]; layout.total_pages() as usize];
        let known = KnownPages::zero(layout);
        Self { layout: layout.clone(), pages, known, decoder: FrameDecoder::new() }
    }

    fn receive(&mut self, frames: &[Vec<u8>]) {
        for bytes in frames {
            let frame = self.decoder.decode(bytes, &self.layout).expect("own frame");
            self.known.accept(&frame).expect("in step");
            for (addr, content) in frame.iter() {
                let page = &mut self.pages[self.layout.linear(addr).expect("checked") as usize];
                match content {
                    PageContent::Data(data) => *page = *data,
                    other => other.apply(page),
                }
            }
        }
    }

    /// A figure of a coder that loses something is worth nothing.
    fn check(&self, capture: &Capture) {
        let last = latest(capture, capture.epochs.len());
        for (addr, page) in last {
            assert!(self.pages[self.layout.linear(addr).expect("checked") as usize] == *page, "{addr} differs");
        }
    }
}

/// Contents of all pages after the first `count` epochs.
fn latest(capture: &Capture, count: usize) -> std::collections::BTreeMap<PageAddr, &Page> {
    capture.epochs[..count].iter().flat_map(|epoch| epoch.pages.iter()).collect()
}

/// CPU time that this thread needs for it.
pub fn cpu_seconds(work: impl FnOnce()) -> f64 {
    let now = || {
        let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every Linux has this clock");
        time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9
    };
    let began = now();
    work();
    now() - began
}

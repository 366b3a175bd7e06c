//! What coding the epochs of real guests costs, in bytes and in processor time: ours and others' ways, on the same
//! bytes in one run, and QEMU's own migration of the same guests.
//!
//! Guests work for a minute, so that what is recorded is their work and not their start. Then they run under protection at
//! 1 s while the agent records their epochs (`vmsync::codec::capture`); then QEMU migrates
//! them into nothing ([`multifd`]); then the lab goes and what was recorded is coded again and again. Speeds are bytes of
//! dirty pages a second of one thread's processor time: the best of several passes, because what else runs on the machine
//! only ever adds to it.

mod multifd;
mod ours;
mod peers;
mod recording;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vmsync::codec::MirrorBudget;

use super::workloads::{self, CASES, Case};
use super::{Bench, Row};
use crate::capture::priority::thread_cpu;
use crate::lab::error::{LabError, Result};
use crate::lab::image;
use multifd::Migrated;
use recording::Recording;

const INTERVAL: Duration = Duration::from_secs(1);
/// How long a guest works before it is recorded.
const WARM_UP: Duration = Duration::from_secs(60);
const RECORD_FOR: Duration = Duration::from_secs(30);
/// Previous contents that a small agent keeps.
const SMALL_MIRROR: MirrorBudget = MirrorBudget::Bytes(64 << 20);
/// zstd's level for whole pages, as an agent begins with.
const LEVEL: i32 = -1;
/// Each measurement is made so often; the best counts.
const PASSES: usize = 5;

/// What a guest is held to: encode GB/s, ratio, times multifd's RAM a second of processor time.
struct Targets {
    encode: f64,
    ratio: f64,
    times_multifd: Option<f64>,
}

fn targets(name: &str) -> Option<Targets> {
    let of = |encode, ratio, times_multifd| Some(Targets { encode, ratio, times_multifd });
    match name {
        "redis" => of(5.0, 50.0, Some(8.0)),
        "postgres" => of(3.0, 30.0, Some(3.0)),
        "gcc" => of(1.5, 10.0, Some(2.0)),
        "random" => of(3.0, 0.99, None),
        _ => None,
    }
}

/// What one coder made of a recording.
#[derive(Debug, Clone, Copy)]
struct Measured {
    raw_bytes: u64,
    packed_bytes: u64,
    encode_s: f64,
    decode_s: f64,
}

impl Measured {
    const NOTHING: Self = Self { raw_bytes: 0, packed_bytes: 0, encode_s: 0.0, decode_s: 0.0 };

    fn ratio(&self) -> f64 {
        self.raw_bytes as f64 / self.packed_bytes.max(1) as f64
    }

    fn encode_gb_s(&self) -> f64 {
        self.raw_bytes as f64 / 1e9 / self.encode_s.max(1e-9)
    }

    fn decode_gb_s(&self) -> f64 {
        self.raw_bytes as f64 / 1e9 / self.decode_s.max(1e-9)
    }
}

/// The best of several passes over the same epochs.
fn best_of(bench: &Bench, mut pass: impl FnMut() -> Measured) -> Result<Measured> {
    let mut best = pass();
    for _ in 1..PASSES {
        bench.check_interrupt()?;
        let next = pass();
        best.encode_s = best.encode_s.min(next.encode_s);
        best.decode_s = best.decode_s.min(next.decode_s);
    }
    Ok(best)
}

/// Records the guests with these names, or all, and measures; or measures what was recorded before.
pub(super) fn run(bench: &Bench, names: &[String], replay: &[PathBuf]) -> Result<()> {
    if !replay.is_empty() {
        return replay.iter().try_for_each(|file| {
            let stem = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let name = stem.split('-').next().unwrap_or_default().to_owned();
            measure(bench, &name, &Recording::load(file)?, None)
        });
    }
    let cases = workloads::cases(names)?;
    // All downloads first: a benchmark that ends for lack of a package shall not have run for minutes.
    for case in &cases {
        image::ensure(case.workload()?.software(), false, &|line| eprintln!("bench: {line}"))?;
        bench.check_interrupt()?;
    }
    debug_assert!(CASES.iter().all(|case| case.name == "idle" || targets(case.name).is_some()));
    cases.iter().try_for_each(|case| {
        let folder = Folder(std::env::temp_dir().join(format!("virt-shadow-codec-{}", std::process::id())));
        let migrated = record(bench, case, &folder.0)?;
        let recording = Recording::load(&newest(&folder.0)?)?;
        drop(folder);
        measure(bench, case.name, &recording, Some(migrated))
    })
}

/// Recordings hold the memory of guests: they go when they have been read.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn newest(folder: &Path) -> Result<PathBuf> {
    let files = std::fs::read_dir(folder).map_err(LabError::io("read", folder))?;
    let path = files.flatten().map(|entry| entry.path()).max();
    path.ok_or_else(|| LabError::Product("the agent recorded nothing".into()))
}

fn record(bench: &Bench, case: &Case, folder: &Path) -> Result<Migrated> {
    let recording = Bench {
        json: bench.json,
        interrupt: Arc::clone(&bench.interrupt),
        lab_name: bench.lab_name.clone(),
        record_dir: Some(folder.to_owned()),
    };
    let stage = workloads::stage(&recording, case, workloads::SHADOWS)?;
    bench.say(&format!("{}: works for {} s before it is recorded", case.name, WARM_UP.as_secs()))?;
    bench.sleep(WARM_UP)?;
    workloads::record_at(&recording, &stage, case, INTERVAL, RECORD_FOR)?;
    multifd::migrate(bench, &stage.lab, workloads::PRIMARY, case.name)
}

fn measure(bench: &Bench, name: &str, recording: &Recording, migrated: Option<Migrated>) -> Result<()> {
    bench.say(&format!("{name}: {} epochs of {} pages are coded", recording.counted(), recording.pages_an_epoch()))?;
    let row = |what: &str, value: f64, unit| Row::new(format!("{name}: {what}"), value, unit);
    let full = best_of(bench, || ours::pass(recording, MirrorBudget::Full, LEVEL))?;
    let small = best_of(bench, || ours::pass(recording, SMALL_MIRROR, LEVEL))?;
    let zstd = best_of(bench, || peers::zstd(recording, 1))?;
    let wanted = targets(name);
    let held = |row: Row, target: Option<f64>| target.map_or(row.clone(), |target| row.at_least(target));
    let share = |part: f64| wanted.as_ref().map(|wanted| (wanted.ratio * part * 1000.0).round() / 1000.0);

    let encode = row("encode", full.encode_gb_s(), "GB/s").beside("zstd 1", zstd.encode_gb_s());
    bench.print(&held(encode, wanted.as_ref().map(|w| w.encode)));
    bench.print(&held(row("ratio", full.ratio(), "x").beside("zstd 1", zstd.ratio()), share(1.0)));
    let decode = row("decode", full.decode_gb_s(), "GB/s").beside("zstd 1", zstd.decode_gb_s());
    bench.print(&decode.at_least((full.encode_gb_s() * 200.0).round() / 100.0));
    let ratio = row("ratio, mirror of 64 MB", small.ratio(), "x").beside("GB/s encode", small.encode_gb_s());
    bench.print(&held(ratio, share(0.5)));

    for level in [-5, 3] {
        let peer = best_of(bench, || peers::zstd(recording, level))?;
        bench.print(
            &row(&format!("peer zstd {level}, encode"), peer.encode_gb_s(), "GB/s").beside("ratio", peer.ratio()),
        );
    }
    type Peer = fn(&Recording) -> Measured;
    let coders: [(&str, Peer); 2] = [("LZ4", peers::lz4), ("XBZRLE-like, all pages cached", peers::xbzrle)];
    for (peer, pass) in coders {
        let peer_of = best_of(bench, || pass(recording))?;
        bench.print(&row(&format!("peer {peer}"), peer_of.encode_gb_s(), "GB/s").beside("ratio", peer_of.ratio()));
        bench.print(&row(&format!("peer {peer}, decode"), peer_of.decode_gb_s(), "GB/s"));
    }
    let copy = best_of(bench, || peers::memcpy(recording))?;
    bench.print(&row("limit: memcpy of the pages", copy.encode_gb_s(), "GB/s"));
    let Some(Migrated { gb_s, ratio }) = migrated else { return Ok(()) };
    bench.print(&row("peer multifd, zstd 1, all memory", gb_s, "GB/s").beside("ratio", ratio));
    let times = row("encode beside multifd", full.encode_gb_s() / gb_s.max(1e-9), "times").beside("GB/s", gb_s);
    bench.print(&held(times, wanted.and_then(|wanted| wanted.times_multifd)));
    Ok(())
}

/// Processor time that this thread needs for it.
fn cpu_s(work: impl FnOnce()) -> f64 {
    let began = thread_cpu();
    work();
    (thread_cpu() - began).as_secs_f64()
}

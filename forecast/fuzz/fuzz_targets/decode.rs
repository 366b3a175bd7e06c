//! Stored forecasters and series: any bytes end in a refusal or in something that works. Checksums are made right, as a
//! fuzzer would never guess them.
#![no_main]

use forecast::Hybrid;
use forecast::series::Series;
use libfuzzer_sys::fuzz_target;
use xxhash_rust::xxh3::xxh3_64;

/// `body` in an envelope of the given magic.
fn envelope(magic: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let mut out = magic.to_vec();
    out.extend(1u16.to_le_bytes());
    out.extend((body.len() as u64).to_le_bytes());
    out.extend(body);
    out.extend(xxh3_64(&out).to_le_bytes());
    out
}

fuzz_target!(|data: &[u8]| {
    let _ = Hybrid::load(data);
    let _ = Series::decode(&envelope(b"VSFS", data));
    // The first two bytes say where the history ends and the models begin.
    let Some((cut, rest)) = data.split_first_chunk::<2>() else { return };
    let (history, models) = rest.split_at(usize::from(u16::from_le_bytes(*cut)).min(rest.len()));
    let mut body = Vec::new();
    for part in [envelope(b"VSFH", history), envelope(b"VSFM", models)] {
        body.extend((part.len() as u32).to_le_bytes());
        body.extend(part);
    }
    if let Ok(mut loaded) = Hybrid::load(&envelope(b"VSFC", &body)) {
        loaded.hybrid.push(Some(1.0));
        let forecast = loaded.hybrid.forecast();
        assert!(forecast.steps().iter().all(|q| q.is_sorted() && q.iter().all(|v| v.is_finite())));
    }
});

//! What the fuzz target feeds and `tests/fuzz_corpus.rs` replays: any bytes, read as each kind of stored thing with the
//! checksums made right, which a fuzzer would never guess, end in a refusal or in something that works.

use forecast::Hybrid;
use forecast::derived::counts::Intermittent;
use forecast::derived::joint::Joint;
use forecast::series::Series;
use xxhash_rust::xxh3::xxh3_64;

/// `body` in an envelope of the given magic and format.
pub fn envelope(magic: &[u8; 4], format: u16, body: &[u8]) -> Vec<u8> {
    let mut out = magic.to_vec();
    out.extend(format.to_le_bytes());
    out.extend((body.len() as u64).to_le_bytes());
    out.extend(body);
    out.extend(xxh3_64(&out).to_le_bytes());
    out
}

/// How many of the decoders took it. The first byte chooses what it is read as; of a forecaster the next three say how
/// long its history is.
pub fn check(data: &[u8]) -> usize {
    let Some((&kind, body)) = data.split_first() else { return 0 };
    match kind % 5 {
        0 => usize::from(Hybrid::load(body).is_ok()),
        1 => {
            let Ok(series) = Series::decode(&envelope(b"VSFS", 1, body)) else { return 0 };
            let stored = series.encode();
            assert_eq!(Series::decode(&stored).map(|s| s.encode()), Ok(stored));
            let _ = series.grid(0, 0, 60_000);
            1
        }
        2 => {
            let Ok(mut counts) = Intermittent::decode(&envelope(b"VSFI", 1, body)) else { return 0 };
            counts.push(3, 2.0);
            let demand = counts.forecast(4, 3);
            assert!(demand.mean().is_finite() && demand.enough(0.5) <= demand.enough(0.99));
            1
        }
        3 => {
            let Ok(mut joint) = Joint::decode(&envelope(b"VSFJ", 1, body)) else { return 0 };
            let normal = [-1.645, -1.282, -0.674, 0.0, 0.674, 1.282, 1.645];
            joint.observe(&vec![normal; joint.variables()], &vec![1.0; joint.variables()]);
            let forecasts = vec![forecast::Forecast::new(vec![normal]); joint.variables()];
            assert!(joint.scenarios(&forecasts, 1, 4, 1).iter().flatten().all(|v| v.is_finite()));
            1
        }
        _ => forecaster(body),
    }
}

fn forecaster(body: &[u8]) -> usize {
    let Some((cut, rest)) = body.split_first_chunk::<3>() else { return 0 };
    let cut = u32::from_le_bytes([cut[0], cut[1], cut[2], 0]) as usize;
    let (history, models) = rest.split_at(cut.min(rest.len()));
    let mut whole = Vec::new();
    for part in [envelope(b"VSFH", 1, history), envelope(b"VSFM", 2, models)] {
        whole.extend((part.len() as u32).to_le_bytes());
        whole.extend(part);
    }
    let Ok(mut loaded) = Hybrid::load(&envelope(b"VSFC", 1, &whole)) else { return 0 };
    for sample in [Some(1.0), None, Some(-3.0)] {
        loaded.hybrid.push(sample);
        let forecast = loaded.hybrid.forecast();
        assert!(forecast.steps().iter().all(|q| q.is_sorted() && q.iter().all(|v| v.is_finite())));
    }
    1
}

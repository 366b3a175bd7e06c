//! What must hold for any series: quantiles in order, nothing seen ahead, survival of whatever machines send, the same
//! output for the same input, and stored models that load exactly or are refused.

use forecast::events::Event;
use forecast::hybrid::Progress;
use forecast::random::Random;
use forecast::{Forecast, Hybrid, Shape};
use proptest::prelude::*;

const HORIZON: usize = 4;
const SEASON: usize = 24;

fn shape() -> Shape {
    Shape::new(3600, SEASON, HORIZON).expect("a valid shape")
}

fn assert_ordered(forecast: &Forecast, what: &str) {
    assert_eq!(forecast.horizon(), HORIZON);
    for (step, q) in forecast.steps().iter().enumerate() {
        assert!(q.iter().all(|v| v.is_finite()), "{what}, step {}: {q:?}", step + 1);
        assert!(q.is_sorted(), "{what}, step {}: {q:?}", step + 1);
    }
}

/// A series made of what machines send: waves, constants, steps, bursts, gaps, nonsense, huge values.
fn hostile(kind: u8, i: usize, random: &mut Random) -> Option<f64> {
    let wave = 50.0 + 20.0 * (i as f64 / SEASON as f64 * std::f64::consts::TAU).sin() + random.normal();
    match kind {
        0 => Some(wave),
        1 => Some(7.0),
        2 => Some(if i < 350 { 1.0 } else { 1000.0 }),
        3 => Some(if random.unit() < 0.02 { 1e5 } else { 0.0 }),
        4 => (random.unit() > 0.3).then_some(wave),
        5 => Some(if random.unit() < 0.2 { f64::NAN } else { wave }),
        6 => Some(wave * 1e300),
        7 => Some(if random.unit() < 0.1 { f64::INFINITY } else { -wave * 1e-300 }),
        8 => None,
        9 => Some(if i.is_multiple_of(2) { f64::MAX } else { f64::MIN }),
        10 => Some(1e15 + (i % 3) as f64),
        _ => Some((random.bits() % 3) as f64),
    }
}

#[test]
fn whatever_machines_send_forecasts_stay_finite_and_in_order() {
    for kind in 0..12 {
        let mut random = Random::new(u64::from(kind));
        let mut hybrid = Hybrid::new(shape());
        for i in 0..420 {
            hybrid.push(hostile(kind, i, &mut random));
            if i % 7 == 0 || i > 400 {
                assert_ordered(&hybrid.forecast(), &format!("kind {kind}, sample {i}"));
            }
            hybrid.learn();
        }
        assert!(kind == 8 || hybrid.status().fits > 0, "kind {kind} never learnt");
    }
}

/// Pushes the same past and then other futures; the forecast in between must be the same, bit for bit.
#[test]
fn the_future_changes_nothing_and_the_same_input_gives_the_same_output() {
    let run = |future: f64| {
        let mut random = Random::new(3);
        let mut hybrid = Hybrid::new(shape());
        hybrid.preload((0..300).map(|i| hostile(0, i, &mut random)));
        hybrid.learn();
        for i in 300..330 {
            hybrid.push(hostile(0, i, &mut random));
        }
        let now = hybrid.forecast();
        for _ in 0..10 {
            hybrid.push(Some(future));
        }
        (now, hybrid.forecast())
    };
    let (calm, wild) = (run(50.0), run(-1e9));
    assert_eq!(calm.0, wild.0);
    assert_ne!(calm.1, wild.1);
    assert_eq!(run(50.0), calm);
}

fn learnt() -> Hybrid {
    let mut random = Random::new(5);
    let mut hybrid = Hybrid::new(shape());
    hybrid.schedule(Event { start: 290, length: 5, kind: 3, size: Some(2.0) });
    hybrid.preload((0..300).map(|i| hostile(4, i, &mut random)));
    hybrid.learn();
    (300..320).for_each(|i| hybrid.push(hostile(4, i, &mut random)));
    hybrid
}

#[test]
fn a_saved_forecaster_goes_on_as_if_it_had_not_been_saved() {
    let mut original = learnt();
    let saved = original.save();
    let loaded = Hybrid::load(&saved).expect("what was saved loads");
    assert_eq!(loaded.left_out, None);
    let mut read = loaded.hybrid;
    assert_eq!(read.save(), saved);
    let mut random = Random::new(6);
    for i in 320..400 {
        let sample = hostile(0, i, &mut random);
        original.push(sample);
        read.push(sample);
        assert_eq!(original.forecast(), read.forecast(), "sample {i}");
        original.learn();
        read.learn();
    }
    assert!(original.status().fits > 1);
}

/// Bytes of the models' envelope inside a saved forecaster: after the outer header and the history's blob.
fn models_at(saved: &[u8]) -> usize {
    const HEADER: usize = 14;
    let history = u32::from_le_bytes([saved[HEADER], saved[HEADER + 1], saved[HEADER + 2], saved[HEADER + 3]]) as usize;
    HEADER + 4 + history + 4
}

/// Makes the outer and the models' checksums right again, so that what is behind them is tested.
fn reseal(saved: &mut [u8], models: usize) {
    let inner_end = saved.len() - 8 - 8;
    let inner = xxhash_rust::xxh3::xxh3_64(&saved[models..inner_end]);
    saved[inner_end..inner_end + 8].copy_from_slice(&inner.to_le_bytes());
    let outer_end = saved.len() - 8;
    let outer = xxhash_rust::xxh3::xxh3_64(&saved[..outer_end]);
    saved[outer_end..].copy_from_slice(&outer.to_le_bytes());
}

#[test]
fn models_of_another_format_are_left_out_and_learnt_anew_from_the_samples() {
    let original = learnt();
    for format in [0u16, 1, 3, u16::MAX] {
        let mut saved = original.save();
        let models = models_at(&saved);
        saved[models + 4..models + 6].copy_from_slice(&format.to_le_bytes());
        reseal(&mut saved, models);
        let mut loaded = Hybrid::load(&saved).expect("the samples load");
        let said = loaded.left_out.map(|e| e.to_string()).unwrap_or_default();
        assert!(said.contains(&format!("format {format}")) && said.contains("learn it anew"), "{said}");
        assert_eq!(loaded.hybrid.history().values(), original.history().values());
        assert_eq!(loaded.hybrid.learn_slice(), Progress::Working);
        loaded.hybrid.learn();
        assert_ordered(&loaded.hybrid.forecast(), "learnt anew");
    }
}

#[test]
fn a_forecaster_of_another_format_is_refused_by_name() {
    let mut saved = learnt().save();
    saved[4..6].copy_from_slice(&9u16.to_le_bytes());
    let refusal = Hybrid::load(&saved).map(|_| ()).expect_err("a newer format");
    assert!(refusal.to_string().contains("format 9, this version reads 1 to 1"), "{refusal}");
}

/// Random damage behind right checksums: a load ends in a refusal or in a forecaster that works.
#[test]
fn damaged_models_are_refused_or_harmless() {
    let saved = learnt().save();
    let models = models_at(&saved);
    let mut random = Random::new(12);
    let mut refused = 0;
    for _ in 0..300 {
        let mut bad = saved.clone();
        for _ in 0..1 + random.bits() % 4 {
            let at = models + 14 + (random.bits() as usize) % (bad.len() - models - 14 - 16);
            bad[at] = random.bits() as u8;
        }
        reseal(&mut bad, models);
        match Hybrid::load(&bad) {
            Err(_) => refused += 1,
            Ok(mut loaded) => {
                loaded.hybrid.push(Some(5.0));
                assert_ordered(&loaded.hybrid.forecast(), "damaged");
            }
        }
    }
    assert!(refused > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn decoders_survive_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Hybrid::load(&bytes).is_err());
        prop_assert!(forecast::series::Series::decode(&bytes).is_err());
    }

    #[test]
    fn quantile_and_probability_are_inverse(mut values in proptest::array::uniform7(-1e6f64..1e6), level in 0.01f64..0.99) {
        values.sort_by(f64::total_cmp);
        let spread = values[6] - values[0];
        prop_assume!(values.windows(2).all(|w| w[1] - w[0] > spread * 1e-6));
        let forecast = Forecast::new(vec![values]);
        let value = forecast.at(1, level).expect("within the horizon");
        let above = forecast.exceedance(1, value).expect("within the horizon");
        prop_assert!((1.0 - above - level).abs() < 1e-6, "{level} {above}");
    }

    #[test]
    fn cold_forecasts_of_any_samples_are_in_order(samples in proptest::collection::vec(any::<f64>(), 0..40)) {
        let mut hybrid = Hybrid::new(shape());
        samples.iter().for_each(|&s| hybrid.push(Some(s)));
        assert_ordered(&hybrid.forecast(), "cold");
    }
}

//! What the fuzzer of `forecast/fuzz` found interesting, and what it started from, replayed. One line of hexadecimal
//! digits an input.

#[path = "../fuzz/check.rs"]
mod check;

fn unhex(line: &str) -> Vec<u8> {
    let digits = line.as_bytes().chunks_exact(2);
    digits.map(|two| std::str::from_utf8(two).ok().and_then(|t| u8::from_str_radix(t, 16).ok()).expect("hex")).collect()
}

#[test]
fn stored_things_are_taken_or_refused() {
    let inputs: Vec<Vec<u8>> = include_str!("../../fixtures/forecast/fuzz-decode.hex").lines().map(unhex).collect();
    let taken: usize = inputs.iter().map(|bytes| check::check(bytes)).sum();
    assert!(inputs.len() >= 50 && taken >= 10 && taken < inputs.len(), "{taken} of {} taken", inputs.len());
}

/// The models' format was 1 until smoothing counted outliers.
#[test]
fn a_forecaster_with_models_of_an_older_format_loads_its_samples_and_learns_anew() {
    let mut loaded = forecast::Hybrid::load(include_bytes!("../../fixtures/forecast/forecaster-models-1.bin"))
        .expect("samples of any format that was ever written load");
    let said = loaded.left_out.as_ref().map(ToString::to_string).unwrap_or_default();
    assert!(said.contains("format 1, this version reads 2 to 2"), "{said}");
    assert_eq!(loaded.hybrid.history().seen(), 260);
    assert!(loaded.hybrid.panel().is_none() && loaded.hybrid.wants_learning());
    loaded.hybrid.learn();
    let next = loaded.hybrid.forecast().at(1, 0.5).expect("a step ahead");
    assert!((next - 5.0).abs() < 1.0, "{next}");
}

//! A plot for the terminal: samples, and an interval where there is a forecast.

const ROWS: usize = 14;

/// `samples` as `*`; `bands[k]` = (low, middle, high) of sample `k`, drawn as `:` and `-` behind it.
pub fn plot(title: &str, samples: &[f64], bands: &[Option<(f64, f64, f64)>]) -> String {
    let ends = bands.iter().flatten().flat_map(|b| [b.0, b.2]).chain(samples.iter().copied());
    let (low, high) = ends.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let span = if high > low { high - low } else { 1.0 };
    let row = |v: f64| ROWS - 1 - (((v - low) / span * (ROWS - 1) as f64).round() as usize).min(ROWS - 1);
    let mut field = vec![vec![' '; samples.len()]; ROWS];
    for (k, sample) in samples.iter().enumerate() {
        if let Some(Some((low, middle, high))) = bands.get(k) {
            field.iter_mut().take(row(*low) + 1).skip(row(*high)).for_each(|line| line[k] = ':');
            field[row(*middle)][k] = '-';
        }
        field[row(*sample)][k] = '*';
    }
    let mut out = format!("{title}\n");
    for (at, line) in field.into_iter().enumerate() {
        let mark = if at == 0 {
            high
        } else if at == ROWS - 1 {
            low
        } else {
            f64::NAN
        };
        let mark = if mark.is_nan() { String::new() } else { format!("{mark:.4}") };
        out.push_str(&format!("{mark:>14} |{}\n", line.into_iter().collect::<String>()));
    }
    out
}

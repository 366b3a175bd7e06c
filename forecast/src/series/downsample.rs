//! Coarser samples that keep what matters: mean, maximum and 95th percentile.

use crate::quantiles::quantile_of_sorted;

/// What is kept of several samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bucket {
    pub mean: f64,
    pub max: f64,
    pub p95: f64,
    /// Samples that were there.
    pub count: u32,
}

/// Every `every` samples as one bucket, `None` where all are missing; the last may be of fewer.
pub fn downsample(samples: &[Option<f64>], every: usize) -> Vec<Option<Bucket>> {
    samples
        .chunks(every.max(1))
        .map(|part| {
            let mut known: Vec<f64> = part.iter().flatten().copied().filter(|v| v.is_finite()).collect();
            known.sort_unstable_by(f64::total_cmp);
            let max = *known.last()?;
            let mean = known.iter().map(|v| v / known.len() as f64).sum();
            Some(Bucket { mean, max, p95: quantile_of_sorted(&known, 0.95), count: known.len() as u32 })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_survives_in_the_maximum() {
        let mut samples: Vec<Option<f64>> = (0..100).map(|i| Some(f64::from(i % 2))).collect();
        samples[50] = Some(90.0);
        samples.extend([None, None]);
        let buckets = downsample(&samples, 100);
        assert_eq!(buckets.len(), 2);
        assert_eq!(buckets[1], None);
        assert!(
            buckets[0].is_some_and(|b| b.max == 90.0 && b.p95 == 1.0 && (b.mean - 1.4).abs() < 1e-9 && b.count == 100)
        );
    }
}

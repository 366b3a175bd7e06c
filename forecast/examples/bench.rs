//! What it costs: learning, a forecast, an update, memory; and whether two cores keep up with 1,000 series a minute.
//!
//!   bench [--series 1000] [--minutes 20] [--threads 2]

// An example acts: it reads the clock, which the crate itself may not.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod support;

use forecast::random::Random;
use forecast::{Hybrid, Shape};
use support::{Failure, Options, cpu_s, in_parallel};

/// A daily load with noise and bursts.
fn sample(index: usize, season: usize, random: &mut Random) -> f64 {
    let day = (index as f64 / season as f64 * std::f64::consts::TAU).sin();
    let burst = if random.unit() < 0.01 { 40.0 * random.unit() } else { 0.0 };
    40.0 + 25.0 * day + 4.0 * random.normal() + burst
}

fn main() -> Result<(), Failure> {
    let options = Options::read()?;
    let mut random = Random::new(1);

    let mut hybrid = Hybrid::new(Shape::new(300, 288, 12)?);
    hybrid.preload((0..14 * 288).map(|i| Some(sample(i, 288, &mut random))));
    let start = cpu_s();
    let (mut slices, mut longest) = (0u32, 0.0f64);
    while hybrid.wants_learning() {
        let before = cpu_s();
        hybrid.learn_slice();
        longest = longest.max(cpu_s() - before);
        slices += 1;
    }
    let learnt = cpu_s() - start;
    println!(
        "first learning, 14 days of 5 minutes (two passes): {learnt:.2} s CPU in {slices} slices, longest {:.1} ms",
        longest * 1e3
    );

    let start = cpu_s();
    const FORECASTS: u32 = 2000;
    let mut checked = 0.0;
    for _ in 0..FORECASTS {
        checked += hybrid.forecast().at(1, 0.5).unwrap_or(f64::NAN);
    }
    println!(
        "forecast, 12 steps x 7 quantiles: {:.0} us (of {:.1})",
        (cpu_s() - start) / f64::from(FORECASTS) * 1e6,
        checked / f64::from(FORECASTS)
    );

    let start = cpu_s();
    const UPDATES: u32 = 280;
    for i in 0..UPDATES {
        hybrid.push(Some(sample(14 * 288 + i as usize, 288, &mut random)));
    }
    println!("online update: {:.0} us a sample", (cpu_s() - start) / f64::from(UPDATES) * 1e6);
    let saved = hybrid.save();
    println!("memory: {} kB a series; saved {} kB", hybrid.status().bytes / 1000, saved.len() / 1000);

    let mut hybrid = Hybrid::new(Shape::new(60, 1440, 12)?);
    hybrid.preload((0..5 * 1440).map(|i| Some(sample(i, 1440, &mut random))));
    let start = cpu_s();
    hybrid.learn();
    let first = cpu_s() - start;
    for i in 5 * 1440..6 * 1440 {
        hybrid.push(Some(sample(i, 1440, &mut random)));
    }
    let start = cpu_s();
    hybrid.learn();
    let again = cpu_s() - start;
    println!(
        "5 days of 1 minute: first learning {first:.2} s, again after a day {again:.2} s; memory {} kB",
        hybrid.status().bytes / 1000
    );

    let (series, minutes, threads) = (
        options.number("--series", 1000usize)?,
        options.number("--minutes", 20usize)?,
        options.number("--threads", 2usize)?,
    );
    let shares: Vec<usize> = (0..threads).map(|t| series / threads + usize::from(t < series % threads)).collect();
    let start = std::time::Instant::now();
    let spent = in_parallel(&shares, threads, |&share| {
        // All start as one that has learnt; each then lives its own life.
        let mut all: Vec<Hybrid> = vec![hybrid.clone(); share];
        let mut random = Random::new(share as u64);
        let begin = cpu_s();
        for minute in 0..minutes {
            for one in &mut all {
                one.push(Some(sample(6 * 1440 + minute, 1440, &mut random)));
                one.forecast();
            }
        }
        Ok(cpu_s() - begin)
    })?;
    let a_minute = spent.iter().sum::<f64>() / minutes as f64;
    let learning = series as f64 * again / 1440.0;
    println!(
        "{series} series of 1 minute, update and forecast each: {a_minute:.2} s CPU a minute; learning once a day each: \
         {learning:.2} s a minute; together {:.1} % of {threads} cores (wall {:.1} s for {minutes} minutes with copying)",
        (a_minute + learning) / 60.0 / threads as f64 * 100.0,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

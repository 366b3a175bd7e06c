//! Writes inputs to start from, one a file: what the crate itself stores, and every prefix length of interest.
//!
//!   seeds DIR

use std::path::Path;

use forecast::derived::counts::Intermittent;
use forecast::derived::joint::Joint;
use forecast::events::Event;
use forecast::series::Series;
use forecast::{Hybrid, Shape};

/// Envelope: 14 bytes before the payload, 8 after.
fn payload(sealed: &[u8]) -> &[u8] {
    &sealed[14..sealed.len() - 8]
}

/// A saved forecaster as the target reads it.
fn forecaster(hybrid: &Hybrid) -> Vec<u8> {
    let saved = hybrid.save();
    let body = payload(&saved);
    let long = |at: usize| u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]) as usize;
    let history = payload(&body[4..4 + long(0)]);
    let models = payload(&body[8 + long(0)..]);
    let mut out = vec![4];
    out.extend(&(history.len() as u32).to_le_bytes()[..3]);
    out.extend(history);
    out.extend(models);
    out
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("give a folder")?;
    let mut series = Series::new(2, 8);
    series.tag("guest", "web-1");
    for at in 0..10 {
        series.push(at * 1000, &[Some(at as f64), None])?;
    }
    let mut counts = Intermittent::new(24);
    (0..60).for_each(|slot| counts.push(slot, f64::from(u8::from(slot % 7 == 0)) * 3.0));
    let joint = Joint::new(3).ok_or("three variables")?;
    let shape = Shape { capacity: 300, ..Shape::new(3600, 2, 1)? };
    let (mut young, mut learnt) = (Hybrid::new(shape), Hybrid::new(shape));
    for i in 0..270u32 {
        let sample = Some(f64::from(i % 2)).filter(|_| i % 40 != 39);
        if i < 5 {
            young.push(sample);
        }
        learnt.push(sample);
        learnt.learn();
    }
    young.schedule(Event { start: 3, length: 2, kind: 1, size: Some(2.0) });
    let sealed = |kind: u8, sealed: &[u8]| [&[kind], payload(sealed)].concat();
    let all = [
        ("whole", [&[0], young.save().as_slice()].concat()),
        ("series", sealed(1, &series.encode())),
        ("counts", sealed(2, &counts.encode())),
        ("joint", sealed(3, &joint.encode())),
        ("young", forecaster(&young)),
        ("learnt", forecaster(&learnt)),
    ];
    for (name, bytes) in all {
        std::fs::write(Path::new(&folder).join(name), bytes)?;
    }
    Ok(())
}

//! What a further shadow costs the primary's host. An epoch is found, copied and coded once; each shadow adds what
//! encrypting and sending it takes.

use std::time::{Duration, Instant};

use super::workloads::{self, agent_pid, cpu_s};
use super::{Bench, Row};
use crate::api::types::{GuestState, GuestView};
use crate::lab::error::{LabError, Result};
use crate::lab::fleet::Fleet;
use crate::lab::{Lab, image, process};

const GUEST: &str = "redis";
const INTERVAL: Duration = Duration::from_millis(50);
/// Shadows in turn. Machines drift: each number is compared with one shadow right before and after it.
const SHADOWS: [u32; 5] = [1, 2, 1, 3, 1];
const PROTECTED_WITHIN: Duration = Duration::from_secs(240);
/// After a shadow's first copy.
const SETTLE_FOR: Duration = Duration::from_secs(3);
const MEASURE_FOR: Duration = Duration::from_secs(30);
/// How many pages an epoch has is looked at so often.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Of the agent's processor time with one shadow.
const SECOND_AT_MOST: f64 = 15.0;

pub(super) fn run(bench: &Bench) -> Result<()> {
    let [case] = workloads::cases(&[GUEST.to_owned()])?[..] else { return Ok(()) };
    image::ensure(case.workload()?.software(), false, &|line| eprintln!("bench: {line}"))?;
    let stage = workloads::stage(bench, case, SHADOWS.into_iter().max().unwrap_or(1))?;
    let mut costs = Vec::new();
    for shadows in SHADOWS {
        let cost = phase(bench, &stage.lab, &stage.fleet, shadows)?;
        let row = Row::new(format!("agent's time for 1,000 pages, shadows: {shadows}"), cost.ms_per_1000, "ms");
        bench.print(&row.beside("pages/s dirtied", cost.pages_per_s));
        costs.push(cost.ms_per_1000);
    }
    let &[first, two, second, three, third] = &costs[..] else { return Ok(()) };
    let more = |cost: f64, before: f64, after: f64| (cost / ((before + after) / 2.0) - 1.0) * 100.0;
    let drift = |before: f64, after: f64| (after / before - 1.0).abs() * 100.0;
    let row = Row::new("a second shadow adds to it", more(two, first, second), "%").at_most(SECOND_AT_MOST);
    bench.print(&row.beside("% drift of one shadow's meanwhile", drift(first, second)));
    let row = Row::new("a second and a third add", more(three, second, third), "%");
    bench.print(&row.beside("% drift of one shadow's meanwhile", drift(second, third)));
    Ok(())
}

struct Cost {
    /// Processor time of the agent and the processes it started, for a thousand pages that a guest wrote.
    ms_per_1000: f64,
    pages_per_s: f64,
}

fn phase(bench: &Bench, lab: &Lab, fleet: &Fleet, shadows: u32) -> Result<Cost> {
    fleet.enable(GUEST, workloads::PRIMARY, shadows, INTERVAL)?;
    // A shadow that is no longer wanted goes a moment later.
    let all_follow = |view: &GuestView| view.state == GuestState::Protected && view.shadows.len() == shadows as usize;
    fleet.wait_protected(GUEST, PROTECTED_WITHIN)?;
    fleet.wait(GUEST, "as many shadows as wanted", PROTECTED_WITHIN, all_follow)?;
    bench.say(&format!("all shadows ({shadows}) follow; measuring for {} s", MEASURE_FOR.as_secs()))?;
    bench.sleep(SETTLE_FOR)?;
    let agent = agent_pid(lab)?;
    let (before, cpu_before) = (fleet.info(GUEST)?, cpu_of_tree(agent)?);
    let (began, mut dirty) = (Instant::now(), Vec::new());
    while began.elapsed() < MEASURE_FOR {
        bench.sleep(LOOK_EVERY)?;
        dirty.push(fleet.info(GUEST)?.capture.dirty_pages.last as f64);
    }
    let (after, cpu, elapsed) = (fleet.info(GUEST)?, cpu_of_tree(agent)? - cpu_before, began.elapsed());
    if !all_follow(&after) {
        return Err(LabError::Product(format!("of {shadows} shadows not all followed: the figures would be of fewer")));
    }
    let epochs = after.capture.epochs_total.saturating_sub(before.capture.epochs_total) as f64;
    let pages = (epochs * dirty.iter().sum::<f64>() / dirty.len() as f64).max(1.0);
    Ok(Cost { ms_per_1000: cpu * 1e6 / pages, pages_per_s: pages / elapsed.as_secs_f64() })
}

/// The agent's companions (guard, gate) are its children.
fn cpu_of_tree(agent: i32) -> Result<f64> {
    process::children(agent).into_iter().chain([agent]).map(cpu_s).sum()
}

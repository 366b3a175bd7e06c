//! What a further shadow costs the primary's host. An epoch is found, copied and coded once; each shadow adds what
//! encrypting and sending it takes.
//!
//! The guest writes at a constant rate. Redis, say, sets, gets and increments in turns longer than a phase: it changes
//! 15,000 to 32,000 pages a second, and what a page costs follows that far more than it does the shadows.
//!
//! Machines drift by as much as a shadow costs. So phases with one shadow stand between all others, each of those is
//! compared with the two beside it, and the median of such comparisons counts. How much phases with one shadow differ from
//! each other by the same rule is what such a comparison can be wrong by, and is printed beside it. What the threads take
//! that serve one shadow only is a part of its cost that no drift touches.

use std::time::{Duration, Instant};

use super::workloads::{PRIMARY, agent_pid, cpu_s};
use super::{Bench, Row, percentile};
use crate::api::types::{GuestState, GuestView, ShadowState};
use crate::lab::error::{LabError, Result};
use crate::lab::fleet::Fleet;
use crate::lab::{GuestClient, Lab, process};

const GUEST: &str = "steady";
const MEMORY_MIB: u32 = 1024;
/// 5,000 pages a second, a sixteenth of each with contents that do not compress.
const WORKLOAD: &str = "dirty:5000:128";
/// Until the mirror has all that the guest writes.
const WARM_UP_FOR: Duration = Duration::from_secs(12);
const INTERVAL: Duration = Duration::from_millis(50);
/// Shadows in turn.
const SHADOWS: [u32; 13] = [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1];
const PROTECTED_WITHIN: Duration = Duration::from_secs(240);
/// After a shadow's first copy.
const SETTLE_FOR: Duration = Duration::from_secs(2);
/// All of it, with the boot of the guest and the first copies, takes four minutes, and is to take six at most.
const MEASURE_FOR: Duration = Duration::from_secs(14);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A shadow that falls behind spoils a phase.
const TRIES: u32 = 3;
/// Threads that serve one shadow have names that begin so.
const OF_ONE_SHADOW: &str = "peer-";
/// Of the agent's processor time with one shadow.
const SECOND_AT_MOST: f64 = 15.0;

pub(super) fn run(bench: &Bench) -> Result<()> {
    let hosts = 1 + SHADOWS.into_iter().max().unwrap_or(1);
    let lab = bench.lab(hosts as u8)?;
    let fleet = Fleet::of(&lab)?;
    fleet.wait_hosts(hosts as usize, Duration::from_secs(30))?;
    let guest = bench.guest(&lab, GUEST, PRIMARY, MEMORY_MIB, WORKLOAD)?;
    let mut stage = Stage { bench, lab: &lab, fleet: &fleet, client: lab.guest_client(guest.ip)? };
    let (mut costs, mut serving) = (Vec::new(), Vec::new());
    stage.follow(1)?;
    bench.sleep(WARM_UP_FOR)?;
    for shadows in SHADOWS {
        let phase = stage.phase(shadows)?;
        let row = Row::new(format!("agent's time for 1,000 pages, shadows: {shadows}"), phase.ms_per_1000, "ms");
        bench.print(&row.beside("pages/s written", phase.pages_per_s));
        serving.push(phase.serving_percent);
        costs.push(phase.ms_per_1000);
    }
    let show = |name: &str, values: &[f64]| {
        let row = Row::new(name, percentile(values, 50), "%");
        row.beside(format!("% least; most {:.1}", percentile(values, 100)), percentile(values, 0))
    };
    bench.print(&show("a second shadow adds to it, median", &added(&costs, 2)).at_most(SECOND_AT_MOST));
    bench.print(&show("a second and a third add, median", &added(&costs, 3)));
    bench.print(&show("of it, threads of one shadow alone, median", &serving));
    bench.print(&show("noise: one shadow beside one, median", &noise(&costs)));
    Ok(())
}

/// What phases with so many shadows cost more than those with one around them, each, percent.
fn added(costs: &[f64], shadows: u32) -> Vec<f64> {
    let phases = SHADOWS.windows(3).zip(costs.windows(3)).filter(|(counts, _)| counts[1] == shadows);
    phases.map(|(_, around)| more_percent(around[1], around[0], around[2])).collect()
}

/// How much each phase with one shadow differs from those before and after it, percent.
fn noise(costs: &[f64]) -> Vec<f64> {
    let ones: Vec<f64> =
        SHADOWS.iter().zip(costs).filter(|(shadows, _)| **shadows == 1).map(|(_, cost)| *cost).collect();
    ones.windows(3).map(|around| more_percent(around[1], around[0], around[2]).abs()).collect()
}

fn more_percent(cost: f64, before: f64, after: f64) -> f64 {
    (cost / ((before + after) / 2.0) - 1.0) * 100.0
}

struct Phase {
    /// Processor time of the agent and the processes it started, for a thousand pages that the guest wrote.
    ms_per_1000: f64,
    pages_per_s: f64,
    /// What the threads of one shadow take of the time that the agent takes with one.
    serving_percent: f64,
}

struct Stage<'a> {
    bench: &'a Bench,
    lab: &'a Lab,
    fleet: &'a Fleet,
    client: GuestClient,
}

impl Stage<'_> {
    fn follow(&self, shadows: u32) -> Result<()> {
        self.fleet.enable(GUEST, PRIMARY, shadows, INTERVAL)?;
        self.fleet.wait_protected(GUEST, PROTECTED_WITHIN)?;
        // A shadow that is no longer wanted goes a moment later.
        let all = |view: &GuestView| all_follow(view, shadows);
        self.fleet.wait(GUEST, "as many shadows as wanted", PROTECTED_WITHIN, all)?;
        Ok(())
    }

    fn phase(&mut self, shadows: u32) -> Result<Phase> {
        for _ in 0..TRIES {
            self.follow(shadows)?;
            self.bench.say(&format!("all shadows ({shadows}) follow; measuring for {} s", MEASURE_FOR.as_secs()))?;
            self.bench.sleep(SETTLE_FOR)?;
            if let Some(phase) = self.measure(shadows)? {
                return Ok(phase);
            }
            self.bench.say("one of them fell behind; once more")?;
        }
        Err(LabError::Product(format!("of {shadows} shadows not all followed: the figures would be of fewer")))
    }

    /// None: not all of them followed all the time.
    fn measure(&mut self, shadows: u32) -> Result<Option<Phase>> {
        let failed = LabError::system::<std::io::Error>;
        let agent = agent_pid(self.lab)?;
        let before = self.client.status().map_err(failed("ask the guest"))?;
        let (cpu_before, serving_before, began) = (cpu_of_tree(agent)?, serving_s(agent), Instant::now());
        while began.elapsed() < MEASURE_FOR {
            self.bench.sleep(LOOK_EVERY)?;
            if !all_follow(&self.fleet.info(GUEST)?, shadows) {
                return Ok(None);
            }
        }
        let (cpu, serving, elapsed) = (cpu_of_tree(agent)?, serving_s(agent), began.elapsed());
        let after = self.client.status().map_err(failed("ask the guest"))?;
        let pages = after.dirty.saturating_sub(before.dirty).max(1) as f64;
        let (cpu, each) = (cpu - cpu_before, (serving - serving_before) / f64::from(shadows));
        let with_one = cpu - each * f64::from(shadows - 1);
        Ok(Some(Phase {
            ms_per_1000: cpu * 1e6 / pages,
            pages_per_s: pages / elapsed.as_secs_f64(),
            serving_percent: each / with_one * 100.0,
        }))
    }
}

fn all_follow(view: &GuestView, shadows: u32) -> bool {
    let following = view.shadows.iter().filter(|shadow| shadow.state == ShadowState::Following).count();
    view.state == GuestState::Protected && view.shadows.len() == shadows as usize && following == shadows as usize
}

/// Processor time of the agent's threads that serve one shadow each, seconds; those that have ended do not count.
fn serving_s(agent: i32) -> f64 {
    let read = |task: &std::path::Path, file: &str| std::fs::read_to_string(task.join(file)).unwrap_or_default();
    let tasks =
        std::fs::read_dir(format!("/proc/{agent}/task")).into_iter().flatten().flatten().map(|task| task.path());
    let of_peers = tasks.filter(|task| read(task, "comm").starts_with(OF_ONE_SHADOW));
    let ran_ns = |task: std::path::PathBuf| read(&task, "schedstat").split(' ').next()?.parse::<f64>().ok();
    of_peers.filter_map(ran_ns).sum::<f64>() / 1e9
}

/// The agent's companions (guard, gate) are its children.
fn cpu_of_tree(agent: i32) -> Result<f64> {
    process::children(agent).into_iter().chain([agent]).map(cpu_s).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_compared_with_those_of_one_shadow_around_them() {
        assert!(SHADOWS.iter().step_by(2).all(|shadows| *shadows == 1), "one between all others, first and last");
        let costs: Vec<f64> = SHADOWS.iter().map(|shadows| [0.0, 10.0, 11.0, 12.0][*shadows as usize]).collect();
        let whole = |values: Vec<f64>| values.into_iter().map(|value| value.round() as i64).collect::<Vec<_>>();
        assert_eq!(whole(added(&costs, 2)), [10, 10, 10]);
        assert_eq!(whole(added(&costs, 3)), [20, 20, 20]);
        assert_eq!(whole(noise(&costs)), [0, 0, 0, 0, 0]);
        // A machine that gets slower all the time changes nothing.
        let drifting: Vec<f64> =
            costs.iter().zip(0..).map(|(cost, nth)| cost * (1.0 + f64::from(nth) / 100.0)).collect();
        assert_eq!((whole(added(&drifting, 3)), whole(noise(&drifting))), (vec![20; 3], vec![0; 5]));
    }
}

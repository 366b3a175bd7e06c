//! The planner beside Nova's way of placing, on the instances of the benchmark, in one run.
//!
//!     cargo run --release -p placement --example bench [-- NAME...] [--threads N] [--nova-xl] [--format json]
//!
//! NAME is `SIZE-SHAPE-SEED` (XS, S, M, L, XL; base, tight, bwtight, power, pair, drain, skew). Objectives are in millions of
//! milli-points, lower is better; (n): shadows left out. Every plan has been accepted by the checker. After the table come
//! the figures that are held to a target, as `make bench` prints them; in JSON these alone, one a line.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, reason = "an example acts; the crate it shows does not")]

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Instant;

use serde::Serialize;

use placement::checker;
use placement::instance::{Instance, Level, Plan};
use placement::solver::{Options, Outcome, Stage, solve};

#[path = "support/failure.rs"]
mod failure;
#[path = "support/forced.rs"]
mod forced;
#[path = "support/generate.rs"]
mod generate;
#[path = "support/nova.rs"]
mod nova;
mod support;

use support::{Threads, peak_memory_mib};

/// What is known of an instance: a proven bound or the best plan others found in a minute or less, and how far above that
/// a plan may be, per cent, within so many seconds.
struct Known {
    name: &'static str,
    what: &'static str,
    millions: f64,
    targets: &'static [(f64, f64)],
}

const fn known(name: &'static str, what: &'static str, millions: f64, targets: &'static [(f64, f64)]) -> Known {
    Known { name, what, millions, targets }
}

const KNOWN: [Known; 9] = [
    known("XS-base-1", "bound", 47.069, &[(0.5, 1.0)]),
    known("XS-tight-1", "bound", 133.62, &[(1.0, 1.0)]),
    known("S-base-1", "bound", 111.235, &[(0.5, 1.0)]),
    known("S-tight-1", "bound", 118.82, &[(1.0, 1.0)]),
    known("M-base-1", "best known", 230.7, &[(1.0, 2.0)]),
    known("M-tight-1", "best known", 371.5, &[(1.0, 2.0)]),
    known("M-bwtight-1", "best known", 368.2, &[(1.0, 2.0)]),
    known("L-base-1", "best known", 2_213.0, &[(2.0, 2.0)]),
    known("XL-base-1", "best known", 11_092.0, &[(3.0, 2.0), (1.5, 10.0)]),
];
/// A plan for the largest site has to be there within so many seconds, and after the loss of a rack and of a power domain;
/// the shadows that another planner moved then, from a plan of its own: fewer are to move.
const FIRST_XL_S: f64 = 0.5;
const REPLANS: [(Level, u64, f64, usize); 2] = [(Level::Rack, 7, 0.1, 182), (Level::Power, 3, 0.4, 3_512)];
/// So many losses of each level are looked at for what they would force to move.
const LOSSES: usize = 50;
/// Nova's way takes a minute and more beyond.
const NOVA_HOSTS: usize = 2_000;

/// One figure, in the form of the project's other benchmarks.
#[derive(Serialize)]
struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    peer: String,
    peer_value: Option<f64>,
    target: Option<String>,
    met: Option<bool>,
}

struct Run {
    outcome: Outcome,
    /// Objective in millions, and when it was reached.
    stages: Vec<(f64, f64)>,
    first_s: f64,
    wall_s: f64,
    cpu_s: f64,
    audit: checker::Audit,
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}

fn bench() -> Result<(), String> {
    let mut threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut names, mut nova_xl, mut json) = (Vec::new(), false, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--threads" => {
                let value = args.next().and_then(|value| value.parse().ok());
                threads = value.filter(|&n| n > 0).ok_or("--threads needs a number")?;
            }
            "--nova-xl" => nova_xl = true,
            "--format" => match args.next().as_deref() {
                Some("json") => json = true,
                Some("table") => json = false,
                _ => return Err("--format needs table or json".into()),
            },
            flag if flag.starts_with('-') => {
                return Err(format!("{flag}: no such option; there are --threads, --nova-xl, --format"));
            }
            name => names.push(name.to_owned()),
        }
    }
    if names.is_empty() {
        names = KNOWN.iter().map(|known| known.name.to_owned()).collect();
    }
    if !json {
        println!("{threads} threads; objectives in millions, (n): shadows left out");
        println!(
            "{:<14}{:>16}{:>9}{:>9}{:>9}{:>20}{:>9}{:>24}{:>9}",
            "instance", "ours", "first s", "all s", "CPU s", "as Nova", "s", "known", "gap %"
        );
    }
    let mut rows = Vec::new();
    for name in names {
        let instance = named(&name)?;
        let run = run(&instance, threads)?;
        let nova = (instance.hosts.len() <= NOVA_HOSTS || nova_xl).then(|| as_nova(&instance));
        if !json {
            line(&name, &run, nova.as_ref());
        }
        figures(&name, &run, nova.as_ref(), &mut rows);
        audited(&name, &run, &mut rows);
        rows.push(same_on_one_thread(&name, &instance, &run)?);
        if name.starts_with("XL") {
            worst_losses(&name, &instance, &run.outcome.plan, &mut rows);
            for (level, domain, within_s, others_moved) in REPLANS {
                replan(&instance, &run.outcome.plan, (level, domain), threads, (within_s, others_moved), &mut rows)?;
            }
        }
    }
    rows.push(Row::new("peak memory".into(), peak_memory_mib() as f64, "MiB"));
    if !json {
        println!();
    }
    for row in rows {
        match json {
            true => println!("{}", serde_json::to_string(&row).map_err(|error| error.to_string())?),
            false => row.print(),
        }
    }
    Ok(())
}

impl Row {
    fn new(name: String, value: f64, unit: &'static str) -> Self {
        Self { name, value, unit, peer: String::new(), peer_value: None, target: None, met: None }
    }

    fn beside(mut self, peer: &str, value: f64) -> Self {
        (self.peer, self.peer_value) = (peer.to_owned(), Some(value));
        self
    }

    fn at_most(mut self, limit: f64) -> Self {
        (self.target, self.met) = (Some(format!("<= {limit}")), Some(self.value <= limit));
        self
    }

    fn below(mut self, limit: f64) -> Self {
        (self.target, self.met) = (Some(format!("< {limit}")), Some(self.value < limit));
        self
    }

    fn print(&self) {
        let met = self.met.map_or("", |met| if met { "met" } else { "MISSED" });
        let peer = self.peer_value.map_or(String::new(), |value| format!("{value:.2} {}", self.peer));
        let target = self.target.clone().unwrap_or_default();
        println!("{:<68}{:>10.2} {:<6}{target:<10}{met:<8}{peer}", self.name, self.value, self.unit);
    }
}

/// Objective in millions and shadows left out of a plan made as Nova would, and the time it took; none: refused.
fn as_nova(instance: &Instance) -> (Option<(f64, usize)>, f64) {
    let started = Instant::now();
    let plan = nova::place(instance);
    let took_s = started.elapsed().as_secs_f64();
    let report = accept(instance, &plan).ok();
    (report.map(|report| (report.objective() as f64 / 1e6, report.unplaced)), took_s)
}

fn audited(name: &str, run: &Run, rows: &mut Vec<Row>) {
    let wrong = run.audit.not_maximal + run.audit.claims_wrong;
    let row = Row::new(format!("{name}: left out though they fit, or wrongly explained"), wrong as f64, "");
    rows.push(row.at_most(0.0).beside("looked at", run.audit.audited as f64));
}

fn figures(name: &str, run: &Run, nova: Option<&(Option<(f64, usize)>, f64)>, rows: &mut Vec<Row>) {
    let Some(known) = KNOWN.iter().find(|known| known.name == name) else { return };
    let above = |millions: f64| 100.0 * (millions / known.millions - 1.0);
    for &(percent, within_s) in known.targets {
        let reached = run.stages.iter().filter(|(_, at_s)| *at_s <= within_s).map(|(millions, _)| *millions);
        let gap = reached.reduce(f64::min).map_or(f64::MAX, above);
        let what = format!("{name}: above {} after {within_s} s", known.what);
        let row = Row::new(what, gap, "%").at_most(percent);
        rows.push(match nova {
            Some((Some((millions, _)), _)) => row.beside("% Nova's way", above(*millions)),
            _ => row,
        });
    }
    if name.starts_with("XL") {
        rows.push(Row::new(format!("{name}: first valid plan"), run.first_s, "s").at_most(FIRST_XL_S));
    }
}

/// The plan is the same, byte for byte, on one thread.
fn same_on_one_thread(name: &str, instance: &Instance, run: &Run) -> Result<Row, String> {
    let alone = self::run(instance, 1)?;
    let text = |plan: &Plan| serde_json::to_vec(plan).map_err(|error| error.to_string());
    let differ = text(&alone.outcome.plan)? != text(&run.outcome.plan)?;
    Ok(Row::new(format!("{name}: plans that differ on 1 thread"), f64::from(u8::from(differ)), "").at_most(0.0))
}

fn named(name: &str) -> Result<Instance, String> {
    let mut parts = name.splitn(3, '-');
    let mut next = || parts.next().unwrap_or_default();
    let (size, shape, seed) = (next(), next(), next());
    let seed = seed.parse().map_err(|_| format!("{name}: has to be SIZE-SHAPE-SEED"))?;
    let instance = generate::generate(size, shape, seed).ok_or(format!("{name}: no such size or shape"))?;
    instance.validate().map_err(|error| format!("{name}: {error}"))?;
    Ok(instance)
}

/// Plans, and has the plan checked.
fn run(instance: &Instance, threads: usize) -> Result<Run, String> {
    let threads = Threads::new(threads);
    let (started, cpu_before) = (Instant::now(), threads.cpu());
    let (mut first_s, mut stages) = (0.0, Vec::new());
    let outcome = solve(instance, &Options::default(), &threads, &mut |stage| {
        let at_s = started.elapsed().as_secs_f64();
        match stage {
            Stage::Ready => (),
            Stage::First { objective, .. } => {
                first_s = at_s;
                stages.push((objective as f64 / 1e6, at_s));
            }
            Stage::Improved { objective, .. } | Stage::Placed { objective, .. } => {
                stages.push((objective as f64 / 1e6, at_s));
            }
        }
    });
    let (wall_s, cpu_s) = (started.elapsed().as_secs_f64(), (threads.cpu() - cpu_before).as_secs_f64());
    accept(instance, &outcome.plan)?;
    let audit = checker::audit(instance, &outcome.plan, 50).map_err(|error| error.to_string())?;
    Ok(Run { outcome, stages, first_s, wall_s, cpu_s, audit })
}

fn accept(instance: &Instance, plan: &Plan) -> Result<checker::Report, String> {
    let report = checker::check(instance, plan).map_err(|error| error.to_string())?;
    if !report.is_feasible() {
        return Err(format!("{}: the checker refused a plan: {:?}", instance.name, report.examples));
    }
    Ok(report)
}

fn line(name: &str, run: &Run, nova: Option<&(Option<(f64, usize)>, f64)>) {
    let millions = |(millions, unplaced): (f64, usize)| format!("{millions:.3} ({unplaced})");
    let ours = millions((run.outcome.objective as f64 / 1e6, run.outcome.unplaced));
    let theirs = nova.map_or("-".to_owned(), |(plan, _)| plan.map_or("refused".to_owned(), millions));
    let their_s = nova.map_or("-".to_owned(), |(_, took_s)| format!("{took_s:.3}"));
    let known = KNOWN.iter().find(|known| known.name == name);
    let gap = known.map(|known| 100.0 * (run.outcome.objective as f64 / 1e6 / known.millions - 1.0));
    println!(
        "{name:<14}{ours:>16}{:>9.3}{:>9.3}{:>9.3}{theirs:>20}{their_s:>9}{:>24}{:>9}",
        run.first_s,
        run.wall_s,
        run.cpu_s,
        known.map_or("-".into(), |known| format!("{} {:.3}", known.what, known.millions)),
        gap.map_or("-".into(), |gap| format!("{gap:.2}")),
    );
}

/// What has to move, whoever plans, after the loss of any one power domain, and of racks from all over the site.
fn worst_losses(name: &str, instance: &Instance, plan: &Plan, rows: &mut Vec<Row>) {
    for (level, _, _, others_moved) in REPLANS {
        let ids: BTreeSet<u64> = (0..instance.hosts.len()).map(|host| checker::domain(instance, level, host)).collect();
        let step = ids.len().div_ceil(LOSSES);
        let forced = ids.iter().step_by(step).map(|&id| forced::moves(&failure::after(instance, plan, level, id)));
        let forced: Vec<usize> = forced.collect();
        let what = format!("{name}: forced moves, worst of {} losses of a {level:?}", forced.len());
        let mean = forced.iter().sum::<usize>() as f64 / forced.len().max(1) as f64;
        let worst = Row::new(what, forced.iter().copied().max().unwrap_or(0) as f64, "").below(others_moved as f64);
        rows.push(worst.beside("on average", mean));
    }
}

fn replan(
    instance: &Instance,
    plan: &Plan,
    (level, domain): (Level, u64),
    threads: usize,
    (within_s, others_moved): (f64, usize),
    rows: &mut Vec<Row>,
) -> Result<(), String> {
    let after = failure::after(instance, plan, level, domain);
    let run = run(&after, threads)?;
    audited(&after.name, &run, rows);
    let report = accept(&after, &run.outcome.plan)?;
    let down = after.hosts.iter().filter(|host| host.state == placement::instance::HostState::Down).count();
    let what = format!("{} after the loss of {level:?} {domain} ({down} hosts)", instance.name);
    let least = forced::moves(&after) as f64;
    let moved = Row::new(format!("{what}: moved"), report.moved as f64, "").below(others_moved as f64);
    rows.push(Row::new(format!("{what}: time"), run.wall_s, "s").at_most(within_s));
    rows.push(moved.beside("have to move from this plan, whoever plans", least));
    let chosen = Row::new(format!("{what}: moved without need"), report.moved as f64 - least, "");
    rows.push(chosen.beside("moved by another planner in all, from its own plan", others_moved as f64));
    rows.push(same_on_one_thread(&after.name, &after, &run)?);
    rows.push(Row::new(format!("{what}: left out"), report.unplaced as f64, "").at_most(0.0));
    Ok(())
}

//! The planner beside Nova's way of placing, on the instances of the benchmark, in one run.
//!
//!     cargo run --release -p placement --example bench [-- NAME...] [--threads N] [--nova-xl]
//!
//! NAME is `SIZE-SHAPE-SEED` (XS, S, M, L, XL; base, tight, bwtight, power, pair, drain, skew). Objectives are in millions of
//! milli-points, lower is better; (n): shadows left out. Every plan has been accepted by the checker.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, reason = "an example acts; the crate it shows does not")]

use std::process::ExitCode;
use std::time::Instant;

use placement::checker;
use placement::instance::{Instance, Level, Plan};
use placement::solver::{Options, Outcome, Stage, solve};

#[path = "support/failure.rs"]
mod failure;
#[path = "support/generate.rs"]
mod generate;
#[path = "support/nova.rs"]
mod nova;
mod support;

use support::{Threads, peak_memory_mib};

/// What is known of an instance: proven bounds and the best plans others found in a minute or less.
const KNOWN: [(&str, &str, f64); 9] = [
    ("XS-base-1", "bound", 47.069),
    ("XS-tight-1", "bound", 133.62),
    ("S-base-1", "bound", 111.235),
    ("S-tight-1", "bound", 118.82),
    ("M-base-1", "best known", 230.7),
    ("M-tight-1", "best known", 371.5),
    ("M-bwtight-1", "best known", 368.2),
    ("L-base-1", "best known", 2_213.0),
    ("XL-base-1", "best known", 11_092.0),
];
/// Nova's way takes a minute and more beyond.
const NOVA_HOSTS: usize = 2_000;

struct Run {
    outcome: Outcome,
    first_s: f64,
    wall_s: f64,
    cpu_s: f64,
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
    let (mut names, mut nova_xl) = (Vec::new(), false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--threads" => {
                let value = args.next().and_then(|value| value.parse().ok());
                threads = value.filter(|&n| n > 0).ok_or("--threads needs a number")?;
            }
            "--nova-xl" => nova_xl = true,
            flag if flag.starts_with('-') => {
                return Err(format!("{flag}: no such option; there are --threads, --nova-xl"));
            }
            name => names.push(name.to_owned()),
        }
    }
    if names.is_empty() {
        names = KNOWN.iter().map(|(name, ..)| (*name).to_owned()).collect();
    }
    println!("{threads} threads; objectives in millions, (n): shadows left out");
    println!(
        "{:<14}{:>16}{:>9}{:>9}{:>9}{:>20}{:>9}{:>24}{:>9}",
        "instance", "ours", "first s", "all s", "CPU s", "as Nova", "s", "known", "gap %"
    );
    for name in names {
        let instance = named(&name)?;
        let run = run(&instance, threads)?;
        row(&name, &instance, &run, nova_xl);
        if name.starts_with("XL") {
            for (level, domain) in [(Level::Rack, 7), (Level::Power, 3)] {
                replan(&instance, &run.outcome.plan, level, domain, threads)?;
            }
        }
    }
    println!("peak memory {} MiB", peak_memory_mib());
    Ok(())
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
    let mut first_s = 0.0;
    let outcome = solve(instance, &Options::default(), &threads, &mut |stage| {
        if let Stage::First { .. } = stage {
            first_s = started.elapsed().as_secs_f64();
        }
    });
    let (wall_s, cpu_s) = (started.elapsed().as_secs_f64(), (threads.cpu() - cpu_before).as_secs_f64());
    accept(instance, &outcome.plan)?;
    let audit = checker::audit(instance, &outcome.plan, 50).map_err(|error| error.to_string())?;
    if audit.not_maximal + audit.claims_wrong > 0 {
        return Err(format!("{}: {audit:?}", instance.name));
    }
    Ok(Run { outcome, first_s, wall_s, cpu_s })
}

fn accept(instance: &Instance, plan: &Plan) -> Result<checker::Report, String> {
    let report = checker::check(instance, plan).map_err(|error| error.to_string())?;
    if !report.is_feasible() {
        return Err(format!("{}: the checker refused a plan: {:?}", instance.name, report.examples));
    }
    Ok(report)
}

fn row(name: &str, instance: &Instance, run: &Run, nova_xl: bool) {
    let millions = |objective: i64, unplaced: usize| format!("{:.3} ({unplaced})", objective as f64 / 1e6);
    let ours = millions(run.outcome.objective, run.outcome.unplaced);
    let (mut theirs, mut their_s) = ("-".to_owned(), "-".to_owned());
    if instance.hosts.len() <= NOVA_HOSTS || nova_xl {
        let started = Instant::now();
        let plan = nova::place(instance);
        their_s = format!("{:.3}", started.elapsed().as_secs_f64());
        theirs = match accept(instance, &plan) {
            Ok(report) => millions(report.objective(), report.unplaced),
            Err(_) => "refused".into(),
        };
    }
    let known = KNOWN.iter().find(|(known, ..)| *known == name);
    let gap = known.map(|(.., value)| 100.0 * (run.outcome.objective as f64 / 1e6 / value - 1.0));
    println!(
        "{name:<14}{ours:>16}{:>9.3}{:>9.3}{:>9.3}{theirs:>20}{their_s:>9}{:>24}{:>9}",
        run.first_s,
        run.wall_s,
        run.cpu_s,
        known.map_or("-".into(), |(_, what, value)| format!("{what} {value:.3}")),
        gap.map_or("-".into(), |gap| format!("{gap:.2}")),
    );
}

fn replan(instance: &Instance, plan: &Plan, level: Level, domain: u64, threads: usize) -> Result<(), String> {
    let after = failure::after(instance, plan, level, domain);
    let run = run(&after, threads)?;
    let report = accept(&after, &run.outcome.plan)?;
    let down = after.hosts.iter().filter(|host| host.state == placement::instance::HostState::Down).count();
    println!(
        "  {:?} {domain} lost ({down} hosts): planned again in {:.3} s ({:.3} s of CPU), {} shadows moved, {} left out",
        level, run.wall_s, run.cpu_s, report.moved, report.unplaced
    );
    Ok(())
}

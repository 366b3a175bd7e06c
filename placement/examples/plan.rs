//! Plans an instance of the format `shadow-place/1`, checks the plan and writes it.
//!
//!     cargo run --release -p placement --example plan -- INSTANCE.json --out PLAN.json [--moves N] [--threads N]
//!
//! Exit status: 0: a plan that the checker accepts was written; 1: it was not; 2: wrong usage or bad files.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, reason = "an example acts; the crate it shows does not")]

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use placement::checker::{self, Report};
use placement::instance::{self, Instance};
use placement::solver::{Options, Outcome, Stage, solve};

mod support;

use support::{Threads, peak_memory_mib};

const USAGE: &str = "usage: plan INSTANCE.json [--out PLAN.json] [--moves N] [--threads N] [--seed N]";
const MAX_THREADS: u64 = 256;
/// So many shadows without a host are shown, and audited.
const SHOWN: usize = 5;
const AUDITED: usize = 50;

struct Arguments {
    instance: String,
    out: Option<String>,
    threads: usize,
    options: Options,
}

fn main() -> ExitCode {
    match arguments().and_then(|arguments| run(&arguments)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("plan: {error}");
            ExitCode::from(2)
        }
    }
}

fn arguments() -> Result<Arguments, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut found = Arguments { instance: String::new(), out: None, threads, options: Options::default() };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value\n{USAGE}"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{arg} {text}: not a number\n{USAGE}"));
        match arg.as_str() {
            "--out" => found.out = Some(value()?),
            "--moves" => found.options.moves = Some(number(value()?)?),
            "--seed" => found.options.seed = number(value()?)?,
            "--threads" => found.threads = number(value()?)?.clamp(1, MAX_THREADS) as usize,
            "--help" | "-h" => return Err(USAGE.into()),
            flag if flag.starts_with('-') => return Err(format!("{flag}: no such option\n{USAGE}")),
            path if found.instance.is_empty() => found.instance = path.into(),
            path => return Err(format!("{path}: one instance at a time\n{USAGE}")),
        }
    }
    if found.instance.is_empty() { Err(USAGE.into()) } else { Ok(found) }
}

fn run(arguments: &Arguments) -> Result<bool, String> {
    let path = &arguments.instance;
    let started = Instant::now();
    let json = fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    let instance = instance::parse(&json).map_err(|error| format!("{path}: {error}"))?;
    drop(json);
    println!(
        "{}: {} hosts, {} guests, {} shadows, {}; read in {:.3} s",
        instance.name,
        instance.hosts.len(),
        instance.vms.len(),
        instance.copies(),
        if instance.is_replan() { "some stand already" } else { "none stands yet" },
        started.elapsed().as_secs_f64()
    );
    let outcome = plan(&instance, arguments);
    let report = checker::check(&instance, &outcome.plan).map_err(|error| format!("the plan made: {error}"))?;
    let audit = checker::audit(&instance, &outcome.plan, AUDITED).map_err(|error| format!("the plan made: {error}"))?;
    show(&outcome, &report);
    println!(
        "audit of {} left out: {} not maximal, {} claims wrong",
        audit.audited, audit.not_maximal, audit.claims_wrong
    );
    println!("peak memory {} MiB", peak_memory_mib());
    let accepted = report.is_feasible()
        && report.objective() == outcome.objective
        && audit.not_maximal == 0
        && audit.claims_wrong == 0;
    if let Some(out) = arguments.out.as_ref().filter(|_| accepted) {
        let json = serde_json::to_vec(&outcome.plan).map_err(|error| format!("the plan made: {error}"))?;
        fs::write(out, json).map_err(|error| format!("{out}: {error}"))?;
    }
    println!("{}", if accepted { "accepted by the checker" } else { "REFUSED by the checker; nothing is written" });
    Ok(accepted)
}

fn plan(instance: &Instance, arguments: &Arguments) -> Outcome {
    let threads = Threads::new(arguments.threads);
    let (started, cpu_before) = (Instant::now(), threads.cpu());
    let mut watch = |stage: Stage| {
        let (wall, cpu) = (started.elapsed().as_secs_f64(), (threads.cpu() - cpu_before).as_secs_f64());
        let at = format!("{wall:8.3} s  {cpu:8.3} s CPU ");
        match stage {
            Stage::Ready => println!("{at} ready"),
            Stage::First { objective, unplaced } => {
                println!("{at} first valid plan: {:.3} M, {unplaced} left out", objective as f64 / 1e6);
            }
            Stage::Improved { objective, unplaced } => {
                println!("{at} better plan: {:.3} M, {unplaced} left out", objective as f64 / 1e6);
            }
            Stage::Placed { objective, unplaced } => {
                println!("{at} last plan: {:.3} M, {unplaced} left out", objective as f64 / 1e6);
            }
        }
    };
    let outcome = solve(instance, &arguments.options, &threads, &mut watch);
    println!(
        "{:8.3} s  done on {} threads; {:.3} s of CPU",
        started.elapsed().as_secs_f64(),
        arguments.threads,
        (threads.cpu() - cpu_before).as_secs_f64()
    );
    outcome
}

fn show(outcome: &Outcome, report: &Report) {
    let terms = &report.terms;
    println!(
        "objective {} ({:.3} M): unplaced {}, mem {}, far {}, cpu {}, net {}, churn {}, balance {}",
        report.objective(),
        report.objective() as f64 / 1e6,
        terms.unplaced,
        terms.mem,
        terms.far,
        terms.cpu,
        terms.net,
        terms.churn,
        terms.balance
    );
    println!("{} of {} shadows placed, {} moved", report.copies - report.unplaced, report.copies, report.moved);
    for (rule, count) in &report.violations {
        println!("BROKEN RULE {rule}: {count} times");
    }
    for example in &report.examples {
        println!("  {example}");
    }
    for refusal in outcome.refusals.iter().take(SHOWN) {
        let counts: Vec<_> =
            refusal.counts.iter().map(|(reason, hosts)| format!("{hosts} {}", reason.name())).collect();
        print!("left out: copy {} of guest {}: {}", refusal.copy, refusal.guest, counts.join(", "));
        match &refusal.fix {
            Some(fix) => println!("; nearest remedy: {fix}"),
            None => println!(),
        }
    }
    if outcome.refusals.len() > SHOWN {
        println!("left out: {} more", outcome.refusals.len() - SHOWN);
    }
}

//! The planner against an exhaustive search, the checker, and itself.

use super::board::Board;
use super::problem::{NONE, Problem};
use super::refusal::objections;
use super::rng::Rng;
use super::*;
use crate::checker;
use crate::instance::{HostState, Instance};

mod specimen;

use specimen::{Size, specimen};

/// Threads lent in a test.
struct Pair;

impl Workers for Pair {
    fn run(&self, tasks: Vec<Task<'_>>) {
        std::thread::scope(|scope| {
            for task in tasks {
                scope.spawn(task);
            }
        });
    }
}

fn solved(instance: &Instance, moves: u64) -> Outcome {
    let options = Options { moves: Some(moves), ..Options::default() };
    let outcome = solve(instance, &options, &OneByOne, &mut |_| ());
    let report = checker::check(instance, &outcome.plan).unwrap();
    assert!(report.is_feasible(), "{:?}", report.examples);
    assert_eq!((report.objective(), report.unplaced), (outcome.objective, outcome.unplaced));
    let audit = checker::audit(instance, &outcome.plan, usize::MAX).unwrap();
    assert_eq!((audit.not_maximal, audit.claims_wrong, audit.unexplained), (0, 0, 0));
    for refusal in &outcome.refusals {
        assert_eq!(refusal.counts.values().sum::<u64>(), instance.hosts.len() as u64);
        assert!(!refusal.fix.as_ref().unwrap().objections.is_empty());
    }
    assert_eq!(outcome.refusals.len(), outcome.unplaced);
    outcome
}

/// Calls `visit` with every feasible plan.
fn all_plans(instance: &Instance, visit: &mut dyn FnMut(&Plan, &checker::Report)) {
    let slots: Vec<(usize, usize)> =
        (0..instance.vms.len()).flat_map(|i| (0..instance.vms[i].copies.len()).map(move |k| (i, k))).collect();
    let mut plan = Plan { place: instance.vms.iter().map(|vm| vec![-1; vm.copies.len()]).collect(), ..Plan::default() };
    let choices = instance.hosts.len() + 1;
    for number in 0..choices.pow(slots.len() as u32) {
        let mut rest = number;
        for &(i, k) in &slots {
            plan.place[i][k] = (rest % choices) as i64 - 1;
            rest /= choices;
        }
        let report = checker::check(instance, &plan).unwrap();
        if report.is_feasible() {
            visit(&plan, &report);
        }
    }
}

#[test]
fn on_tiny_instances_no_plan_is_better() {
    for seed in 0..40 {
        let instance = specimen(Size::TINY, seed);
        let ours = solved(&instance, 10_000);
        let mut least = i64::MAX;
        all_plans(&instance, &mut |plan, report| {
            // A plan that leaves out what fits is none of ours, even where that is cheaper.
            if report.objective() < least && checker::audit(&instance, plan, usize::MAX).unwrap().not_maximal == 0 {
                least = report.objective();
            }
        });
        assert_eq!(ours.objective, least, "seed {seed}");
    }
}

#[test]
fn after_a_loss_no_plan_that_places_as_much_moves_less() {
    let mut moved_at_all = 0;
    for seed in 0..40 {
        let mut instance = specimen(Size::TINY, seed);
        let before = solved(&instance, 5_000);
        for (vm, hosts) in instance.vms.iter_mut().zip(&before.plan.place) {
            for (copy, &host) in vm.copies.iter_mut().zip(hosts) {
                copy.current = host;
            }
        }
        let hosts = instance.hosts.len();
        let mut rng = Rng::of(seed, 7);
        instance.hosts[rng.below(hosts as u32) as usize].state = HostState::Down;
        // What a promotion took.
        let smaller = &mut instance.hosts[rng.below(hosts as u32) as usize];
        smaller.memory_mib /= 2;
        smaller.cpu_milli /= 2;
        let ours = solved(&instance, 5_000);
        let ours = checker::check(&instance, &ours.plan).unwrap();
        let (mut least_moved, mut least_unplaced) = (usize::MAX, i64::MAX);
        all_plans(&instance, &mut |_, report| {
            least_unplaced = least_unplaced.min(report.terms.unplaced);
            if report.terms.unplaced <= ours.terms.unplaced {
                least_moved = least_moved.min(report.moved);
            }
        });
        assert_eq!(ours.terms.unplaced, least_unplaced, "seed {seed}");
        assert_eq!(ours.moved, least_moved, "seed {seed}");
        moved_at_all += ours.moved;
    }
    assert!(moved_at_all > 0, "no specimen had anything to move");
}

#[test]
fn a_plan_does_not_depend_on_threads_and_a_seed_repeats_it() {
    for (size, moves) in [(Size::SMALL, 20_000), (Size::LARGE, 20_000)] {
        let instance = specimen(size, 3);
        let plan = |workers: &dyn Workers, seed| {
            let options = Options { moves: Some(moves), seed, ..Options::default() };
            serde_json::to_string(&solve(&instance, &options, workers, &mut |_| ()).plan).unwrap()
        };
        let first = plan(&OneByOne, 1);
        assert!(first == plan(&Pair, 1));
        assert!(first == plan(&OneByOne, 1));
        assert!(first != plan(&OneByOne, 2), "the seed changes nothing");
    }
}

#[test]
fn plans_of_any_size_and_budget_are_accepted() {
    for seed in 0..12 {
        let instance = specimen(Size::SMALL, seed);
        let first = solved(&instance, 0);
        let better = solved(&instance, 30_000);
        assert!(better.objective <= first.objective, "seed {seed}");
    }
    let large = specimen(Size::LARGE, 1);
    assert!(large.copies() > 6_000, "not planned by zones");
    assert!(solved(&large, 100_000).objective < solved(&large, 0).objective);
}

#[test]
fn a_price_is_what_the_plan_costs_more_and_is_named_unless_a_rule_objects() {
    for seed in 0..40 {
        let instance = specimen(Size::SMALL, seed);
        let problem = Problem::new(&instance);
        let mut board = Board::new(&problem);
        let mut rng = Rng::of(seed, 1);
        let (mut priced, mut barred) = (0, 0);
        for _ in 0..300 {
            let id = rng.below(problem.shadows.len() as u32);
            let host = rng.below(problem.sites.len() as u32);
            let (before, _) = board.total(&problem);
            let mut view = board.whole(&problem);
            let from = view.at(id);
            if from == host {
                continue;
            }
            let shadow = &problem.shadows[id as usize];
            let left_out = super::board::View::left_out(shadow);
            let saved = match from {
                NONE => (left_out, 0),
                from => view.relief(shadow, from),
            };
            let same_rack = from != NONE && problem.sites[from as usize].rack == problem.sites[host as usize].rack;
            let moving = view.price(id, from, host);
            view.take(id);
            let placing = view.price(id, NONE, host);
            assert_eq!(placing.is_none(), !objections(&view, id, host).is_empty());
            assert_eq!(placing.is_none(), moving.is_none());
            match moving {
                Some(price) => {
                    assert!(view.put(id, host));
                    let worse = price - saved.0 - if same_rack { 0 } else { saved.1 };
                    assert_eq!(board.total(&problem).0, before + worse, "seed {seed}");
                    priced += 1;
                }
                None => {
                    if from != NONE {
                        view.put(id, from);
                    }
                    assert_eq!(board.total(&problem).0, before);
                    barred += 1;
                }
            }
        }
        assert!(priced > 10 && barred > 10, "seed {seed}: {priced} {barred}");
    }
}

#[test]
fn every_host_is_explained() {
    for seed in 0..10 {
        let instance = specimen(Size::SMALL, seed);
        let outcome = solved(&instance, 20_000);
        for (guest, hosts) in outcome.plan.place.iter().enumerate() {
            for (copy, &host) in hosts.iter().enumerate() {
                let verdicts = explain(&instance, &outcome.plan, guest, copy).unwrap();
                assert_eq!(verdicts.len(), instance.hosts.len());
                let chosen: Vec<i64> =
                    (0..).zip(&verdicts).filter(|(_, verdict)| **verdict == Verdict::Chosen).map(|(h, _)| h).collect();
                assert_eq!(chosen, if host < 0 { vec![] } else { vec![host] });
            }
        }
        assert_eq!(explain(&instance, &outcome.plan, instance.vms.len(), 0), None);
    }
}

#[test]
fn shadows_that_stand_are_left_alone_if_so_asked() {
    for seed in 0..20 {
        let mut instance = specimen(Size::SMALL, seed);
        let before = solved(&instance, 10_000);
        for (i, (vm, hosts)) in instance.vms.iter_mut().zip(&before.plan.place).enumerate() {
            for (copy, &host) in vm.copies.iter_mut().zip(hosts) {
                copy.current = if i % 3 == 0 { -1 } else { host };
            }
        }
        let options = Options { moves: Some(10_000), keep: true, ..Options::default() };
        let after = solve(&instance, &options, &OneByOne, &mut |_| ());
        assert_eq!(checker::check(&instance, &after.plan).unwrap().moved, 0, "seed {seed}");
    }
}

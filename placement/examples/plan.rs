//! Plans an instance: `plan INSTANCE.json --out PLAN.json [--moves N] [--threads N]`.
use std::time::Instant;

use placement::solver::{Options, Stage, Task, Workers, solve};

struct Threads(usize);
impl Workers for Threads {
    fn run(&self, tasks: Vec<Task<'_>>) {
        let queue = std::sync::Mutex::new(tasks.into_iter());
        let work = || loop {
            let Some(task) = queue.lock().unwrap().next() else { break };
            task();
        };
        std::thread::scope(|scope| {
            for _ in 1..self.0 {
                scope.spawn(work);
            }
            work();
        });
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let get = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).cloned();
    let t = Instant::now();
    let instance = placement::instance::parse(&std::fs::read(&args[1]).unwrap()).unwrap();
    println!("read {:.3}", t.elapsed().as_secs_f64());
    let options = Options {
        moves: get("--moves").map(|x| x.parse().unwrap()),
        seed: get("--seed").map_or(1, |x| x.parse().unwrap())

    };
    let t = Instant::now();
    let plan = solve(
        &instance,
        &options,
        &Threads(get("--threads").map_or(2, |x| x.parse().unwrap())),
        &mut |stage: Stage| println!("{:.3} {stage:?}", t.elapsed().as_secs_f64()),
    );
    println!("{:.3} done", t.elapsed().as_secs_f64());
    if let Some(out) = get("--out") {
        std::fs::write(out, serde_json::to_vec(&plan.plan).unwrap()).unwrap();
    }
}

//! Sources, targets, guests and links in virtual time, with faults: lost and slow connections, agents that crash
//! between any two effects (and within one), destroyed images, failed cuts, promotions, primaries that do not know
//! yet that they were replaced. Deterministic: a failing seed is printed; run it again with
//! `VMSYNC_SEED=N cargo test -p vmsync --test simulation`. `VMSYNC_SEEDS=N` runs N seeds instead of the default.

mod sim;

use sim::World;

const DEFAULT_SEEDS: u64 = 500;

#[test]
fn shadows_never_lie() {
    let number = env_number;
    if let Some(seed) = number("VMSYNC_SEED") {
        World::new(seed, true).run();
        return;
    }
    let seeds = number("VMSYNC_SEEDS").unwrap_or(DEFAULT_SEEDS);
    let mut seen = sim::Seen::default();
    for seed in 0..seeds {
        let run = std::panic::AssertUnwindSafe(|| World::new(seed, false).run());
        match std::panic::catch_unwind(run) {
            Ok(world) => seen.add(&world),
            Err(panic) => {
                eprintln!("failing seed: {seed} (run it alone with VMSYNC_SEED={seed})");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{seeds} seeds, {} faults, nothing lost: {seen:?}", seen.faults());
    // A simulation that does not reach what it is for proves nothing.
    seen.assert_everything_happened(seeds);
}

/// Its disk had filled up when the primary greeted: it waited for an image for ever.
#[test]
fn seed_1351_a_full_disk_at_the_greeting() {
    World::without_frames(1351).run();
}

/// A way back that could not be read left what had been kept for it alone.
#[test]
fn seed_2064_a_refused_way_back() {
    World::without_frames(2064).run();
}

/// A length was damaged on the way: the shadow waited for bytes that never came, and what else was sent to it passed for a
/// sign of its life.
#[test]
fn seed_3620_a_shadow_that_waits_for_the_rest_of_a_message() {
    World::without_frames(3620).run();
}

#[allow(clippy::disallowed_methods)] // the test's own parameters
fn env_number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

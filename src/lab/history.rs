//! Was a register linearizable? Checks what clients of one register saw, in the way of Wing and Gong, with a memory of
//! states that led nowhere (Lowe).
//!
//! A call takes effect at one moment between its beginning and its end. The search puts calls in an order one by one: next
//! may come any that began before the first of the remaining ones ended. A write without an answer may have taken effect
//! at any later time, or never; each of those doubles what has to be tried, so there may be only a few.

use std::collections::{BTreeSet, HashSet};

/// What a client asked for, and a read's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    Write(u64),
    Read(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Nanoseconds of one clock.
    pub began: u64,
    /// None: there was no answer. Reads without one say nothing and do not belong here.
    pub ended: Option<u64>,
    pub act: Act,
}

/// How far an order has come: calls before `base` are in it, and those in `beyond`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    base: usize,
    beyond: BTreeSet<usize>,
    value: u64,
}

impl State {
    fn with(&self, call: usize, value: u64) -> Self {
        let mut next = Self { value, ..self.clone() };
        next.beyond.insert(call);
        while next.beyond.remove(&next.base) {
            next.base += 1;
        }
        next
    }
}

/// Whether there is an order of the calls that explains every answer, from a register that holds `initial`.
pub fn is_linearizable(mut calls: Vec<Call>, initial: u64) -> bool {
    calls.sort_by_key(|call| call.began);
    let end = |call: &Call| call.ended.unwrap_or(u64::MAX);
    let mut stack = vec![State { base: 0, beyond: BTreeSet::new(), value: initial }];
    let mut seen = HashSet::new();
    while let Some(state) = stack.pop() {
        if !seen.insert(state.clone()) {
            continue;
        }
        let remaining = || (state.base..calls.len()).filter(|number| !state.beyond.contains(number));
        // Beginnings grow: behind the first that begins too late nothing can end earlier.
        let mut first_end = u64::MAX;
        for number in remaining() {
            if calls[number].began > first_end {
                break;
            }
            first_end = first_end.min(end(&calls[number]));
        }
        if first_end == u64::MAX {
            return true;
        }
        let mut candidates: Vec<usize> = remaining().take_while(|number| calls[*number].began <= first_end).collect();
        // The last one put on the stack is tried first: those that end first most likely came first.
        candidates.sort_by_key(|number| std::cmp::Reverse(end(&calls[*number])));
        for number in candidates {
            match calls[number].act {
                Act::Write(value) => stack.push(state.with(number, value)),
                Act::Read(value) if value == state.value => stack.push(state.with(number, value)),
                Act::Read(_) => {}
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call(began: u64, ended: u64, act: Act) -> Call {
        Call { began, ended: Some(ended), act }
    }

    #[test]
    fn known_histories() {
        use Act::{Read, Write};
        let lost = |began, act| Call { began, ended: None, act };
        for (what, expected, calls) in [
            ("nothing", true, vec![]),
            ("one after the other", true, vec![call(0, 1, Write(1)), call(2, 3, Read(1))]),
            ("a write that was undone", false, vec![call(0, 1, Write(1)), call(2, 3, Read(0))]),
            (
                "during a write both are right",
                true,
                vec![call(0, 9, Write(1)), call(1, 2, Read(0)), call(3, 4, Read(1))],
            ),
            ("there and gone", false, vec![call(0, 9, Write(1)), call(1, 2, Read(1)), call(3, 4, Read(0))]),
            ("never written", false, vec![call(0, 9, Write(1)), call(1, 2, Read(7))]),
            ("a write without answer may be", true, vec![lost(0, Write(1)), call(5, 6, Read(0)), call(7, 8, Read(1))]),
            ("but not come and go", false, vec![lost(0, Write(1)), call(5, 6, Read(1)), call(7, 8, Read(0))]),
            (
                "two readers that disagree on the order of two writes",
                false,
                vec![call(0, 9, Write(1)), call(0, 9, Write(2)), call(10, 11, Read(1)), call(12, 13, Read(2))],
            ),
            (
                "a failover to an older state",
                false,
                vec![
                    call(0, 1, Write(1)),
                    call(2, 3, Write(2)),
                    call(4, 5, Read(2)),
                    call(100, 101, Read(1)),
                    call(102, 103, Write(3)),
                ],
            ),
        ] {
            assert_eq!(is_linearizable(calls, 0), expected, "{what}");
        }
    }

    /// Calls of some clients, each with a moment at which it takes effect, on a real register.
    fn right_history() -> impl Strategy<Value = Vec<Call>> {
        let one = (0..200u64, 0..30u64, 0..30u64, prop::option::weighted(0.5, Just(())), prop::bool::weighted(0.95));
        prop::collection::vec(one, 0..24).prop_map(|plans| {
            let mut plans: Vec<_> = plans.into_iter().enumerate().collect();
            plans.sort_by_key(|(number, (at, ..))| (*at, *number));
            let mut value = 0;
            let calls = plans.into_iter().map(|(number, (at, before, after, write, answered))| {
                let (began, ended) = (at.saturating_sub(before), at + after);
                let act = match write {
                    Some(()) => {
                        value = number as u64 + 1;
                        Act::Write(value)
                    }
                    None => Act::Read(value),
                };
                let ended = (answered || write.is_none()).then_some(ended);
                Call { began, ended, act }
            });
            calls.collect()
        })
    }

    /// All orders, for few calls.
    fn by_brute_force(calls: &[Call], left: &mut Vec<usize>, value: u64) -> bool {
        if left.iter().all(|number| calls[*number].ended.is_none()) {
            return true;
        }
        (0..left.len()).any(|at| {
            let number = left.remove(at);
            let next = match calls[number].act {
                Act::Write(written) => Some(written),
                Act::Read(read) => (read == value).then_some(value),
            };
            let in_time = left.iter().all(|other| calls[*other].ended.is_none_or(|ended| calls[number].began <= ended));
            let found = in_time && next.is_some_and(|value| by_brute_force(calls, left, value));
            left.insert(at, number);
            found
        })
    }

    fn any_history() -> impl Strategy<Value = Vec<Call>> {
        let one = (0..12u64, 0..8u64, 0..3u64, any::<bool>(), prop::bool::weighted(0.8));
        prop::collection::vec(one, 0..6).prop_map(|calls| {
            let calls = calls.into_iter().map(|(began, took, value, write, answered)| Call {
                began,
                ended: (answered || !write).then_some(began + took),
                act: if write { Act::Write(value) } else { Act::Read(value) },
            });
            calls.collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        #[test]
        fn what_a_real_register_did_is_linearizable(calls in right_history()) {
            prop_assert!(is_linearizable(calls, 0));
        }

        #[test]
        fn it_agrees_with_trying_all_orders(calls in any_history()) {
            let mut left = (0..calls.len()).collect();
            prop_assert_eq!(is_linearizable(calls.clone(), 0), by_brute_force(&calls, &mut left, 0));
        }

        #[test]
        fn a_write_that_all_saw_and_that_is_undone_is_found(calls in right_history(), at in any::<prop::sample::Index>()) {
            // After everything: a write that ends, and a read of what was before.
            let writes: Vec<u64> = calls.iter().filter_map(|call| match call.act {
                Act::Write(value) if call.ended.is_some() => Some(value),
                _ => None,
            }).collect();
            prop_assume!(!writes.is_empty());
            let stale = writes[at.index(writes.len())];
            let mut calls = calls;
            calls.retain(|call| call.ended.is_some());
            calls.push(call(1_000, 1_001, Act::Write(1 << 40)));
            calls.push(call(1_002, 1_003, Act::Read(stale)));
            prop_assert!(!is_linearizable(calls, 0));
        }
    }
}

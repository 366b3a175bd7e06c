//! The rules of primaryship: who may run a guest, by terms alone.
//!
//! A guest's term is the number of its newest promotion. The manager hands terms out, each once, and writes one down
//! before it says it; an agent writes down the highest it met. Three rules follow, and all of them compare two terms:
//!
//! 1. A host may run a guest if its own record says primary and it knows of no higher term ([`may_run`]).
//! 2. A host obeys an order or a stream of a term if it knows of no higher one ([`obeys`]).
//! 3. Whoever meets a higher term than its own primaryship stops its copy ([`must_stop`]).
//!
//! What terms cannot do: a primary that is cut off meets no higher term and runs on. That is where leases come in: the
//! right to run until a time, renewed by the manager, which [`may_run`] will ask for besides the term; and fencing,
//! which makes sure before a promotion ([`crate::guardian`], where a host is counted as down).

use crate::units::Term;

/// What a host's own record says it is for a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Primary,
    Shadow,
    /// Was primary; another host has a higher term.
    Retired,
}

/// Why a host may not run a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MayNotRun {
    #[error("it is primary elsewhere with a newer term ({newer}, here {own})")]
    Superseded { own: Term, newer: Term },
    #[error("it became primary elsewhere after term {own} of this host")]
    Retired { own: Term },
    #[error("this host keeps a shadow of it (term {own}), which only a promotion starts")]
    IsShadow { own: Term },
}

/// Rule 1. `newest`: the highest term the asking host knows of.
pub fn may_run(role: Role, own: Term, newest: Term) -> Result<(), MayNotRun> {
    match role {
        _ if newest > own => Err(MayNotRun::Superseded { own, newer: newest }),
        Role::Primary => Ok(()),
        Role::Shadow => Err(MayNotRun::IsShadow { own }),
        Role::Retired => Err(MayNotRun::Retired { own }),
    }
}

/// Rule 2.
pub fn obeys(known: Term, ordered: Term) -> bool {
    ordered >= known
}

/// Rule 3.
pub fn must_stop(role: Role, own: Term, met: Term) -> bool {
    role == Role::Primary && met > own
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two hosts can both be allowed to run only if one does not know what the other does.
    #[test]
    fn of_two_hosts_that_know_the_same_at_most_one_may_run() {
        let roles = [Role::Primary, Role::Shadow, Role::Retired];
        for (a, b) in (0..4u64).flat_map(|a| (0..4u64).map(move |b| (a, b))).filter(|(a, b)| a != b) {
            let newest = Term(a.max(b));
            for (role_a, role_b) in roles.iter().flat_map(|x| roles.iter().map(move |y| (*x, *y))) {
                let both = may_run(role_a, Term(a), newest).is_ok() && may_run(role_b, Term(b), newest).is_ok();
                assert!(!both, "{role_a:?} {a} and {role_b:?} {b}");
            }
        }
    }

    #[test]
    fn a_higher_term_stops_a_primary_and_is_obeyed() {
        assert!(must_stop(Role::Primary, Term(3), Term(4)) && !must_stop(Role::Primary, Term(3), Term(3)));
        assert!(!must_stop(Role::Shadow, Term(3), Term(4)));
        assert!(obeys(Term(3), Term(3)) && obeys(Term(3), Term(4)) && !obeys(Term(4), Term(3)));
    }
}

//! One source, one target, nothing goes wrong: first copy, epochs, verification, reconnect, promotion.

mod support;

use support::{Pair, guest_layout};
use vmsync::source::{PeerState, PeerVerdict, SourceEffect, SourceEvent};
use vmsync::target::TargetEvent;
use vmsync::{Epoch, Term};

#[test]
fn first_copy_then_epochs_then_promotion() {
    let mut pair = Pair::new(guest_layout());
    pair.connect();
    pair.run_until_following();
    for round in 0..20 {
        pair.guest.dirty(round, 37);
        pair.cut();
        assert_eq!(pair.image.pages, pair.guest.at_cut, "round {round}");
    }
    let (commit, state) = pair.promote(Term::new(2), pair.source.last_epoch()).expect("committed");
    assert_eq!(commit.epoch, pair.source.last_epoch());
    assert_eq!(&state.bytes[..], &pair.guest.device_state()[..]);
    assert_eq!(pair.image.pages, pair.guest.at_cut);
}

#[test]
fn a_lost_connection_costs_only_what_is_missing() {
    let mut pair = Pair::new(guest_layout());
    pair.connect();
    pair.run_until_following();
    let first_copy = pair.source.totals().raw_bytes;
    pair.disconnect();
    pair.guest.dirty(7, 5);
    pair.connect();
    pair.run_until_following();
    assert_eq!(pair.image.pages, pair.guest.at_cut);
    let again = pair.source.totals().raw_bytes - first_copy;
    assert!(again <= 20 * 4096, "{again} bytes were sent again");
}

#[test]
fn verification_is_equal_until_the_tracker_misses_a_page() {
    let mut pair = Pair::new(guest_layout());
    pair.connect();
    pair.run_until_following();
    pair.guest.dirty(1, 20);
    let report = pair.verify();
    assert!(report.peers.iter().all(|(_, v)| v.is_equal()), "{report:?}");
    let missed = pair.guest.write_behind_the_trackers_back(3);
    let report = pair.verify();
    let [(_, PeerVerdict::Compared { pages_different: 1, first_difference, device_state_equal: true, .. })] =
        report.peers[..]
    else {
        panic!("not found: {report:?}")
    };
    assert_eq!(first_difference, Some(missed));
}

#[test]
fn an_old_primary_learns_that_it_is_superseded() {
    let mut pair = Pair::new(guest_layout());
    pair.connect();
    pair.run_until_following();
    assert!(pair.promote(Term::new(5), Epoch::NONE).is_some());
    pair.settle();
    let superseded =
        |e: &SourceEffect| matches!(e, SourceEffect::Superseded { newer_term, .. } if newer_term.get() == 5);
    assert!(pair.source_log.iter().any(superseded), "told as it happened");
    pair.source_log.clear();
    pair.connect();
    pair.settle();
    assert!(pair.source_log.iter().any(superseded), "and told again when it comes back");
    assert_eq!(pair.state(), PeerState::Disconnected);
}

#[test]
fn garbage_closes_the_connection_and_nothing_else() {
    let mut pair = Pair::new(guest_layout());
    pair.connect();
    pair.run_until_following();
    let commit = pair.target.committed();
    let error = vmsync::wire::WireError::NotOurs(*b"GET ");
    pair.target_event(TargetEvent::Unreadable { conn: vmsync::target::ConnId(999), error: error.clone() });
    assert_eq!(pair.state(), PeerState::Following);
    pair.source_event(SourceEvent::Unreadable { peer: pair.peer.clone(), error });
    assert_eq!(pair.state(), PeerState::Disconnected);
    assert_eq!(pair.target.committed(), commit);
}

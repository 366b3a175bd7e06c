//! With libvirt's own user for QEMU, not root: protected, equal, and taken over when QEMU is killed.

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use support::{BACK_WITHIN, Bed, GUEST};
use virt_shadow::lab::QemuUser;

#[test]
fn a_guest_of_libvirts_default_user_survives_the_loss_of_its_qemu() {
    let bed = Bed::raise("user", 3, 2, QemuUser::LibvirtQemu);
    let qemu = bed.qemu("host1");
    let status = std::fs::read_to_string(format!("/proc/{qemu}/status")).unwrap();
    let uid = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert!(!uid.split_whitespace().any(|id| id == "0"), "QEMU runs as root: {uid}");
    bed.enable();
    let term = bed.wait_protected().term;
    bed.assert_equal();

    let killed = Instant::now();
    kill(qemu, Signal::SIGKILL).unwrap();
    let view = bed.fleet.wait(GUEST, "a newer term", BACK_WITHIN, |view| view.term > term).unwrap();
    let answered = bed.watch.wait_answer_after(killed + Duration::from_millis(20), BACK_WITHIN).unwrap();
    let promotion = bed.fleet.last_promotion(GUEST).unwrap();
    println!("answers {answered:?} after the kill, promoted within {} us, {promotion:?}", promotion.took_us);
    assert_ne!(promotion.host, "host1");
    assert_eq!(view.term, term + 1);
    // Two hosts are left for shadows beside the new primary.
    let view = bed.wait_protection_goes_on();
    assert_eq!((view.primary.host.as_str(), view.shadows.len()), (promotion.host.as_str(), 2));
    bed.assert_equal();
    bed.assert_guest_unharmed();
}

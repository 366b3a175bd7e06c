//! A guest goes back to before a mistake: to an epoch that its shadows keep; and forward again, if that was one.

mod support;

use std::time::{Duration, Instant};

use support::{Bed, GUEST};
use virt_shadow::api::types::{Keep, KeptEpoch};
use virt_shadow::lab::{GuestReply, QemuUser};

/// By the guest's clock: long enough that nobody takes one moment for the other.
const MISTAKE_LASTS_MS: u64 = 3_000;
const KEEP: Keep = Keep { epochs: 0, age_ms: 600_000, mib: 256 };

/// Writes a note into the guest; an epoch that every shadow has and that holds it, and the guest as it was soon after.
fn noted(bed: &Bed, note: &str) -> (u64, GuestReply) {
    let mut client = bed.lab.guest_client(bed.guest.ip).unwrap();
    assert_eq!(client.ask(&format!("note {note}")).unwrap(), format!("note {note}"));
    // A comparison is of an epoch that is cut for it.
    let epoch = bed.assert_equal().epoch;
    (epoch, client.status().unwrap())
}

fn kept(bed: &Bed) -> Vec<KeptEpoch> {
    bed.fleet.epochs(GUEST).unwrap().into_iter().flat_map(|shadow| shadow.epochs).collect()
}

/// The guest was brought to the epoch of that note; `then`: the guest soon after that epoch.
fn assert_back(bed: &Bed, note: &str, then: &GuestReply, ordered: Instant) -> GuestReply {
    let mut client = bed.lab.wait_guest(GUEST).and_then(|_| bed.lab.guest_client(bed.guest.ip)).unwrap();
    assert_eq!(client.ask("note").unwrap(), format!("note {note}"));
    let now = client.status().unwrap();
    let since_ms = ordered.elapsed().as_millis() as u64;
    assert_eq!((&now.boot, now.errors), (&then.boot, 0), "{now:?}");
    // By the guest's own clock it has lived no longer than this since then.
    assert!(now.uptime_ms <= then.uptime_ms + since_ms, "{now:?} from {then:?} in {since_ms} ms");
    client.verify().unwrap();
    println!("back at {note:?}: counter {} then, {} now, {since_ms} ms after the order", then.counter, now.counter);
    now
}

#[test]
fn a_guest_goes_back_and_forth_between_epochs() {
    let _lab = support::one_lab();
    let bed = Bed::raise("rewind", 3, 2, QemuUser::Root);
    let (code, _, errors) =
        bed.cli("host1", &["enable", GUEST, "--shadows", "2", "--keep", "10min,256M", "--wait", "120"]);
    assert_eq!(code, Some(0), "{errors}");
    assert_eq!(bed.wait_protected().keep, KEEP);

    let (before, then) = noted(&bed, "before the mistake");
    let mut client = bed.lab.guest_client(bed.guest.ip).unwrap();
    while client.status().unwrap().uptime_ms < then.uptime_ms + MISTAKE_LASTS_MS {
        std::thread::sleep(Duration::from_millis(100));
    }
    let (after, then_after) = noted(&bed, "after the mistake");
    assert!(then_after.counter > then.counter);

    // What is kept outlasts the agent that keeps it.
    let shadow = bed.shadow_hosts()[0].clone();
    bed.kill_agent(&shadow);
    bed.wait_protection_goes_on();
    bed.assert_equal();
    let (code, list, errors) = bed.cli("host2", &["epochs", GUEST]);
    assert_eq!(code, Some(0), "{errors}");
    let lines = |epoch: u64| list.lines().filter(|l| l.split_whitespace().nth(1) == Some(&epoch.to_string())).count();
    assert_eq!((lines(before), lines(after)), (2, 2), "{list}");

    // An epoch that nobody has, and no leave to stop a primary that answers: nothing happens.
    for (options, words) in
        [(&["--epoch", "999999999", "--force"][..], "not kept"), (&["--epoch", "999999998"], "not kept")]
    {
        let (code, _, errors) = bed.cli("host2", &[&["promote", GUEST][..], options].concat());
        assert!(code == Some(1) && errors.contains(words), "{errors}");
    }
    let (code, _, errors) = bed.cli("host2", &["promote", GUEST, "--epoch", &before.to_string()]);
    assert!(code == Some(1) && errors.contains("--force"), "{errors}");
    bed.assert_guest_unharmed();

    let ordered = Instant::now();
    let (code, said, errors) = bed.cli("host2", &["promote", GUEST, "--epoch", &before.to_string(), "--force"]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(said.contains(&before.to_string()), "{said}");
    assert_back(&bed, "before the mistake", &then, ordered);
    let view = bed.wait_protection_goes_on();
    assert_ne!(view.primary.host, "host1");
    bed.assert_equal();
    assert!(view.capture.epoch > 1_000_000, "new epochs are told from those of the other past: {}", view.capture.epoch);

    // The shadow that followed has both pasts: the way back can be undone.
    let again = kept(&bed);
    assert!(again.iter().any(|e| e.epoch == after) && again.iter().any(|e| e.epoch > 1_000_000), "{again:?}");
    let ordered = Instant::now();
    let report = bed.fleet.go_back(GUEST, after).unwrap();
    assert_eq!(report.epoch, after);
    assert_back(&bed, "after the mistake", &then_after, ordered);
    bed.wait_protection_goes_on();
    bed.assert_equal();
}

//! Bits that flip where a shadow keeps what it has: in the journal between an epoch's commit and its place in the image, in
//! the record of what the image holds, in former epochs. All of it is found, and nothing of it is ever promoted.

mod support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{BACK_WITHIN, Bed, GUEST, Random, one_lab};
use virt_shadow::lab::{GuestOptions, LabOptions, QemuUser};

const SHADOW: &str = "host2";
/// A commit record's head, and its length with the head.
const COMMIT_HEAD: [u8; 8] = [3, 0, 0, 0, 36, 0, 0, 0];
const COMMIT_LEN: usize = 52;
const JOURNAL_HEADER_LEN: usize = 40;
const STATE_HEAD_LEN: u64 = 24;

/// Where the agent `agent` keeps the files of the shadow.
fn folder(bed: &Bed, agent: Pid) -> PathBuf {
    let uuid = bed.lab.virsh(SHADOW, &["domuuid", GUEST]).unwrap();
    Path::new(&format!("/proc/{agent}/root/run/virt-shadow/targets")).join(uuid.trim())
}

fn flip(path: &Path, at: u64, bit: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
}

/// Flips a bit while the agent stands still, which is then killed.
fn flip_and_kill(path: &Path, at: u64, bit: u64, agent: Pid) {
    flip(path, at, bit);
    kill(agent, Signal::SIGKILL).unwrap();
}

fn alarms(bed: &Bed) -> Vec<String> {
    let events = bed.fleet.events().unwrap_or_default().into_iter();
    events.filter(|event| event.kind == "shadow-damaged" && event.level == "alarm").map(|event| event.message).collect()
}

fn wait_alarms(bed: &Bed, count: usize) -> String {
    let began = Instant::now();
    while alarms(bed).len() < count {
        assert!(began.elapsed() < BACK_WITHIN, "what was damaged was not found");
        std::thread::sleep(Duration::from_millis(50));
    }
    alarms(bed).pop().unwrap()
}

/// Stops the shadow's agent when an epoch is sealed in its journal and not yet, or not wholly, in its image.
fn stop_behind_a_commit(bed: &Bed, random: &mut Random) -> (Pid, PathBuf, Vec<u8>) {
    let agent = bed.service(SHADOW, "virtshadowd");
    let path = folder(bed, agent).join("journal");
    let began = Instant::now();
    loop {
        random.sleep_below_ms(12);
        kill(agent, Signal::SIGSTOP).unwrap();
        // Until all of its threads stand still.
        std::thread::sleep(Duration::from_millis(2));
        let journal = fs::read(&path).unwrap();
        if journal.len() >= COMMIT_LEN && journal[journal.len() - COMMIT_LEN..].starts_with(&COMMIT_HEAD) {
            return (agent, path, journal);
        }
        kill(agent, Signal::SIGCONT).unwrap();
        assert!(began.elapsed() < BACK_WITHIN, "no epoch was met between its commit and its place in the image");
    }
}

#[test]
fn a_flipped_bit_is_found_and_nothing_of_it_is_promoted() {
    let _one = one_lab();
    let mut random = Random::from_env();
    let options = LabOptions { hosts: 2, racks: 2, qemu_user: QemuUser::Root, ..LabOptions::for_test("damage") };
    let workload = "dirty:2000:32".parse().unwrap();
    let disks = vec!["64".parse().unwrap()];
    let guest = GuestOptions { memory_mib: 160, workload, disks, ..GuestOptions::new(GUEST, "host1") };
    let bed = Bed::raise_guest(&options, 1, &guest);
    let enable = ["enable", GUEST, "--interval", "20", "--keep", "10min,256M", "--wait", "120"];
    let (code, _, errors) = bed.cli("host1", &enable);
    assert_eq!(code, Some(0), "{errors}");
    bed.wait_protected();

    // In the journal: what was acknowledged may be in the image in part.
    for round in 1..=2 {
        let (agent, path, journal) = stop_behind_a_commit(&bed, &mut random);
        let at = JOURNAL_HEADER_LEN as u64 + random.below((journal.len() - JOURNAL_HEADER_LEN) as u64);
        flip_and_kill(&path, at, random.below(8), agent);
        let message = wait_alarms(&bed, round);
        println!("byte {at} of a journal of {}: {message}", journal.len());
        assert!(message.contains("journal"), "{message}");
        bed.wait_protection_goes_on();
        bed.assert_equal_disks();
    }

    // In the record of what the image holds.
    let agent = bed.service(SHADOW, "virtshadowd");
    let path = folder(&bed, agent).join("target");
    kill(agent, Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(2));
    // Behind its head: another version is another matter.
    let at = STATE_HEAD_LEN + random.below(fs::metadata(&path).unwrap().len() - STATE_HEAD_LEN);
    flip_and_kill(&path, at, random.below(8), agent);
    let message = wait_alarms(&bed, 3);
    println!("byte {at} of the state record: {message}");
    bed.wait_protection_goes_on();
    bed.assert_equal_disks();

    // In former epochs: there is no way back, and the guest goes on where it is.
    std::thread::sleep(Duration::from_secs(1));
    let kept = bed.fleet.epochs(GUEST).unwrap().remove(0).epochs;
    let epoch = kept.iter().map(|kept| kept.epoch).min().unwrap();
    for record in fs::read_dir(folder(&bed, bed.service(SHADOW, "virtshadowd")).join("undo")).unwrap() {
        let path = record.unwrap().path();
        // One that is too old by now is removed meanwhile, and the newest may be under way.
        let len = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        if len > 0 {
            flip(&path, random.below(len), random.below(8));
        }
    }
    let refused = bed.fleet.go_back(GUEST, epoch).unwrap_err().to_string();
    println!("back to epoch {epoch}: {refused}");
    assert!(refused.contains("undo record"), "{refused}");
    let view = bed.wait_protection_goes_on();
    assert_eq!(view.primary.host, "host1");
    bed.assert_guest_unharmed();

    // The last good epoch is promoted.
    bed.assert_equal_disks();
    let cut = bed.lab.power_cut("host1").unwrap();
    bed.watch.wait_answer_after(cut + Duration::from_millis(60), BACK_WITHIN).expect("the guest answers");
    let mut client = bed.lab.guest_client(bed.guest.ip).unwrap();
    client.verify().unwrap();
    client.records().unwrap();
    bed.assert_guest_unharmed();
}

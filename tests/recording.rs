//! Epochs that an agent records for measuring codecs are what cuts brought, whole and in order, and nobody else's to read.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use virt_shadow::lab::fleet::Fleet;
use virt_shadow::lab::{GuestOptions, Lab, LabOptions};
use vmsync::codec::capture::{CaptureReader, CapturedEpoch};
use vmsync::units::{Page, PageAddr};

const EPOCHS: u64 = 40;
/// Of the guest's region.
const REGION_PAGES: u64 = 8 * 256;

/// As `fixtures/guest/workload.rs` has it.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Number and generation of the page of the guest's region whose head, proven by its key, lies in `page`: the guest's
/// allocator need not begin the region at a page.
fn of_region(page: &Page, salt: u64) -> Option<(u64, u64)> {
    let words: Vec<u64> = page.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    let is_head = |head: &&[u64]| head[0] < REGION_PAGES && head[2] == mix(salt ^ (head[0] << 40) ^ head[1]);
    words.windows(3).find(is_head).map(|head| (head[0], head[1]))
}

fn read(path: &Path) -> Vec<CapturedEpoch> {
    let mut reader = CaptureReader::new(BufReader::new(File::open(path).unwrap())).unwrap();
    std::iter::from_fn(|| reader.next_epoch().unwrap()).collect()
}

#[test]
fn recorded_epochs_are_what_cuts_brought() {
    let dir = std::env::temp_dir().join(format!("virt-shadow-recording-{}", std::process::id()));
    let options = LabOptions { hosts: 2, racks: 2, record_dir: Some(dir.clone()), ..LabOptions::for_test("record") };
    let lab = Lab::up(&options).unwrap();
    let fleet = Fleet::of(&lab).unwrap();
    fleet.wait_hosts(2, Duration::from_secs(20)).unwrap();
    let workload = "dirty:1000:8".parse().unwrap();
    let guest =
        lab.guest(&GuestOptions { memory_mib: 128, workload, ..GuestOptions::new("web", "host1") }, true).unwrap();
    let boot = lab.guest_client(guest.ip).unwrap().status().unwrap().boot;
    let salt = u64::from_str_radix(&boot, 16).unwrap();

    fleet.enable("web", "host1", 1, Duration::from_millis(50)).unwrap();
    let first = fleet.wait_protected("web", Duration::from_secs(60)).unwrap().capture.epoch;
    let enough = |view: &virt_shadow::api::types::GuestView| view.capture.epoch >= first + EPOCHS;
    fleet.wait("web", "enough epochs", Duration::from_secs(60), enough).unwrap();
    fleet.disable("web").unwrap();

    let path = dir.join("web-50ms-1.capture");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    // The last epochs are written after the guest is no longer protected.
    let (began, mut size) = (Instant::now(), 0);
    while fs::metadata(&path).unwrap().len() > size {
        assert!(began.elapsed() < Duration::from_secs(30), "the file still grows");
        size = fs::metadata(&path).unwrap().len();
        std::thread::sleep(Duration::from_millis(500));
    }
    let epochs = read(&path);
    fs::remove_dir_all(&dir).unwrap();

    let (memory, cuts) = epochs.split_first().unwrap();
    let region = memory.pages.iter().filter(|(_, page)| of_region(page, salt).is_some()).count() as u64;
    assert!(region >= REGION_PAGES, "{region} pages of the region in {} pages of memory", memory.pages.len());
    assert!(cuts.len() as u64 > EPOCHS, "{} epochs", cuts.len());
    let mut newest: HashMap<PageAddr, u64> = HashMap::new();
    let mut written = 0;
    for pair in cuts.windows(2) {
        assert!(pair[1].epoch == pair[0].epoch + 1 && pair[1].at_us > pair[0].at_us, "epochs are in order");
        assert!(!pair[0].device_state.is_empty());
    }
    for (addr, page) in cuts.iter().flat_map(|cut| cut.pages.iter()) {
        let Some((number, generation)) = of_region(page, salt) else { continue };
        written += 1;
        let before = newest.insert(addr, generation).unwrap_or(0);
        assert!(before <= generation, "page {number} went back from generation {before} to {generation}");
    }
    assert!(written > EPOCHS * 25, "{written} pages of the region in {} epochs", cuts.len());
}

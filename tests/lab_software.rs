//! Guests that run real software: their load runs, clients outside reach them.
//!
//! Needs root, and the packages: downloaded the first time (180 MB in all), so these do not run by themselves:
//! `cargo test --test lab_software -- --ignored`

use std::io::{Read, Write};
use std::time::Duration;

use virt_shadow::lab::{GuestOptions, Lab, LabOptions, StartedGuest};

fn lab(name: &str) -> Lab {
    assert!(nix::unistd::geteuid().is_root(), "tests of the lab make namespaces and bridges: run them as root");
    Lab::up(&LabOptions { daemons: false, hosts: 1, racks: 1, ..LabOptions::for_test(name) }).unwrap()
}

fn start(lab: &Lab, workload: &str) -> StartedGuest {
    let mut options = GuestOptions::new(workload, "host1");
    options.workload = workload.parse().unwrap();
    options.memory_mib = options.workload.default_memory_mib(false);
    lab.guest(&options, true).unwrap()
}

/// Waits until the guest has done more than at first, without a fault.
fn works(lab: &Lab, guest: &StartedGuest) {
    let mut client = lab.guest_client(guest.ip).unwrap();
    let first = client.status().unwrap();
    for _ in 0..120 {
        std::thread::sleep(Duration::from_millis(500));
        let now = client.status().unwrap();
        assert_eq!(now.errors, 0, "{now:?}");
        if now.work > first.work {
            return;
        }
    }
    panic!("{} does not work: {first:?}", guest.name);
}

/// What a service of the guest answers to these bytes, at least `at_least` of it.
fn ask(lab: &Lab, guest: &StartedGuest, port: u16, question: &[u8], at_least: usize) -> Vec<u8> {
    let mut stream = lab.connect_from_client(guest.ip, port).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(question).unwrap();
    let mut answer = vec![0; at_least];
    stream.read_exact(&mut answer).unwrap();
    answer
}

#[test]
#[ignore = "downloads packages"]
fn redis_is_under_load_and_serves_clients() {
    let lab = lab("redis");
    let guest = start(&lab, "redis");
    works(&lab, &guest);
    assert_eq!(ask(&lab, &guest, 6379, b"INCR lab\r\nINCR lab\r\n", 8), b":1\r\n:2\r\n");
}

#[test]
#[ignore = "downloads packages"]
fn postgres_is_under_load_and_serves_clients() {
    let lab = lab("postgres");
    let guest = start(&lab, "postgres");
    works(&lab, &guest);
    // The startup message of protocol 3.0; the answer is AuthenticationOk, of 8 bytes with 0 in it.
    let parameters = b"user\0postgres\0database\0bench\0\0";
    let length = (8 + parameters.len()) as u32;
    let hello = [&length.to_be_bytes()[..], &196_608u32.to_be_bytes(), parameters].concat();
    assert_eq!(ask(&lab, &guest, 5432, &hello, 9), b"R\0\0\0\x08\0\0\0\0");
}

#[test]
#[ignore = "downloads packages"]
fn gcc_compiles() {
    let lab = lab("gcc");
    let guest = start(&lab, "gcc");
    works(&lab, &guest);
}

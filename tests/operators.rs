//! What operators do to a guest with virsh while it is protected: followed, re-synced or refused with a reason; the
//! guest is never left paused, no shadow lies afterwards, and nothing is promoted. The table of it, with the reasons,
//! is docs/operations-while-protected.md.

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use support::{BACK_WITHIN, Bed, GUEST};
use virt_shadow::api::types::{GuestState, GuestView};
use virt_shadow::lab::{GuestReply, QemuUser};

const HOSTS: u8 = 4;

struct Operator {
    bed: Bed,
    /// Where the guest runs.
    at: String,
}

impl Operator {
    fn virsh(&self, arguments: &[&str]) -> String {
        self.bed.lab.virsh(&self.at, arguments).unwrap_or_else(|error| panic!("virsh {arguments:?}: {error}"))
    }

    fn status(&self) -> GuestReply {
        self.bed.lab.wait_guest(GUEST).unwrap()
    }

    fn domain_state(&self) -> String {
        // A cut shows as paused for a few milliseconds, and on a busy machine that is when others get to ask.
        let asked = Instant::now();
        loop {
            let state = self.virsh(&["domstate", GUEST]);
            if state.trim() != "paused" || asked.elapsed() > Duration::from_secs(10) {
                return state.trim().to_owned();
            }
            std::thread::sleep(Duration::from_millis(23));
        }
    }

    /// The guest runs where it should, protected by equal shadows, and there is no domain of it anywhere else.
    fn settled(&self, what: &str) -> GuestReply {
        let began = Instant::now();
        let view = self.bed.wait_protection_goes_on();
        let back = began.elapsed();
        assert_eq!(view.primary.host, self.at, "{what}: {view:?}");
        assert_eq!(self.domain_state(), "running", "{what}");
        self.bed.assert_equal();
        let wanted: Vec<String> = view.shadows.into_iter().map(|s| s.host).chain([self.at.clone()]).collect();
        let elsewhere = |host: &String| !wanted.contains(host) && self.bed.has_domain(host);
        let began = Instant::now();
        while let Some(host) = (1..=HOSTS).map(|n| format!("host{n}")).find(elsewhere) {
            assert!(began.elapsed() < Duration::from_secs(20), "{what}: a domain is left on {host}");
            std::thread::sleep(Duration::from_millis(50));
        }
        let promoted = self.bed.fleet.events().unwrap().into_iter().find(|event| event.kind == "guest-promoted");
        assert!(promoted.is_none(), "{what}: {promoted:?}");
        let reply = self.status();
        assert_eq!(reply.errors, 0, "{what}");
        println!("{what:<50} protected again after {:.1} s", back.as_secs_f64());
        reply
    }

    /// Runs `operation`, after which the same boot of the guest runs on.
    fn goes_on(&self, what: &str, operation: impl FnOnce()) {
        let before = self.status().boot;
        operation();
        assert_eq!(self.settled(what).boot, before, "{what}: the guest was started anew");
    }

    /// Runs `operation`, after which the guest starts anew.
    fn starts_anew(&self, what: &str, operation: impl FnOnce()) {
        let before = self.status().boot;
        operation();
        assert_ne!(self.settled(what).boot, before, "{what}: the guest was not started anew");
    }

    /// `how`: what libvirt may say of it.
    fn wait_stopped(&self, how: &[&str]) -> GuestView {
        let view = self
            .bed
            .fleet
            .wait(GUEST, "stopped on purpose", BACK_WITHIN, |view| view.state == GuestState::Stopped)
            .unwrap();
        assert!(how.iter().any(|how| view.reason.contains(how)), "{how:?}: {}", view.reason);
        self.bed.wait_no_domain_but_on(&self.at);
        view
    }

    /// Has the guest's own system end or restart itself; it may do so before it can answer.
    fn guest_does(&self, what: &str) {
        let mut client = self.bed.lab.guest_client(self.bed.guest.ip).unwrap();
        client.set_timeout(Some(Duration::from_secs(2))).unwrap();
        if let Ok(answer) = client.ask(what) {
            assert_eq!(answer, format!("ok {what}"));
        }
    }

    /// A host without any domain of the guest's.
    fn free_host(&self) -> String {
        let busy: Vec<String> = self.bed.shadow_hosts();
        (1..=HOSTS).map(|n| format!("host{n}")).find(|host| *host != self.at && !busy.contains(host)).unwrap()
    }

    fn migrate(&self, to: &str, options: &[&str]) -> Result<String, String> {
        let uri = self.bed.lab.libvirt_uri(to);
        let over = format!("tcp://10.77.1.{}", to.trim_start_matches("host"));
        let arguments = [&["migrate", GUEST, &uri, "--live", "--migrateuri", &over], options].concat();
        self.bed.lab.virsh(&self.at, &arguments).map_err(|error| error.to_string())
    }

    /// Starts the guest on a host where it does not run; why that was refused.
    fn start_elsewhere(&self, host: &str) -> String {
        self.bed.lab.virsh(host, &["start", GUEST]).unwrap_err().to_string()
    }
}

fn protected(name: &str) -> Operator {
    let bed = Bed::raise(name, HOSTS, 2, QemuUser::Root);
    bed.enable();
    bed.wait_protected();
    Operator { bed, at: "host1".into() }
}

fn pausing_and_resetting(operator: &Operator) {
    for round in 1..=3 {
        operator.goes_on(&format!("suspend, resume {round}"), || {
            operator.virsh(&["suspend", GUEST]);
            std::thread::sleep(Duration::from_millis(1_500));
            assert_eq!(operator.virsh(&["domstate", GUEST, "--reason"]).trim(), "paused (user)");
            operator.bed.assert_equal();
            assert_eq!(operator.virsh(&["domstate", GUEST, "--reason"]).trim(), "paused (user)");
            operator.virsh(&["resume", GUEST]);
        });
    }
    for round in 1..=3 {
        operator.goes_on(&format!("suspend, resume at once {round}"), || {
            for _ in 0..10 {
                operator.virsh(&["suspend", GUEST]);
                operator.virsh(&["resume", GUEST]);
            }
        });
    }
    for round in 1..=2 {
        operator.starts_anew(&format!("reset {round}"), || {
            operator.virsh(&["reset", GUEST]);
        });
        operator.starts_anew(&format!("the guest reboots {round}"), || {
            operator.guest_does("reboot");
        });
    }
    // This guest's kernel does not listen to its power button: it goes on, and so does protection.
    operator.goes_on("reboot, which the guest ignores", || {
        operator.virsh(&["reboot", GUEST]);
    });
}

fn changing_devices(operator: &Operator) {
    for (round, mib) in [160, 220, 256].into_iter().enumerate() {
        operator.goes_on(&format!("setmem to {mib} MiB {}", round + 1), || {
            operator.virsh(&["setmem", GUEST, &format!("{mib}M"), "--live"]);
        });
    }
    const MAC: &str = "52:54:00:99:99:99";
    for round in 1..=2 {
        operator.goes_on(&format!("attach-interface {round}"), || {
            let device = ["bridge", "br0", "--model", "virtio", "--mac", MAC, "--live"];
            operator.virsh(&[["attach-interface", GUEST].as_slice(), &device].concat());
        });
        operator.goes_on(&format!("detach-interface {round}"), || {
            operator.virsh(&["detach-interface", GUEST, "bridge", "--mac", MAC, "--live"]);
        });
    }
    assert!(!operator.virsh(&["domiflist", GUEST]).contains(MAC));
    for round in 1..=2 {
        let definition = operator.virsh(&["dumpxml", GUEST, "--inactive"]);
        let file = std::env::temp_dir().join(format!("{}.xml", operator.bed.lab.name()));
        std::fs::write(&file, definition).unwrap();
        operator.goes_on(&format!("undefine {round}"), || {
            operator.virsh(&["undefine", GUEST]);
        });
        operator.goes_on(&format!("define {round}"), || {
            operator.virsh(&["define", file.to_str().unwrap()]);
        });
        std::fs::remove_file(file).unwrap();
    }
}

fn saving_and_snapshots(operator: &Operator) {
    for round in 1..=4 {
        let file = format!("/var/lib/libvirt/snapshot{round}.mem");
        operator.goes_on(&format!("live memory snapshot {round}"), || {
            let memory = format!("file={file},snapshot=external");
            operator.virsh(&["snapshot-create-as", GUEST, "s", "--memspec", &memory, "--live"]);
            operator.virsh(&["snapshot-delete", GUEST, "s", "--metadata"]);
        });
        assert!(operator.bed.lab.exec(&operator.at, &["rm", &file]).unwrap().status.success());
    }
    operator.goes_on("dump --live", || {
        operator.virsh(&["dump", GUEST, "/var/lib/libvirt/guest.dump", "--live", "--memory-only"]);
    });
    for round in 1..=3 {
        operator.goes_on(&format!("managedsave, start {round}"), || {
            operator.virsh(&["managedsave", GUEST]);
            operator.wait_stopped(&["saved"]);
            operator.virsh(&["start", GUEST]);
        });
    }
    operator.goes_on("managedsave, start at once", || {
        operator.virsh(&["managedsave", GUEST]);
        operator.virsh(&["start", GUEST]);
    });
}

fn ending_and_starting(operator: &Operator) {
    for round in 1..=3 {
        operator.starts_anew(&format!("destroy, start {round}"), || {
            operator.virsh(&["destroy", GUEST]);
            // QEMU ends in good order when told to; on a busy host libvirt sees that before its own order.
            operator.wait_stopped(&["destroyed", "shutdown"]);
            operator.virsh(&["start", GUEST]);
        });
    }
    operator.starts_anew("destroy, start at once", || {
        operator.virsh(&["destroy", GUEST]);
        operator.virsh(&["start", GUEST]);
    });
    for round in 1..=2 {
        operator.starts_anew(&format!("the guest powers off, start {round}"), || {
            // Its power button first, as virsh shutdown presses it; this guest's kernel does not listen.
            operator.virsh(&["shutdown", GUEST]);
            operator.guest_does("poweroff");
            operator.wait_stopped(&["shutdown"]);
            operator.virsh(&["start", GUEST]);
        });
    }
}

fn migrating(operator: &mut Operator) {
    for round in 1..=3 {
        let shadow = operator.bed.shadow_hosts()[round % 2].clone();
        operator.goes_on(&format!("migrate to a host with a shadow {round}"), || {
            let refused = operator.migrate(&shadow, &[]).unwrap_err();
            assert!(refused.contains("already active"), "{refused}");
            let refused = operator.start_elsewhere(&shadow);
            assert!(refused.contains("already active"), "{refused}");
        });
        let (boot, to) = (operator.status().boot, operator.free_host());
        // From the third on to a host that ran the guest before.
        operator.migrate(&to, &["--persistent", "--undefinesource"]).unwrap();
        operator.at = to;
        let reply = operator.settled(&format!("migrate {round}, to {}", operator.at));
        assert_eq!(reply.boot, boot, "the guest was started anew");
    }
    let (boot, from, to) = (operator.status().boot, operator.at.clone(), operator.free_host());
    operator.migrate(&to, &["--persistent"]).unwrap();
    operator.at = to;
    let reply = operator.settled(&format!("migrate, its definition stays, to {}", operator.at));
    assert_eq!(reply.boot, boot, "the guest was started anew");
    operator.goes_on("start where it came from", || {
        let refused = operator.start_elsewhere(&from);
        println!("  {refused}");
        let why = ["already active", "was taken over by another host", "keeps the shadow of"];
        assert!(why.iter().any(|words| refused.contains(words)), "{refused}");
    });
}

/// A shadow that was paused by hand is paused no less than one that waits: it must take over all the same.
fn suspended_shadows_take_over(operator: &Operator) {
    let before = operator.status().boot;
    for shadow in operator.bed.shadow_hosts() {
        operator.bed.lab.virsh(&shadow, &["suspend", GUEST]).unwrap();
    }
    operator.bed.assert_equal();
    let killed = Instant::now();
    kill(operator.bed.qemu(&operator.at), Signal::SIGKILL).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let answered = operator.bed.watch.wait_answer_after(killed + Duration::from_millis(100), BACK_WITHIN);
    println!("suspend of both shadows, SIGKILL of QEMU: answers after {answered:?}");
    assert!(answered.is_some(), "the promoted guest does not run");
    assert_eq!(operator.status().boot, before);
    operator.bed.wait_protection_goes_on();
    operator.bed.assert_equal();
}

/// What nobody should do to the waiting domains.
fn touching_shadows(operator: &Operator) {
    let lab = &operator.bed.lab;
    for round in 1..=2 {
        let shadow = operator.bed.shadow_hosts()[round % 2].clone();
        operator.goes_on(&format!("destroy of a shadow {round}"), || {
            lab.virsh(&shadow, &["destroy", GUEST]).unwrap();
        });
        operator.goes_on(&format!("resume, suspend of a shadow {round}"), || {
            // Whatever libvirt says to it, a guest that waits for its state does not run.
            println!("  resume: {:?}", lab.virsh(&shadow, &["resume", GUEST]).map_err(|error| error.to_string()));
            std::thread::sleep(Duration::from_millis(500));
            println!("  then: {:?}", lab.virsh(&shadow, &["domstate", GUEST, "--reason"]));
            println!("  suspend: {:?}", lab.virsh(&shadow, &["suspend", GUEST]).map_err(|error| error.to_string()));
        });
    }
}

/// The interval follows what pauses may cost, and comes back.
fn limiting_its_cost(operator: &Operator) {
    let (bed, again) = (&operator.bed, ["enable", GUEST, "--shadows", "2", "--budget", "pause=0.5%"]);
    for (order, paced_by, range_us) in
        [(&again[..], "pause", 80_000..=2_000_000), (&again[..4], "interval", 50_000..=50_000)]
    {
        let (code, _, errors) = bed.cli(&operator.at, order);
        assert_eq!(code, Some(0), "{errors}");
        let paced =
            |view: &GuestView| view.capture.paced_by == paced_by && range_us.contains(&view.capture.interval_now_us);
        let view = bed.fleet.wait(GUEST, paced_by, BACK_WITHIN, paced).unwrap();
        println!("{order:?}: every {} us, for {}", view.capture.interval_now_us, view.capture.paced_by);
    }
    let (code, _, errors) = bed.cli(&operator.at, &["enable", GUEST, "--budget", "pause=much"]);
    assert!(code == Some(1) && errors.contains("percentage"), "{code:?} {errors}");
    operator.settled("a budget, and none");
}

#[test]
fn a_guest_is_paused_reset_and_changed() {
    let _lab = support::one_lab();
    let operator = protected("change");
    limiting_its_cost(&operator);
    pausing_and_resetting(&operator);
    changing_devices(&operator);
}

#[test]
fn a_guest_is_saved_ended_and_started() {
    let _lab = support::one_lab();
    let operator = protected("save");
    saving_and_snapshots(&operator);
    ending_and_starting(&operator);
}

#[test]
fn a_guest_is_migrated_and_its_shadows_are_touched() {
    let _lab = support::one_lab();
    let mut operator = protected("move");
    migrating(&mut operator);
    touching_shadows(&operator);
    suspended_shadows_take_over(&operator);
}

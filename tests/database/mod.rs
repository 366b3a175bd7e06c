//! A database on a guest's disk, its clients, and power cuts of its host: what Redis and PostgreSQL have in common.

pub mod postgres;
pub mod redis;

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virt_shadow::api::types::{Consistency, ConsistencyMode, GuestView, OnLoss, Quorum};
use virt_shadow::lab::fleet::Fleet;
use virt_shadow::lab::{GuestOptions, Lab, LabOptions, Software};

use super::support::{BACK_WITHIN, Bed, GUEST, INTERVAL, Random};

/// How long a client waits for an answer over a failover.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// So long it is known when a client was told what.
const REMEMBERED: Duration = Duration::from_secs(20);
/// The one that was lost is the next one's shadow.
const HOSTS: u8 = 2;

pub fn rounds() -> u32 {
    std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

pub fn consistency(mode: ConsistencyMode) -> Consistency {
    match mode {
        ConsistencyMode::Async => Consistency::default(),
        ConsistencyMode::OutputCommit => Consistency { mode, quorum: Quorum::All, on_loss: OnLoss::Consistency },
    }
}

/// What one connection was told: its writes are numbered from 1, one after the other.
#[derive(Default)]
pub struct Told {
    pub number: u64,
    when: VecDeque<(u64, Instant)>,
}

impl Told {
    fn tell(&mut self, number: u64) {
        let now = Instant::now();
        self.number = number;
        self.when.push_back((number, now));
        while self.when.front().is_some_and(|(_, at)| now - *at > REMEMBERED) {
            self.when.pop_front();
        }
    }

    /// The database has this number. How many acknowledged writes are lost, and how long before `cut` the first of
    /// them was acknowledged.
    pub fn found(&mut self, number: u64, cut: Instant) -> (u64, Duration) {
        assert!(number <= self.number + 1, "{number} is there, {} was acknowledged last", self.number);
        let lost = self.number.saturating_sub(number);
        let first = self.when.iter().find(|(told, _)| *told == number + 1).map(|(_, at)| *at);
        let ago = match (lost, first) {
            (0, _) => Duration::ZERO,
            (_, Some(at)) => cut.saturating_duration_since(at),
            (_, None) => REMEMBERED,
        };
        self.number = number;
        self.when.clear();
        (lost, ago)
    }
}

/// Tells clients to pause or to stop; see [`Clients::go_on`].
pub struct Clients {
    pub told: Vec<Mutex<Told>>,
    acknowledged: AtomicU64,
    longest_wait_us: AtomicU64,
    sockets: Mutex<Vec<TcpStream>>,
    pause: AtomicBool,
    stop: AtomicBool,
    paused: AtomicUsize,
}

impl Clients {
    pub fn new(count: usize) -> Self {
        let told = (0..count).map(|_| Mutex::default()).collect();
        let (pause, stop) = (AtomicBool::default(), AtomicBool::default());
        let (acknowledged, longest_wait_us) = (AtomicU64::new(0), AtomicU64::new(0));
        let (sockets, paused) = (Mutex::default(), AtomicUsize::new(0));
        Self { told, acknowledged, longest_wait_us, sockets, pause, stop, paused }
    }

    pub fn of(&self, client: usize) -> MutexGuard<'_, Told> {
        self.told[client].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Between two requests of a client: waits while clients are to pause; false: stop.
    pub fn go_on(&self) -> bool {
        if self.pause.load(Ordering::SeqCst) {
            self.paused.fetch_add(1, Ordering::SeqCst);
            while self.pause.load(Ordering::SeqCst) && !self.stopped() {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.paused.fetch_sub(1, Ordering::SeqCst);
        }
        !self.stopped()
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Those that wait for an answer get an error.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        for socket in self.sockets().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    pub fn restart(&self) {
        self.stop.store(false, Ordering::SeqCst);
        self.longest_wait();
    }

    /// A client's connection, to be ended when it is to stop.
    pub fn connected(&self, socket: TcpStream) {
        self.sockets().push(socket);
        if self.stopped() {
            self.stop();
        }
    }

    fn sockets(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest that a client waited for an acknowledgement since this was asked last.
    pub fn longest_wait(&self) -> Duration {
        Duration::from_micros(self.longest_wait_us.swap(0, Ordering::SeqCst))
    }

    /// `work` while no request is under way.
    pub fn while_paused<T>(&self, work: impl FnOnce() -> T) -> T {
        self.pause.store(true, Ordering::SeqCst);
        let began = Instant::now();
        while self.paused.load(Ordering::SeqCst) < self.told.len() {
            assert!(!self.stopped() && began.elapsed() < ANSWER_WITHIN, "a client got no answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        let done = work();
        self.pause.store(false, Ordering::SeqCst);
        done
    }

    /// The write of this number is acknowledged.
    pub fn tell(&self, client: usize, number: u64, asked: Instant) {
        self.of(client).tell(number);
        self.longest_wait_us.fetch_max(asked.elapsed().as_micros() as u64, Ordering::SeqCst);
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
    }

    /// The database has these numbers, which a client may not have been told of.
    pub fn begin_at(&self, numbers: &[u64]) {
        numbers.iter().enumerate().for_each(|(client, number)| self.of(client).number = *number);
    }

    /// Writes acknowledged in all.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }
}

/// A guest with a database on its disks, and where its disks are looked at.
pub struct Site {
    pub bed: Bed,
    pub software: Software,
    work: PathBuf,
    disks: usize,
}

impl Site {
    pub fn raise(software: Software, disks: &[&str]) -> Self {
        let name = format!("disk-{software}");
        let options = LabOptions { hosts: HOSTS, racks: HOSTS, ..LabOptions::for_test(&name) };
        let mut guest = GuestOptions::new(GUEST, "host1");
        guest.workload = software.name().parse().unwrap();
        guest.memory_mib = guest.workload.default_memory_mib(true);
        guest.disks = disks.iter().map(|disk| disk.parse().unwrap()).collect();
        let bed = Bed::raise_guest_asked(&options, 1, &guest, Duration::from_millis(50));
        let work = std::env::temp_dir().join(format!("virt-shadow-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&work).unwrap();
        Self { bed, software, work, disks: disks.len() }
    }

    pub fn lab(&self) -> &Lab {
        &self.bed.lab
    }

    /// A connection to the database, for which a guest on a busy machine gets its time. Closed, it is gone at once: a
    /// request that was not answered must not be sent again to the next primary.
    fn connect(&self, port: u16) -> TcpStream {
        let began = Instant::now();
        let stream = loop {
            match self.lab().connect_from_client(self.bed.guest.ip, port) {
                Ok(stream) => break stream,
                Err(error) => assert!(began.elapsed() < ANSWER_WITHIN, "{error}"),
            }
        };
        stream.set_read_timeout(Some(ANSWER_WITHIN)).unwrap();
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        stream
    }

    pub fn protect(&self, mode: ConsistencyMode) {
        let host = self.bed.fleet.info(GUEST).map_or("host1".into(), |view| view.primary.host);
        self.bed.fleet.enable_with(GUEST, &host, 1, INTERVAL, consistency(mode)).unwrap();
    }

    /// Waits until a failover would keep the promise of the mode.
    pub fn wait_kept(&self, mode: ConsistencyMode) -> GuestView {
        let view = self.bed.fleet.wait_protected(GUEST, 2 * BACK_WITHIN).unwrap();
        if mode == ConsistencyMode::Async {
            return view;
        }
        let holding = |view: &GuestView| view.capture.output.gate == "holding" && view.capture.output.reason.is_empty();
        self.bed.fleet.wait(GUEST, "output held", BACK_WITHIN, holding).unwrap()
    }

    /// Cuts the power of the guest's host, at a moment that is random, and waits until the guest runs elsewhere.
    pub fn lose_host(&self, random: &mut Random, clients: &Clients) -> Loss {
        let from = self.bed.fleet.info(GUEST).unwrap().primary.host;
        let stop = AtomicBool::new(false);
        let (mut cut, mut to, mut waited) = (Instant::now(), String::new(), Duration::ZERO);
        let shown = std::thread::scope(|scope| {
            let sampler = scope.spawn(|| sample_lags(self.lab(), &from, &stop));
            std::thread::sleep(Duration::from_millis(1_000 + random.below(2_500)));
            waited = clients.longest_wait();
            cut = self.lab().power_cut(&from).unwrap();
            let elsewhere = |view: &GuestView| view.primary.host != from;
            to = self.bed.fleet.wait(GUEST, "another primary", BACK_WITHIN, elsewhere).unwrap().primary.host;
            stop.store(true, Ordering::SeqCst);
            sampler.join().unwrap()
        });
        let before = shown.iter().rev().find(|(at, _)| *at <= cut);
        let after = shown.iter().rev().find(|(at, _)| *at > cut);
        Loss {
            from,
            to,
            cut,
            waited,
            lag_before: before.map_or(Duration::ZERO, |(_, lag)| *lag),
            lag_shown: after.or(before).expect("a lag was shown").1,
        }
    }

    /// Gives the lost host its power back; both are there when this returns.
    pub fn give_power_back(&self, host: &str) {
        self.lab().power_on(host).unwrap();
        self.bed.fleet.wait_hosts(HOSTS.into(), BACK_WITHIN).unwrap();
    }

    /// Copies the disks of the running guest as of one moment, and checks their file systems: what their journals
    /// hold is brought in, and then nothing is wrong. `folders`: of each disk what is taken out into the folder that is
    /// returned.
    pub fn look_at_disks(&self, folders: &[&str]) -> PathBuf {
        let host = self.bed.fleet.info(GUEST).unwrap().primary.host;
        let work = &self.work;
        std::fs::remove_dir_all(work).unwrap();
        std::fs::create_dir_all(work).unwrap();
        let copy: String = ["vda", "vdb"][..self.disks]
            .iter()
            .map(|disk| {
                let image = format!("$(virsh -q domblklist {GUEST} | awk '$1 == \"{disk}\" {{print $2}}')");
                format!("cp --sparse=always {image} {}/{disk}\n", work.display())
            })
            .collect();
        let script = format!("set -e; virsh -q suspend {GUEST}\n{copy}virsh -q resume {GUEST}");
        let output = self.lab().exec(&host, &["sh", "-c", &script]).unwrap();
        assert!(output.status.success(), "{output:?}");
        for (disk, folder) in ["vda", "vdb"].iter().zip(folders) {
            check_file_system(work, disk);
            let out = work.join(format!("{disk}.files"));
            std::fs::create_dir(&out).unwrap();
            run(work, &format!("debugfs -R 'rdump {folder} {}' {disk}", out.display()));
        }
        work.clone()
    }

    /// What a script prints that runs among the database's programs with `work` at /work.
    pub fn run_beside(&self, work: &Path, script: &str) -> String {
        let output = self.lab().at_client_with(self.software, work, script).unwrap().output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Of a failed test they are worth a look.
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.work);
        }
    }
}

/// One power cut.
pub struct Loss {
    pub from: String,
    pub to: String,
    pub cut: Instant,
    /// The longest that a client had waited before.
    pub waited: Duration,
    /// What `info` showed just before.
    pub lag_before: Duration,
    /// What it showed last, before the guest ran elsewhere.
    pub lag_shown: Duration,
}

/// What `info` shows of the shadow's lag, and when, as long as the guest's primary is on that host.
fn sample_lags(lab: &Lab, host: &str, stop: &AtomicBool) -> Vec<(Instant, Duration)> {
    let fleet = Fleet::of(lab).unwrap();
    let mut shown = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        if let Ok(view) = fleet.info(GUEST)
            && view.primary.host == host
            && let Some(shadow) = view.shadows.first()
        {
            shown.push((Instant::now(), Duration::from_millis(shadow.lag_ms)));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    shown
}

/// First what a mount does: the journal, and files that were open when they were removed. Then everything has to be right.
fn check_file_system(work: &Path, disk: &str) {
    run(work, &format!("e2fsck -E journal_only -y {disk}"));
    let preened = run(work, &format!("e2fsck -fp {disk}"));
    let usual = |line: &str| line.contains("orphaned inode") || line.contains(" files (") || line.trim().is_empty();
    assert!(preened.lines().all(usual), "{disk} was repaired: {preened}");
    run(work, &format!("e2fsck -fn {disk}"));
}

/// Runs e2fsprogs; their exit code 1 tells that the journal was brought in.
fn run(work: &Path, command: &str) -> String {
    let output = std::process::Command::new("sh").args(["-c", command]).current_dir(work).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{command}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

//! How long a guest and its clients miss each other when its QEMU dies, its host loses power, or it is moved.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{Bench, Row, percentile};
use crate::hypervisor::{Hypervisor, HypervisorError, HypervisorEvent, Lifecycle};
use crate::lab::error::{LabError, Result};
use crate::lab::fleet::Fleet;
use crate::lab::{ClientWatch, Lab, StartedGuest};

const INTERVAL: Duration = Duration::from_millis(50);
const HOSTS: u8 = 4;
pub(super) const GUEST: &str = "web";
const PROTECTED_WITHIN: Duration = Duration::from_secs(60);

struct Stage {
    lab: Lab,
    fleet: Fleet,
    guest: StartedGuest,
    client: ClientWatch,
}

/// A protected guest and a client that never stops asking.
fn stage(bench: &Bench) -> Result<Stage> {
    let lab = bench.lab(HOSTS)?;
    let fleet = Fleet::of(&lab)?;
    fleet.wait_hosts(usize::from(HOSTS), Duration::from_secs(30))?;
    let guest = bench.guest(&lab, GUEST, "host1", 256, "dirty:2000")?;
    let client = lab.watch(guest.ip, Duration::from_millis(5))?;
    fleet.enable(GUEST, "host1", 2, INTERVAL)?;
    fleet.wait_protected(GUEST, PROTECTED_WITHIN)?;
    Ok(Stage { lab, fleet, guest, client })
}

/// When libvirt on any host said that the guest was started, by an event, as a client of libvirt sees it.
pub(super) struct Starts {
    seen: Arc<Mutex<Vec<(String, Instant)>>>,
    _connections: Vec<Arc<Hypervisor>>,
}

impl Starts {
    pub(super) fn watch(lab: &Lab, hosts: impl Iterator<Item = String>) -> Result<Self> {
        let failed = |error: HypervisorError| LabError::Product(format!("libvirt's events: {error}"));
        let seen: Arc<Mutex<Vec<(String, Instant)>>> = Arc::default();
        let connect = |host: String| {
            let connection = Hypervisor::connect(&lab.libvirt_uri(&host)).map_err(failed)?;
            let sink = Arc::clone(&seen);
            let note = move |event: HypervisorEvent| {
                if let HypervisorEvent::Lifecycle { name, event: Lifecycle::Resumed(_), .. } = event
                    && name == GUEST
                {
                    sink.lock().unwrap_or_else(PoisonError::into_inner).push((host.clone(), Instant::now()));
                }
            };
            connection.subscribe(Arc::new(note)).map_err(failed)?;
            Ok(connection)
        };
        let _connections = hosts.map(connect).collect::<Result<_>>()?;
        Ok(Self { seen, _connections })
    }

    /// The first start after `moment` on a host other than `old`.
    pub(super) fn first_after(&self, moment: Instant, old: &str) -> Option<Instant> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().filter(|(host, at)| host != old && *at > moment).map(|(_, at)| *at).min()
    }
}

/// Kills the guest's QEMU; the moment, by this process's clock and by the wall's, as the shell that kills tells it.
fn kill_qemu(lab: &Lab, host: &str) -> Result<(Instant, f64)> {
    let script = format!("pid=$(cat /run/libvirt/qemu/{GUEST}.pid); date +%s%N; kill -9 $pid");
    let output = lab.exec(host, &["sh", "-c", &script])?;
    let (now, wall) = (Instant::now(), SystemTime::now());
    let text = String::from_utf8_lossy(&output.stdout);
    let ns: u64 = text.trim().parse().map_err(|_| LabError::Product(format!("no time of the kill: {text:?}")))?;
    let killed = UNIX_EPOCH + Duration::from_nanos(ns);
    let ago = wall.duration_since(killed).unwrap_or_default();
    Ok((now.checked_sub(ago).unwrap_or(now), ns as f64 / 1e6))
}

impl Stage {
    /// Waits for the next answer after `moment`, milliseconds.
    fn answer_ms(&self, moment: Instant) -> Result<f64> {
        let answer = self.client.wait_answer_after(moment, Duration::from_secs(30));
        answer.map(|span| span.as_secs_f64() * 1e3).ok_or_else(|| LabError::Product("no answer within 30 s".into()))
    }

    /// The guest must be the one that ran before, with its memory sound.
    fn check_guest(&self) -> Result<()> {
        let seen = self.client.report();
        let mut checker = self.lab.guest_client(self.guest.ip)?;
        checker.verify().map_err(LabError::system("have the guest check its memory"))?;
        if seen.guest_errors == 0 && seen.boots.len() == 1 {
            return Ok(());
        }
        Err(LabError::Product(format!("the guest was restarted or damaged: {seen:?}")))
    }
}

pub(super) fn run(bench: &Bench, rounds: u32) -> Result<()> {
    let stage = stage(bench)?;
    bench.say(&format!("{rounds} times SIGKILL of the primary's QEMU"))?;
    let starts = Starts::watch(&stage.lab, (1..=HOSTS).map(|number| format!("host{number}")))?;
    let (mut running, mut decided, mut answers, mut lost) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        let view = stage.fleet.wait_protected(GUEST, PROTECTED_WITHIN)?;
        bench.sleep(Duration::from_millis(700))?;
        let (at, at_ms) = kill_qemu(&stage.lab, &view.primary.host)?;
        answers.push(stage.answer_ms(at + Duration::from_millis(5))?);
        let promotion = stage.fleet.wait_promotion(GUEST, at_ms as u64, Duration::from_secs(5))?;
        let started = starts.first_after(at, &view.primary.host);
        let started = started.ok_or_else(|| LabError::Product("libvirt told of no start".into()))?;
        running.push((started - at).as_secs_f64() * 1e3);
        decided.push(promotion.took_us as f64 / 1e3);
        lost.push(promotion.epochs_lost as f64);
    }
    drop(starts);
    stage.check_guest()?;
    bench.print(&Row::new("SIGKILL of QEMU to running shadow, p50", percentile(&running, 50), "ms").at_most(30.0));
    bench.print(&Row::new("SIGKILL of QEMU to running shadow, max", percentile(&running, 100), "ms"));
    let row = Row::new("of that, from the manager's decision, p50", percentile(&decided, 50), "ms");
    bench.print(&row);
    bench.print(&Row::new("SIGKILL to the client's first answer, p50", percentile(&answers, 50), "ms"));
    bench.print(&Row::new("epochs lost, max", percentile(&lost, 100), "epochs"));
    bench.print(&Row::new("failovers that succeeded", running.len() as f64, "of them").at_least(f64::from(rounds)));

    bench.say(&format!("{rounds} power cuts of the primary's host"))?;
    let mut answers = vec![];
    for _ in 0..rounds {
        let view = stage.fleet.wait_protected(GUEST, PROTECTED_WITHIN)?;
        bench.sleep(Duration::from_millis(700))?;
        let at = stage.lab.power_cut(&view.primary.host)?;
        answers.push(stage.answer_ms(at + Duration::from_millis(20))?);
        stage.lab.power_on(&view.primary.host)?;
        stage.fleet.wait_hosts(usize::from(HOSTS), Duration::from_secs(30))?;
    }
    stage.check_guest()?;
    bench.print(&Row::new("power cut to the first answer, p50", percentile(&answers, 50), "ms").at_most(2000.0));
    bench.print(&Row::new("power cut to the first answer, max", percentile(&answers, 100), "ms").at_most(2000.0));
    bench.print(&Row::new("power cuts survived", answers.len() as f64, "of them").at_least(f64::from(rounds)));
    Ok(())
}

pub(super) fn run_switchover(bench: &Bench, rounds: u32) -> Result<()> {
    let stage = stage(bench)?;
    bench.say(&format!("{rounds} switchovers"))?;
    let (mut pauses, mut silences) = (vec![], vec![]);
    for _ in 0..rounds {
        stage.fleet.wait_protected(GUEST, PROTECTED_WITHIN)?;
        let from = Instant::now();
        let report = stage.fleet.switchover(GUEST, None)?;
        stage.answer_ms(Instant::now())?;
        pauses.push(report.pause_ms.unwrap_or(f64::INFINITY));
        silences.push(stage.client.longest_silence(from, Instant::now()).as_secs_f64() * 1e3);
    }
    stage.check_guest()?;
    let lost = stage.client.report().connections_lost as f64;
    bench.print(&Row::new("switchover, guest stands still, p50", percentile(&pauses, 50), "ms").at_most(100.0));
    bench.print(&Row::new("switchover, guest stands still, max", percentile(&pauses, 100), "ms").at_most(100.0));
    bench.print(&Row::new("switchover, silence for the client, p50", percentile(&silences, 50), "ms"));
    bench.print(&Row::new("connections lost", lost, "of 1").at_most(0.0));
    Ok(())
}

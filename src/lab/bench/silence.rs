//! How long a client of a guest whose output is held hears nothing when a part of ours fails: agent, gate, shadow.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::failover::Starts;
use super::{Bench, Row, percentile};
use crate::api::types::GuestView;
use crate::lab::error::{LabError, Result};
use crate::lab::fleet::Fleet;
use crate::lab::{ClientWatch, Lab};

/// The bound that is stated for each.
const AT_MOST_MS: f64 = 200.0;
const ROUNDS: u32 = 4;
/// Longer than whatever is wrong may last.
const LOOK_FOR: Duration = Duration::from_millis(900);
const BACK_WITHIN: Duration = Duration::from_secs(60);
const PRIMARY: &str = "host1";
const SHADOW: &str = "host2";

/// What fails.
#[derive(Clone, Copy)]
enum Fault {
    AgentKilled,
    AgentStopped,
    GateKilled,
    /// Once: it is continued.
    GateStopped,
    /// Again at once: it is ended.
    GateStoppedAgain,
    ShadowWithoutPower,
}

const FAULTS: [(Fault, &str); 6] = [
    (Fault::AgentKilled, "agent killed"),
    (Fault::AgentStopped, "agent stopped"),
    (Fault::GateKilled, "gate killed"),
    (Fault::GateStopped, "gate stopped"),
    (Fault::GateStoppedAgain, "gate stopped again and again"),
    (Fault::ShadowWithoutPower, "only shadow's host without power"),
];

/// Power cuts under a client that has one connection only.
const POWER_CUTS: u32 = 8;
const ASK_EVERY: Duration = Duration::from_millis(5);
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// A guest with one shadow, whose output is held, and the client that asks it.
pub(super) struct Stage<'a> {
    pub lab: &'a Lab,
    pub fleet: &'a Fleet,
    pub guest: &'a str,
    pub client: &'a ClientWatch,
}

pub(super) fn run(bench: &Bench, stage: &Stage<'_>) -> Result<()> {
    // The client alone: what else is at work on this machine.
    let from = Instant::now();
    bench.sleep(2 * LOOK_FOR)?;
    let untouched = stage.client.longest_silence(from, Instant::now()).as_secs_f64() * 1e3;
    for (fault, name) in FAULTS {
        bench.say(&format!("{ROUNDS} times: {name}"))?;
        let mut silences = Vec::new();
        for round in 0..ROUNDS {
            stage.wait_holding()?;
            // At different moments of cuts and commits.
            bench.sleep(Duration::from_millis(300 + 7 * u64::from(round)))?;
            silences.push(stage.silence_ms(fault)?);
        }
        let row = Row::new(format!("silence: {name}, longest of {ROUNDS}"), percentile(&silences, 100), "ms");
        bench.print(&row.at_most(AT_MOST_MS).beside("with nothing wrong", untouched));
    }
    stage.wait_holding()
}

impl Stage<'_> {
    fn wait_holding(&self) -> Result<()> {
        self.fleet.wait_protected(self.guest, BACK_WITHIN)?;
        let holding = |view: &GuestView| view.capture.output.gate == "holding" && view.capture.output.reason.is_empty();
        self.fleet.wait(self.guest, "output held", BACK_WITHIN, holding).map(drop).map_err(Into::into)
    }

    fn silence_ms(&self, fault: Fault) -> Result<f64> {
        let gone = |what: &str| LabError::Product(format!("no {what} on {PRIMARY}"));
        let agent = || {
            let pid = self.lab.service_pid(PRIMARY, "virtshadowd")?;
            pid.map(Pid::from_raw).ok_or_else(|| gone("agent"))
        };
        let gate = || {
            let pid = self.lab.companion_pid(PRIMARY, "gate")?;
            pid.map(Pid::from_raw).ok_or_else(|| gone("gate"))
        };
        let signal = |pid, signal| kill(pid, signal).map_err(LabError::system("send a signal"));
        let from = Instant::now();
        let mut stopped = None;
        match fault {
            Fault::AgentKilled => signal(agent()?, Signal::SIGKILL)?,
            Fault::AgentStopped => {
                let agent = agent()?;
                signal(agent, Signal::SIGSTOP)?;
                stopped = Some(agent);
            }
            Fault::GateKilled => signal(gate()?, Signal::SIGKILL)?,
            Fault::GateStopped => signal(gate()?, Signal::SIGSTOP)?,
            Fault::GateStoppedAgain => {
                let gate = gate()?;
                // Until it is gone, and as a person or a script might, not faster.
                while from.elapsed() < LOOK_FOR && kill(gate, Signal::SIGSTOP).is_ok() {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            Fault::ShadowWithoutPower => drop(self.lab.power_cut(SHADOW)?),
        }
        std::thread::sleep(LOOK_FOR.saturating_sub(from.elapsed()));
        let silence = self.client.longest_silence(from, Instant::now());
        if let Some(agent) = stopped {
            signal(agent, Signal::SIGCONT)?;
        }
        if matches!(fault, Fault::ShadowWithoutPower) {
            self.lab.power_on(SHADOW)?;
            self.fleet.wait_hosts(2, BACK_WITHIN)?;
        }
        Ok(silence.as_secs_f64() * 1e3)
    }
}

/// How long the client of a promoted guest waits for TCP to ask again, on the connection that it had; other clients come anew.
pub(super) fn after_power_cuts(bench: &Bench, stage: &Stage<'_>, ip: Ipv4Addr) -> Result<()> {
    bench.say(&format!("{POWER_CUTS} power cuts"))?;
    let (mut own, mut anew, mut whole) = (vec![], vec![], vec![]);
    for round in 0..POWER_CUTS {
        stage.wait_holding()?;
        bench.sleep(Duration::from_millis(300 + 7 * u64::from(round)))?;
        let from = stage.fleet.info(stage.guest)?.primary.host;
        let to = if from == PRIMARY { SHADOW } else { PRIMARY };
        let starts = Starts::watch(stage.lab, std::iter::once(to.to_owned()))?;
        let mut client = stage.lab.guest_client(ip)?;
        let failed = LabError::system::<std::io::Error>;
        client.set_timeout(Some(ANSWER_WITHIN)).map_err(failed("set a time limit"))?;
        let stop = AtomicBool::new(false);
        let (cut, waits) = std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                let mut waits: Vec<(Instant, Instant)> = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    client.status()?;
                    waits.push((asked, Instant::now()));
                    std::thread::sleep(ASK_EVERY);
                }
                Ok(waits)
            });
            std::thread::sleep(Duration::from_millis(500));
            let cut = stage.lab.power_cut(&from);
            std::thread::sleep(Duration::from_secs(3));
            stop.store(true, Ordering::Relaxed);
            let waits = asking.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
            (cut, waits)
        });
        let (cut, waits) = (cut?, waits.map_err(failed("ask the guest"))?);
        // By then the host is gone.
        let dead = cut + Duration::from_millis(60);
        let silent = |what: &str| LabError::Product(format!("power cut {round}: {what}"));
        let (_, answered) = waits.iter().find(|(_, at)| *at > dead).copied().ok_or_else(|| silent("no answer"))?;
        let started = starts.first_after(cut, &from).ok_or_else(|| silent("libvirt told of no start"))?;
        let new = stage.client.first_answer_after(dead).map(|span| dead + span);
        let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
        own.push(ms(started, answered));
        anew.push(new.map_or(0.0, |at| ms(started, at)));
        whole.push(ms(cut, answered));
        stage.lab.power_on(&from)?;
        stage.fleet.wait_hosts(2, BACK_WITHIN)?;
    }
    let row = Row::new("guest runs again to first answer, p50", percentile(&own, 50), "ms");
    bench.print(&row.beside("on a new connection", percentile(&anew, 50)));
    let row = Row::new("guest runs again to first answer, max", percentile(&own, 100), "ms");
    bench.print(&row.beside("on a new connection", percentile(&anew, 100)));
    bench.print(&Row::new("power cut to first answer, own connection, p50", percentile(&whole, 50), "ms"));
    Ok(())
}

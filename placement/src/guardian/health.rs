//! Silence of hosts: suspicion, probes, witnesses, and when a host counts as down.
//!
//! A silent agent is not a dead host. A round of suspicion asks three times: we try to connect to the host, and hosts
//! that keep shadows of its guests try as well and say how long its stream has been silent. One answer from anywhere,
//! even a refused connection, shows that its kernel lives, and nothing is promoted away from it.

use super::context::Context;
use super::model::{Guest, Health, Host, HostIntro, HostReport, Record, Suspicion};
use super::{
    Action, Answer, FailoverStep, Guardian, Level, MAX_STRANGERS, Note, Order, Outcome, Phase, Ready, Save,
    SwitchoverStep, lifecycle,
};
use crate::units::{HostName, Moment};

/// Most hosts asked about a silent one.
const MAX_WITNESSES: usize = 5;
/// What a witness's answer may take on top of the time it probes.
const WITNESS_SLACK_MS: u64 = 300;
/// Once one of them says that it is gone, the others have this long on top to contradict: one may be gone as well.
const OTHERS_WITHIN_MS: u64 = 50;

impl Guardian {
    pub(super) fn hello(&mut self, now: Moment, intro: HostIntro, records: &[Record], ready: &mut Ready) {
        let name = intro.name.clone();
        let host = self.hosts.entry(name.clone()).or_insert_with(|| {
            let mut host = Host::known(intro.clone(), now);
            host.health = Health::Down { since: now };
            host
        });
        let new = host.is_down();
        if host.intro != intro || new {
            ready.save.push(Save::Host(intro.clone()));
        }
        host.intro = intro;
        host.connected = true;
        host.report.primaries.clear();
        host.report.shadows.clear();
        self.seen(now, &name, ready);
        for record in records {
            if self.guests.contains_key(&record.guest) || self.forget_there(now, &name, record, ready) {
                continue;
            }
            let message = format!(
                "{name} has a record of guest {} ({}, term {}) that the manager does not know; enable it again, or \
                 disable it there",
                record.domain, record.guest, record.term
            );
            ready.save.push(host_note(Level::Warning, "unknown-guest", &name, message));
            if self.strangers.len() < MAX_STRANGERS {
                let term = self.strangers.entry(record.guest.clone()).or_default();
                *term = record.term.max(*term);
            }
        }
        for id in self.guests.keys().cloned().collect::<Vec<_>>() {
            let record = records.iter().find(|record| record.guest == id);
            self.with_guest(now, &id, ready, |guest, cx| lifecycle::hello(guest, cx, &name, record));
        }
    }

    pub(super) fn heartbeat(&mut self, now: Moment, name: &HostName, report: HostReport, ready: &mut Ready) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        let mut report = report;
        if let Some(abilities) = report.abilities.take() {
            host.abilities = abilities;
        }
        host.report = report;
        self.seen(now, name, ready);
        let concerned = |guest: &Guest| guest.plan.primary == *name || guest.plan.seats.contains(name);
        let reported = &self.hosts[name].report;
        let ids: Vec<_> = self
            .guests
            .iter()
            .filter(|(id, guest)| concerned(guest) || reported.shadows.contains_key(*id))
            .map(|(id, _)| id.clone())
            .collect();
        for id in ids {
            self.with_guest(now, &id, ready, |guest, cx| lifecycle::reported(guest, cx, name));
        }
    }

    /// The agent of that host was heard.
    fn seen(&mut self, now: Moment, name: &HostName, ready: &mut Ready) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        host.last_seen = now;
        match std::mem::replace(&mut host.health, Health::Up) {
            Health::Down { .. } => {
                let message = format!("{name} in {} is up", host.intro.rack);
                ready.save.push(host_note(Level::Info, "host-up", name, message));
            }
            Health::AgentSilent { .. } => {
                ready.save.push(host_note(Level::Info, "host-up", name, format!("agent of {name} reports again")));
            }
            Health::Up | Health::Suspect(_) => (),
        }
    }

    /// Once per tick. If we ourselves stood still (suspended, starved), what we missed is nobody's silence.
    pub(super) fn check_silence(&mut self, now: Moment, ready: &mut Ready) {
        let stood_still_ms = self.last_tick.map_or(0, |last| now.ms_since(last));
        self.last_tick = Some(now);
        if stood_still_ms > self.settings.suspect_ms / 3 {
            for host in self.hosts.values_mut() {
                host.last_seen = now.min(host.last_seen.plus_ms(stood_still_ms));
            }
        }
        for name in self.hosts.keys().cloned().collect::<Vec<_>>() {
            let host = &self.hosts[&name];
            match &host.health {
                Health::Up if now.ms_since(host.last_seen) > self.settings.suspect_ms => {
                    let message = format!("{name} is silent for {} ms", now.ms_since(host.last_seen));
                    ready.save.push(host_note(Level::Warning, "host-suspect", &name, message));
                    self.suspect(now, &name, String::new(), ready);
                }
                Health::Suspect(_) => self.decide(now, &name, ready),
                Health::AgentSilent { until, .. } if now >= *until => self.ask_again(now, &name, ready),
                Health::Up | Health::AgentSilent { .. } | Health::Down { .. } => (),
            }
        }
    }

    /// Begins a round of questions.
    fn suspect(&mut self, now: Moment, name: &HostName, note: String, ready: &mut Ready) {
        let timeout_ms = self.settings.confirm_ms;
        let addr = self.hosts[name].intro.probe_addr;
        ready.then.push(Action::Probe { host: name.clone(), addr, timeout_ms });
        let witnesses = self.witnesses(name);
        let guest = self.guests.values().find(|guest| guest.plan.primary == *name).map(|guest| guest.plan.id.clone());
        for witness in &witnesses {
            let order = Order::Witness { suspect: name.clone(), timeout_ms, guest: guest.clone() };
            let token = self.orders.begin(None, witness, order.clone());
            let timeout_ms = timeout_ms + WITNESS_SLACK_MS;
            ready.then.push(Action::Order { token, host: witness.clone(), order, timeout_ms });
        }
        let witnesses = witnesses.into_iter().map(|witness| (witness, None)).collect();
        self.set_health(name, Health::Suspect(Suspicion { since: now, unanswered: false, witnesses, note }));
    }

    /// Hosts with shadows of its guests, or if none is up, any others.
    fn witnesses(&self, suspect: &HostName) -> Vec<HostName> {
        let can = |name: &&HostName| *name != suspect && self.hosts.get(*name).is_some_and(Host::is_up);
        let mut best: Vec<HostName> = self
            .guests
            .values()
            .filter(|guest| depends_on(guest, suspect))
            .flat_map(|guest| guest.plan.seats.iter())
            .filter(can)
            .cloned()
            .collect();
        best.sort();
        best.dedup();
        if best.is_empty() {
            best = self.hosts.keys().filter(can).cloned().collect();
        }
        best.truncate(MAX_WITNESSES);
        best
    }

    pub(super) fn probed(&mut self, now: Moment, name: &HostName, answered: bool, ready: &mut Ready) {
        let until = now.plus_ms(self.settings.suspect_ms);
        let Some(host) = self.hosts.get_mut(name) else { return };
        match (&mut host.health, answered) {
            (Health::Suspect(_), true) => self.agent_silent(now, name, "the host answers".into(), ready),
            (Health::Suspect(suspicion), false) => {
                suspicion.unanswered = true;
                self.decide(now, name, ready);
            }
            (Health::AgentSilent { until: again, .. }, true) => *again = until,
            (Health::AgentSilent { .. }, false) => self.suspect(now, name, String::new(), ready),
            (Health::Up | Health::Down { .. }, _) => (),
        }
    }

    fn agent_silent(&mut self, now: Moment, name: &HostName, reason: String, ready: &mut Ready) {
        let message = format!("agent of {name} is silent, but {reason}: nothing is promoted away from it");
        ready.save.push(host_note(Level::Warning, "agent-silent", name, message));
        let until = now.plus_ms(self.settings.suspect_ms);
        self.set_health(name, Health::AgentSilent { until, reason });
    }

    fn ask_again(&mut self, now: Moment, name: &HostName, ready: &mut Ready) {
        let timeout_ms = self.settings.confirm_ms;
        let Some(host) = self.hosts.get_mut(name) else { return };
        if let Health::AgentSilent { until, .. } = &mut host.health {
            // Its outcome sets a nearer time; this one is for an outcome that never comes.
            *until = now.plus_ms(timeout_ms + 10_000);
        }
        ready.then.push(Action::Probe { host: name.clone(), addr: host.intro.probe_addr, timeout_ms });
    }

    pub(super) fn witnessed(
        &mut self,
        now: Moment,
        witness: &HostName,
        order: &Order,
        outcome: Outcome,
        ready: &mut Ready,
    ) {
        let Order::Witness { suspect, .. } = order else { return };
        let enough_ms = self.settings.suspect_ms;
        let Some(Health::Suspect(suspicion)) = self.hosts.get_mut(suspect).map(|host| &mut host.health) else { return };
        let Some(said) = suspicion.witnesses.get_mut(witness) else { return };
        match outcome {
            Outcome::Done(Answer::Witnessed { answers: true, .. }) => {
                return self.agent_silent(now, suspect, format!("the host answers {witness}"), ready);
            }
            Outcome::Done(Answer::Witnessed { stream_silent_ms: Some(ms), .. }) if ms < enough_ms => {
                suspicion.note = format!("{witness} heard it {ms} ms ago");
                *said = Some(false);
            }
            Outcome::Done(Answer::Witnessed { .. }) => *said = Some(true),
            Outcome::Done(_) | Outcome::Refused { .. } | Outcome::Unknown { .. } => *said = Some(false),
        }
        self.decide(now, suspect, ready);
    }

    /// Ends a round of suspicion if everybody has been heard.
    fn decide(&mut self, now: Moment, name: &HostName, ready: &mut Ready) {
        let Some(Health::Suspect(suspicion)) = self.hosts.get(name).map(|host| &host.health) else { return };
        if !suspicion.unanswered || now.ms_since(suspicion.since) < self.settings.confirm_ms {
            return;
        }
        if self.guests.values().any(|guest| depends_on(guest, name)) {
            let gone = suspicion.witnesses.values().any(|said| *said == Some(true));
            let waited_long = now.ms_since(suspicion.since) >= self.settings.confirm_ms + OTHERS_WITHIN_MS;
            if suspicion.witnesses.values().any(Option::is_none) && !(gone && waited_long) {
                return;
            }
            if !gone {
                let note = match suspicion.note.as_str() {
                    "" => "no answer to us, and no other host could be asked".to_owned(),
                    heard => heard.to_owned(),
                };
                return self.suspect(now, name, note, ready);
            }
        }
        self.down(now, name, ready);
    }

    fn down(&mut self, now: Moment, name: &HostName, ready: &mut Ready) {
        let silent_ms = now.ms_since(self.hosts[name].last_seen);
        let message = format!("{name} is down: silent for {silent_ms} ms, no answer to the manager nor to other hosts");
        ready.save.push(host_note(Level::Alarm, "host-down", name, message));
        self.set_health(name, Health::Down { since: now });
        // What that means for each guest is decided where its state is tended.
        for id in self.guests.keys().cloned().collect::<Vec<_>>() {
            self.with_guest(now, &id, ready, |_, _: &mut Context<'_>| ());
        }
    }

    fn set_health(&mut self, name: &HostName, health: Health) {
        if let Some(host) = self.hosts.get_mut(name) {
            host.health = health;
        }
    }
}

/// Something would be promoted, or taken back, if `host` were down.
fn depends_on(guest: &Guest, host: &HostName) -> bool {
    let primary = guest.plan.primary == *host;
    match &guest.plan.phase {
        Phase::Steady => primary,
        Phase::FailingOver(failover) => match &failover.step {
            FailoverStep::RetireFirst => primary,
            FailoverStep::Choose => false,
            FailoverStep::Promote { to, .. } => to == host,
        },
        Phase::SwitchingOver(switchover) => {
            primary || switchover.to == *host && matches!(switchover.step, SwitchoverStep::Promote { .. })
        }
        Phase::Stopped { .. } | Phase::Lost { .. } | Phase::Leaving => false,
    }
}

fn host_note(level: Level, kind: &'static str, host: &HostName, message: String) -> Save {
    Save::Note(Note { level, kind: kind.into(), domain: None, host: Some(host.clone()), message, figures: Vec::new() })
}

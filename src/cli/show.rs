//! Views of the REST API as text for people.

use std::collections::BTreeMap;

use crate::api::types::{
    Budget, Consistency, ConsistencyMode, DoctorReport, EventView, GuestState, GuestView, HostState, HostVerdict,
    HostView, Keep, MoveReport, OnLoss, OutputStats, PlanView, PolicyView, ShadowEpochs, ShadowState, VerifyReport,
};

use super::table::{Table, bytes, fields, ms, plain, timestamp};

pub fn guest_state(state: GuestState) -> &'static str {
    match state {
        GuestState::Syncing => "syncing",
        GuestState::Protected => "protected",
        GuestState::Degraded => "degraded",
        GuestState::Unprotected => "unprotected",
        GuestState::FailingOver => "failing over",
        GuestState::SwitchingOver => "switching over",
        GuestState::Stopped => "stopped",
        GuestState::Lost => "lost",
    }
}

pub fn shadow_state(state: ShadowState) -> &'static str {
    match state {
        ShadowState::Disconnected => "disconnected",
        ShadowState::Syncing => "syncing",
        ShadowState::Following => "following",
        ShadowState::Refused => "refused",
    }
}

fn host_state(state: HostState) -> &'static str {
    match state {
        HostState::Up => "up",
        HostState::AgentSilent => "agent silent",
        HostState::Suspect => "suspect",
        HostState::Down => "down",
    }
}

pub fn guests(guests: &[GuestView], quiet: bool) -> String {
    let mut table = Table::new(&["Domain", "State", "Primary", "Shadows", "Lag", "Pause p99", "Output", "Term"]);
    for guest in guests {
        let shadows: Vec<_> = guest
            .shadows
            .iter()
            .map(|shadow| match shadow.state {
                ShadowState::Following => shadow.host.clone(),
                state => format!("{} ({})", shadow.host, shadow_state(state)),
            })
            .collect();
        let lag = guest.shadows.iter().filter(|shadow| shadow.committed_epoch > 0).map(|shadow| shadow.lag_ms).min();
        table.row([
            guest.domain.clone(),
            guest_state(guest.state).into(),
            guest.primary.host.clone(),
            shadows.join(", "),
            lag.map_or("-".into(), |lag| format!("{lag} ms")),
            if guest.capture.epochs_total > 0 { ms(guest.capture.pause_us.p99) } else { "-".into() },
            match guest.capture.output.gate.as_str() {
                "" => "-".into(),
                gate => gate.to_owned(),
            },
            guest.term.to_string(),
        ]);
    }
    table.render(quiet)
}

pub fn guest(guest: &GuestView, quiet: bool) -> String {
    let capture = &guest.capture;
    let mut lines = vec![
        ("Name", guest.domain.clone()),
        ("UUID", guest.uuid.clone()),
        ("State", guest_state(guest.state).to_owned()),
    ];
    if !guest.reason.is_empty() {
        lines.push(("Reason", guest.reason.clone()));
    }
    lines.extend([
        ("Primary", format!("{} ({})", guest.primary.host, guest.primary.rack)),
        ("Term", guest.term.to_string()),
        ("Memory", bytes(guest.memory_bytes)),
        ("Shadows", format!("{} of {} wanted", guest.shadows.len(), guest.shadows_wanted)),
        (
            "Policy",
            match guest.policy.trim() {
                "" => "-".into(),
                text => text.replace('\n', ", "),
            },
        ),
        ("Interval", interval(guest)),
        ("Mirror", format!("at most {}", bytes((guest.mirror_mib << 20).min(guest.memory_bytes)))),
        ("Consistency", consistency(guest)),
        ("Kept", kept(guest.keep)),
        ("Epoch", format!("{} ({} cut)", capture.epoch, capture.epochs_total)),
        ("Pause", {
            let pause = capture.pause_us;
            format!("p50 {}, p99 {}, max {}", ms(pause.p50), ms(pause.p99), ms(pause.max))
        }),
        ("Of a pause", format!("search p50 {}, copy p50 {}", ms(capture.search_us.p50), ms(capture.copy_us.p50))),
        ("Dirty pages", format!("{} last, {:.0} mean", capture.dirty_pages.last, capture.dirty_pages.mean)),
        ("Pages", format!("{} raw, {} sent", bytes(capture.raw_bytes_total), bytes(capture.wire_bytes_total))),
        (
            "Tracker",
            match (capture.tracker.as_str(), capture.tracker_reason.as_str()) {
                ("", _) => "-".into(),
                (tracker, "") => tracker.into(),
                (tracker, reason) => format!("{tracker} ({reason})"),
            },
        ),
    ]);
    if !capture.output.gate.is_empty() {
        lines.push(("Output", output(&capture.output)));
    }
    if capture.watchdog_fired_total > 0 {
        lines.push(("Watchdog", format!("ended {} cuts", capture.watchdog_fired_total)));
    }
    let mut text = fields(&lines);
    if !guest.shadows.is_empty() {
        text.push('\n');
        text.push_str(&shadows(guest, quiet));
    }
    text
}

/// The mode, what it rests on, and with `output-commit` what becomes of output at the moment.
fn consistency(guest: &GuestView) -> String {
    let Consistency { mode, quorum, on_loss } = guest.consistency;
    if mode == ConsistencyMode::Async {
        return "async".into();
    }
    let first = match on_loss {
        OnLoss::Availability => "availability",
        OnLoss::Consistency => "consistency",
    };
    format!("output-commit (quorum {quorum}, {first} first)")
}

/// What the output gate does.
pub fn output(stats: &OutputStats) -> String {
    let state = match (stats.gate.as_str(), stats.reason.as_str()) {
        (gate, "") => gate.to_owned(),
        (gate, reason) => format!("{gate}: {reason}"),
    };
    let OutputStats { held_frames, held_bytes, hold_us, dropped_frames_total, opened_total, .. } = stats;
    let (held, p50, p99) = (bytes(*held_bytes), ms(hold_us.p50), ms(hold_us.p99));
    let mut text = format!("{state}; {held_frames} frames held ({held}), for p50 {p50}, p99 {p99}");
    for (count, what) in [(opened_total, "times open uncommitted"), (dropped_frames_total, "frames dropped")] {
        if *count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    }
    text
}

/// How many former epochs shadows keep.
fn kept(keep: Keep) -> String {
    if keep.mib == 0 {
        return "newest epoch only".into();
    }
    let epochs = (keep.epochs > 0).then(|| format!("{} epochs", keep.epochs));
    let age = (keep.age_ms > 0).then(|| format!("{} s", keep.age_ms as f64 / 1e3));
    let parts: Vec<String> = epochs.into_iter().chain(age).chain([bytes(keep.mib << 20)]).collect();
    format!("former epochs, at most {}", parts.join(", "))
}

/// With a budget: what it allows at the moment, and which of its limits keeps it from being shorter.
fn interval(guest: &GuestView) -> String {
    let Budget { pause_permille, wire_kbit, cpu_percent } = guest.budget;
    let limits = [
        (pause_permille > 0, format!("pauses {} %", f64::from(pause_permille) / 10.0)),
        (wire_kbit > 0, format!("wire {} Mbit/s", wire_kbit as f64 / 1e3)),
        (cpu_percent > 0, format!("processor {cpu_percent} %")),
    ];
    let limits: Vec<String> = limits.into_iter().filter(|(set, _)| *set).map(|(_, text)| text).collect();
    if limits.is_empty() {
        return format!("{} ms", guest.interval_ms);
    }
    let now = match (guest.capture.interval_now_us, guest.capture.paced_by.as_str()) {
        (0, _) => String::new(),
        (now, "interval" | "") => format!(", now {}", ms(now)),
        (now, by) => format!(", now {} for {by}", ms(now)),
    };
    format!("{} ms at least{now} (budget: {})", guest.interval_ms, limits.join(", "))
}

pub fn shadows(guest: &GuestView, quiet: bool) -> String {
    let mut table = Table::new(&["Shadow", "Rack", "Tier", "State", "Epoch", "Lag", "Rate", "Pending", "Reason"]);
    for shadow in &guest.shadows {
        table.row([
            shadow.host.clone(),
            shadow.rack.clone(),
            shadow.tier.clone(),
            shadow_state(shadow.state).into(),
            shadow.committed_epoch.to_string(),
            if shadow.committed_epoch > 0 { format!("{} ms", shadow.lag_ms) } else { "-".into() },
            format!("{}/s", bytes(shadow.wire_bytes_per_s)),
            shadow.pending_pages.to_string(),
            shadow.reason.clone(),
        ]);
    }
    table.render(quiet)
}

pub fn hosts(hosts: &[HostView], quiet: bool) -> String {
    let headings = ["Host", "Rack", "State", "Primaries", "Shadows", "Memory free", "Tracker", "Address", "Version"];
    let mut table = Table::new(&headings);
    for host in hosts {
        let state = match host.state {
            HostState::Up => host_state(host.state).to_owned(),
            state => format!("{} ({})", host_state(state), host.reason),
        };
        let mib = |mib: u64| bytes(mib.saturating_mul(1 << 20));
        table.row([
            host.host.clone(),
            host.rack.clone(),
            state,
            host.primaries.to_string(),
            host.shadows.to_string(),
            format!("{} of {}", mib(host.memory_free_mib), mib(host.memory_total_mib)),
            host.tracker.clone(),
            host.sync_addr.clone(),
            host.version.clone(),
        ]);
    }
    table.render(quiet)
}

pub fn policy(view: &PolicyView) -> String {
    match view.policy.trim() {
        "" => "# the default: one hot shadow in another rack\n".into(),
        text => text.lines().map(|line| plain(line) + "\n").collect(),
    }
}

pub fn plan(view: &PlanView, quiet: bool) -> String {
    let mut table = Table::new(&["Domain", "Primary", "Shadow", "Host", "Now"]);
    for guest in &view.guests {
        for shadow in &guest.shadows {
            let name = |host: &Option<String>| host.clone().unwrap_or_else(|| "-".into());
            let number = shadow.shadow.to_string();
            table.row([guest.domain.clone(), guest.primary.clone(), number, name(&shadow.host), name(&shadow.now)]);
        }
    }
    let mut text = table.render(quiet);
    for guest in view.guests.iter().filter(|guest| !guest.reason.is_empty()) {
        text += &plain(&format!("{}: {}", guest.domain, guest.reason));
        text.push('\n');
    }
    for guest in &view.guests {
        for shadow in guest.shadows.iter().filter(|shadow| !shadow.verdicts.is_empty()) {
            let mut table = Table::new(&["Host", "Rack", "Verdict", "Why", "What would help"]);
            for verdict in &shadow.verdicts {
                let HostVerdict { host, rack, verdict: word, text, remedy, .. } = verdict;
                table.row([host.clone(), rack.clone(), word.clone(), text.clone(), remedy.clone()]);
            }
            let counts = counts(&shadow.verdicts).into_iter().map(|(word, hosts)| format!("{hosts} {word}"));
            let counts = counts.collect::<Vec<_>>().join(", ");
            let title = format!("shadow {} of {} ({} hosts: {counts})", shadow.shadow, guest.domain, view.hosts);
            text += &format!("\n{}\n{}", plain(&title), table.render(quiet));
        }
    }
    text
}

/// Hosts by verdict, those that are barred by the first rule that does; they sum to all hosts.
fn counts(verdicts: &[HostVerdict]) -> BTreeMap<&str, u64> {
    let mut counts = BTreeMap::new();
    for verdict in verdicts {
        let word = verdict.reasons.first().unwrap_or(&verdict.verdict);
        *counts.entry(word.as_str()).or_insert(0) += 1;
    }
    counts
}

pub fn event(event: &EventView) -> String {
    let level = match event.level.as_str() {
        "info" => String::new(),
        level => format!("{}: ", level.to_uppercase()),
    };
    let whom = match (&event.domain, &event.host) {
        (Some(domain), _) => format!(" {domain}:"),
        (None, Some(host)) => format!(" {host}:"),
        (None, None) => String::new(),
    };
    plain(&format!("{}: {level}{}{whom} {}", timestamp(event.time_ms), event.kind, event.message))
}

pub fn moved(report: &MoveReport) -> String {
    let pause = report.pause_ms.map_or(String::new(), |pause| format!(", stood still {pause:.1} ms"));
    let lost = match report.epochs_lost {
        0 => "nothing lost".to_owned(),
        1 => "1 epoch lost".to_owned(),
        lost => format!("{lost} epochs lost"),
    };
    format!(
        "Domain '{}' runs on {} instead of {}: epoch {}, term {}, {lost}, {:.1} ms{pause}\n",
        report.domain, report.to, report.from, report.epoch, report.term, report.took_ms
    )
}

pub fn verified(report: &VerifyReport, quiet: bool) -> String {
    let mut table = Table::new(&["Shadow", "Equal", "Pages compared", "Difference"]);
    for shadow in &report.shadows {
        table.row([
            shadow.host.clone(),
            if shadow.equal { "yes" } else { "no" }.into(),
            shadow.pages_compared.to_string(),
            shadow.difference.clone(),
        ]);
    }
    table.render(quiet)
}

/// Newest first, as that is what is looked for.
pub fn epochs(shadows: &[ShadowEpochs], quiet: bool) -> String {
    let mut table = Table::new(&["Shadow", "Epoch", "Term", "Age", "Size"]);
    for shadow in shadows {
        for kept in shadow.epochs.iter().rev() {
            let size = if kept.bytes == 0 { "-".into() } else { bytes(kept.bytes) };
            let age = format!("{:.1} s", kept.age_ms as f64 / 1e3);
            table.row([shadow.host.clone(), kept.epoch.to_string(), kept.term.to_string(), age, size]);
        }
    }
    let problems = shadows.iter().filter(|shadow| !shadow.problem.is_empty());
    table.render(quiet)
        + &problems.map(|shadow| format!(" {}: {}\n", shadow.host, plain(&shadow.problem))).collect::<String>()
}

pub fn doctor(report: &DoctorReport, quiet: bool) -> String {
    let can = |can: bool| if can { "yes" } else { "no" }.to_owned();
    let mut text = fields(&[
        ("Host", report.host.clone()),
        ("Primary", can(report.primary)),
        ("Standby", can(report.standby)),
        ("Tracker", report.tracker.clone()),
    ]);
    let mut table = Table::new(&["Check", "Status", "Found"]);
    for check in &report.checks {
        table.row([check.name.clone(), check.status.clone(), check.found.clone()]);
    }
    text.push('\n');
    text.push_str(&table.render(quiet));
    let remedies = report.checks.iter().filter(|check| !check.remedy.is_empty());
    let remedies: String =
        remedies.map(|check| format!(" {}: {}\n", plain(&check.name), plain(&check.remedy))).collect();
    if !remedies.is_empty() {
        text.push_str(&format!("\nWhat to do:\n{remedies}"));
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::api::types::{CaptureStats, HostRef, ShadowView};

    pub(in crate::cli) fn example() -> GuestView {
        GuestView {
            domain: "web".into(),
            uuid: "0d8f9bd2-0000-4000-8000-000000000001".into(),
            term: 3,
            state: GuestState::Degraded,
            reason: "host3: no memory".into(),
            primary: HostRef { host: "host1".into(), rack: "rack1".into() },
            shadows_wanted: 2,
            policy: String::new(),
            interval_ms: 50,
            budget: Budget::default(),
            mirror_mib: 256,
            consistency: Default::default(),
            keep: Keep { epochs: 9, age_ms: 1500, mib: 64 },
            memory_bytes: 1 << 30,
            capture: CaptureStats {
                epoch: 77,
                epochs_total: 76,
                tracker: "userfaultfd".into(),
                ..CaptureStats::default()
            },
            shadows: vec![ShadowView {
                host: "host2".into(),
                rack: "rack2".into(),
                tier: "hot".into(),
                state: ShadowState::Following,
                reason: String::new(),
                committed_epoch: 76,
                lag_ms: 52,
                lag_peak_ms: Default::default(),
                wire_bytes_per_s: 2_500_000,
                pending_pages: 0,
            }],
        }
    }

    #[test]
    fn a_list_of_guests() {
        assert_eq!(
            guests(&[example()], false),
            " Domain   State      Primary   Shadows   Lag     Pause p99   Output   Term
---------------------------------------------------------------------------
 web      degraded   host1     host2     52 ms   0.0 ms      -        3
"
        );
    }

    #[test]
    fn one_guest_in_full() {
        let text = guest(&example(), false);
        for line in [
            "Name:        web",
            "Reason:      host3: no memory",
            "Shadows:     1 of 2 wanted",
            "Kept:        former epochs, at most 9 epochs, 1.5 s, 64.0 MiB",
            "Tracker:     userfaultfd",
            "Consistency: async",
            " host2    rack2   hot    following   76      52 ms   2.4 MiB/s   0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
    }

    #[test]
    fn what_becomes_of_output() {
        let mut view = example();
        view.consistency = Consistency {
            mode: ConsistencyMode::OutputCommit,
            quorum: "2".parse().unwrap(),
            on_loss: OnLoss::Consistency,
        };
        view.capture.output = OutputStats { gate: "holding".into(), held_frames: 3, ..OutputStats::default() };
        assert_eq!(consistency(&view), "output-commit (quorum 2, consistency first)");
        view.capture.output.opened_total = 1;
        let line = output(&view.capture.output);
        assert_eq!(line, "holding; 3 frames held (0 B), for p50 0.0 ms, p99 0.0 ms, 1 times open uncommitted");
        assert!(guest(&view, false).contains(&line));
    }

    #[test]
    fn epochs_with_the_newest_first() {
        let kept = |epoch, age_ms, bytes| crate::api::types::KeptEpoch { epoch, term: 2, age_ms, bytes };
        let shadows = [
            ShadowEpochs {
                host: "host2".into(),
                problem: String::new(),
                epochs: vec![kept(7, 120, 5000), kept(8, 60, 0)],
            },
            ShadowEpochs { host: "host3".into(), problem: "it is silent".into(), epochs: Vec::new() },
        ];
        let expected = " Shadow   Epoch   Term   Age     Size
-----------------------------------------
 host2    8       2      0.1 s   -
 host2    7       2      0.1 s   4.9 KiB
 host3: it is silent
";
        assert_eq!(epochs(&shadows, false), expected);
    }

    #[test]
    fn an_event_on_one_line() {
        let view = EventView {
            seq: 1,
            time_ms: 0,
            level: "alarm".into(),
            kind: "guest-lost".into(),
            domain: Some("web".into()),
            host: None,
            message: "two\nlines".into(),
            figures: serde_json::Map::new(),
        };
        assert_eq!(event(&view), "1970-01-01 00:00:00.000+0000: ALARM: guest-lost web: two lines");
    }
}

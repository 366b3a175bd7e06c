//! `virt-shadow watch`: a live view in the terminal, or a line per shadow and look elsewhere.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, MissedTickBehavior};

use super::args::Format;
use super::table::{bytes, ms, plain, timestamp};
use super::{Failed, Result, Session, put, show};
use crate::api::types::GuestView;

/// Cursor off, no wrapping of long lines; and back.
const SCREEN_ON: &str = "\x1b[?25l\x1b[?7l\x1b[2J";
const SCREEN_OFF: &str = "\x1b[?7h\x1b[?25h";
const HOME: &str = "\x1b[H";
const END_OF_LINE: &str = "\x1b[K\n";
const END_OF_SCREEN: &str = "\x1b[J";

/// Until Ctrl-C, or `count` looks.
pub(super) async fn run(session: &Session, domain: Option<&str>, every: Duration, count: Option<u64>) -> Result<()> {
    let screen = session.format == Format::Table && std::io::stdout().is_terminal();
    let _restore = screen.then(Screen::on);
    let mut ticks = tokio::time::interval_at(Instant::now(), every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = false;
    let mut looks = 0u64;
    while count.is_none_or(|count| looks < count) {
        let look = async {
            ticks.tick().await;
            look(session, domain).await
        };
        let result = tokio::select! {
            result = look => result,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        looks += 1;
        match result {
            Ok(views) => {
                seen = true;
                let text = match (session.format, screen) {
                    (Format::Json, _) => serde_json::to_string(&views).failed_to(|| "print the answer".into())? + "\n",
                    (Format::Table, true) => full_screen(&views, every),
                    (Format::Table, false) => lines(&views, now_ms()),
                };
                put(&text);
            }
            // Who watches a failover wants to see its end: a daemon that is away for a moment is waited for.
            Err(error) if seen && screen => {
                put(&format!("{HOME}{}{END_OF_LINE}", plain(&error.why)));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn look(session: &Session, domain: Option<&str>) -> Result<Vec<GuestView>> {
    match domain {
        Some(domain) => session.guest(domain).await.map(|view| vec![view]),
        None => session.guests().await,
    }
}

/// Puts the terminal back in order, however watching ends.
struct Screen;

impl Screen {
    fn on() -> Self {
        put(SCREEN_ON);
        Self
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut stdout = std::io::stdout().lock();
        // Nobody looks any more if that fails.
        let _ = stdout.write_all(SCREEN_OFF.as_bytes()).and_then(|()| stdout.flush());
    }
}

fn full_screen(views: &[GuestView], every: Duration) -> String {
    let mut text = format!("virt-shadow watch: {} domains, every {} s", views.len(), every.as_secs_f64());
    text.push_str("   (Ctrl-C ends)\n\n");
    if views.is_empty() {
        text.push_str("No domain is protected; `virt-shadow enable DOMAIN` protects one.\n");
    }
    for view in views {
        text.push_str(&guest(view));
        text.push('\n');
    }
    let lines: String = text.lines().map(|line| format!("{}{END_OF_LINE}", plain(line))).collect();
    format!("{HOME}{lines}{END_OF_SCREEN}")
}

fn guest(view: &GuestView) -> String {
    let capture = &view.capture;
    let mut text = format!(
        "{}: {} on {} ({}), term {}\n",
        view.domain,
        show::guest_state(view.state),
        view.primary.host,
        view.primary.rack,
        view.term
    );
    if !view.reason.is_empty() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {}", view.reason);
    }
    let pause = capture.pause_us;
    let _ = writeln!(
        text,
        "  epoch {}   pause p50 {} p99 {} max {}   dirty pages {} (mean {:.0})   sent {} of {}",
        capture.epoch,
        ms(pause.p50),
        ms(pause.p99),
        ms(pause.max),
        capture.dirty_pages.last,
        capture.dirty_pages.mean,
        bytes(capture.wire_bytes_total),
        bytes(capture.raw_bytes_total)
    );
    if !capture.output.gate.is_empty() {
        let _ = writeln!(text, "  output {}", show::output(&capture.output));
    }
    text.push_str(&show::shadows(view, false));
    text
}

/// One line per shadow, fields in a fixed order, for logs and pipes.
fn lines(views: &[GuestView], time_ms: u64) -> String {
    let mut text = String::new();
    for view in views {
        let pause = view.capture.pause_us;
        let head = format!(
            "{} {} {} primary={} epoch={} pause_p50_us={} pause_p99_us={} dirty_pages={}",
            timestamp(time_ms),
            view.domain,
            show::guest_state(view.state).replace(' ', "-"),
            view.primary.host,
            view.capture.epoch,
            pause.p50,
            pause.p99,
            view.capture.dirty_pages.last
        );
        let head = match view.capture.output.gate.as_str() {
            "" => head,
            gate => format!("{head} output={gate} hold_p99_us={}", view.capture.output.hold_us.p99),
        };
        if view.shadows.is_empty() {
            text.push_str(&(plain(&head) + " shadow=-\n"));
        }
        for shadow in &view.shadows {
            let line = format!(
                "{head} shadow={} {} committed={} lag_ms={} wire_bytes_per_s={}",
                shadow.host,
                show::shadow_state(shadow.state),
                shadow.committed_epoch,
                shadow.lag_ms,
                shadow.wire_bytes_per_s
            );
            text.push_str(&(plain(&line) + "\n"));
        }
    }
    text
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_per_shadow() {
        let view = show::tests::example();
        assert_eq!(
            lines(&[view], 0),
            "1970-01-01 00:00:00.000+0000 web degraded primary=host1 epoch=77 pause_p50_us=0 pause_p99_us=0 \
             dirty_pages=0 shadow=host2 following committed=76 lag_ms=52 wire_bytes_per_s=2500000\n"
        );
    }

    #[test]
    fn the_screen_is_redrawn_in_place() {
        let text = full_screen(&[show::tests::example()], Duration::from_secs(1));
        assert!(text.starts_with(HOME) && text.ends_with(END_OF_SCREEN));
        assert_eq!(text.matches('\n').count(), text.matches(END_OF_LINE).count());
        assert!(text.contains("web: degraded on host1 (rack1), term 3"));
        assert!(full_screen(&[], Duration::from_secs(1)).contains("virt-shadow enable"));
    }
}

//! `virt-shadow`: virsh's manners for shadows.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use clap::error::ErrorKind;
use serde::Serialize;
use serde_json::{Value, json};

pub mod args;
mod hook;
mod pages;
mod show;
mod table;
mod watch;

use self::args::{Cli, Command, Enable, Format};
use crate::api::client::{Client, ClientError};
use crate::api::percent;
use crate::api::types::{
    DoctorReport, EnableRequest, EventView, GuestState, GuestView, HostView, MoveReport, MoveRequest, PlanView,
    PolicyRequest, PolicyView, ShadowEpochs, VerifyReport,
};

/// How long one look for new events waits in the daemon, milliseconds.
const FOLLOW_WAIT_MS: u64 = 20_000;
const EVENTS_AT_ONCE: usize = 1_000;
const WAIT_EVERY: Duration = Duration::from_millis(250);

/// What failed (`failed to X`) and why.
pub(crate) struct CliError {
    what: String,
    why: String,
}

type Result<T> = std::result::Result<T, CliError>;

trait Failed<T> {
    /// `what`: the order in words, after "failed to".
    fn failed_to(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::fmt::Display> Failed<T> for std::result::Result<T, E> {
    fn failed_to(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|why| CliError { what: what(), why: why.to_string() })
    }
}

/// The program. Errors go to standard error in two lines, as virsh prints them.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody is left to be told if that fails.
            let _ = error.print();
            let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return if asked_for { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&CliError { what: "start".into(), why: error.to_string() }),
    };
    match runtime.block_on(run(cli)) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

fn fail(error: &CliError) -> ExitCode {
    let mut stderr = std::io::stderr().lock();
    let lines = error.why.lines().map(|line| format!("error: {}\n", table::plain(line))).collect::<String>();
    let _ = write!(stderr, "error: failed to {}\n{lines}", error.what);
    ExitCode::FAILURE
}

/// Writes to standard output; that nobody reads it any more (`| head`) ends the program quietly.
fn put(text: &str) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}

async fn run(cli: Cli) -> Result<ExitCode> {
    let session = Session { client: Client::new(&cli.connect), format: cli.format, quiet: cli.quiet };
    match cli.command {
        Command::Enable(wish) => session.enable(wish).await?,
        Command::Disable(which) => session.disable(&which.domain).await?,
        Command::List { name } => session.list(name).await?,
        Command::Info(which) => {
            let view = session.guest(&which.domain).await?;
            session.print(&view, |quiet| show::guest(&view, quiet))?;
        }
        Command::Watch { domain, interval, count } => {
            watch::run(&session, domain.as_deref(), Duration::from_secs_f64(interval), count).await?;
        }
        Command::Epochs(which) => session.epochs(&which.domain).await?,
        Command::Promote { domain, to, force, epoch } => {
            session.moves(&domain.domain, "promote", MoveRequest { to, force, epoch }).await?;
        }
        Command::Switchover { domain, to } => {
            session.moves(&domain.domain, "switchover", MoveRequest { to, force: false, epoch: None }).await?;
        }
        Command::Verify(which) => return session.verify(&which.domain).await,
        Command::Policy { domain, set, clear } => session.policy(&domain.domain, &set, clear).await?,
        Command::Plan { domain, explain, shadows } => session.plan(domain.as_deref(), explain, shadows).await?,
        Command::Hosts { name } => session.hosts(name).await?,
        Command::Events { follow, since, domain } => session.events(since, follow, domain.as_deref()).await?,
        Command::Doctor => {
            let report: DoctorReport =
                session.client.get("/v1/doctor").await.failed_to(|| "examine this host".into())?;
            session.print(&report, |quiet| show::doctor(&report, quiet))?;
        }
        Command::Version => session.version().await?,
        Command::Completion { shell } => put(&pages::completion(shell)),
        Command::Man { directory } => {
            pages::man(&directory).failed_to(|| format!("write man pages to {}", directory.display()))?;
        }
        Command::Hook { name, operation, state_dir, .. } => {
            hook::run(&session.client, &state_dir, &name, &operation)
                .await
                // Few words: libvirt's own error, of 1 KiB at most, begins with the hook's whole environment.
                .failed_to(|| format!("allow '{name}' here"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `-`: standard input.
fn read_file(path: &str) -> std::result::Result<String, String> {
    let read = match path {
        "-" => std::io::read_to_string(std::io::stdin()),
        path => std::fs::read_to_string(path),
    };
    read.map_err(|error| format!("{path}: {error}"))
}

/// A daemon, and how to print what it says.
pub(crate) struct Session {
    client: Client,
    format: Format,
    quiet: bool,
}

impl Session {
    fn print(&self, value: &impl Serialize, text: impl FnOnce(bool) -> String) -> Result<()> {
        match self.format {
            Format::Json => {
                put(&(serde_json::to_string_pretty(value).failed_to(|| "print the answer".into())? + "\n"));
            }
            // Like virsh, an empty line ends what a person reads.
            Format::Table if self.quiet => put(&text(true)),
            Format::Table => put(&(text(false) + "\n")),
        }
        Ok(())
    }

    async fn guest(&self, domain: &str) -> Result<GuestView> {
        let path = format!("/v1/guests/{}", percent::encode(domain));
        self.client.get(&path).await.failed_to(|| format!("get domain '{domain}'"))
    }

    async fn guests(&self) -> Result<Vec<GuestView>> {
        self.client.get("/v1/guests").await.failed_to(|| "list domains".into())
    }

    async fn enable(&self, wish: Enable) -> Result<()> {
        let consistency = wish.consistency();
        let Enable { domain, shadows, interval, budget, mirror, keep, on, wait, .. } = wish;
        let request = EnableRequest {
            domain: domain.clone(),
            shadows,
            interval_ms: interval,
            budget: budget.unwrap_or_default(),
            mirror_mib: mirror,
            consistency,
            keep,
            on,
            host: None,
        };
        let what = || format!("enable domain '{domain}'");
        let mut view: GuestView = self.client.post("/v1/guests", &request).await.failed_to(what)?;
        if let Some(seconds) = wait {
            view = self.wait_protected(&view, Duration::from_secs_f64(seconds)).await?;
        }
        self.print(&view, |quiet| match quiet {
            true => String::new(),
            false => {
                let hosts: Vec<_> = view.shadows.iter().map(|shadow| shadow.host.as_str()).collect();
                let state = show::guest_state(view.state);
                format!("Domain '{}' is {state}, shadows on {}\n", view.domain, hosts.join(", "))
            }
        })
    }

    /// Looks until all wanted shadows follow, with progress on a terminal.
    async fn wait_protected(&self, enabled: &GuestView, within: Duration) -> Result<GuestView> {
        let began = Instant::now();
        let progress = !self.quiet && std::io::stderr().is_terminal();
        let clear = || {
            if progress {
                eprint!("\r\x1b[K");
            }
        };
        loop {
            let view = self.guest(&enabled.uuid).await.inspect_err(|_| clear())?;
            if view.state == GuestState::Protected {
                clear();
                return Ok(view);
            }
            if began.elapsed() >= within {
                clear();
                let reason = if view.reason.is_empty() { String::new() } else { format!(": {}", view.reason) };
                return Err(CliError {
                    what: format!("wait for domain '{}' to be protected", view.domain),
                    why: format!("it is {} after {} s{reason}", show::guest_state(view.state), within.as_secs_f64()),
                });
            }
            if progress {
                let pending: u64 = view.shadows.iter().map(|shadow| shadow.pending_pages).sum();
                let rate: u64 = view.shadows.iter().map(|shadow| shadow.wire_bytes_per_s).sum();
                let state = show::guest_state(view.state);
                let (pending, rate) = (table::bytes(pending.saturating_mul(4096)), table::bytes(rate));
                eprint!("\r\x1b[K{}: {state}, {pending} to go, {rate}/s, {} s", view.domain, began.elapsed().as_secs());
            }
            tokio::time::sleep(WAIT_EVERY).await;
        }
    }

    async fn disable(&self, domain: &str) -> Result<()> {
        let path = format!("/v1/guests/{}", percent::encode(domain));
        let answer: Value = self.client.delete(&path).await.failed_to(|| format!("disable domain '{domain}'"))?;
        self.print(&answer, |quiet| match answer.get("message").and_then(Value::as_str).unwrap_or_default() {
            _ if quiet => String::new(),
            "" => format!("Domain '{domain}' is no longer protected\n"),
            message => format!("Domain '{domain}' is no longer protected; {}\n", table::plain(message)),
        })
    }

    async fn list(&self, names: bool) -> Result<()> {
        let views = self.guests().await?;
        if names && self.format == Format::Table {
            put(&views.iter().map(|view| table::plain(&view.domain) + "\n").collect::<String>());
            return Ok(());
        }
        self.print(&views, |quiet| show::guests(&views, quiet))
    }

    async fn policy(&self, domain: &str, set: &[String], clear: bool) -> Result<()> {
        let path = format!("/v1/guests/{}/policy", percent::encode(domain));
        if set.is_empty() && !clear {
            let view: PolicyView =
                self.client.get(&path).await.failed_to(|| format!("get the policy of domain '{domain}'"))?;
            return self.print(&view, |_| show::policy(&view));
        }
        let what = || format!("set the policy of domain '{domain}'");
        let mut request = PolicyRequest { policy: clear.then(String::new), set: Vec::new() };
        for item in set {
            match item {
                change if change.contains('=') => request.set.push(change.clone()),
                _ if request.policy.is_some() => return Err("more than one file").failed_to(what),
                file => request.policy = Some(read_file(file).failed_to(what)?),
            }
        }
        let view: PolicyView = self.client.post(&path, &request).await.failed_to(what)?;
        self.print(&view, |quiet| if quiet { String::new() } else { show::policy(&view) })
    }

    async fn plan(&self, domain: Option<&str>, explain: bool, shadows: Option<u32>) -> Result<()> {
        let mut path = format!("/v1/plan?explain={}", u8::from(explain));
        if let Some(domain) = domain {
            path += &format!("&domain={}", percent::encode(domain));
        }
        if let Some(shadows) = shadows {
            path += &format!("&shadows={shadows}");
        }
        let view: PlanView = self.client.get(&path).await.failed_to(|| match domain {
            Some(domain) => format!("plan the shadows of domain '{domain}'"),
            None => "plan shadows".into(),
        })?;
        self.print(&view, |quiet| show::plan(&view, quiet))
    }

    async fn hosts(&self, names: bool) -> Result<()> {
        let views: Vec<HostView> = self.client.get("/v1/hosts").await.failed_to(|| "list hosts".into())?;
        if names && self.format == Format::Table {
            put(&views.iter().map(|view| table::plain(&view.host) + "\n").collect::<String>());
            return Ok(());
        }
        self.print(&views, |quiet| show::hosts(&views, quiet))
    }

    async fn moves(&self, domain: &str, how: &str, request: MoveRequest) -> Result<()> {
        let path = format!("/v1/guests/{}/{how}", percent::encode(domain));
        let what = || match how {
            "promote" => format!("promote a shadow of domain '{domain}'"),
            _ => format!("switch domain '{domain}' over"),
        };
        let report: MoveReport = self.client.post(&path, &request).await.failed_to(what)?;
        self.print(&report, |quiet| if quiet { String::new() } else { show::moved(&report) })
    }

    async fn epochs(&self, domain: &str) -> Result<()> {
        let path = format!("/v1/guests/{}/epochs", percent::encode(domain));
        let shadows: Vec<ShadowEpochs> =
            self.client.get(&path).await.failed_to(|| format!("list epochs of domain '{domain}'"))?;
        self.print(&shadows, |quiet| show::epochs(&shadows, quiet))
    }

    /// Exit status 1 if anything differs.
    async fn verify(&self, domain: &str) -> Result<ExitCode> {
        let path = format!("/v1/guests/{}/verify", percent::encode(domain));
        let what = || format!("verify domain '{domain}'");
        let report: VerifyReport = self.client.post(&path, &json!({})).await.failed_to(what)?;
        self.print(&report, |quiet| show::verified(&report, quiet))?;
        let equal = !report.shadows.is_empty() && report.shadows.iter().all(|shadow| shadow.equal);
        Ok(if equal { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn events(&self, mut since: u64, follow: bool, domain: Option<&str>) -> Result<()> {
        let mut caught_up = false;
        loop {
            let wait_ms = if caught_up { FOLLOW_WAIT_MS } else { 0 };
            let path = format!("/v1/events?since={since}&wait_ms={wait_ms}&limit={EVENTS_AT_ONCE}");
            let events: Vec<EventView> = match self.client.get(&path).await {
                Ok(events) => events,
                // The daemon is being restarted: it will go on where it was.
                Err(ClientError::Connect { .. } | ClientError::Broken { .. }) if follow && caught_up => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
                Err(error) => return Err(error).failed_to(|| "get events".into()),
            };
            caught_up = events.len() < EVENTS_AT_ONCE;
            since = events.last().map_or(since, |event| event.seq);
            for event in events.iter().filter(|event| domain.is_none_or(|name| event.domain.as_deref() == Some(name))) {
                match self.format {
                    // One a line, so that they can be read as they come.
                    Format::Json => put(&(serde_json::to_string(event).failed_to(|| "print an event".into())? + "\n")),
                    Format::Table => put(&(show::event(event) + "\n")),
                }
            }
            if caught_up && !follow {
                return Ok(());
            }
        }
    }

    async fn version(&self) -> Result<()> {
        let daemon = self.client.get::<Value>("/v1/version").await;
        let own = env!("CARGO_PKG_VERSION");
        let value = json!({ "virt-shadow": own, "virtshadowd": daemon.as_ref().ok() });
        self.print(&value, |_| {
            let daemon = match &daemon {
                Ok(daemon) => {
                    let text = |key: &str| daemon.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
                    format!("{} on {}", text("version"), text("host"))
                }
                Err(error) => format!("not reached: {error}"),
            };
            table::fields(&[("virt-shadow", own.into()), ("virtshadowd", daemon)])
        })
    }
}

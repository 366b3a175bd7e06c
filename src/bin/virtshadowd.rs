//! `virtshadowd`: the daemon on every host, with the agent role, and on one of them (or apart) the manager role.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use virt_shadow::api::server::{self, Backend};
use virt_shadow::cli::args::Daemon;
use virt_shadow::config::Config;
use virt_shadow::manager::{Manager, Options};
use virt_shadow::transport::Security;

fn main() -> ExitCode {
    // The agent starts this program again as its guard and as gates; see `capture::guard` and `output::process`. Before
    // anything makes a thread.
    match std::env::args_os().nth(1).as_deref().and_then(|word| word.to_str()) {
        Some("guard") => virt_shadow::capture::guard::main(),
        Some("gate") => virt_shadow::output::process::main(),
        _ => {}
    }
    let arguments = Daemon::parse();
    match start(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: virtshadowd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Daemon) -> anyhow::Result<()> {
    let filter =
        tracing_subscriber::EnvFilter::try_new(&arguments.log).with_context(|| format!("--log {}", arguments.log))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let config = Config::load(&arguments.config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build()?;
    let result = runtime.block_on(run(config));
    // Threads in calls that never return must not keep a daemon that was told to end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    result
}

async fn run(config: Config) -> anyhow::Result<()> {
    let (stop, shutdown) = watch::channel(false);
    let security = Security::load(config.transport, &config.tls)?;
    if matches!(security, Security::Plain) {
        tracing::warn!("transport = \"plain-tcp\": whoever reaches this network can read and change guests' memory");
    }
    let listener = server::listen(&config.socket).await?;
    let manager = match config.manager.enabled {
        true => Some(Manager::start(Options::from_config(&config, security.clone()), shutdown.clone()).await?),
        false => None,
    };
    // Kept until the end: the agent works as long as it has an owner.
    let (_agent, link) = match config.agent.enabled {
        true => virt_shadow::agent::start(&config, security, shutdown.clone())
            .map(|(agent, link)| (Some(agent), Some(link)))?,
        false => (None, None),
    };
    let backend = Backend { host: config.host.clone(), manager, agent: link };
    let api = tokio::spawn(server::serve(listener, backend, shutdown));
    notify("READY=1");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => (),
        _ = interrupt.recv() => (),
    }
    notify("STOPPING=1");
    tracing::info!("shutting down");
    stop.send_replace(true);
    // No new calls; those under way end with their connections.
    api.await.context("API socket")?;
    std::fs::remove_file(&config.socket).with_context(|| format!("cannot remove {}", config.socket.display()))
}

/// Tells the service manager, if there is one, how we are (see sd_notify(3)).
fn notify(state: &str) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    let told = address.and_then(|to| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &to));
    if let Err(error) = told {
        tracing::warn!("NOTIFY_SOCKET: {error}");
    }
}

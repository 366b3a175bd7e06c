//! The agent role: what a host does for its guests.

use tokio::sync::watch;

use crate::api::link::AgentLink;
use crate::config::Config;

/// Runs the agent role until `shutdown` turns true. `link` is given the connection to the manager once it is
/// started, for the daemon's REST server.
pub async fn run(
    _config: Config,
    mut shutdown: watch::Receiver<bool>,
    _link: watch::Sender<Option<AgentLink>>,
) -> anyhow::Result<()> {
    shutdown.wait_for(|stop| *stop).await?;
    Ok(())
}

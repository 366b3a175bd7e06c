//! `/etc/virt-shadow/virtshadowd.toml`: what a daemon is and where it finds its manager.
//!
//! Every field has a default but `manager` of an agent; unknown fields are refused, so a typing error is found at
//! start and not at the first failover.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::transport::PeerName;

/// Where the daemon looks for its configuration unless `--config` names another file.
pub const DEFAULT_CONFIG_PATH: &str = "/etc/virt-shadow/virtshadowd.toml";
/// Socket of the REST API, and what `virt-shadow` connects to unless `--connect` names another.
pub const DEFAULT_SOCKET_PATH: &str = "/run/virt-shadow/virtshadowd.sock";

/// Most labels of a host.
const MAX_LABELS: usize = 64;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this host, unique among all hosts of the manager. Default: the kernel's host name.
    pub host: String,
    /// Failure domain of this host; shadows go to other racks than their primary's.
    pub rack: String,
    /// Power domain of its rack, if the manager has no topology file: no two copies of a guest share one.
    pub power: Option<String>,
    /// What guests may ask for, or avoid, of hosts of their shadows.
    pub labels: Vec<String>,
    /// Unix socket of the REST API; whoever may open it may give orders (mode 0660).
    pub socket: PathBuf,
    /// Records that must survive a reboot: which guests this host ran, with which term; the manager's database.
    pub state_dir: PathBuf,
    /// Journals and process records; lost at reboot, best on tmpfs.
    pub run_dir: PathBuf,
    /// How hosts speak with each other: `tls`, or `plain-tcp` where nobody else can listen or connect.
    pub transport: Transport,
    pub tls: TlsConfig,
    pub agent: AgentConfig,
    pub manager: ManagerConfig,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    Tls,
    PlainTcp,
}

/// PEM files, by default where libvirt keeps its own. Both certificates name this host among their DNS names.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Authorities whose certificates count.
    pub ca: PathBuf,
    /// Shown to whom we connect to.
    pub client_cert: PathBuf,
    pub client_key: PathBuf,
    /// Shown to who connects to us; the manager's also names its address, or `agent.manager_name`.
    pub server_cert: PathBuf,
    pub server_key: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    /// Whether this daemon has the agent role.
    pub enabled: bool,
    /// Address of the manager's control port, `IP:PORT`.
    pub manager: Option<SocketAddr>,
    /// Name in the manager's certificate; without it the certificate must hold the address above.
    pub manager_name: Option<String>,
    /// Address other hosts' agents reach this one's sync port at, and the address it listens on.
    pub sync_listen: SocketAddr,
    pub libvirt_uri: String,
    /// `auto`, `userfaultfd` or `hash`.
    pub tracker: TrackerChoice,
    /// The longest a cut may keep a guest stopped before the watchdog lets it go, milliseconds.
    pub watchdog_ms: u64,
    /// Of the threads that a stopped guest waits for, ours and QEMU's: `realtime` or `usual`.
    pub priority: PriorityChoice,
    /// Where copies of guests' disks are kept, and the disks of shadows; on a disk of this host, with room for them.
    pub disk_dir: PathBuf,
    /// Bound of the first copy of each disk on its own host, MiB/s; 0: as fast as it goes.
    pub disk_copy_mib_per_s: u64,
    /// For measuring codecs: a folder for files with the memory of protected guests and their epochs, in the clear.
    pub record_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrackerChoice {
    Auto,
    Userfaultfd,
    Hash,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PriorityChoice {
    /// The lowest real-time priority, as far as this daemon has the right to it.
    RealTime,
    /// As everything else on this host; pauses are longer when it is busy.
    Usual,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ManagerConfig {
    /// Whether this daemon has the manager role.
    pub enabled: bool,
    /// Control port that agents connect to.
    pub listen: SocketAddr,
    /// How often agents report, milliseconds.
    pub heartbeat_ms: u64,
    /// Silence after which a host is suspected and probed, milliseconds.
    pub suspect_ms: u64,
    /// How long a suspected host is probed without any answer before it counts as gone, milliseconds.
    pub confirm_ms: u64,
    /// A file that describes the site: racks, switches, power domains, links. Without one hosts tell their racks.
    pub topology: Option<PathBuf>,
    /// vCPUs that a processor may carry once shadows have been promoted.
    pub cpu_overcommit: u32,
    /// How often the shadows of each guest are compared with it without anybody asking, hours; 0: never.
    pub compare_hours: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            host: nix::unistd::gethostname().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
            rack: "rack0".into(),
            power: None,
            labels: Vec::new(),
            socket: DEFAULT_SOCKET_PATH.into(),
            state_dir: "/var/lib/virt-shadow".into(),
            run_dir: "/run/virt-shadow".into(),
            transport: Transport::Tls,
            tls: TlsConfig::default(),
            agent: AgentConfig::default(),
            manager: ManagerConfig::default(),
        }
    }
}

impl Default for TlsConfig {
    fn default() -> Self {
        Self {
            ca: "/etc/pki/CA/cacert.pem".into(),
            client_cert: "/etc/pki/libvirt/clientcert.pem".into(),
            client_key: "/etc/pki/libvirt/private/clientkey.pem".into(),
            server_cert: "/etc/pki/libvirt/servercert.pem".into(),
            server_key: "/etc/pki/libvirt/private/serverkey.pem".into(),
        }
    }
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            manager: None,
            manager_name: None,
            sync_listen: ([0, 0, 0, 0], 7710).into(),
            libvirt_uri: "qemu:///system".into(),
            tracker: TrackerChoice::Auto,
            watchdog_ms: 300,
            priority: PriorityChoice::RealTime,
            disk_dir: "/var/lib/virt-shadow/disks".into(),
            disk_copy_mib_per_s: 200,
            record_dir: None,
        }
    }
}

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            listen: ([0, 0, 0, 0], 7711).into(),
            heartbeat_ms: 200,
            suspect_ms: 700,
            confirm_ms: 300,
            topology: None,
            cpu_overcommit: 16,
            compare_hours: 24,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("{path}: {field}: {reason}")]
    Invalid { path: PathBuf, field: &'static str, reason: String },
}

impl Config {
    /// Reads and checks `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Parses the text of a file named `path` (named in errors only).
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|error| ConfigError::Parse { path: path.into(), message: error.to_string() })?;
        config.check().map_err(|(field, reason)| ConfigError::Invalid { path: path.into(), field, reason })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        let name_ok = |s: &str| {
            !s.is_empty() && s.len() <= 64 && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        if !name_ok(&self.host) {
            return Err(("host", format!("{:?} is not a name of 1 to 64 letters, digits, '-', '_' or '.'", self.host)));
        }
        if !name_ok(&self.rack) {
            return Err(("rack", format!("{:?} is not a name of 1 to 64 letters, digits, '-', '_' or '.'", self.rack)));
        }
        if let Some(power) = self.power.as_ref().filter(|power| !name_ok(power)) {
            return Err(("power", format!("{power:?} is not a name of 1 to 64 letters, digits, '-', '_' or '.'")));
        }
        if let Some(label) = self.labels.iter().find(|label| !name_ok(label)) {
            return Err(("labels", format!("{label:?} is not a name of 1 to 64 letters, digits, '-', '_' or '.'")));
        }
        if self.labels.len() > MAX_LABELS {
            return Err(("labels", format!("{} are more than {MAX_LABELS}", self.labels.len())));
        }
        if !self.agent.enabled && !self.manager.enabled {
            return Err(("agent.enabled", "neither the agent nor the manager role is enabled".into()));
        }
        if self.agent.enabled && self.agent.manager.is_none() && !self.manager.enabled {
            return Err(("agent.manager", "an agent needs the address of its manager, as \"IP:PORT\"".into()));
        }
        let range = |field, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err((field, format!("{value} is not within {min} to {max}")))
            }
        };
        range("agent.watchdog_ms", self.agent.watchdog_ms, 20, 2_000)?;
        range("agent.disk_copy_mib_per_s", self.agent.disk_copy_mib_per_s, 0, 1 << 20)?;
        if !self.agent.disk_dir.is_absolute() {
            return Err(("agent.disk_dir", format!("{} does not begin with /", self.agent.disk_dir.display())));
        }
        range("manager.heartbeat_ms", self.manager.heartbeat_ms, 20, 10_000)?;
        range("manager.cpu_overcommit", self.manager.cpu_overcommit.into(), 1, 1_000)?;
        range("manager.compare_hours", self.manager.compare_hours, 0, 8_760)?;
        range("manager.suspect_ms", self.manager.suspect_ms, 100, 60_000)?;
        if self.manager.suspect_ms < 2 * self.manager.heartbeat_ms {
            let least = 2 * self.manager.heartbeat_ms;
            return Err(("manager.suspect_ms", format!("must be at least two heartbeats, {least} ms")));
        }
        range("manager.confirm_ms", self.manager.confirm_ms, 50, 60_000)
    }

    /// Where this daemon's agent finds its manager: as configured, or its own manager role on loopback.
    pub fn manager_addr(&self) -> Option<SocketAddr> {
        self.agent.manager.or_else(|| self.manager.enabled.then(|| ([127, 0, 0, 1], self.manager.listen.port()).into()))
    }

    /// As whom the manager at [`Config::manager_addr`] must show itself.
    pub fn manager_name(&self) -> Option<PeerName> {
        match (&self.agent.manager_name, self.agent.manager) {
            (Some(name), _) => Some(PeerName::Name(name.clone())),
            (None, Some(addr)) => Some(PeerName::Address(addr.ip())),
            (None, None) => self.manager.enabled.then(|| PeerName::Name(self.host.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("x.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn errors_name_file_field_and_remedy() {
        assert!(parse("hots = \"a\"").unwrap_err().contains("hots"));
        let no_manager = parse("host = \"h1\"").unwrap_err();
        assert!(no_manager.contains("x.toml: agent.manager") && no_manager.contains("IP:PORT"), "{no_manager}");
        assert!(parse("host = \"h 1\"\n[manager]\nenabled = true").unwrap_err().contains("h 1"));
        assert!(parse("host = \"h1\"\n[manager]\nenabled = true\nsuspect_ms = 1").unwrap_err().contains("within"));
    }

    #[test]
    fn priority_is_one_of_two_words() {
        let agent = |line: &str| parse(&format!("host = \"h1\"\n[manager]\nenabled = true\n[agent]\n{line}"));
        assert_eq!(agent("").unwrap().agent.priority, PriorityChoice::RealTime);
        assert_eq!(agent("priority = \"usual\"").unwrap().agent.priority, PriorityChoice::Usual);
        for wrong in ["priority = \"high\"", "priority = 1", "priority = true"] {
            let error = agent(wrong).unwrap_err();
            assert!(error.contains("x.toml") && error.contains(wrong), "{error}");
        }
        let error = agent("priority = \"high\"").unwrap_err();
        assert!(error.contains("`realtime`") && error.contains("`usual`"), "{error}");
    }

    #[test]
    fn an_agent_beside_the_manager_finds_it_on_loopback() {
        let config = parse("host = \"h1\"\n[manager]\nenabled = true").unwrap();
        assert_eq!(config.manager_addr().unwrap().to_string(), "127.0.0.1:7711");
    }
}

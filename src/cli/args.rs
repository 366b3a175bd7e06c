//! Commands and options of `virt-shadow` and `virtshadowd`: what is parsed, completed and printed in the man pages.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use placement::guardian::{DEFAULT_KEEP_MIB, KEEP_EPOCHS, KEEP_MIB, MIRROR_MIB};

use crate::api::types::{Budget, Consistency, ConsistencyMode, Keep, OnLoss, Quorum};
use crate::config::{DEFAULT_CONFIG_PATH, DEFAULT_SOCKET_PATH};

/// Keeps shadows of running guests on other hosts, ready to go on when their host is lost.
#[derive(Debug, Parser)]
#[command(name = "virt-shadow", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// Socket of the virtshadowd to talk to
    #[arg(
        short,
        long,
        global = true,
        value_name = "SOCKET",
        env = "VIRT_SHADOW_SOCKET",
        default_value = DEFAULT_SOCKET_PATH,
        hide_env_values = true
    )]
    pub connect: PathBuf,
    /// Print no headings and no messages, only what was asked for
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// How to print results
    #[arg(long, global = true, value_name = "FORMAT", default_value = "table")]
    pub format: Format,
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  virt-shadow enable web                 shadow the running domain web to a host in another rack
  virt-shadow enable web --shadows 2 --wait 60
  virt-shadow list
  virt-shadow watch web
  virt-shadow plan web --explain         where its shadows would go, and why not elsewhere
  virt-shadow policy web --set shadows=2 need=ssd
  virt-shadow switchover web             move it now, losing nothing
  virt-shadow doctor                     what this host can be, and what it lacks

Domains are named by name or UUID. Exit status: 0, or 1 with the error on standard error.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Protect a running domain, without restarting it; repeated, change how
    Enable(Enable),
    /// Stop protecting a domain; it runs on
    Disable(Domain),
    /// List protected domains
    List {
        /// Print names only
        #[arg(long)]
        name: bool,
    },
    /// Show all that is known of a protected domain
    Info(Domain),
    /// Follow domains in the terminal: lag, pauses, dirty pages, traffic; elsewhere print a line per shadow
    Watch {
        /// Domain to follow; all protected ones if not given
        domain: Option<String>,
        /// Seconds between two looks
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
        interval: f64,
        /// End after so many looks
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// List the epochs that the shadows of a domain could be promoted from, see enable --keep
    Epochs(Domain),
    /// Make a shadow the primary because the primary is gone; loses what was not committed
    Promote {
        #[command(flatten)]
        domain: Domain,
        /// Host whose shadow takes over; the one with the newest commit if not given
        #[arg(long, value_name = "HOST")]
        to: Option<String>,
        /// Even if the primary still answers: it is stopped first
        #[arg(long)]
        force: bool,
        /// Go back to this epoch, one of those that `epochs` lists; loses what the domain did since
        #[arg(long, value_name = "N")]
        epoch: Option<u64>,
    },
    /// Move a domain to one of its shadows, losing nothing
    Switchover {
        #[command(flatten)]
        domain: Domain,
        /// Host whose shadow takes over; the one with the newest commit if not given
        #[arg(long, value_name = "HOST")]
        to: Option<String>,
    },
    /// Compare all memory and the device state of a domain with its shadows
    Verify(Domain),
    /// Show or change what a domain asks of its shadows; kept with its definition
    ///
    /// Keys: shadows, tiers, apart, latency_us, interval_ms, need, avoid, group, priority.
    Policy {
        #[command(flatten)]
        domain: Domain,
        /// A file with a whole policy (- for standard input), or a key with its value: shadows=2, apart=rack,room,
        /// need=ssd; without a value the key goes. May be repeated
        #[arg(long, value_name = "FILE|KEY=VALUE", num_args = 1.., conflicts_with = "clear")]
        set: Vec<String>,
        /// Back to the default: one hot shadow in another rack
        #[arg(long)]
        clear: bool,
    },
    /// Show where shadows would go, changing nothing: of all protected domains, or of one, protected or not
    Plan {
        /// Name or UUID of a domain
        domain: Option<String>,
        /// Say of each host why it would be taken or not
        #[arg(long)]
        explain: bool,
        /// As if so many shadows were asked for
        #[arg(long, value_name = "N", requires = "domain", value_parser = clap::value_parser!(u32).range(1..=8))]
        shadows: Option<u32>,
    },
    /// List hosts
    Hosts {
        /// Print names only
        #[arg(long)]
        name: bool,
    },
    /// Show what happened
    Events {
        /// Go on printing events as they happen
        #[arg(short, long)]
        follow: bool,
        /// Only events with a higher number
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        since: u64,
        /// Only events of this domain
        #[arg(long, value_name = "DOMAIN")]
        domain: Option<String>,
    },
    /// Check whether this host can be primary or standby, and what is missing
    Doctor,
    /// Show the versions of this program and of the daemon
    Version,
    /// Print a completion script
    Completion {
        #[arg(value_name = "SHELL", default_value = "bash")]
        shell: Shell,
    },
    /// Write the man pages into a directory
    #[command(hide = true)]
    Man { directory: PathBuf },
    /// What libvirt calls for every domain (/etc/libvirt/hooks/qemu); the definition on standard input
    #[command(hide = true)]
    Hook {
        name: String,
        operation: String,
        suboperation: Option<String>,
        extra: Option<String>,
        /// Where the daemon keeps its records
        #[arg(long, value_name = "DIR", default_value = "/var/lib/virt-shadow", env = "VIRT_SHADOW_STATE_DIR")]
        state_dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct Domain {
    /// Name or UUID of a domain
    pub domain: String,
}

#[derive(Debug, Args)]
pub struct Enable {
    /// Name or UUID of a running domain
    pub domain: String,
    /// How many shadows, each in a rack of its own; default: what its policy says, else one, or one per --on
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub shadows: Option<u32>,
    /// Milliseconds between two cuts; with --budget, the least. Default: what its policy says, else 50
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub interval: Option<u64>,
    /// What protection may cost; the time between cuts grows as needed, to 2 s at most. One or more of pause=SHARE of the
    /// guest's time (2%), wire=RATE towards each shadow in bits a second (500M), cpu=SHARE of a processor (50%)
    #[arg(long, value_name = "LIMIT,...", value_parser = budget)]
    pub budget: Option<Budget>,
    /// Memory on the domain's host for previous contents of its pages, of which only the changes are sent then: a
    /// number of MiB, or with a unit (64M, 2G), or full: as much as the domain has
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = mirror_mib)]
    pub mirror: u64,
    /// What clients may rely on after a failover: async, a failover loses at most the lag; output-commit, nothing a
    /// client was told is lost, as the domain's packets leave only when shadows have what they tell
    #[arg(long, value_name = "MODE", default_value = "async")]
    pub consistency: ConsistencyArg,
    /// With output-commit: how many shadows must have it; any, all or a number
    #[arg(long, value_name = "SHADOWS", default_value = "any")]
    pub quorum: Quorum,
    /// With output-commit, when those cannot be had: availability, packets leave all the same, with an event;
    /// consistency, they wait, and the domain is cut off from the network
    #[arg(long, value_name = "FIRST", default_value = "availability")]
    pub on_loss: OnLossArg,
    /// Former epochs that each shadow keeps, to go back to with promote --epoch. One or more of a number of epochs (1000),
    /// an age (90s, 10min, 2h) and memory on the shadow's host (64M, 2G; 256M if not given); or none
    #[arg(long, value_name = "LIMIT,...", default_value = "none", value_parser = keep)]
    pub keep: Keep,
    /// Host that must keep a shadow; may be repeated. The rest is chosen
    #[arg(long, value_name = "HOST")]
    pub on: Vec<String>,
    /// Wait until the domain is protected, at most so long
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub wait: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConsistencyArg {
    Async,
    OutputCommit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnLossArg {
    Availability,
    Consistency,
}

impl Enable {
    pub(super) fn consistency(&self) -> Consistency {
        Consistency {
            mode: match self.consistency {
                ConsistencyArg::Async => ConsistencyMode::Async,
                ConsistencyArg::OutputCommit => ConsistencyMode::OutputCommit,
            },
            quorum: self.quorum,
            on_loss: match self.on_loss {
                OnLossArg::Availability => OnLoss::Availability,
                OnLossArg::Consistency => OnLoss::Consistency,
            },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Keeps shadows of this host's guests on other hosts, and shadows of other hosts' guests here.
#[derive(Debug, Parser)]
#[command(name = "virtshadowd", version, max_term_width = 100)]
pub struct Daemon {
    /// Configuration file
    #[arg(long, value_name = "FILE", default_value = DEFAULT_CONFIG_PATH)]
    pub config: PathBuf,
    /// What to log: error, warn, info, debug or trace, also per module (virt_shadow::manager=debug)
    #[arg(long, value_name = "LEVEL", env = "VIRT_SHADOW_LOG", default_value = "info")]
    pub log: String,
}

/// MiB of a size as `--mirror` takes it.
fn mirror_mib(text: &str) -> Result<u64, String> {
    if text == "full" {
        return Ok(*MIRROR_MIB.end());
    }
    let (number, factor) = match text.strip_suffix(['M', 'm']) {
        Some(number) => (number, 1),
        None => text.strip_suffix(['G', 'g']).map_or((text, 1), |number| (number, 1024)),
    };
    let mib = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    mib.filter(|mib| MIRROR_MIB.contains(mib)).ok_or_else(|| "must be full, or MiB such as 256, 256M or 2G".into())
}

/// `1000,10min,256M`, in any order, each kind at most once.
fn keep(text: &str) -> Result<Keep, String> {
    let mut keep = Keep::default();
    if text == "none" {
        return Ok(keep);
    }
    const UNITS: [(&str, u64); 5] = [("min", 60_000), ("s", 1_000), ("h", 3_600_000), ("M", 1), ("G", 1024)];
    for part in text.split(',') {
        let unit = UNITS.iter().find(|(unit, _)| part.ends_with(unit)).copied();
        let (unit, factor) = unit.unwrap_or(("", 1));
        let number = part[..part.len() - unit.len()].parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
        let number = number.filter(|number| *number > 0).ok_or_else(|| {
            format!("{part:?} is none of a number of epochs (1000), an age (90s, 10min, 2h) and memory (64M, 2G)")
        })?;
        let (limit, most) = match unit {
            "M" | "G" => (&mut keep.mib, *KEEP_MIB.end()),
            "" => (&mut keep.epochs, *KEEP_EPOCHS.end()),
            _ => (&mut keep.age_ms, u64::MAX),
        };
        if number > most {
            return Err(format!("{part} is more than {most}{}", if unit.is_empty() { " epochs" } else { "M" }));
        }
        if std::mem::replace(limit, number) != 0 {
            return Err(format!("{part:?} is the second limit of its kind"));
        }
    }
    if keep.mib == 0 {
        keep.mib = DEFAULT_KEEP_MIB;
    }
    Ok(keep)
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be a number of seconds from 0.05 to 86400".into()),
    }
}

/// `pause=2%,wire=500M,cpu=50%`, in any order, each at most once.
fn budget(text: &str) -> Result<Budget, String> {
    let mut budget = Budget::default();
    for part in text.split(',') {
        let (name, value) =
            part.split_once('=').ok_or_else(|| format!("{part:?} is not pause=SHARE, wire=RATE or cpu=SHARE"))?;
        let share = |most: f64| match value.strip_suffix('%').and_then(|number| number.parse::<f64>().ok()) {
            Some(percent) if percent > 0.0 && percent <= most => Ok(percent),
            _ => Err(format!("{name}={value}: must be a percentage above 0% and up to {most}%")),
        };
        let twice = match name {
            "pause" => std::mem::replace(&mut budget.pause_permille, (share(100.0)? * 10.0).ceil() as u32) != 0,
            "cpu" => std::mem::replace(&mut budget.cpu_percent, share(10_000.0)?.ceil() as u32) != 0,
            "wire" => std::mem::replace(&mut budget.wire_kbit, kilobits(value)?) != 0,
            _ => return Err(format!("{name:?} is none of pause, wire and cpu")),
        };
        if twice {
            return Err(format!("{name} is given twice"));
        }
    }
    Ok(budget)
}

/// Bits a second with a unit: `800k`, `500M`, `1.5G`.
fn kilobits(text: &str) -> Result<u64, String> {
    let error = || format!("wire={text}: must be bits a second with a unit, from 1k to 1000G, such as 500M");
    let (number, kilobits) = [('k', 1.0), ('M', 1e3), ('G', 1e6)]
        .into_iter()
        .find_map(|(unit, kilobits)| Some((text.strip_suffix(unit)?, kilobits)))
        .ok_or_else(error)?;
    match number.parse::<f64>() {
        Ok(number) if (1.0..=1e9).contains(&(number * kilobits)) => Ok((number * kilobits) as u64),
        _ => Err(error()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn a_budget_is_understood_or_refused_with_the_reason() {
        let all = Budget { pause_permille: 15, wire_kbit: 1_500_000, cpu_percent: 50 };
        assert_eq!(budget("pause=1.5%,cpu=50%,wire=1.5G").unwrap(), all);
        assert_eq!(budget("wire=800k").unwrap(), Budget { wire_kbit: 800, ..Budget::default() });
        for (text, word) in [
            ("", "is not pause"),
            ("pause", "is not pause"),
            ("pause=2", "percentage"),
            ("pause=0%", "percentage"),
            ("pause=101%", "100%"),
            ("pause=NaN%", "percentage"),
            ("wire=5", "500M"),
            ("wire=infG", "500M"),
            ("disk=5%", "none of"),
            ("cpu=5%,cpu=6%", "twice"),
        ] {
            let error = budget(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
        Daemon::command().debug_assert();
    }

    #[test]
    fn arguments_that_cannot_be_meant_are_refused() {
        for line in [
            "virt-shadow",
            "virt-shadow enable",
            "virt-shadow enable web --shadows 0",
            "virt-shadow enable web --shadows 9",
            "virt-shadow enable web --interval 9",
            "virt-shadow enable web --mirror 5T",
            "virt-shadow enable web --mirror 99999999999G",
            "virt-shadow enable web --wait soon",
            "virt-shadow enable web --consistency strict",
            "virt-shadow enable web --quorum 0",
            "virt-shadow enable web --on-loss shrug",
            "virt-shadow watch --interval 0",
            "virt-shadow list web",
            "virt-shadow policy",
            "virt-shadow policy web --set shadows=2 --clear",
            "virt-shadow plan --shadows 2",
            "virt-shadow plan web --shadows 9",
            "virt-shadow frobnicate",
            "virt-shadow list --format yaml",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn mirrors_are_sizes_or_full() {
        for (text, mib) in [("0", 0), ("64", 64), ("64M", 64), ("2G", 2048), ("full", 16 << 20)] {
            assert_eq!(mirror_mib(text), Ok(mib));
        }
        for bad in ["", "G", "-1", "1.5G", "17000000"] {
            assert!(mirror_mib(bad).is_err(), "{bad}");
        }
        assert_eq!(mirror_mib("256M"), Ok(crate::api::types::DEFAULT_MIRROR_MIB));
    }

    #[test]
    fn what_is_kept_is_limited_by_number_age_and_memory() {
        for (text, epochs, age_ms, mib) in [
            ("none", 0, 0, 0),
            ("1000", 1000, 0, 256),
            ("90s", 0, 90_000, 256),
            ("10min,2G", 0, 600_000, 2048),
            ("64M,2h,50", 50, 7_200_000, 64),
        ] {
            assert_eq!(keep(text), Ok(Keep { epochs, age_ms, mib }), "{text}");
        }
        for (text, word) in [
            ("", "none of"),
            ("0", "none of"),
            ("-5s", "none of"),
            ("5d", "none of"),
            ("20001", "more than 20000 epochs"),
            ("5T", "none of"),
            ("9999999G", "more than"),
            ("5,6", "second"),
            ("99999999999999999999min", "none of"),
        ] {
            let error = keep(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn global_options_go_before_and_after_the_command() {
        for line in ["virt-shadow -c /s -q --format json list", "virt-shadow list -q --format json --connect /s"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert!(cli.quiet && cli.format == Format::Json && cli.connect.as_os_str() == "/s", "{line}");
        }
        let cli = Cli::try_parse_from("virt-shadow enable web --on b --on c".split(' ')).unwrap();
        assert!(matches!(cli.command, Command::Enable(enable) if enable.on == ["b", "c"] && enable.shadows.is_none()));
    }
}

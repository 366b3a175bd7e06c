//! The product running in a lab, through its REST API: what the demo, the benchmarks and the tests have in common.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::LabError;
use super::{Lab, MANAGER};
use crate::api::client::Client;
use crate::api::types::{
    Consistency, EnableRequest, EventView, GuestState, GuestView, HostState, HostView, MoveReport, MoveRequest,
    ShadowEpochs, ShadowState, VerifyReport,
};

/// Longest wait for one answer: a switchover waits for a slow shadow.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    #[error("{asked}: {reason}")]
    Answer { asked: String, reason: String },
    #[error("{what} not reached within {} s: {last}", .within.as_secs())]
    TooLate { what: String, within: Duration, last: String },
}

impl From<FleetError> for LabError {
    fn from(error: FleetError) -> Self {
        Self::Product(error.to_string())
    }
}

pub type Result<T> = std::result::Result<T, FleetError>;

/// One failover.
#[derive(Debug, Clone)]
pub struct Promotion {
    pub host: String,
    /// When the manager heard that the guest runs, milliseconds since 1970.
    pub at_ms: u64,
    pub epoch: u64,
    pub epochs_lost: u64,
    /// From the decision until then.
    pub took_us: u64,
}

/// The fleet of one lab, asked through one daemon's socket.
pub struct Fleet {
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Fleet {
    /// Asks the manager itself.
    pub fn of(lab: &Lab) -> super::Result<Self> {
        Self::through(lab, MANAGER)
    }

    /// Asks by way of a host's own daemon, as its operator would.
    pub fn through(lab: &Lab, node: &str) -> super::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(LabError::system("start a runtime"))?;
        Ok(Self { socket: lab.daemon_socket(node), runtime })
    }

    fn ask<T: DeserializeOwned>(&self, method: &str, path: &str, body: Option<&impl Serialize>) -> Result<T> {
        let failed = |reason: String| FleetError::Answer { asked: format!("{method} {path}"), reason };
        let client = Client::new(&self.socket).with_timeout(ANSWER_WITHIN);
        let answer = self.runtime.block_on(async {
            match (method, body) {
                ("POST", Some(body)) => client.post(path, body).await,
                ("DELETE", _) => client.delete(path).await,
                _ => client.get(path).await,
            }
        });
        answer.map_err(|error| failed(error.to_string()))
    }

    pub fn enable(&self, domain: &str, host: &str, shadows: u32, interval: Duration) -> Result<GuestView> {
        self.enable_with(domain, host, shadows, interval, Consistency::default())
    }

    pub fn enable_with(
        &self,
        domain: &str,
        host: &str,
        shadows: u32,
        interval: Duration,
        consistency: Consistency,
    ) -> Result<GuestView> {
        let request = EnableRequest {
            shadows: Some(shadows),
            interval_ms: Some(interval.as_millis() as u64),
            consistency,
            host: Some(host.into()),
            ..EnableRequest::of(domain)
        };
        self.ask("POST", "/v1/guests", Some(&request))
    }

    pub fn disable(&self, domain: &str) -> Result<serde_json::Value> {
        self.ask("DELETE", &format!("/v1/guests/{domain}"), None::<&()>)
    }

    pub fn info(&self, domain: &str) -> Result<GuestView> {
        self.ask("GET", &format!("/v1/guests/{domain}"), None::<&()>)
    }

    pub fn hosts(&self) -> Result<Vec<HostView>> {
        self.ask("GET", "/v1/hosts", None::<&()>)
    }

    pub fn events(&self) -> Result<Vec<EventView>> {
        self.ask("GET", "/v1/events?limit=1000", None::<&()>)
    }

    pub fn verify(&self, domain: &str) -> Result<VerifyReport> {
        self.ask("POST", &format!("/v1/guests/{domain}/verify"), Some(&serde_json::json!({})))
    }

    pub fn switchover(&self, domain: &str, to: Option<&str>) -> Result<MoveReport> {
        let request = MoveRequest { to: to.map(Into::into), force: false, epoch: None };
        self.ask("POST", &format!("/v1/guests/{domain}/switchover"), Some(&request))
    }

    pub fn promote(&self, domain: &str, to: Option<&str>, force: bool) -> Result<MoveReport> {
        let request = MoveRequest { to: to.map(Into::into), force, epoch: None };
        self.ask("POST", &format!("/v1/guests/{domain}/promote"), Some(&request))
    }

    /// Back to an epoch that a shadow keeps, away from a primary that still answers.
    pub fn go_back(&self, domain: &str, epoch: u64) -> Result<MoveReport> {
        let request = MoveRequest { to: None, force: true, epoch: Some(epoch) };
        self.ask("POST", &format!("/v1/guests/{domain}/promote"), Some(&request))
    }

    pub fn epochs(&self, domain: &str) -> Result<Vec<ShadowEpochs>> {
        self.ask("GET", &format!("/v1/guests/{domain}/epochs"), None::<&()>)
    }

    /// The newest promotion of a guest by failover, as the manager's log has it.
    pub fn last_promotion(&self, domain: &str) -> Result<Promotion> {
        let events = self.events()?;
        let missing = || FleetError::Answer {
            asked: format!("events of {domain}"),
            reason: "no promotion with its figures among them".into(),
        };
        let event = events
            .iter()
            .rev()
            .find(|event| event.kind == "guest-promoted" && event.domain.as_deref() == Some(domain))
            .ok_or_else(missing)?;
        let number = |key: &str| event.figures.get(key).and_then(serde_json::Value::as_u64);
        Ok(Promotion {
            host: event.host.clone().ok_or_else(missing)?,
            at_ms: event.time_ms,
            epoch: number("epoch").ok_or_else(missing)?,
            epochs_lost: number("epochs_lost").ok_or_else(missing)?,
            took_us: number("took_us").ok_or_else(missing)?,
        })
    }

    /// Waits for a promotion that was told after `since_ms`.
    pub fn wait_promotion(&self, domain: &str, since_ms: u64, within: Duration) -> Result<Promotion> {
        let began = Instant::now();
        loop {
            match self.last_promotion(domain) {
                Ok(promotion) if promotion.at_ms >= since_ms => return Ok(promotion),
                outcome if began.elapsed() > within => {
                    let last = format!("{outcome:?}");
                    return Err(FleetError::TooLate { what: format!("a promotion of {domain}"), within, last });
                }
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Waits until `reached` is true of the guest.
    pub fn wait(
        &self,
        domain: &str,
        what: &str,
        within: Duration,
        reached: impl Fn(&GuestView) -> bool,
    ) -> Result<GuestView> {
        let began = Instant::now();
        loop {
            let last = match self.info(domain) {
                Ok(view) if reached(&view) => return Ok(view),
                Ok(view) => describe(&view),
                Err(error) => error.to_string(),
            };
            if began.elapsed() > within {
                return Err(FleetError::TooLate { what: format!("{domain}: {what}"), within, last });
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until all wanted shadows have a committed epoch and follow.
    pub fn wait_protected(&self, domain: &str, within: Duration) -> Result<GuestView> {
        self.wait(domain, "protection by all shadows", within, |view| {
            let following =
                view.shadows.iter().filter(|s| s.state == ShadowState::Following && s.committed_epoch > 0).count();
            view.state == GuestState::Protected && following as u32 == view.shadows_wanted
        })
    }

    /// Waits until that many hosts are up.
    pub fn wait_hosts(&self, up: usize, within: Duration) -> Result<()> {
        let began = Instant::now();
        loop {
            let last = match self.hosts() {
                Ok(hosts) if hosts.iter().filter(|h| h.state == HostState::Up).count() >= up => return Ok(()),
                Ok(hosts) => format!("{hosts:?}"),
                Err(error) => error.to_string(),
            };
            if began.elapsed() > within {
                return Err(FleetError::TooLate { what: format!("{up} hosts up"), within, last });
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// A guest's view in one line, for messages.
pub fn describe(view: &GuestView) -> String {
    let shadows: Vec<String> = view
        .shadows
        .iter()
        .map(|s| format!("{} {:?} epoch {} lag {} ms {}", s.host, s.state, s.committed_epoch, s.lag_ms, s.reason))
        .collect();
    format!(
        "{:?} ({}), primary {}, term {}, epoch {}, shadows [{}]",
        view.state,
        view.reason,
        view.primary.host,
        view.term,
        view.capture.epoch,
        shadows.join("; ")
    )
}

//! Between the control protocol and what [`placement::guardian`] speaks.

use std::net::{IpAddr, SocketAddr};

use placement::guardian::{
    Abilities, Answer, Event, HostReport, Needs, Order, Outcome, PeerReport, PrimaryReport, Record, RequestError,
    ShadowReport,
};
use placement::{Epoch, GuestId, HostName, Term};

use super::links::CallError;
use crate::api::control::{
    Command, Done, GuestEvent, GuestNeeds, GuestRecord, Heartbeat, Inventory, Role, ShadowStatus, ShadowTarget,
};
use crate::api::types::{ApiError, ShadowState};

pub(super) fn record(record: &GuestRecord) -> Record {
    Record {
        guest: guest_id(&record.uuid),
        domain: record.domain.clone(),
        term: Term(record.term),
        role: match record.role {
            Role::Primary => placement::term::Role::Primary,
            Role::Shadow => placement::term::Role::Shadow,
            Role::Retired => placement::term::Role::Retired,
        },
        active: record.active,
    }
}

/// UUIDs are compared as text, so all of them get one spelling here.
pub(super) fn guest_id(uuid: &str) -> GuestId {
    uuid.to_ascii_lowercase().into()
}

pub(super) fn report(heartbeat: &Heartbeat) -> HostReport {
    let primary = |status: &crate::api::control::PrimaryStatus| PrimaryReport {
        term: Term(status.term),
        memory_mib: status.memory_bytes.div_ceil(1 << 20),
        epoch: Epoch(status.stats.epoch),
        problem: status.problem.clone(),
        peers: status
            .peers
            .iter()
            .map(|peer| {
                let following = peer.state == ShadowState::Following;
                let kbit_per_s = peer.wire_bytes_per_s.saturating_mul(8) / 1000;
                let report = PeerReport { committed: Epoch(peer.committed_epoch), following, kbit_per_s };
                (HostName::from(&*peer.host), report)
            })
            .collect(),
    };
    HostReport {
        memory_total_mib: heartbeat.memory_total_mib,
        memory_free_mib: heartbeat.memory_free_mib,
        abilities: heartbeat.inventory.as_ref().map(abilities),
        primaries: heartbeat.primaries.iter().map(|status| (guest_id(&status.uuid), primary(status))).collect(),
        shadows: heartbeat.shadows.iter().map(|status| (guest_id(&status.uuid), shadow(status))).collect(),
    }
}

fn abilities(inventory: &Inventory) -> Abilities {
    Abilities {
        cpus: inventory.cpus,
        vfs: Some(inventory.vfs),
        cpu_models: inventory.cpu_models.clone(),
        machine_types: inventory.machine_types.clone(),
        labels: inventory.labels.clone(),
        power: inventory.power.clone(),
        switch: crate::agent::only_switch(&inventory.neighbours),
    }
}

pub(super) fn needs(needs: &GuestNeeds) -> Needs {
    Needs {
        vcpus: needs.vcpus,
        // A guest with a VF cannot be captured, so none needs any.
        vfs: 0,
        cpu_model: needs.cpu_model.clone(),
        machine_type: needs.machine_type.clone(),
    }
}

fn shadow(status: &ShadowStatus) -> ShadowReport {
    ShadowReport {
        term: Term(if status.committed_epoch > 0 { status.committed_term } else { 0 }),
        committed: Epoch(status.committed_epoch),
        connected: status.connected,
        problem: status.problem.clone(),
    }
}

/// None: an event that changes nothing.
pub(super) fn event(host: &HostName, event: &GuestEvent) -> Option<Event> {
    let host = host.clone();
    Some(match event {
        GuestEvent::Died { uuid, term, detail, last_epoch } => Event::Died {
            host,
            guest: guest_id(uuid),
            term: Term(*term),
            detail: detail.clone(),
            last_epoch: Epoch(*last_epoch),
        },
        GuestEvent::Stopped { uuid, term, how } => {
            Event::Stopped { host, guest: guest_id(uuid), term: Term(*term), how: how.clone() }
        }
        GuestEvent::Started { uuid, .. } => Event::Started { host, guest: guest_id(uuid) },
        GuestEvent::Superseded { uuid, term, newer_term } => {
            Event::Superseded { host, guest: guest_id(uuid), term: Term(*term), newer: Term(*newer_term) }
        }
        GuestEvent::Notice { .. } => return None,
    })
}

/// Addresses of hosts, as one of them reaches the others.
pub(super) trait Addresses {
    /// None: no such host is known.
    fn sync_addr(&self, of: &HostName) -> Option<SocketAddr>;
    /// The manager's address as `host` reaches it.
    fn manager_as_seen_by(&self, host: &HostName) -> Option<IpAddr>;
}

/// Where `from` reaches the sync port of `to`. A host that shares the manager's machine connects over loopback and may
/// be known by that only: for others it is where they reach the manager.
fn route(addresses: &impl Addresses, from: &HostName, to: &HostName) -> Option<SocketAddr> {
    let mut addr = addresses.sync_addr(to)?;
    if addr.ip().is_loopback()
        && from != to
        && let Some(ip) = addresses.manager_as_seen_by(from)
    {
        addr.set_ip(ip);
    }
    Some(addr)
}

/// `order` as the command that is sent to `to`. `Err`: the name of a host of which no address is known.
pub(super) fn command(order: &Order, to: &HostName, addresses: &impl Addresses) -> Result<Command, HostName> {
    let target = |host: &HostName| route(addresses, to, host).ok_or_else(|| host.clone());
    Ok(match order.clone() {
        Order::AcceptShadow { guest, domain, term, primary, keep } => {
            Command::AcceptShadow { uuid: guest.to_string(), domain, term: term.0, primary: primary.to_string(), keep }
        }
        Order::DropShadow { guest } => Command::DropShadow { uuid: guest.to_string() },
        Order::Protect { guest, domain, term, interval_ms, budget, mirror_mib, consistency, policy, shadows } => {
            Command::Protect {
                uuid: guest.to_string(),
                domain,
                term: term.0,
                interval_ms,
                budget,
                mirror_mib,
                consistency,
                policy,
                shadows: shadows
                    .iter()
                    .map(|host| Ok(ShadowTarget { host: host.to_string(), addr: target(host)? }))
                    .collect::<Result<_, HostName>>()?,
            }
        }
        Order::Release { guest } => Command::Release { uuid: guest.to_string() },
        Order::Promote { guest, term, after_epoch, back_to } => Command::Promote {
            uuid: guest.to_string(),
            term: term.0,
            after_epoch: after_epoch.0,
            back_to: back_to.map(|epoch| epoch.0),
        },
        Order::FinalCut { guest, to } => Command::FinalCut { uuid: guest.to_string(), to: to.to_string() },
        Order::UndoFinalCut { guest, term } => Command::UndoFinalCut { uuid: guest.to_string(), term: term.0 },
        Order::Retire { guest, term } => Command::Retire { uuid: guest.to_string(), term: term.0 },
        Order::Witness { suspect, timeout_ms, guest } => {
            Command::Witness { addr: target(&suspect)?, timeout_ms, uuid: guest.map(|guest| guest.to_string()) }
        }
        Order::ShadowStatus { guest } => Command::ShadowStatus { uuid: guest.to_string() },
        Order::Describe { guest } => Command::Describe { domain: guest.to_string() },
    })
}

pub(super) fn outcome(order: &Order, result: Result<Done, CallError>) -> Outcome {
    let done = match result {
        Ok(done) => done,
        Err(CallError::Refused(ApiError { code, message })) => return Outcome::Refused { code, message },
        Err(CallError::Unknown(why)) => return Outcome::Unknown { why },
    };
    let answer = match (order, done) {
        (Order::Promote { .. }, Done::Promoted { epoch, .. }) => Answer::Promoted { epoch: Epoch(epoch) },
        (Order::FinalCut { .. }, Done::FinalCut { epoch, paused_for_us }) => {
            Answer::Cut { epoch: Epoch(epoch), paused_for_us }
        }
        (Order::Witness { .. }, Done::Witnessed { answers, stream_silent_ms }) => {
            Answer::Witnessed { answers, stream_silent_ms }
        }
        (Order::ShadowStatus { .. }, Done::Shadow { status }) => Answer::Shadow(status.as_ref().map(shadow)),
        (Order::Describe { .. }, Done::Described { running, .. }) => Answer::Described { running },
        (
            Order::AcceptShadow { .. }
            | Order::DropShadow { .. }
            | Order::Protect { .. }
            | Order::Release { .. }
            | Order::UndoFinalCut { .. }
            | Order::Retire { .. },
            _,
        ) => Answer::Nothing,
        (_, done) => {
            return Outcome::Unknown { why: format!("the agent answered something else than was asked: {done:?}") };
        }
    };
    Outcome::Done(answer)
}

pub(super) fn api_error(error: RequestError) -> ApiError {
    match error {
        RequestError::NotFound(message) => ApiError::new("not-found", message),
        RequestError::Invalid(message) => ApiError::new("invalid", message),
        RequestError::Conflict(message) => ApiError::new("conflict", message),
        RequestError::Refused(message) => ApiError::new("refused", message),
        RequestError::Failed(message) => ApiError::new("failed", message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Three;
    impl Addresses for Three {
        fn sync_addr(&self, of: &HostName) -> Option<SocketAddr> {
            match of.as_str() {
                "with-manager" => Some(([127, 0, 0, 1], 7710).into()),
                "apart" => Some(([10, 0, 0, 2], 7710).into()),
                _ => None,
            }
        }
        fn manager_as_seen_by(&self, host: &HostName) -> Option<IpAddr> {
            (host.as_str() == "apart").then(|| [10, 0, 0, 1].into())
        }
    }

    #[test]
    fn a_host_beside_the_manager_is_found_by_others() {
        let addr = |from: &str, to: &str| route(&Three, &from.into(), &to.into()).map(|addr| addr.to_string());
        assert_eq!(addr("apart", "with-manager").as_deref(), Some("10.0.0.1:7710"));
        assert_eq!(addr("with-manager", "apart").as_deref(), Some("10.0.0.2:7710"));
        assert_eq!(addr("with-manager", "with-manager").as_deref(), Some("127.0.0.1:7710"));
        assert_eq!(addr("apart", "nobody"), None);
    }

    #[test]
    fn an_answer_to_another_question_leaves_the_outcome_open() {
        let order = Order::Promote { guest: "u".into(), term: Term(2), after_epoch: Epoch(0), back_to: None };
        assert!(matches!(outcome(&order, Ok(Done::Nothing)), Outcome::Unknown { .. }));
        assert_eq!(
            outcome(&order, Ok(Done::Promoted { epoch: 4, took_us: 1 })),
            Outcome::Done(Answer::Promoted { epoch: Epoch(4) })
        );
    }
}

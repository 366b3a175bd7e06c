//! What the REST API shows of the state: plans from the guardian, figures from the last heartbeats.

use placement::guardian::{Guest, Health, Host, Phase, Seat};
use placement::{GuestId, HostName};

use super::core::State;
use crate::api::control::{PeerStatus, PrimaryStatus, ShadowStatus};
use crate::api::types::{GuestState, GuestView, HostRef, HostState, HostView, ShadowState, ShadowView};

impl State {
    pub(super) fn host_views(&self) -> Vec<HostView> {
        self.guardian.hosts().map(|host| self.host_view(host)).collect()
    }

    fn host_view(&self, host: &Host) -> HostView {
        let name = &host.intro.name;
        let about = self.about.get(name);
        let (state, reason) = match &host.health {
            Health::Up if host.connected => (HostState::Up, String::new()),
            // Its agent has gone, or has not come back since the manager was started.
            Health::Up => (HostState::Suspect, "its agent is not connected".into()),
            Health::Suspect(_) => (HostState::Suspect, "silent; being asked".into()),
            Health::AgentSilent { reason, .. } => (HostState::AgentSilent, reason.clone()),
            Health::Down { .. } => (HostState::Down, "no answer to the manager nor to other hosts".into()),
        };
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        HostView {
            host: name.to_string(),
            rack: host.intro.rack.clone(),
            state,
            version: about.map(|about| about.version.clone()).unwrap_or_default(),
            sync_addr: host.intro.sync_addr.to_string(),
            memory_total_mib: host.report.memory_total_mib,
            memory_free_mib: host.report.memory_free_mib,
            tracker: about.map(|about| about.tracker.clone()).unwrap_or_default(),
            primaries: count(self.guardian.guests().filter(|guest| guest.plan.primary == *name).count()),
            shadows: count(self.guardian.guests().filter(|guest| guest.plan.seats.contains(name)).count()),
            last_seen_ms: self.now.ms_since(host.last_seen),
            reason,
            inventory: self.inventories.get(name).cloned(),
        }
    }

    pub(super) fn guest_views(&self) -> Vec<GuestView> {
        let mut views: Vec<_> = self.guardian.guests().map(|guest| self.guest_view(guest)).collect();
        views.sort_by(|a, b| (&a.domain, &a.uuid).cmp(&(&b.domain, &b.uuid)));
        views
    }

    pub(super) fn guest_view(&self, guest: &Guest) -> GuestView {
        let plan = &guest.plan;
        let primary = self.primary_status(&plan.primary, &plan.id, plan.term.0);
        let shadows: Vec<_> = plan.seats.iter().map(|host| self.shadow_view(guest, host, primary)).collect();
        let (state, why) = self.guest_state(guest, primary, &shadows);
        let reason = guest.reason();
        GuestView {
            domain: plan.domain.clone(),
            uuid: plan.id.to_string(),
            term: plan.term.0,
            state,
            reason: if reason.is_empty() { why } else { reason },
            primary: self.host_ref(&plan.primary),
            shadows_wanted: plan.shadows_wanted,
            policy: plan.policy.to_string(),
            interval_ms: plan.interval_ms,
            budget: plan.budget,
            mirror_mib: plan.mirror_mib,
            consistency: plan.consistency,
            keep: plan.keep,
            memory_bytes: primary.map_or(plan.memory_mib << 20, |primary| primary.memory_bytes),
            capture: primary.map(|primary| primary.stats.clone()).unwrap_or_default(),
            shadows,
        }
    }

    fn host_ref(&self, name: &HostName) -> HostRef {
        let rack = self.guardian.host(name).map(|host| host.intro.rack.clone()).unwrap_or_default();
        HostRef { host: name.to_string(), rack }
    }

    fn primary_status(&self, host: &HostName, id: &GuestId, term: u64) -> Option<&PrimaryStatus> {
        let (_, heartbeat) = self.heartbeats.get(host)?;
        heartbeat.primaries.iter().find(|status| status.uuid == id.as_str() && status.term == term)
    }

    fn shadow_status(&self, host: &HostName, id: &GuestId) -> Option<&ShadowStatus> {
        let (_, heartbeat) = self.heartbeats.get(host)?;
        heartbeat.shadows.iter().find(|status| status.uuid == id.as_str())
    }

    fn shadow_view(&self, guest: &Guest, host: &HostName, primary: Option<&PrimaryStatus>) -> ShadowView {
        let own = self.shadow_status(host, &guest.plan.id).filter(|own| own.term == guest.plan.term.0);
        let peer = primary.and_then(|primary| primary.peers.iter().find(|peer| peer.host == host.as_str()));
        let up = self.guardian.host(host).is_some_and(Host::is_up);
        let accept_failed = match guest.seat(host) {
            Some(Seat::Failed { reason, .. }) => Some(reason.clone()),
            _ => None,
        };
        let (state, reason) = match (accept_failed, peer) {
            (Some(reason), _) => (ShadowState::Refused, reason),
            (None, _) if !up => (ShadowState::Disconnected, format!("{host} is not up")),
            (None, Some(peer)) => (peer.state, peer.reason.clone()),
            (None, None) => (ShadowState::Disconnected, "the primary has not connected yet".into()),
        };
        let from_peer = |field: fn(&PeerStatus) -> u64| peer.map_or(0, field);
        // How old the last heartbeat is comes on top of the lag it told.
        let heard_ms = self.heartbeats.get(&guest.plan.primary).map_or(0, |(at, _)| at.elapsed().as_millis() as u64);
        let stale_ms = heard_ms.saturating_sub(1_000);
        ShadowView {
            host: host.to_string(),
            rack: self.host_ref(host).rack,
            tier: "hot".into(),
            state,
            reason: match own.map(|own| own.problem.as_str()) {
                Some(problem) if reason.is_empty() => problem.into(),
                _ => reason,
            },
            committed_epoch: from_peer(|peer| peer.committed_epoch).max(own.map_or(0, |own| own.committed_epoch)),
            lag_ms: from_peer(|peer| peer.lag_ms).saturating_add(stale_ms),
            lag_peak_ms: peer.map_or_else(Default::default, |peer| peer.lag_peak_ms),
            wire_bytes_per_s: from_peer(|peer| peer.wire_bytes_per_s),
            pending_pages: from_peer(|peer| peer.pending_pages),
        }
    }

    /// The state, and one reason for it that the guardian does not know.
    fn guest_state(
        &self,
        guest: &Guest,
        primary: Option<&PrimaryStatus>,
        shadows: &[ShadowView],
    ) -> (GuestState, String) {
        match &guest.plan.phase {
            Phase::FailingOver(_) => return (GuestState::FailingOver, String::new()),
            Phase::SwitchingOver(_) => return (GuestState::SwitchingOver, String::new()),
            Phase::Stopped { .. } => return (GuestState::Stopped, String::new()),
            Phase::Lost { .. } => return (GuestState::Lost, String::new()),
            Phase::Steady | Phase::Leaving => (),
        }
        let problem = primary.map(|primary| primary.problem.clone()).unwrap_or_default();
        let ready = shadows.iter().filter(|shadow| shadow.committed_epoch > 0).count();
        let following = shadows.iter().filter(|s| s.committed_epoch > 0 && s.state == ShadowState::Following).count();
        let first_copy =
            shadows.iter().any(|s| s.state == ShadowState::Syncing || s.state == ShadowState::Disconnected);
        let wanted = guest.plan.shadows_wanted as usize;
        if following >= wanted && problem.is_empty() {
            (GuestState::Protected, String::new())
        } else if ready > 0 {
            let late = shadows.iter().find(|shadow| shadow.state != ShadowState::Following);
            let why = late.map(|late| match late.reason.as_str() {
                "" => format!("the shadow on {} is behind", late.host),
                reason => format!("{}: {reason}", late.host),
            });
            (GuestState::Degraded, if problem.is_empty() { why.unwrap_or_default() } else { problem })
        } else if first_copy && problem.is_empty() {
            (GuestState::Syncing, "first copy under way".into())
        } else {
            (GuestState::Unprotected, problem)
        }
    }
}

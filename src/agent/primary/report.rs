//! The core's views and reports in the words of the API.

use std::collections::BTreeMap;

use vmsync::source::{PeerState, PeerVerdict, PeerView};
use vmsync::units::{Epoch, Millis};

use crate::api::control::PeerStatus;
use crate::api::types::{Percentiles, ShadowState, VerifyReport, VerifyShadow};
use crate::capture::memory::GuestMemory;

/// A shadow as its primary sees it: `refusals` and `lost` tell why there is no connection.
pub(super) fn peer_status(
    host: String,
    view: PeerView,
    rate: u64,
    lag_peak_ms: Percentiles,
    refusals: &BTreeMap<String, String>,
    lost: &BTreeMap<String, String>,
) -> PeerStatus {
    let refused = refusals.get(&host);
    let lost = lost.get(&host).cloned();
    let state = match view.state {
        PeerState::Disconnected if refused.is_some() => ShadowState::Refused,
        PeerState::Disconnected => ShadowState::Disconnected,
        PeerState::Syncing => ShadowState::Syncing,
        PeerState::Following => ShadowState::Following,
    };
    PeerStatus {
        state,
        reason: refused.cloned().or(lost).unwrap_or(view.reason),
        committed_epoch: view.committed.map_or(0, Epoch::get),
        lag_ms: view.lag.map_or(0, Millis::get),
        lag_peak_ms,
        wire_bytes_per_s: rate,
        pending_pages: view.pending_pages,
        host,
    }
}

pub(super) fn verify_report(guest: &str, report: vmsync::source::VerifyReport, memory: &GuestMemory) -> VerifyReport {
    let shadows = report.peers.iter().map(|(peer, verdict)| {
        let (pages_compared, difference) = match verdict {
            PeerVerdict::Compared { pages_compared, pages_different, first_difference, device_state_equal } => {
                let mut parts = Vec::new();
                if let Some(first) = first_difference {
                    let block = memory.layout().block(first.block).map_or("?", |block| block.name.as_str());
                    let at = first.page.byte_offset();
                    parts.push(format!("{pages_different} pages, the first at {at:#x} of {block}"));
                }
                if !device_state_equal {
                    parts.push("the device state".into());
                }
                (*pages_compared, parts.join(" and "))
            }
            PeerVerdict::NotCompared(reason) => (0, reason.to_string()),
        };
        let host = peer.as_str().to_owned();
        VerifyShadow { host, equal: verdict.is_equal(), pages_compared, difference }
    });
    VerifyReport { domain: guest.into(), epoch: report.epoch.get(), shadows: shadows.collect() }
}

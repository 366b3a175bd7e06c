//! The filters in QEMU: two filter-redirectors a NIC, each on a socket that the gate process has the other end of.
//!
//! Names all begin with [`PREFIX`], so that what an agent left that is gone is found. Taken out in the order in which
//! nothing is lost: first what captures, then, when the gate has given everything back, what releases.

use std::os::fd::{AsFd, BorrowedFd};

use serde_json::{Value, json};

use crate::hypervisor::xml::OutputNic;
use crate::hypervisor::{Domain, HypervisorError};

const PREFIX: &str = "virt-shadow-";

const CAPTURE: &str = "virt-shadow-cap-";

/// Names of what belongs to one NIC; `tag` tells gates apart. The sockets have the names of their filters.
struct Names {
    capture: String,
    release: String,
}

impl Names {
    fn of(netdev: &str, tag: &str) -> Self {
        Self { capture: format!("{CAPTURE}{netdev}-{tag}"), release: format!("{PREFIX}rel-{netdev}-{tag}") }
    }
}

/// Puts the filters of one NIC in; QEMU gets copies of the two sockets. After a failure some of it may be left.
pub(super) fn insert(
    domain: &Domain,
    nic: &OutputNic,
    tag: &str,
    capture: BorrowedFd<'_>,
    release: BorrowedFd<'_>,
) -> Result<(), HypervisorError> {
    let names = Names::of(&nic.netdev, tag);
    for (name, socket) in [(&names.release, release), (&names.capture, capture)] {
        let fd_name = format!("{name}-fd");
        let give = json!({"execute": "getfd", "arguments": {"fdname": fd_name}}).to_string();
        domain.qmp_with_files(&give, &[socket.as_fd()])?;
        let socket = json!({"addr": {"type": "fd", "data": {"str": fd_name}}, "server": false});
        domain.qmp_call("chardev-add", json!({"id": chardev(name), "backend": {"type": "socket", "data": socket}}))?;
    }
    // In this order: of two filters the one added last sees what the guest sends first.
    for (name, end) in [(&names.release, "indev"), (&names.capture, "outdev")] {
        let mut filter = json!({
            "qom-type": "filter-redirector", "id": name, "netdev": nic.netdev, "queue": "rx", "vnet_hdr_support": true,
        });
        filter[end] = chardev(name).into();
        domain.qmp_call("object-add", filter)?;
    }
    Ok(())
}

fn chardev(filter: &str) -> String {
    format!("{filter}-socket")
}

/// Filters, and sockets.
pub(super) type Present = (Vec<String>, Vec<String>);

/// What of ours is in this QEMU.
pub(super) fn present(domain: &Domain) -> Result<Present, HypervisorError> {
    let names = |list: &Value, field: &str| -> Vec<String> {
        let items = list.as_array().into_iter().flatten();
        let names = items.filter_map(|item| item.get(field)?.as_str());
        names.filter(|name| name.starts_with(PREFIX)).map(str::to_owned).collect()
    };
    let filters = names(&domain.qmp_call("qom-list", json!({"path": "/objects"}))?, "name");
    Ok((filters, names(&domain.qmp_call("query-chardev", Value::Null)?, "label")))
}

/// Whether a NIC has all of its filters. A NIC that is unplugged takes them with it.
pub(super) fn is_whole(present: &Present, netdev: &str, tag: &str) -> bool {
    let names = Names::of(netdev, tag);
    present.0.contains(&names.capture) && present.0.contains(&names.release)
}

/// Takes out what there is of one NIC.
pub(super) fn remove_nic(domain: &Domain, netdev: &str, tag: &str) -> Result<(), HypervisorError> {
    let names = Names::of(netdev, tag);
    let (filters, sockets) = present(domain)?;
    for name in [&names.capture, &names.release] {
        if filters.contains(name) {
            domain.qmp_call("object-del", json!({"id": name}))?;
        }
        if sockets.contains(&chardev(name)) {
            domain.qmp_call("chardev-remove", json!({"id": chardev(name)}))?;
        }
    }
    Ok(())
}

/// Whether this QEMU has filters of ours.
pub fn left_behind(domain: &Domain) -> Result<bool, HypervisorError> {
    present(domain).map(|(filters, sockets)| !filters.is_empty() || !sockets.is_empty())
}

/// Output no longer goes through the gate with this tag: what costs the least calls, as output waits for it. What is
/// left is [`remove`]'s.
pub(super) fn bypass(domain: &Domain, netdevs: &[String], tag: &str) {
    for netdev in netdevs {
        // One that is not there any more is fine.
        let _ = domain.qmp_call("object-del", json!({"id": Names::of(netdev, tag).capture}));
    }
}

/// Takes what is ours out, but for the gate with the tag `but`: output leaves as if nothing had been. `flush` is called
/// when nothing is captured any more and what was can still be given back.
pub fn remove(domain: &Domain, but: Option<&str>, flush: impl FnOnce()) -> Result<(), HypervisorError> {
    let (mut filters, mut sockets) = present(domain)?;
    if let Some(tag) = but {
        filters.retain(|name| !name.ends_with(&format!("-{tag}")));
        sockets.retain(|label| !label.ends_with(&chardev(&format!("-{tag}"))));
    }
    let (captures, releases): (Vec<_>, Vec<_>) = filters.iter().partition(|name| name.starts_with(CAPTURE));
    for name in captures {
        domain.qmp_call("object-del", json!({"id": name}))?;
    }
    flush();
    for name in releases {
        domain.qmp_call("object-del", json!({"id": name}))?;
    }
    for label in sockets {
        domain.qmp_call("chardev-remove", json!({"id": label}))?;
    }
    Ok(())
}

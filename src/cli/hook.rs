//! libvirt's hook: may this host start that guest?
//!
//! libvirt calls it for every domain, waits for it, and refuses the start if it fails, so it is quick, it never calls
//! libvirt, and about guests we know nothing of it says yes. What it stands for is the second invariant: a host that
//! comes back must not start a guest that a shadow has taken over. A guest that comes by migration is another matter: it
//! runs at its source until it runs here, so nothing is started twice. libvirt says so (`migrate`) just before it asks.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::api::client::{Client, ClientError};
use crate::api::control::{GuestRecord, Role};
use crate::api::percent;
use crate::hypervisor::xml::is_shadow;

/// libvirt waits meanwhile.
const TIMEOUT: Duration = Duration::from_secs(3);
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// Longest definition read.
const MAX_XML_BYTES: u64 = 16 << 20;
const MAX_RECORD_BYTES: u64 = 1 << 20;

#[derive(Deserialize)]
struct Verdict {
    allowed: bool,
    /// Not yet, but perhaps in a moment.
    undecided: bool,
    reason: String,
}

/// `Err`: why the guest must not start here, and what to do.
pub async fn run(client: &Client, state_dir: &Path, name: &str, operation: &str) -> Result<(), String> {
    if !matches!(operation, "prepare" | "migrate") {
        return Ok(());
    }
    let mut xml = Vec::new();
    if let Err(error) = std::io::stdin().lock().take(MAX_XML_BYTES).read_to_end(&mut xml) {
        return Err(format!("definition of {name} cannot be read: {error}"));
    }
    let Some(uuid) = uuid(&xml) else {
        // Without an identity it is no guest of ours.
        return Ok(());
    };
    // A waiting shadow of ours: it cannot run before it has been given a state. Told by its definition, not by the
    // moment: while it is being made an operator must not get the guest itself through.
    if std::str::from_utf8(&xml).is_ok_and(|xml| is_shadow(xml).unwrap_or(false)) {
        return Ok(());
    }
    let path = format!("/v1/hook?uuid={uuid}&name={}&operation={operation}", percent::encode(name));
    if operation == "migrate" {
        // Only told: without a daemon the start that follows is judged by the records.
        let _ = client.clone().with_timeout(TIMEOUT).get::<Verdict>(&path).await;
        return Ok(());
    }
    let asked = Instant::now();
    loop {
        match client.clone().with_timeout(TIMEOUT).get::<Verdict>(&path).await {
            Ok(verdict) if verdict.allowed => return Ok(()),
            // Destroyed and started again at once: the manager is still to say that it lies with this host.
            Ok(verdict) if verdict.undecided && asked.elapsed() < TIMEOUT => {
                tokio::time::sleep(ASK_AGAIN_AFTER).await;
            }
            Ok(verdict) => return Err(verdict.reason),
            Err(error) => return from_records(state_dir, name, &uuid, &error),
        }
    }
}

/// UUID in a domain definition, which may be anything.
fn uuid(xml: &[u8]) -> Option<String> {
    let root = xmltree::Element::parse(xml).ok()?;
    let text = root.get_child("uuid")?.get_text()?.trim().to_ascii_lowercase();
    let plain = text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    plain.then_some(text)
}

/// What the daemon would most likely say, from the records it left.
fn from_records(state_dir: &Path, name: &str, uuid: &str, error: &ClientError) -> Result<(), String> {
    let path = state_dir.join("guests").join(format!("{uuid}.json"));
    let mut text = String::new();
    match std::fs::File::open(&path).and_then(|file| file.take(MAX_RECORD_BYTES).read_to_string(&mut text)) {
        Ok(_) => (),
        Err(missing) if missing.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(unreadable) => return Err(format!("record {} of guest {name}: {unreadable}", path.display())),
    }
    let role = match serde_json::from_str::<GuestRecord>(&text) {
        Ok(record) => record.role,
        // Something is known of this guest, but not what: the safe side.
        Err(broken) => return Err(format!("record {} of guest {name}: {broken}", path.display())),
    };
    let what = match role {
        Role::Shadow => "this host keeps a shadow of it, and another host runs it",
        Role::Primary | Role::Retired => "another host may run it by now",
    };
    Err(format!(
        "guest {name} is protected, and {what}; virtshadowd, which knows, cannot be asked ({error}). Start virtshadowd, \
         or give up its protection with `virt-shadow disable {name}`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "0d8f9bd2-0000-4000-8000-000000000001";

    #[test]
    fn only_a_well_formed_uuid_is_taken() {
        let xml = |uuid: &str| format!("<domain type='kvm'><name>a</name><uuid>{uuid}</uuid></domain>").into_bytes();
        assert_eq!(uuid(&xml(&format!(" {} ", UUID.to_uppercase()))).as_deref(), Some(UUID));
        for bad in [&xml("../../../etc/passwd-0000-000000000001")[..], &xml(""), b"<domain/>", b"<dom", b"", b"\xff"] {
            assert_eq!(uuid(bad), None);
        }
    }

    #[test]
    fn without_a_daemon_records_decide() {
        let dir = std::env::temp_dir().join(format!("virt-shadow-hook-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("guests")).unwrap();
        let gone = ClientError::Broken { socket: "/s".into(), detail: "no answer".into() };
        let file = dir.join("guests").join(format!("{UUID}.json"));
        let ask = || from_records(&dir, "web", UUID, &gone);
        assert!(ask().is_ok());
        for text in [
            r#"{"uuid":"u","domain":"web","term":2,"role":"retired"}"#,
            r#"{"uuid":"u","domain":"web","term":2,"role":"primary","more":1}"#,
            r#"{"uuid":"u","domain":"web","term":2,"role":"shadow"}"#,
            "{",
        ] {
            std::fs::write(&file, text).unwrap();
            assert!(ask().is_err(), "{text}");
        }
        assert!(ask().unwrap_err().contains(UUID));
        std::fs::write(&file, r#"{"uuid":"u","domain":"web","term":2,"role":"retired"}"#).unwrap();
        assert!(ask().unwrap_err().contains("virt-shadow disable web"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

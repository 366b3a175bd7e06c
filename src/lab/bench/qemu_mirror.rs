//! What QEMU itself offers of a protected guest's cost: its disk mirrored with synchronous writes, by the same kind of job,
//! to `qemu-nbd` on the same host, and its state written to nowhere as often as epochs are cut. Nobody looks for
//! written pages, copies, codes or sends.

use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pause::Watched;
use crate::hypervisor::{Domain, HypervisorError};
use crate::lab::Lab;
use crate::lab::error::{LabError, Result};

const DISK: &str = "vda";
const READY_WITHIN: Duration = Duration::from_secs(60);

/// A guest that is mirrored and cut, until [`Alone::end`].
pub(super) struct Alone {
    domain: Domain,
    server: Child,
    stop: Arc<AtomicBool>,
    cuts: Option<JoinHandle<std::result::Result<(), HypervisorError>>>,
    pauses: Watched,
}

fn failed(error: HypervisorError) -> LabError {
    LabError::Product(format!("the guest mirrored by QEMU alone: {error}"))
}

impl Alone {
    pub(super) fn start(lab: &Lab, host: &str, guest: &str, interval: Duration) -> Result<Self> {
        let pauses = Watched::start(lab, host).map_err(failed)?;
        let domain = pauses.hypervisor.lookup(guest).map_err(failed)?;
        let bytes = domain.disk_bytes(DISK).map_err(failed)?;
        let (socket, image) = ("/run/qemu-alone.sock", "/var/lib/libvirt/images/qemu-alone.raw");
        // Nothing is forwarded to the host's disk, as by our copy.
        let script = format!(
            "rm -f {socket} {image}; truncate -s {bytes} {image} && exec qemu-nbd --cache=unsafe --discard=unmap \
             -f raw -x alone -k {socket} {image}"
        );
        let server = lab.command(host, "sh")?.args(["-c", &script]).spawn();
        let server = server.map_err(LabError::system("start qemu-nbd"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut alone = Self { domain, server, stop, cuts: None, pauses };
        let began = Instant::now();
        let wait = |ready: &mut dyn FnMut() -> Result<bool>| {
            while !ready()? {
                if began.elapsed() > READY_WITHIN {
                    return Err(LabError::Product("qemu-nbd does not mirror the guest's disk".into()));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        };
        wait(&mut || Ok(lab.exec(host, &["test", "-S", socket])?.status.success()))?;
        let xml = format!(
            "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='alone'>\
             <host transport='unix' socket='{socket}'/></source></disk>"
        );
        alone.domain.mirror_disk(DISK, &xml).map_err(failed)?;
        wait(&mut || Ok(alone.domain.block_job(DISK).map_err(failed)?.is_some_and(|job| job.is_ready())))?;
        let (domain, stop) = (alone.domain.clone(), Arc::clone(&alone.stop));
        alone.cuts = Some(std::thread::spawn(move || {
            let mut next = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                let arguments = serde_json::json!({"filename": "/dev/null", "live": false});
                domain.qmp_call("xen-save-devices-state", arguments)?;
                next = (next + interval).max(Instant::now());
                std::thread::sleep(next - Instant::now());
            }
            Ok(())
        }));
        Ok(alone)
    }

    /// Ends it; the guest's pauses in microseconds, or an error if a cut failed meanwhile.
    pub(super) fn end(mut self) -> Result<Vec<u64>> {
        self.stop.store(true, Ordering::Relaxed);
        let cuts = self.cuts.take().map(JoinHandle::join);
        if let Some(Ok(outcome)) = cuts {
            outcome.map_err(failed)?;
        }
        self.domain.abort_block_job(DISK).map_err(failed)?;
        Ok(self.pauses.take())
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // qemu-nbd ends when QEMU disconnects, or else with the lab; this is what entered the host for it.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

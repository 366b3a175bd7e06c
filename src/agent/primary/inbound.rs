//! Frames on their way to a guest whose output is held: to the shadows that follow, which give them to the guest's copy.
//!
//! Nothing relies on it. What cannot be seen is said once.

use std::sync::Mutex;
use std::sync::mpsc::Sender;

use super::session::Input;
use crate::hypervisor::xml::OutputNic;
use crate::packet::Capture;

#[derive(Default)]
pub(super) struct Inbound {
    capture: Option<Capture>,
}

impl Inbound {
    /// NICs came or went: these are the ones whose frames are wanted by now. Also if they look the same: one that was taken
    /// out and put back is seen no more where the former was.
    pub(super) fn follow(&mut self, guest: &str, nics: &[OutputNic], inputs: &Sender<Input>) {
        self.capture = None;
        if nics.is_empty() {
            return;
        }
        let devices = nics.iter().filter_map(|nic| Some((&*nic.mac, nic.device.as_deref()?)));
        let inputs = Mutex::new(inputs.clone());
        let tell = move || {
            let _ = inputs.lock().unwrap_or_else(|p| p.into_inner()).send(Input::Inbound);
        };
        match Capture::start(devices, tell) {
            Ok(capture) => self.capture = Some(capture),
            Err(error) => tracing::warn!(guest, %error, "what clients sent last will not be replayed after a failover"),
        }
    }

    pub(super) fn take(&self) -> Vec<Vec<u8>> {
        self.capture.as_ref().map(Capture::take).unwrap_or_default()
    }
}

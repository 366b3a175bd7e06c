//! Guests of a lab: their libvirt definition.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_128;

use super::error::{LabError, Result};
use super::host::CONSOLE_DIR;
use super::image::{GuestImage, Software};
use super::namespace::HOST_BRIDGE;
use super::state::{GuestState, LabState, NET_PREFIX_LEN, guest_ip};

const MEMORY_MIN_MIB: u32 = 96;
const MEMORY_MAX_MIB: u32 = 64 * 1024;
/// Sizes of a receive queue that QEMU takes.
const RX_QUEUES: [u32; 3] = [256, 512, 1024];
const CPUS_MAX: u32 = 16;
const RATE_MAX: u64 = 1_000_000;
/// What kernel, busybox and workload need beside the workload's region.
const SYSTEM_MIB: u32 = 80;
const MEMORY_DEFAULT_MIB: u32 = 256;
/// For packages unpacked in memory, what they work on, and room.
const SOFTWARE_MIB: u32 = 1024;
/// The same where what they work on is on a disk.
const SOFTWARE_WITH_DISK_MIB: u32 = 384;
/// For what a software's data begins with, and room for a long test.
const SOFTWARE_DISK_MIN_MIB: u32 = 256;
const REGION_DEFAULT_MIB: u32 = 64;
const GUESTS_MAX: u16 = 4096;
/// Root ports beyond those of the guest's own devices, for NICs to hot-plug. Each costs loading time of a shadow.
const SPARE_ROOT_PORTS: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Machine {
    Q35,
    Pc,
}

/// Where QEMU takes the guest's RAM from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Backing {
    /// Private anonymous memory, libvirt's default.
    Anonymous,
    /// Shared memfd, as vhost-user and virtiofs guests have it.
    Memfd,
}

/// MiB of a guest's memory, as the command line takes it.
pub(super) fn memory_mib(text: &str) -> Result<u32, String> {
    let (number, factor) = match text.strip_suffix(['G', 'g']) {
        Some(number) => (number, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let mib = number.parse::<u32>().ok().and_then(|number| number.checked_mul(factor));
    let fits = mib.filter(|mib| (MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(mib));
    fits.ok_or_else(|| {
        format!("must be MiB such as 256, 256M or 1G, from {MEMORY_MIN_MIB}M to {}G", MEMORY_MAX_MIB / 1024)
    })
}

/// What the guest does; written `idle`, `counter`, `busy[:RATE[:MIB]]`, `dirty:RATE[:MIB]`, `random[:RATE[:MIB]]`, or
/// the name of a [`Software`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    text: String,
    region_mib: u32,
    software: Option<Software>,
}

impl Workload {
    pub fn idle() -> Self {
        Self { text: "idle".into(), region_mib: 0, software: None }
    }

    /// What its guest's image is made of besides the lab's own workload.
    pub fn software(&self) -> Option<Software> {
        self.software
    }

    /// Memory of a guest that was not told another size.
    pub fn default_memory_mib(&self, with_disk: bool) -> u32 {
        if self.software.is_some() { self.needed_mib(with_disk) } else { MEMORY_DEFAULT_MIB }
    }

    fn needed_mib(&self, with_disk: bool) -> u32 {
        match (self.software, with_disk) {
            // It compiles into memory in any case.
            (Some(Software::Redis | Software::Postgres), true) => SOFTWARE_WITH_DISK_MIB,
            (Some(_), _) => SOFTWARE_MIB,
            (None, _) => self.region_mib.saturating_add(SYSTEM_MIB),
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORMS: &str = "one of idle, counter, busy[:RATE[:MIB]], dirty:RATE[:MIB], random[:RATE[:MIB]], redis, \
                             postgres, gcc";
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let numbers: Vec<u64> = parts.map(|p| p.parse().map_err(|_| FORMS.to_owned())).collect::<Result<_, _>>()?;
        let software = Software::from_name(name);
        let fits = match name {
            "idle" | "counter" => numbers.is_empty(),
            "busy" | "random" => numbers.len() <= 2,
            "dirty" => (1..=2).contains(&numbers.len()),
            _ => software.is_some() && numbers.is_empty(),
        };
        if !fits {
            return Err(FORMS.into());
        }
        if numbers.first().is_some_and(|rate| *rate > RATE_MAX) {
            return Err(format!("the rate is at most {RATE_MAX} pages/s"));
        }
        let region_mib = match (name, numbers.get(1)) {
            ("idle" | "counter", _) => 0,
            _ if software.is_some() => 0,
            (_, None) => REGION_DEFAULT_MIB,
            (_, Some(mib)) => u32::try_from(*mib).ok().filter(|m| (1..=MEMORY_MAX_MIB).contains(m)).ok_or(FORMS)?,
        };
        Ok(Self { text: text.into(), region_mib, software })
    }
}

/// A disk with an ext4 file system, on which databases have their data, and every other workload writes and checks
/// numbered records; written `MIB[:raw|qcow2]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestDisk {
    pub mib: u32,
    pub qcow2: bool,
}

/// Folder of the guests' own disks on every host.
pub const DISK_DIR: &str = "/var/lib/libvirt/images";
const DISK_MIN_MIB: u32 = 16;
const DISK_MAX_MIB: u32 = 64 * 1024;
/// As /disk and /disk2 in the guest.
const DISKS_MAX: usize = 2;

impl GuestDisk {
    pub fn format(self) -> &'static str {
        if self.qcow2 { "qcow2" } else { "raw" }
    }

    /// Of a guest's disk with that number, from 0.
    pub fn path(self, guest: &str, number: usize) -> String {
        let number = if number == 0 { String::new() } else { format!(".{}", number + 1) };
        format!("{DISK_DIR}/{guest}{number}.{}", self.format())
    }

    /// Makes the disk where it runs, with the contents of a folder, if any.
    pub(super) fn script(self, guest: &str, number: usize, contents: Option<&Path>) -> String {
        let (mib, format, path) = (self.mib, self.format(), self.path(guest, number));
        let contents = contents.map(|folder| format!("-d '{}'", folder.display())).unwrap_or_default();
        format!(
            "set -e; mkdir -p {DISK_DIR}; rm -f {path} {path}.new; truncate -s {mib}M {path}.new; \
             mkfs.ext4 -q -F -b 4096 {contents} {path}.new; \
             if [ {format} = raw ]; then mv {path}.new {path}; \
             else qemu-img convert -q -f raw -O qcow2 {path}.new {path}; rm {path}.new; fi"
        )
    }
}

impl FromStr for GuestDisk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (size, format) = text.split_once(':').unwrap_or((text, "raw"));
        let mib = size.parse().ok().filter(|mib| (DISK_MIN_MIB..=DISK_MAX_MIB).contains(mib));
        match (mib, format) {
            (Some(mib), "raw" | "qcow2") => Ok(Self { mib, qcow2: format == "qcow2" }),
            _ => Err(format!("MIB[:raw|qcow2] with {DISK_MIN_MIB} to {DISK_MAX_MIB} MiB")),
        }
    }
}

#[derive(Debug, Clone)]
pub struct GuestOptions {
    pub name: String,
    pub host: String,
    pub memory_mib: u32,
    pub cpus: u32,
    pub workload: Workload,
    pub machine: Machine,
    pub backing: Backing,
    pub disks: Vec<GuestDisk>,
    /// Gone when it ends: created, not defined.
    pub transient: bool,
    /// With a virtio balloon, as libvirt adds one where a definition says nothing.
    pub balloon: bool,
    /// Frames that its interface takes while nobody empties it; QEMU's usual 256 if not given.
    pub rx_queue: Option<u32>,
}

impl GuestOptions {
    /// 256 MiB, one CPU, idle, q35, anonymous memory, defined, with a balloon.
    pub fn new(name: &str, host: &str) -> Self {
        Self {
            name: name.into(),
            host: host.into(),
            memory_mib: MEMORY_DEFAULT_MIB,
            cpus: 1,
            workload: Workload::idle(),
            machine: Machine::Q35,
            backing: Backing::Anonymous,
            disks: Vec::new(),
            transient: false,
            balloon: true,
            rx_queue: None,
        }
    }

    pub fn check(&self) -> Result<()> {
        let invalid = |what, value: String, reason: String| Err(LabError::Invalid { what, value, reason });
        let name_ok = (1..=64).contains(&self.name.len())
            && self.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && self.name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !name_ok {
            let reason = "a guest's name is 1 to 64 letters, digits, '-', '_' or '.'".into();
            return invalid("guest name", self.name.clone(), reason);
        }
        if !(MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(&self.memory_mib) {
            let reason = format!("a lab guest has {MEMORY_MIN_MIB} to {MEMORY_MAX_MIB} MiB");
            return invalid("memory", self.memory_mib.to_string(), reason);
        }
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return invalid("cpus", self.cpus.to_string(), format!("a lab guest has 1 to {CPUS_MAX}"));
        }
        let needed = self.workload.needed_mib(!self.disks.is_empty());
        if needed > self.memory_mib {
            let reason = format!("needs a guest of {needed} MiB or more, not {}", self.memory_mib);
            return invalid("workload", self.workload.to_string(), reason);
        }
        if let Some(frames) = self.rx_queue
            && !RX_QUEUES.contains(&frames)
        {
            return invalid("receive queue", frames.to_string(), "QEMU takes 256, 512 or 1024".into());
        }
        if self.disks.len() > DISKS_MAX {
            return invalid("disks", self.disks.len().to_string(), format!("a lab guest has at most {DISKS_MAX}"));
        }
        if let (Some(_), Some(disk)) = (self.workload.software(), self.disks.first())
            && disk.mib < SOFTWARE_DISK_MIN_MIB
        {
            let reason = format!("{} needs a disk of {SOFTWARE_DISK_MIN_MIB} MiB or more", self.workload);
            return invalid("disk", disk.mib.to_string(), reason);
        }
        Ok(())
    }

    /// Gives the guest its address, MAC and UUID, all of which follow from its name and its place in the lab.
    pub fn enroll(&self, state: &LabState) -> Result<GuestState> {
        self.check()?;
        state.host(&self.host)?;
        if let Some(known) = state.guests.get(&self.name) {
            let reason = format!("exists already, made on {}", known.home);
            return Err(LabError::Invalid { what: "guest", value: self.name.clone(), reason });
        }
        let taken = |ip| state.guests.values().any(|g| g.ip == ip);
        let ip = (1..=GUESTS_MAX).map(guest_ip).find(|ip| !taken(*ip)).ok_or_else(|| LabError::Invalid {
            what: "guest",
            value: self.name.clone(),
            reason: format!("the lab has its {GUESTS_MAX} guests already"),
        })?;
        let id = xxh3_128(format!("{}/{}", state.name, self.name).as_bytes()).to_be_bytes();
        let [.., third, low] = ip.octets();
        Ok(GuestState {
            uuid: uuid_from(id),
            home: self.host.clone(),
            ip,
            // The last two bytes are those of the address, so no two guests of a lab share one.
            mac: format!("52:54:00:{:02x}:{third:02x}:{low:02x}", id[0]),
            workload: self.workload.to_string(),
            memory_mib: self.memory_mib,
        })
    }

    /// The libvirt domain.
    pub fn xml(&self, guest: &GuestState, image: &GuestImage) -> String {
        let (machine, controllers) = match self.machine {
            Machine::Q35 => {
                let ports = 1 + usize::from(self.balloon) + self.disks.len() + SPARE_ROOT_PORTS;
                let port = "<controller type='pci' model='pcie-root-port'/>\n    ";
                ("q35", format!("<controller type='pci' index='0' model='pcie-root'/>\n    {}", port.repeat(ports)))
            }
            Machine::Pc => ("pc", String::new()),
        };
        let backing = match self.backing {
            Backing::Anonymous => "",
            Backing::Memfd => "\n  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        };
        let balloon = if self.balloon { "virtio" } else { "none" };
        let rx_queue = self.rx_queue.map_or(String::new(), |frames| format!(" rx_queue_size='{frames}'"));
        let disk = |(number, disk): (usize, &GuestDisk)| {
            format!(
                "<disk type='file' device='disk'><driver name='qemu' type='{}' discard='unmap'/><source file='{}'/>\
                 <target dev='vd{}' bus='virtio'/></disk>\n    ",
                disk.format(),
                disk.path(&self.name, number),
                if number == 0 { 'a' } else { 'b' },
            )
        };
        let disks: String = self.disks.iter().enumerate().map(disk).collect();
        let Self { name, memory_mib, cpus, workload, .. } = self;
        let GuestState { uuid, ip, mac, .. } = guest;
        let (kernel, initrd) = (image.kernel.display(), image.initrd.display());
        format!(
            "<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>{backing}
  <vcpu>{cpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>console=ttyS0 quiet panic=1 mitigations=off audit=0 lab.ip={ip}/{NET_PREFIX_LEN} \
lab.workload={workload}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    {controllers}<controller type='usb' model='none'/>
    {disks}<interface type='bridge'>
      <mac address='{mac}'/>
      <source bridge='{HOST_BRIDGE}'/>
      <model type='virtio'/>
      <driver name='qemu'{rx_queue}/>
    </interface>
    <serial type='file'><source path='{CONSOLE_DIR}/{name}.log' append='on'/><target port='0'/></serial>
    <memballoon model='{balloon}'/>
    <video><model type='none'/></video>
    <audio id='1' type='none'/>
  </devices>
</domain>
"
        )
    }
}

/// A UUID of version 8 (made by the application) from any 16 bytes.
pub fn uuid_from(mut id: [u8; 16]) -> String {
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    let hex: String = id.iter().map(|b| format!("{b:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// What `guest` tells about a guest it started.
#[derive(Debug, Clone, Serialize)]
pub struct StartedGuest {
    pub name: String,
    pub host: String,
    pub uuid: String,
    pub ip: std::net::Ipv4Addr,
    pub mac: String,
    /// From the order to start to the first answer; none if nobody waited.
    pub boot_ms: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_parsed_as_the_guest_does() {
        for good in
            ["idle", "counter", "busy", "busy:100", "busy:100:32", "dirty:4000", "random", "random:10:16", "redis"]
        {
            assert_eq!(good.parse::<Workload>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "dirty",
            "idle:1",
            "dirty:x",
            "dirty:1:2:3",
            "random:1:0",
            "dirty:9999999",
            "nothing",
            "dirty: 4",
            "gcc:1",
        ] {
            assert!(bad.parse::<Workload>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_region_that_does_not_fit_is_refused_with_what_is_needed() {
        let mut options = GuestOptions::new("g", "host1");
        options.memory_mib = 128;
        options.workload = "dirty:100:64".parse().unwrap();
        assert!(options.check().unwrap_err().to_string().contains("144 MiB"));
        options.workload = "dirty:100:32".parse().unwrap();
        options.check().unwrap();
        options.workload = "postgres".parse().unwrap();
        assert!(options.check().unwrap_err().to_string().contains("1024 MiB"));
        options.memory_mib = options.workload.default_memory_mib(false);
        options.check().unwrap();
        options.memory_mib = options.workload.default_memory_mib(true);
        options.disks = vec!["64".parse().unwrap()];
        assert!(options.check().unwrap_err().to_string().contains("256 MiB"));
        options.disks = vec!["512".parse().unwrap(); 2];
        options.check().unwrap();
        options.disks.push("512".parse().unwrap());
        assert!(options.check().unwrap_err().to_string().contains("at most 2"));
    }

    #[test]
    fn memory_is_mib_or_has_a_unit() {
        for (text, mib) in [("96", 96), ("256M", 256), ("1G", 1024), ("64g", 65_536)] {
            assert_eq!(memory_mib(text), Ok(mib), "{text}");
        }
        for text in ["", "M", "0", "95M", "65G", "1T", "1.5G", "-1", "4194304G", "256MM", " 256"] {
            assert!(memory_mib(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_receive_queue_is_one_that_qemu_takes() {
        let with = |rx_queue| GuestOptions { rx_queue, ..GuestOptions::new("g", "host1") }.check();
        [None, Some(256), Some(1024)].into_iter().for_each(|frames| with(frames).unwrap());
        for frames in [0, 1, 300, 2048] {
            assert!(with(Some(frames)).unwrap_err().to_string().contains("256, 512 or 1024"), "{frames}");
        }
    }

    #[test]
    fn names_that_would_break_the_xml_are_refused() {
        for bad in ["", "a'b", "<a>", "a b", "-a", "../a"] {
            assert!(GuestOptions::new(bad, "host1").check().is_err(), "{bad:?}");
        }
    }
}

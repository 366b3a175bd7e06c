//! A waiting shadow: made, found again after a restart of the agent, given up.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmsync::layout::{RamBlock as LayoutBlock, RamLayout};

use super::error::{Result, StandbyError};
use super::feed::{self, Feed, FeedError};
use super::image::Image;
use super::promote;
use super::record::{self, Phase, Record};
use crate::disk::DiskCopy;
use crate::disk::images::{self, target_of};
use crate::hypervisor::process::QemuProcess;
use crate::hypervisor::ramblock::RamBlock;
use crate::hypervisor::xml::{self, GuestDefinition, Interface};
use crate::hypervisor::{Domain, Hypervisor, HypervisorError, XmlKind};

/// QEMU's run state while it waits for a device state.
pub(super) const WAITING: &str = "inmigrate";

/// The guest a shadow is of, as its primary's host describes it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ShadowDescription {
    pub uuid: String,
    pub name: String,
    /// [`XmlKind::Migratable`] of the running primary.
    pub live_xml: String,
    /// [`XmlKind::Inactive`] of the primary; `None` if it is transient, and then the promoted guest is, too.
    pub inactive_xml: Option<String>,
}

/// A paused QEMU with the guest's memory in place, armed to take a device state and run.
///
/// Dropping the value leaves the shadow waiting, as a crash of the agent would; [`Shadow::adopt`] finds it again and
/// [`Shadow::remove`] gives it up.
#[derive(Debug)]
pub struct Shadow {
    pub(super) hypervisor: Arc<Hypervisor>,
    pub(super) domain: Domain,
    pub(super) record: Record,
    pub(super) run_dir: PathBuf,
    pub(super) image: Image,
    pub(super) feed: Feed,
    /// As QEMU resolved it, such as `pc-q35-10.0`.
    pub(super) machine: String,
    pub(super) interfaces: Vec<Interface>,
}

/// What became of a shadow that was recorded before this agent started.
#[derive(Debug)]
pub enum Adopted {
    Waiting(Box<Shadow>),
    /// It had been promoted when the agent died; what was left to do has been done.
    Promoted(promote::Promotion),
    /// There is none, or none that could still be used; anything left of it is gone.
    None,
}

impl Shadow {
    /// Makes sure that a shadow of this guest waits here: [`Shadow::keep`] if possible, else [`Shadow::create`].
    /// [`Shadow::process`] tells whether it is the one that waited before.
    pub fn prepare(
        hypervisor: &Arc<Hypervisor>,
        description: &ShadowDescription,
        layout: &RamLayout,
        run_dir: &Path,
        disk_dir: &Path,
    ) -> Result<Self> {
        match Self::keep(hypervisor, description, layout, run_dir)? {
            Some(shadow) => Ok(shadow),
            None => Self::create(hypervisor, description, layout, run_dir, disk_dir).map(|(shadow, _)| shadow),
        }
    }

    /// The shadow that waits here already, with its image, if it is of this guest in this shape and memory. Changes
    /// nothing if it is not.
    pub fn keep(
        hypervisor: &Arc<Hypervisor>,
        description: &ShadowDescription,
        layout: &RamLayout,
        run_dir: &Path,
    ) -> Result<Option<Self>> {
        check_description(description)?;
        let Some(mut record) = read_record(run_dir, &description.uuid)? else { return Ok(None) };
        if !fits(&record, description, layout)? {
            return Ok(None);
        }
        record.live_xml.clone_from(&description.live_xml);
        record.inactive_xml.clone_from(&description.inactive_xml);
        match Self::reopen(hypervisor, record, run_dir) {
            Ok(shadow) => {
                shadow.write_record()?;
                Ok(Some(shadow))
            }
            Err(StandbyError::Hypervisor(error)) if error.is_disconnect() => Err(error.into()),
            Err(error) => {
                tracing::info!(guest = description.name, %error, "the shadow that waits here cannot be kept");
                Ok(None)
            }
        }
    }

    /// Makes a new shadow, all of whose memory is zero. A waiting one of the same guest is given up first. True: a disk
    /// has what was found in `disk_dir`, which may be close to what the guest's has.
    pub fn create(
        hypervisor: &Arc<Hypervisor>,
        description: &ShadowDescription,
        layout: &RamLayout,
        run_dir: &Path,
        disk_dir: &Path,
    ) -> Result<(Self, bool)> {
        let definition = check_description(description)?;
        Self::remove(hypervisor, &description.uuid, run_dir)?;
        for file in &definition.files {
            if !Path::new(file).exists() {
                return Err(StandbyError::MissingFile { guest: description.name.clone(), path: file.clone() });
            }
        }
        let (disks, has_contents) = make_disks(description, layout, disk_dir)?;
        let shadow_xml = xml::with_disk_files(&description.live_xml, &disks)
            .and_then(|xml| xml::shadow_xml(&xml))
            .map_err(|source| StandbyError::Definition { guest: description.name.clone(), source })?;
        let domain = hypervisor.create_xml(&shadow_xml, true)?;
        let shadow = Self::make(hypervisor, domain.clone(), description, layout, disks, run_dir);
        if shadow.is_err() {
            // Nothing is in it yet.
            if let Err(error) = domain.destroy() {
                tracing::error!(guest = description.name, %error, "a shadow that failed to start stays behind");
            }
            let _ = record::remove(run_dir, &description.uuid);
        }
        shadow.map(|shadow| (shadow, has_contents))
    }

    /// Whether this shadow can go on for a guest that is described so, without being made anew.
    pub fn fits(&self, description: &ShadowDescription, layout: &RamLayout) -> Result<bool> {
        check_description(description)?;
        fits(&self.record, description, layout)
    }

    fn make(
        hypervisor: &Arc<Hypervisor>,
        domain: Domain,
        description: &ShadowDescription,
        layout: &RamLayout,
        disks: Vec<(String, String)>,
        run_dir: &Path,
    ) -> Result<Self> {
        let ShadowDescription { uuid, name, live_xml, inactive_xml } = description;
        let process = domain.process()?;
        let mut record = Record::new(uuid, name, process, live_xml, inactive_xml.as_deref());
        record.layout = layout.blocks().iter().map(|block| (block.name.clone(), block.len_bytes)).collect();
        record.disks = disks;
        let mut image = open_image(&domain, process, layout, &record.disks)?;
        image.clear().map_err(|source| StandbyError::Image { guest: name.clone(), source })?;
        let machine = feed::machine_type(&domain)?;
        let interfaces = interfaces(&domain)?;
        let feed = Feed::arm(&domain).map_err(|error| feed_error(name, error))?;
        record.feed_inode = Some(feed.inode());
        let hypervisor = Arc::clone(hypervisor);
        let shadow = Self { hypervisor, domain, record, run_dir: run_dir.to_owned(), image, feed, machine, interfaces };
        shadow.write_record()?;
        Ok(shadow)
    }

    /// Finds the recorded shadow of `uuid` again after a restart of the agent.
    pub fn adopt(hypervisor: &Arc<Hypervisor>, uuid: &str, run_dir: &Path) -> Result<Adopted> {
        let Some(record) = read_record(run_dir, uuid)? else { return Ok(Adopted::None) };
        if record.phase == Phase::Promoting {
            return promote::complete(hypervisor, record, run_dir);
        }
        match Self::reopen(hypervisor, record, run_dir) {
            Ok(shadow) => Ok(Adopted::Waiting(Box::new(shadow))),
            // Nothing is wrong with the shadow; try again when there is a connection.
            Err(StandbyError::Hypervisor(error)) if error.is_disconnect() => Err(error.into()),
            Err(error) => {
                tracing::warn!(uuid, %error, "the shadow recorded here cannot be used again");
                Self::clear_away(hypervisor, uuid, run_dir).map(|()| Adopted::None)
            }
        }
    }

    pub(super) fn reopen(hypervisor: &Arc<Hypervisor>, record: Record, run_dir: &Path) -> Result<Self> {
        let not_waiting = |reason: String| StandbyError::NotWaiting { guest: record.name.clone(), reason };
        let domain = hypervisor.lookup_uuid(&record.uuid)?;
        if !record.process.is_alive() || domain.process()? != record.process {
            return Err(not_waiting("its QEMU has ended or been replaced".into()));
        }
        let state = domain.run_state()?;
        if state != WAITING {
            return Err(not_waiting(format!("QEMU's state is {state}")));
        }
        let blocks =
            record.layout.iter().map(|(name, len_bytes)| LayoutBlock { name: name.clone(), len_bytes: *len_bytes });
        let layout = RamLayout::new(blocks.collect()).map_err(|error| not_waiting(error.to_string()))?;
        let image = open_image(&domain, record.process, &layout, &record.disks)?;
        let inode = record.feed_inode.ok_or_else(|| not_waiting("it was never armed".into()))?;
        let feed = Feed::retake(record.process, inode).map_err(|error| feed_error(&record.name, error))?;
        // A promotion that was given up may have disarmed it.
        feed::arm_start(&domain)?;
        let machine = feed::machine_type(&domain)?;
        let interfaces = interfaces(&domain)?;
        let hypervisor = Arc::clone(hypervisor);
        Ok(Self { hypervisor, domain, record, run_dir: run_dir.to_owned(), image, feed, machine, interfaces })
    }

    pub fn uuid(&self) -> &str {
        &self.record.uuid
    }

    pub fn name(&self) -> &str {
        &self.record.name
    }

    pub fn process(&self) -> QemuProcess {
        self.record.process
    }

    pub fn layout(&self) -> &RamLayout {
        self.image.layout()
    }

    pub fn image(&self) -> &Image {
        &self.image
    }

    pub fn image_mut(&mut self) -> &mut Image {
        &mut self.image
    }

    /// Folder for what belongs to this shadow; [`Shadow::remove`] removes it with all that is in it.
    pub fn directory(&self) -> PathBuf {
        record::directory(&self.run_dir, &self.record.uuid)
    }

    /// Why this shadow could not be promoted now; `None` when it could. Costs a look into /proc.
    pub fn problem(&self) -> Option<String> {
        (!self.record.process.is_alive()).then(|| "its waiting QEMU has ended; it has to be made anew".to_owned())
    }

    /// Ends the waiting shadow of `uuid`, if there is one, and removes all that is kept of it. A domain of that UUID
    /// that is not a waiting shadow is left alone and is an error.
    pub fn remove(hypervisor: &Hypervisor, uuid: &str, run_dir: &Path) -> Result<()> {
        if !record::is_uuid(uuid) {
            return Err(HypervisorError::NotFound { domain: uuid.to_owned() }.into());
        }
        match hypervisor.lookup_uuid(uuid) {
            Err(HypervisorError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
            Ok(domain) if domain.is_active()? => {
                let state = domain.run_state()?;
                let ours = is_shadow(&domain)?;
                if state != WAITING || !ours {
                    let found = if ours { format!("promoted, {state}") } else { state };
                    return Err(StandbyError::Occupied { guest: domain.name().to_owned(), found });
                }
                domain.destroy()?;
            }
            Ok(_) => {}
        }
        remove_record(run_dir, uuid)
    }

    /// [`Shadow::remove`] for a shadow that cannot be used: if its place has been taken by something else, only the
    /// record goes.
    pub(super) fn clear_away(hypervisor: &Hypervisor, uuid: &str, run_dir: &Path) -> Result<()> {
        match Self::remove(hypervisor, uuid, run_dir) {
            Err(StandbyError::Occupied { .. }) => remove_record(run_dir, uuid),
            outcome => outcome,
        }
    }

    pub(super) fn write_record(&self) -> Result<()> {
        self.record.write(&self.run_dir).map_err(|source| StandbyError::Record {
            guest: self.record.name.clone(),
            path: record::path(&self.run_dir, &self.record.uuid),
            source,
        })
    }
}

fn remove_record(run_dir: &Path, uuid: &str) -> Result<()> {
    record::remove(run_dir, uuid).map_err(|source| StandbyError::Record {
        guest: uuid.to_owned(),
        path: record::directory(run_dir, uuid),
        source,
    })
}

/// Definition of a guest that may become a shadow here, and is the one it is said to be.
fn check_description(description: &ShadowDescription) -> Result<GuestDefinition> {
    let guest = description.name.clone();
    let definition = GuestDefinition::parse(&description.live_xml)
        .map_err(|source| StandbyError::Definition { guest: guest.clone(), source })?;
    let wrong = |expected: &str, found: &str| StandbyError::WrongGuest {
        guest: description.name.clone(),
        expected: expected.to_owned(),
        found: found.to_owned(),
    };
    if !record::is_uuid(&description.uuid) || definition.uuid != description.uuid {
        return Err(wrong(&description.uuid, &definition.uuid));
    }
    if definition.name != description.name {
        return Err(wrong(&description.name, &definition.name));
    }
    if let Some(inactive) = &description.inactive_xml {
        let inactive = GuestDefinition::parse(inactive).map_err(|source| StandbyError::Definition { guest, source })?;
        if inactive.uuid != description.uuid {
            return Err(wrong(&description.uuid, &inactive.uuid));
        }
    }
    Ok(definition)
}

fn fits(record: &Record, description: &ShadowDescription, layout: &RamLayout) -> Result<bool> {
    let shape = |xml: &str| {
        xml::shape(xml).map_err(|source| StandbyError::Definition { guest: description.name.clone(), source })
    };
    let same_memory = record.layout.len() == layout.blocks().len()
        && record
            .layout
            .iter()
            .zip(layout.blocks())
            .all(|((name, len), block)| *name == block.name && *len == block.len_bytes);
    Ok(record.phase == Phase::Waiting
        && (&record.uuid, &record.name) == (&description.uuid, &description.name)
        && same_memory
        && shape(&record.live_xml)? == shape(&description.live_xml)?)
}

/// Files for the disks of the layout: target and path. True: one of them was there.
fn make_disks(
    description: &ShadowDescription,
    layout: &RamLayout,
    disk_dir: &Path,
) -> Result<(Vec<(String, String)>, bool)> {
    let failed = |path: &Path| {
        let (guest, path) = (description.name.clone(), path.to_owned());
        move |source| StandbyError::Disk { guest, path, source }
    };
    let (mut disks, mut has_contents) = (Vec::new(), false);
    for block in layout.blocks() {
        let Some(target) = target_of(&block.name) else { continue };
        if !images::is_target(target) {
            let source = std::io::Error::other(format!("{target:?} is no name of a disk"));
            return Err(failed(disk_dir)(source));
        }
        let folder = images::folder(disk_dir, &description.uuid).map_err(failed(disk_dir))?;
        let path = images::choose(&folder, target, &[]);
        has_contents |= path.exists();
        DiskCopy::open(&path, block.len_bytes).map_err(failed(&path))?;
        disks.push((target.to_owned(), path.to_string_lossy().into_owned()));
    }
    Ok((disks, has_contents))
}

pub(super) fn is_shadow(domain: &Domain) -> Result<bool> {
    let live = domain.xml(XmlKind::Live)?;
    xml::is_shadow(&live).map_err(|source| StandbyError::Definition { guest: domain.name().to_owned(), source })
}

fn interfaces(domain: &Domain) -> Result<Vec<Interface>> {
    let live = domain.xml(XmlKind::Live)?;
    let definition = GuestDefinition::parse(&live)
        .map_err(|source| StandbyError::Definition { guest: domain.name().to_owned(), source })?;
    Ok(definition.interfaces)
}

fn read_record(run_dir: &Path, uuid: &str) -> Result<Option<Record>> {
    if !record::is_uuid(uuid) {
        return Ok(None);
    }
    Record::read(run_dir, uuid).map_err(|source| StandbyError::Record {
        guest: uuid.to_owned(),
        path: record::path(run_dir, uuid),
        source,
    })
}

fn open_image(domain: &Domain, process: QemuProcess, layout: &RamLayout, disks: &[(String, String)]) -> Result<Image> {
    let guest = || domain.name().to_owned();
    let blocks = domain.ram_blocks()?;
    if let Some(difference) = layout_difference(layout, &blocks) {
        return Err(StandbyError::Layout { guest: guest(), difference });
    }
    let live = domain.xml(XmlKind::Live)?;
    let definition =
        GuestDefinition::parse(&live).map_err(|source| StandbyError::Definition { guest: guest(), source })?;
    Image::open(process, layout, &blocks, disks, definition.keeps_memory)
        .map_err(|source| StandbyError::Image { guest: guest(), source })
}

/// The first way in which a shadow's blocks differ from its primary's: a state may load without complaint into a
/// QEMU that lacks a part of the guest's memory.
fn layout_difference(primary: &RamLayout, shadow: &[RamBlock]) -> Option<String> {
    for wanted in primary.blocks().iter().filter(|block| target_of(&block.name).is_none()) {
        match shadow.iter().find(|block| block.name == wanted.name) {
            None => return Some(format!("it has no block {} of {} bytes", wanted.name, wanted.len_bytes)),
            Some(found) if found.used != wanted.len_bytes => {
                let name = &wanted.name;
                return Some(format!("its block {name} has {} bytes instead of {}", found.used, wanted.len_bytes));
            }
            Some(_) => {}
        }
    }
    let extra = shadow.iter().find(|block| primary.find(&block.name).is_none())?;
    Some(format!("it has a block {} that the primary lacks", extra.name))
}

pub(super) fn feed_error(guest: &str, error: FeedError) -> StandbyError {
    let guest = guest.to_owned();
    match error {
        FeedError::Hypervisor(error) => error.into(),
        FeedError::System(action, source) => StandbyError::Feed { guest, action, source },
        FeedError::Gone => StandbyError::NotWaiting { guest, reason: FeedError::Gone.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = include_str!("../../fixtures/xml/plain-live.xml");
    const UUID: &str = "5f0ad1f9-1d3c-4d5b-9d0b-3f5f2f9f7a11";

    #[test]
    fn memory_of_both_sides_is_compared_as_a_set() {
        let layout = |blocks: &[(&str, u64)]| {
            let block = |(name, len_bytes): &(&str, u64)| LayoutBlock { name: (*name).into(), len_bytes: *len_bytes };
            RamLayout::new(blocks.iter().map(block).collect()).unwrap()
        };
        let block = |name: &str, used| RamBlock {
            name: name.into(),
            page_size: 4096,
            used,
            total: 1 << 30,
            hva: 0,
            read_only: false,
        };
        let shadow = [block("pc.bios", 8192), block("pc.ram", 1 << 20)];
        let difference = |blocks: &[(&str, u64)]| layout_difference(&layout(blocks), &shadow).unwrap_or_default();
        assert_eq!(difference(&[("pc.ram", 1 << 20), ("pc.bios", 8192)]), "");
        assert!(difference(&[("pc.ram", 1 << 20)]).contains("pc.bios that the primary lacks"));
        assert!(difference(&[("pc.ram", 1 << 20), ("pc.bios", 4096)]).contains("8192 bytes instead of 4096"));
        let dimm = difference(&[("pc.ram", 1 << 20), ("pc.bios", 8192), ("memdimm0", 4096)]);
        assert!(dimm.contains("no block memdimm0"), "{dimm}");
    }

    #[test]
    fn a_description_of_another_guest_is_refused() {
        let good = ShadowDescription {
            uuid: UUID.into(),
            name: "counter1".into(),
            live_xml: PLAIN.into(),
            inactive_xml: Some(PLAIN.into()),
        };
        check_description(&good).unwrap();
        let wrong = |change: &dyn Fn(&mut ShadowDescription)| {
            let mut description = good.clone();
            change(&mut description);
            check_description(&description).unwrap_err()
        };
        assert!(matches!(wrong(&|d| d.uuid = "../../etc".into()), StandbyError::WrongGuest { .. }));
        assert!(matches!(wrong(&|d| d.name = "other".into()), StandbyError::WrongGuest { .. }));
        assert!(matches!(wrong(&|d| d.live_xml = "<x/>".into()), StandbyError::Definition { .. }));
        let other = PLAIN.replace(UUID, "00000000-1d3c-4d5b-9d0b-3f5f2f9f7a11");
        assert!(matches!(wrong(&|d| d.inactive_xml = Some(other.clone())), StandbyError::WrongGuest { .. }));
    }
}

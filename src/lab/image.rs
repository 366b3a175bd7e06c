//! The guests' kernel and initramfs: Debian's kernel for clouds, busybox, and our workload; made once, then cached.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};
use xxhash_rust::xxh3::Xxh3;

use super::error::{LabError, Result};
use super::process::run;
use super::state::CACHE_ROOT;

const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// In the order in which they can be loaded; what a kernel has built in is left out.
const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_balloon",
    "failover",
    "net_failover",
    "virtio_net",
];
const WORKLOAD_SOURCE: &str = include_str!("../../fixtures/guest/workload.rs");
const INIT_SCRIPT: &str = include_str!("../../fixtures/guest/init");

/// Files to boot a guest from; they stay where they are.
#[derive(Debug, Clone, serde::Serialize)]
pub struct GuestImage {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

/// Finds the image in the cache, or makes it (20 s and one download the first time).
pub fn ensure(progress: &dyn Fn(&str)) -> Result<GuestImage> {
    let cache = Path::new(CACHE_ROOT);
    fs::create_dir_all(cache).map_err(LabError::io("create", cache))?;
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).map_err(LabError::io("create", &lock_path))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| LabError::io("lock", &lock_path)(errno.into()))?;

    let kernel_dir = cache.join("kernel");
    if !kernel_dir.is_dir() {
        progress("downloading the guests' kernel");
        in_scratch(&kernel_dir, fetch_kernel)?;
    }
    let busybox = read_busybox()?;
    let kernel = kernel_dir.join("vmlinuz");
    let mut hash = Xxh3::new();
    hash.update(WORKLOAD_SOURCE.as_bytes());
    hash.update(INIT_SCRIPT.as_bytes());
    hash.update(&busybox);
    hash.update(&read(&kernel_dir.join("release"))?);
    let image_dir = cache.join(format!("image-{:032x}", hash.digest128()));
    if !image_dir.is_dir() {
        progress("building the guests' image");
        in_scratch(&image_dir, |dir| build_initrd(dir, &kernel_dir, &busybox))?;
    }
    Ok(GuestImage { kernel, initrd: image_dir.join("initrd") })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(LabError::io("read", path))
}

/// Lets `make` fill a new directory, which becomes `target` only when it is complete.
fn in_scratch(target: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let scratch = target.with_extension("part");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch).map_err(LabError::io("create", &scratch))?;
    make(&scratch)?;
    fs::rename(&scratch, target).map_err(LabError::io("rename", &scratch))
}

/// Downloads and unpacks the kernel package without installing it: vmlinuz, release, modules/NAME.ko.
fn fetch_kernel(dir: &Path) -> Result<()> {
    // The package of the plain name only depends on that of the current version.
    let depends = run(Command::new("apt-cache").args(["depends", "--important", KERNEL_PACKAGE]))?;
    let depends = String::from_utf8_lossy(&depends.stdout).into_owned();
    let package = depends.lines().find_map(|l| l.trim().strip_prefix("Depends: linux-image-")).ok_or_else(|| {
        let reason = "depends on no kernel image; are the package lists there (apt-get update)?".into();
        LabError::Invalid { what: "package", value: KERNEL_PACKAGE.into(), reason }
    })?;
    // As root without a sandbox: apt's own user need not reach this directory.
    let download = ["-o", "APT::Sandbox::User=root", "download", &format!("linux-image-{package}")];
    run(Command::new("apt-get").args(download).current_dir(dir))?;
    let deb = find(dir, &|name| name.ends_with(".deb")).ok_or_else(|| missing(dir, "downloaded package"))?;
    let unpacked = dir.join("unpacked");
    run(Command::new("dpkg-deb").arg("-x").args([&deb, &unpacked]))?;
    let boot = unpacked.join("boot");
    let vmlinuz = find(&boot, &|name| name.starts_with("vmlinuz-")).ok_or_else(|| missing(&boot, "vmlinuz"))?;
    fs::rename(&vmlinuz, dir.join("vmlinuz")).map_err(LabError::io("rename", &vmlinuz))?;
    fs::write(dir.join("release"), package).map_err(LabError::io("write", dir))?;
    let modules = dir.join("modules");
    fs::create_dir(&modules).map_err(LabError::io("create", &modules))?;
    for module in MODULES {
        let is_it = |name: &str| name.strip_prefix(module).is_some_and(|rest| rest.starts_with(".ko"));
        if let Some(path) = find(&unpacked, &is_it) {
            let target = modules.join(format!("{module}.ko"));
            fs::write(&target, decompressed(&path)?).map_err(LabError::io("write", &target))?;
        }
    }
    fs::remove_dir_all(&unpacked).map_err(LabError::io("remove", &unpacked))?;
    fs::remove_file(&deb).map_err(LabError::io("remove", &deb))
}

fn missing(dir: &Path, what: &str) -> LabError {
    LabError::Corrupt { path: dir.into(), reason: format!("no {what} in it") }
}

fn decompressed(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return read(path),
    };
    Ok(run(Command::new(tool).arg("-dc").arg(path))?.stdout)
}

/// First file below `dir` (in order of names) whose own name pleases `wanted`.
fn find(dir: &Path, wanted: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(dir).ok()?.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    entries.into_iter().find_map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => find(&entry.path(), wanted),
        Ok(kind) if kind.is_file() => entry.file_name().to_str().is_some_and(wanted).then(|| entry.path()),
        _ => None,
    })
}

fn read_busybox() -> Result<Vec<u8>> {
    let path = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|p| p.is_file());
    let remedy = |reason: &str| LabError::Invalid {
        what: "program",
        value: "busybox".into(),
        reason: format!("{reason}; install the package busybox-static"),
    };
    let bytes = read(path.ok_or_else(|| remedy("is not installed"))?)?;
    let dynamic = bytes.windows(9).any(|w| w == b"/ld-linux");
    if dynamic { Err(remedy("is not statically linked")) } else { Ok(bytes) }
}

fn build_initrd(dir: &Path, kernel_dir: &Path, busybox: &[u8]) -> Result<()> {
    let source = dir.join("workload.rs");
    fs::write(&source, WORKLOAD_SOURCE).map_err(LabError::io("write", &source))?;
    let workload = dir.join("workload");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    run(Command::new(rustc)
        .args(["--edition", "2021", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort"])
        .args(["-C", "strip=symbols", "-o"])
        .args([&workload, &source]))?;

    let mut archive = Cpio::default();
    for name in ["bin", "dev", "modules", "proc", "sys"] {
        archive.entry(name, 0o040_755, (0, 0), &[]);
    }
    archive.entry("dev/console", 0o020_600, (5, 1), &[]);
    archive.entry("init", 0o100_755, (0, 0), INIT_SCRIPT.as_bytes());
    archive.entry("bin/busybox", 0o100_755, (0, 0), busybox);
    archive.entry("workload", 0o100_755, (0, 0), &read(&workload)?);
    let mut order = String::new();
    for name in MODULES.map(|m| format!("{m}.ko")) {
        let path = kernel_dir.join("modules").join(&name);
        if path.is_file() {
            archive.entry(&format!("modules/{name}"), 0o100_644, (0, 0), &read(&path)?);
            order += &format!("{name}\n");
        }
    }
    archive.entry("modules/order", 0o100_644, (0, 0), order.as_bytes());
    let path = dir.join("initrd");
    fs::write(&path, archive.finish()).map_err(LabError::io("write", &path))
}

/// Writer of the "newc" archives that the kernel unpacks as its first root: per entry a header of 6 + 13 x 8 hex
/// digits, the name with its NUL, the data, name and data each filled up to 4 bytes.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.entries += 1;
        let links = if mode & 0o040_000 != 0 { 2 } else { 1 };
        let (size, name_size) = (data.len() as u32, name.len() as u32 + 1);
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.fill_up();
        self.bytes.extend_from_slice(data);
        self.fill_up();
    }

    fn fill_up(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_what_cpio_writes() {
        let mut archive = Cpio::default();
        archive.entry("bin", 0o040_755, (0, 0), &[]);
        archive.entry("bin/a", 0o100_755, (0, 0), b"hello");
        let bytes = archive.finish();
        let listing = super::super::process::run_with_input(
            Command::new("busybox").args(["cpio", "-tv"]),
            std::str::from_utf8(&bytes).unwrap(),
        );
        let listing = String::from_utf8(listing.unwrap().stdout).unwrap();
        assert!(listing.contains("drwxr-xr-x") && listing.contains("bin/a") && listing.contains(" 5 "), "{listing}");
        assert_eq!(bytes.len() % 4, 0);
    }
}

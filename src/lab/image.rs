//! The guests' kernel and initramfs: Debian's kernel for clouds, busybox, our workload, and for real workloads what these
//! need out of Debian's packages; made once, then cached.
//!
//! ```text
//! kernel-2/              vmlinuz, release, modules/NAME.ko
//! image-HASH/            initrd: busybox, init, workload, modules
//!   initrd-NAME-HASH     the same behind the archives of a software (the kernel unpacks one after the other)
//!   disk-NAME-HASH       the same without its data, for guests that have these on their disk
//! software-NAME-HASH/    archive.cpio: what its recipe takes out of the packages
//!   data/, data.cpio     the data that its recipe prepared, by its path in the guest
//!   programs/            the same as in the archive, to be run on this machine (toolbox)
//! ```

mod cpio;
mod packages;
mod software;
mod toolbox;
mod tree;

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};
use xxhash_rust::xxh3::Xxh3;

use super::error::{LabError, Result};
use super::process::run;
use super::state::CACHE_ROOT;
use cpio::{Cpio, Kind};
pub use software::Software;
use software::{DATABASE_UID, Recipe};
pub use toolbox::{HOST_PATH, Toolbox};

const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// In the order in which they can be loaded; what a kernel has built in is left out.
const MODULES: [&str; 10] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_balloon",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
];
const WORKLOAD_SOURCE: &str = include_str!("../../fixtures/guest/workload.rs");
/// Of making a guest's data: many times what it takes on a busy machine.
const PREPARE_TIMEOUT_S: &str = "300";
/// Grows with every change of what is made out of a recipe, so that older archives are not taken for its own.
const RECIPES_VERSION: u32 = 2;
const INIT_SCRIPT: &str = include_str!("../../fixtures/guest/init");

/// Files to boot a guest from; they stay where they are.
#[derive(Debug, Clone, serde::Serialize)]
pub struct GuestImage {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// What the file system of the guest's first disk begins with; none: nothing.
    pub data: Option<PathBuf>,
}

/// Finds the image in the cache, or makes it (20 s and one download the first time; with software one more). `on_disk`:
/// of a guest that has its data on a disk.
pub fn ensure(software: Option<Software>, on_disk: bool, progress: &dyn Fn(&str)) -> Result<GuestImage> {
    let cache = Path::new(CACHE_ROOT);
    let base = ensure_base(cache, progress)?;
    let Some(software) = software else { return Ok(base) };
    let (archive_dir, named) = ensure_software(cache, software, progress)?;
    let data = software.recipe().data;
    let in_memory = data.is_some() && !on_disk;
    let prefix = if data.is_some() && on_disk { "disk" } else { "initrd" };
    let initrd = base.initrd.with_file_name(format!("{prefix}-{named}"));
    let _lock = lock(cache, &format!("lock-{software}"))?;
    if !initrd.is_file() {
        let part = initrd.with_extension("part");
        let mut parts = vec![archive_dir.join("archive.cpio")];
        if in_memory {
            parts.push(archive_dir.join("data.cpio"));
        }
        parts.push(base.initrd.clone());
        join(&parts, &part).and_then(|()| fs::rename(&part, &initrd)).map_err(LabError::io("write", &initrd))?;
    }
    let data = data.filter(|_| on_disk).map(|folder| archive_dir.join("data").join(folder));
    Ok(GuestImage { initrd, data, ..base })
}

/// The programs of a software, to be run on this machine.
pub fn toolbox(software: Software, progress: &dyn Fn(&str)) -> Result<Toolbox> {
    let (dir, _) = ensure_software(Path::new(CACHE_ROOT), software, progress)?;
    Ok(Toolbox::new(dir.join("programs")))
}

/// The folder of what is made out of a recipe, and the part of its name that tells it from others.
fn ensure_software(cache: &Path, software: Software, progress: &dyn Fn(&str)) -> Result<(PathBuf, String)> {
    // A lock of its own: guests without software need not wait for a download.
    let _lock = lock(cache, &format!("lock-{software}"))?;
    let recipe = software.recipe();
    let mut hash = Xxh3::new();
    hash.update(format!("{RECIPES_VERSION} {recipe:?}").as_bytes());
    let named = format!("{software}-{:032x}", hash.digest128());
    let archive_dir = cache.join(format!("software-{named}"));
    if !archive_dir.is_dir() {
        progress(&format!("making the {software} guest out of packages (once; half a minute and a download)"));
        let say = |line: &str| progress(&format!("{software}: {line}"));
        in_scratch(&archive_dir, |dir| make_software(dir, recipe, &say))?;
    }
    Ok((archive_dir, named))
}

fn lock(cache: &Path, name: &str) -> Result<Flock<File>> {
    fs::create_dir_all(cache).map_err(LabError::io("create", cache))?;
    let path = cache.join(name);
    let file = File::create(&path).map_err(LabError::io("create", &path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| LabError::io("lock", &path)(errno.into()))
}

/// Writes files one after the other into a new one.
fn join(parts: &[PathBuf], target: &Path) -> io::Result<()> {
    let mut out = File::create(target)?;
    for part in parts {
        io::copy(&mut File::open(part)?, &mut out)?;
    }
    out.sync_all()
}

fn ensure_base(cache: &Path, progress: &dyn Fn(&str)) -> Result<GuestImage> {
    let _lock = lock(cache, "lock")?;
    // Its name changes with what is taken out of the package.
    let kernel_dir = cache.join("kernel-2");
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
    Ok(GuestImage { kernel, initrd: image_dir.join("initrd"), data: None })
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

    let path = dir.join("initrd");
    let mut archive = new_archive(&path)?;
    let written = (|| {
        for name in ["bin", "dev", "modules", "proc", "sys"] {
            archive.entry(name.as_bytes(), Kind::mode(0o040_755), &[])?;
        }
        let console = Kind { device: (5, 1), ..Kind::mode(0o020_600) };
        archive.entry(b"dev/console", console, &[])?;
        archive.entry(b"init", Kind::mode(0o100_755), INIT_SCRIPT.as_bytes())?;
        archive.entry(b"bin/busybox", Kind::mode(0o100_755), busybox)?;
        archive.entry(b"workload", Kind::mode(0o100_755), &fs::read(&workload)?)?;
        let mut order = String::new();
        for name in MODULES.map(|m| format!("{m}.ko")) {
            let module = kernel_dir.join("modules").join(&name);
            if module.is_file() {
                archive.entry(format!("modules/{name}").as_bytes(), Kind::mode(0o100_644), &fs::read(&module)?)?;
                order += &format!("{name}\n");
            }
        }
        archive.entry(b"modules/order", Kind::mode(0o100_644), order.as_bytes())?;
        archive.finish().map(drop)
    })();
    written.map_err(LabError::io("write", &path))
}

fn new_archive(path: &Path) -> Result<Cpio<BufWriter<File>>> {
    let file = File::create(path).map_err(LabError::io("create", path))?;
    Ok(Cpio::new(BufWriter::new(file)))
}

/// Downloads, unpacks, picks and prepares; leaves `archive.cpio`.
fn make_software(dir: &Path, recipe: &Recipe, progress: &dyn Fn(&str)) -> Result<()> {
    // Packages bring programs that run as root for anybody; nobody else shall reach these here.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(LabError::io("change mode of", dir))?;
    let (unpacked, root) = (dir.join("unpacked"), dir.join("root"));
    let debs = packages::download(dir, recipe.packages, progress)?;
    progress(&format!("unpacking {} packages", debs.len()));
    packages::unpack(&debs, &unpacked)?;
    tree::pick(recipe, &unpacked, &root)?;
    furnish(&root, recipe)?;
    if let Some(script) = recipe.prepare {
        progress("preparing its data");
        prepare(&root, script)?;
    }
    let (data, programs) = (dir.join("data"), dir.join("programs"));
    if let Some(folder) = recipe.data {
        let moved = data.join(folder);
        let parent = moved.parent().unwrap_or(&data);
        fs::create_dir_all(parent).map_err(LabError::io("create", parent))?;
        fs::rename(root.join(folder), &moved).map_err(LabError::io("move", &moved))?;
        write_archive(&dir.join("data.cpio"), &data)?;
    }
    write_archive(&dir.join("archive.cpio"), &root)?;
    fs::rename(&root, &programs).map_err(LabError::io("move", &programs))?;
    toolbox::furnish(&programs, &read_busybox()?)?;
    let kept = ["archive.cpio", "data", "data.cpio", "programs"];
    let left = fs::read_dir(dir).map_err(LabError::io("read", dir))?;
    for entry in left.flatten().filter(|e| !kept.iter().any(|name| e.file_name() == *name)).map(|e| e.path()) {
        let removed = if entry.is_dir() { fs::remove_dir_all(&entry) } else { fs::remove_file(&entry) };
        removed.map_err(LabError::io("remove", &entry))?;
    }
    Ok(())
}

fn write_archive(path: &Path, tree: &Path) -> Result<()> {
    let mut archive = new_archive(path)?;
    archive.tree(tree).and_then(|()| archive.finish()).map(drop).map_err(LabError::io("write", path))
}

/// What is neither in a package nor in the image that all guests have.
fn furnish(root: &Path, recipe: &Recipe) -> Result<()> {
    let done = (|| {
        for folder in ["bin", "dev", "etc", "guest/bin", "proc", "run", "tmp", "var"] {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        symlink("busybox", root.join("bin/sh"))?;
        let users = format!("root:x:0:0::/:/bin/sh\npostgres:x:{DATABASE_UID}:{DATABASE_UID}::/tmp:/bin/sh\n");
        fs::write(root.join("etc/passwd"), users)?;
        fs::write(root.join("etc/group"), format!("root:x:0:\npostgres:x:{DATABASE_UID}:\n"))?;
        fs::write(root.join("guest/run"), recipe.run)?;
        fs::set_permissions(root.join("guest/run"), fs::Permissions::from_mode(0o755))
    })();
    done.map_err(LabError::io("furnish", root))
}

/// Runs the recipe's preparation with the tree as its root, without network, in namespaces that end with it.
fn prepare(root: &Path, script: &str) -> Result<()> {
    let (busybox, program) = (root.join("bin/busybox"), root.join("guest/prepare"));
    let written = fs::write(&busybox, read_busybox()?)
        .and_then(|()| fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755)))
        .and_then(|()| fs::write(&program, script));
    written.map_err(LabError::io("furnish", root))?;
    run(Command::new("unshare")
        .args(["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "chroot"])
        .arg(root)
        .args(["/bin/busybox", "timeout", PREPARE_TIMEOUT_S, "/bin/busybox", "sh", "/guest/prepare"])
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default()))?;
    [busybox, program].iter().try_for_each(|path| fs::remove_file(path).map_err(LabError::io("remove", path)))
}

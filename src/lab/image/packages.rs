//! Debian packages with all they depend on, from wherever this machine's apt gets its own: downloaded and unpacked, never
//! installed. What is installed here does not matter: apt resolves them as if nothing were.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::lab::error::{LabError, Result};
use crate::lab::process::{run, run_for_lines};

/// Folders of a system without a merged /usr: links, so that packages of either kind end up in the same place.
pub const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// Downloads `packages` and their dependencies into `dir`, verified by apt.
pub fn download(dir: &Path, packages: &[&str], progress: &dyn Fn(&str)) -> Result<Vec<PathBuf>> {
    let (archives, none_installed) = (dir.join("archives"), dir.join("status"));
    fs::create_dir_all(archives.join("partial")).map_err(LabError::io("create", &archives))?;
    File::create(&none_installed).map_err(LabError::io("create", &none_installed))?;
    let mut apt = Command::new("apt-get");
    apt.args(["--quiet", "--assume-yes", "--download-only"]).env("LC_ALL", "C");
    for option in [
        format!("Dir::State::status={}", none_installed.display()),
        format!("Dir::Cache::archives={}", archives.display()),
        // This machine's own caches tell what is installed here.
        "Dir::Cache::pkgcache=".into(),
        "Dir::Cache::srcpkgcache=".into(),
        // As root without a sandbox: apt's own user need not reach this directory.
        "APT::Sandbox::User=root".into(),
        "APT::Install-Recommends=false".into(),
        "Acquire::Retries=2".into(),
        "Acquire::http::Timeout=30".into(),
        "Acquire::https::Timeout=30".into(),
    ] {
        apt.args(["--option", &option]);
    }
    apt.arg("install").args(packages);
    run_for_lines(&mut apt, |line| {
        // "Need to get 23.6 MB of archives.", "Fetched 23.6 MB in 0s (174 MB/s)"
        if line.starts_with("Need to get") || line.starts_with("Fetched") {
            progress(line.trim_end_matches('.'));
        }
    })
    .map_err(|error| LabError::Packages { packages: packages.join(", "), reason: error.to_string() })?;
    let entries = fs::read_dir(&archives).map_err(LabError::io("read", &archives))?;
    let mut debs: Vec<_> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "deb")).collect();
    debs.sort();
    match debs.is_empty() {
        true => Err(LabError::Packages { packages: packages.join(", "), reason: "apt-get brought none".into() }),
        false => Ok(debs),
    }
}

/// Unpacks packages over each other into a new root.
pub fn unpack(debs: &[PathBuf], root: &Path) -> Result<()> {
    for name in MERGED {
        let (real, link) = (root.join("usr").join(name), root.join(name));
        fs::create_dir_all(&real).map_err(LabError::io("create", &real))?;
        std::os::unix::fs::symlink(Path::new("usr").join(name), &link).map_err(LabError::io("link", &link))?;
    }
    for deb in debs {
        // dpkg-deb's own --extract would replace the links by folders.
        let mut reader = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(deb)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(LabError::system("run dpkg-deb"))?;
        let pipe = reader.stdout.take().map_or_else(Stdio::null, Stdio::from);
        // This process's end of the pipe goes with the command: a reader whose tar has failed must not wait for ever.
        let unpacked = Command::new("tar")
            .args(["--extract", "--keep-directory-symlink", "--directory"])
            .arg(root)
            .stdin(pipe)
            .output()
            .map_err(LabError::system("run tar"));
        let read = reader.wait().map_err(LabError::system("wait for dpkg-deb"))?;
        let unpacked = unpacked?;
        if !read.success() || !unpacked.status.success() {
            let messages = String::from_utf8_lossy(&unpacked.stderr);
            let reason = format!("cannot be unpacked: {}", messages.lines().next().unwrap_or("dpkg-deb failed"));
            return Err(LabError::Corrupt { path: deb.clone(), reason });
        }
    }
    Ok(())
}

/// The libraries that `program` (a path inside of `root`) is linked with, and its loader, as the loader of that root
/// finds them; nothing of the program itself is run.
pub fn libraries(root: &Path, program: &Path) -> Result<Vec<PathBuf>> {
    const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
    let mut list = Command::new("chroot");
    list.arg(root).arg(Path::new("/").join(LOADER)).arg("--list").arg(Path::new("/").join(program));
    // LD_LIBRARY_PATH and its like are for other programs; PATH is where chroot is.
    list.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    let listed = run(&mut list)?;
    let mut found = vec![PathBuf::from(LOADER)];
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        // "\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x...)"; others are the kernel's or the loader itself.
        let Some((name, target)) = line.trim().split_once(" => ") else { continue };
        let Some(path) = target.split(" (").next().and_then(|path| path.strip_prefix('/')) else {
            let reason = format!("needs {name}, which no downloaded package has");
            return Err(LabError::Corrupt { path: root.join(program), reason });
        };
        found.push(path.into());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_that_cannot_be_had_is_named_with_what_to_do() {
        let dir = std::env::temp_dir().join(format!("virt-shadow-packages-{}", std::process::id()));
        let error = download(&dir, &["virt-shadow-no-such-package"], &|_| ()).unwrap_err().to_string();
        fs::remove_dir_all(&dir).unwrap();
        assert!(error.contains("packages virt-shadow-no-such-package cannot be downloaded"), "{error}");
        assert!(error.contains("apt-get update"), "{error}");
    }
}

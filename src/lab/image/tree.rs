//! A guest's tree: the few programs, libraries and folders it needs, out of packages that bring far more.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use crate::lab::error::{LabError, Result};

use super::packages::{self, MERGED};
use super::software::Recipe;

/// Links followed from one to the next at most.
const LINKS_MAX: u32 = 16;

/// Fills `root` with what the recipe names, as hard links to the files below `unpacked`.
pub fn pick(recipe: &Recipe, unpacked: &Path, root: &Path) -> Result<()> {
    let mut picker = Picker { unpacked, root, taken: BTreeSet::new() };
    for name in MERGED {
        let (real, link) = (root.join("usr").join(name), root.join(name));
        fs::create_dir_all(&real).map_err(LabError::io("create", &real))?;
        // The guest's own programs are in a /bin that is a folder.
        if name != "bin" {
            std::os::unix::fs::symlink(Path::new("usr").join(name), &link).map_err(LabError::io("link", &link))?;
        }
    }
    for pattern in recipe.programs {
        for program in picker.matches(pattern)? {
            let file = picker.take(&program)?;
            if is_elf(&unpacked.join(&file))? {
                for library in packages::libraries(unpacked, &file)? {
                    picker.take(&library)?;
                }
            }
        }
    }
    for pattern in recipe.folders {
        for folder in picker.matches(pattern)? {
            picker.take_folder(&folder)?;
        }
    }
    Ok(())
}

struct Picker<'a> {
    unpacked: &'a Path,
    root: &'a Path,
    taken: BTreeSet<PathBuf>,
}

impl Picker<'_> {
    /// All paths that a pattern stands for; an error if there is none.
    fn matches(&self, pattern: &str) -> Result<Vec<PathBuf>> {
        let mut found = vec![PathBuf::new()];
        for part in pattern.split('/') {
            let mut next = Vec::new();
            for folder in found {
                if part != "*" {
                    next.push(folder.join(part));
                    continue;
                }
                let Ok(entries) = fs::read_dir(self.unpacked.join(&folder)) else { continue };
                let mut names: Vec<_> =
                    entries.flatten().filter(|e| e.path().is_dir()).map(|e| e.file_name()).collect();
                names.sort();
                next.extend(names.into_iter().map(|name| folder.join(name)));
            }
            found = next;
        }
        found.retain(|path| fs::symlink_metadata(self.unpacked.join(path)).is_ok());
        match found.is_empty() {
            true => Err(self.lacks(Path::new(pattern))),
            false => Ok(found),
        }
    }

    fn lacks(&self, path: &Path) -> LabError {
        let reason = format!("the downloaded packages bring no {}", path.display());
        LabError::Corrupt { path: self.unpacked.into(), reason }
    }

    /// Takes a file and the links on the way to it; returns the path of the file itself.
    fn take(&mut self, path: &Path) -> Result<PathBuf> {
        let mut path = normal(path);
        for _ in 0..LINKS_MAX {
            let source = self.unpacked.join(&path);
            let meta = fs::symlink_metadata(&source).map_err(|error| match error.kind() {
                ErrorKind::NotFound => self.lacks(&path),
                _ => LabError::io("look at", &source)(error),
            })?;
            self.link(&path)?;
            if !meta.is_symlink() {
                return Ok(path);
            }
            let target = fs::read_link(&source).map_err(LabError::io("read", &source))?;
            path = normal(&path.parent().unwrap_or(Path::new("")).join(target));
        }
        Err(LabError::Corrupt { path: self.unpacked.join(path), reason: "is a link that leads to links only".into() })
    }

    fn take_folder(&mut self, folder: &Path) -> Result<()> {
        let source = self.unpacked.join(folder);
        let entries = fs::read_dir(&source).map_err(LabError::io("read", &source))?;
        for entry in entries {
            let entry = entry.map_err(LabError::io("read", &source))?;
            let (path, kind) = (folder.join(entry.file_name()), entry.file_type());
            match kind.map_err(LabError::io("look at", &source))?.is_dir() {
                true => self.take_folder(&path)?,
                false => self.link(&path)?,
            }
        }
        Ok(())
    }

    /// The same file, or symbolic link, in the guest's tree.
    fn link(&mut self, path: &Path) -> Result<()> {
        if !self.taken.insert(path.into()) {
            return Ok(());
        }
        let (source, target) = (self.unpacked.join(path), self.root.join(path));
        let parent = target.parent().unwrap_or(self.root);
        fs::create_dir_all(parent).map_err(LabError::io("create", parent))?;
        fs::hard_link(&source, &target).map_err(LabError::io("link", &target))
    }
}

/// Inside the root: without `..` and `.`, and in /usr what systems have there by a link.
fn normal(path: &Path) -> PathBuf {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => parts.push(name),
            Component::ParentDir => drop(parts.pop()),
            Component::RootDir => parts.clear(),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    let merged = parts.first().is_some_and(|first| MERGED.iter().any(|name| first == name));
    let path: PathBuf = parts.into_iter().collect();
    if merged { Path::new("usr").join(path) } else { path }
}

fn is_elf(path: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read(&mut magic)).map_err(LabError::io("read", path))?;
    Ok(magic[..read] == *b"\x7fELF")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const RECIPE: Recipe = Recipe {
        packages: &[],
        programs: &["usr/bin/tool", "usr/lib/tool/*/helper"],
        folders: &["usr/share/tool"],
        run: "",
        prepare: None,
        data: None,
    };

    /// Scripts only: no loader is asked.
    fn unpacked(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("virt-shadow-tree-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        for folder in ["usr/bin", "usr/lib/tool/7", "usr/share/tool/deep", "usr/share/other"] {
            fs::create_dir_all(dir.join("unpacked").join(folder)).unwrap();
        }
        fs::create_dir_all(dir.join("root")).unwrap();
        let at = |path: &str| dir.join("unpacked").join(path);
        symlink("/bin/tool-7", at("usr/bin/tool")).unwrap();
        for file in ["usr/bin/tool-7", "usr/lib/tool/7/helper", "usr/share/tool/deep/data", "usr/share/other/data"] {
            fs::write(at(file), "#!/bin/sh\n").unwrap();
        }
        dir
    }

    #[test]
    fn only_what_the_recipe_names_is_taken_with_the_links_that_lead_to_it() {
        let dir = unpacked("pick");
        pick(&RECIPE, &dir.join("unpacked"), &dir.join("root")).unwrap();
        let root = dir.join("root");
        assert_eq!(fs::read_link(root.join("usr/bin/tool")).unwrap(), Path::new("/bin/tool-7"));
        for there in ["usr/bin/tool-7", "usr/lib/tool/7/helper", "lib/tool/7/helper", "usr/share/tool/deep/data"] {
            assert!(root.join(there).is_file(), "{there}");
        }
        assert!(!root.join("usr/share/other").exists() && !root.join("bin").exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_packages_no_longer_bring_is_named() {
        let dir = unpacked("lack");
        fs::remove_dir_all(dir.join("unpacked/usr/lib/tool/7")).unwrap();
        let error = pick(&RECIPE, &dir.join("unpacked"), &dir.join("root")).unwrap_err().to_string();
        assert!(error.contains("bring no usr/lib/tool/*/helper"), "{error}");
        let dir = unpacked("lack");
        fs::remove_file(dir.join("unpacked/usr/bin/tool-7")).unwrap();
        let error = pick(&RECIPE, &dir.join("unpacked"), &dir.join("root")).unwrap_err().to_string();
        assert!(error.contains("bring no usr/bin/tool-7"), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn paths_stay_inside_the_root() {
        assert_eq!(normal(Path::new("/lib/x/../../../../etc/./passwd")), Path::new("etc/passwd"));
        assert_eq!(normal(Path::new("lib64/ld.so")), Path::new("usr/lib64/ld.so"));
    }
}

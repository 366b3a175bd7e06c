//! The shape that the folder names promise: crates that think depend on nothing that acts, and on each other not at
//! all; files stay short enough to read.

use std::fs;
use std::path::{Path, PathBuf};

const THINKING: [&str; 3] = ["vmsync", "placement", "forecast"];
/// What a thinking crate may use: values, arrays, hashes, compression, errors.
const PURE: [&str; 7] = ["ndarray", "serde", "serde_json", "thiserror", "toml", "xxhash-rust", "zstd"];
const LONGEST_FILE_LINES: usize = 800;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn crates_that_think_use_nothing_that_acts() {
    for krate in THINKING {
        let text = fs::read_to_string(root().join(krate).join("Cargo.toml")).unwrap();
        let manifest: toml::Table = text.parse().unwrap();
        let dependencies = manifest["dependencies"].as_table().unwrap();
        for name in dependencies.keys() {
            assert!(
                PURE.contains(&name.as_str()),
                "{krate} depends on {name}, which is not on the list of pure crates"
            );
        }
        let lib = fs::read_to_string(root().join(krate).join("src/lib.rs")).unwrap();
        if krate == "vmsync" {
            assert!(lib.contains("#![deny(unsafe_code)]"), "{krate} may use unsafe");
        } else {
            assert!(lib.contains("#![forbid(unsafe_code)]"), "{krate} may use unsafe");
        }
        let bans = fs::read_to_string(root().join(krate).join("clippy.toml")).unwrap();
        for banned in ["std::time::Instant", "std::fs", "std::thread::spawn", "std::net::TcpStream"] {
            assert!(bans.contains(banned), "{krate}/clippy.toml does not ban {banned}");
        }
    }
}

#[test]
fn the_codecs_vectors_are_the_one_place_of_vmsync_with_unsafe() {
    let mut files = Vec::new();
    rust_files(&root().join("vmsync/src"), &mut files);
    let allowing = |file: &&PathBuf| fs::read_to_string(file).unwrap().contains("allow(unsafe_code)");
    let found: Vec<_> = files.iter().filter(allowing).map(|file| file.strip_prefix(root()).unwrap()).collect();
    assert_eq!(found, [Path::new("vmsync/src/codec/mod.rs")]);
    let text = fs::read_to_string(root().join("vmsync/src/codec/mod.rs")).unwrap();
    assert_eq!(text.matches("allow(unsafe_code)").count(), 1);
    assert!(text.contains("#[allow(unsafe_code)]\nmod simd;"), "not the vectors");
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn files_can_be_read_in_one_sitting_and_promise_nothing() {
    let mut files = Vec::new();
    for folder in ["src", "vmsync/src", "placement/src", "forecast/src"] {
        rust_files(&root().join(folder), &mut files);
    }
    assert!(files.len() > 50);
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("todo", "!("), concat!("unimplemented", "!(")];
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let lines = text.lines().count();
        assert!(lines <= LONGEST_FILE_LINES, "{} has {lines} lines", file.display());
        // Examples in documentation may leave out what they are not about.
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//! #")).collect::<Vec<_>>().join("\n");
        for word in words {
            assert!(!code.contains(word), "{} says {word}", file.display());
        }
    }
}

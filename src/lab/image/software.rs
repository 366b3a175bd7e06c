//! Real programs that a guest can run: which Debian packages they are in, what of these a guest needs, what starts them.

use std::fmt;

/// Owner of the database's files and processes, on this machine (while its data is made) and in the guest. An unused
/// number here, so that nobody on this machine owns these files.
pub const DATABASE_UID: u32 = 54_321;

/// A real workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Software {
    Redis,
    Postgres,
    Gcc,
}

/// How a guest's tree is made from packages. Paths are relative to the root and resolved in the unpacked packages; a
/// `*` stands for one folder of any name (a version).
#[derive(Debug)]
pub struct Recipe {
    /// Asked of apt, which adds what they depend on.
    pub packages: &'static [&'static str],
    /// Programs and libraries loaded by name; the libraries they are linked with are found by the loader.
    pub programs: &'static [&'static str],
    /// Taken whole.
    pub folders: &'static [&'static str],
    /// Started in the guest; it prints `work TOTAL` lines.
    pub run: &'static str,
    /// Run once on this machine inside the tree, cut off from everything else, to make data.
    pub prepare: Option<&'static str>,
    /// Folder of that data. A guest with a disk has it there, others in memory.
    pub data: Option<&'static str>,
}

impl Software {
    pub const ALL: [Self; 3] = [Self::Redis, Self::Postgres, Self::Gcc];

    pub fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Postgres => "postgres",
            Self::Gcc => "gcc",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|software| software.name() == name)
    }

    pub(super) fn recipe(self) -> &'static Recipe {
        match self {
            Self::Redis => &REDIS,
            Self::Postgres => &POSTGRES,
            Self::Gcc => &GCC,
        }
    }
}

impl fmt::Display for Software {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

const REDIS: Recipe = Recipe {
    packages: &["redis-server", "redis-tools"],
    programs: &["usr/bin/redis-server", "usr/bin/redis-cli", "usr/bin/redis-benchmark", "usr/bin/redis-check-aof"],
    folders: &[],
    run: include_str!("../../../fixtures/guest/software/redis"),
    prepare: None,
    data: None,
};

const POSTGRES: Recipe = Recipe {
    packages: &["postgresql"],
    programs: &[
        "usr/lib/postgresql/*/bin/postgres",
        "usr/lib/postgresql/*/bin/initdb",
        "usr/lib/postgresql/*/bin/pg_ctl",
        "usr/lib/postgresql/*/bin/pg_isready",
        "usr/lib/postgresql/*/bin/pg_amcheck",
        "usr/lib/postgresql/*/bin/pgbench",
        "usr/lib/postgresql/*/bin/psql",
        "usr/lib/postgresql/*/lib/amcheck.so",
        "usr/lib/postgresql/*/lib/dict_snowball.so",
        "usr/lib/postgresql/*/lib/plpgsql.so",
    ],
    folders: &["usr/share/postgresql"],
    run: include_str!("../../../fixtures/guest/software/postgres"),
    prepare: Some(include_str!("../../../fixtures/guest/software/postgres-prepare")),
    data: Some("var/lib/postgresql"),
};

const GCC: Recipe = Recipe {
    packages: &["gcc", "libc6-dev", "libstb-dev"],
    programs: &["usr/bin/gcc", "usr/bin/as", "usr/lib/gcc/x86_64-linux-gnu/*/cc1"],
    folders: &["usr/lib/gcc/x86_64-linux-gnu/*/include", "usr/include"],
    run: include_str!("../../../fixtures/guest/software/gcc"),
    prepare: None,
    data: None,
};

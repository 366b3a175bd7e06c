//! Names and numbers of this crate, each a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<S: Into<String>> From<S> for $name {
            fn from(text: S) -> Self {
                Self(text.into())
            }
        }
    };
}

name_type!(
    /// A host as its agent calls it; unique in the fleet.
    HostName
);
name_type!(
    /// UUID of a guest, lower case with dashes, as libvirt prints it.
    GuestId
);

/// Fencing number of a guest's primaryship. Every promotion gets a higher one than was ever used for that guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub u64);

impl Term {
    /// The next higher term. At one promotion a microsecond it lasts half a million years, so it saturates.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of an epoch within a term; 0: none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A point on the caller's monotonic clock, microseconds from any origin.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    pub fn from_us(us: u64) -> Self {
        Self(us)
    }
    pub fn from_ms(ms: u64) -> Self {
        Self(ms.saturating_mul(1_000))
    }
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000)))
    }
    /// Microseconds since `earlier`; 0 if that is later.
    pub fn us_since(self, earlier: Moment) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
    /// Whole milliseconds since `earlier`; 0 if that is later.
    pub fn ms_since(self, earlier: Moment) -> u64 {
        self.us_since(earlier) / 1_000
    }
}

/// How much of its past each shadow of a guest keeps, to go back to. All zero: nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keep {
    /// Most epochs besides the newest; 0: any number.
    pub epochs: u64,
    /// Age of the oldest, milliseconds; 0: any.
    pub age_ms: u64,
    /// Most memory on the shadow's host, MiB.
    pub mib: u64,
}

/// What protecting a guest may cost. 0 is no limit; without any the guest is cut at its fixed interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Share of the guest's time that pauses may take, in thousandths.
    pub pause_permille: u32,
    /// Towards each shadow, kilobits a second.
    pub wire_kbit: u64,
    /// Of the processors of the primary's host, hundredths of one.
    pub cpu_percent: u32,
}

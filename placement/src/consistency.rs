//! What a client may rely on after a failover; kept with a guest's plan, acted on by its primary's agent.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The most shadows a quorum can name: more than any guest has.
const MAX_QUORUM: u32 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Consistency {
    pub mode: ConsistencyMode,
    /// With `output-commit`: how many shadows must have an epoch before its output leaves.
    pub quorum: Quorum,
    /// With `output-commit`: what goes first when those cannot be had.
    pub on_loss: OnLoss,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsistencyMode {
    /// A failover loses at most the lag.
    #[default]
    Async,
    /// Nothing a client was told is lost by a failover.
    OutputCommit,
}

/// Written `any`, `all` or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Quorum {
    #[default]
    Any,
    /// Every shadow that is wanted.
    All,
    Count(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnLoss {
    /// Output leaves all the same, and the operator is told.
    #[default]
    Availability,
    /// The guest is cut off from the network until the quorum is back.
    Consistency,
}

impl Consistency {
    pub fn is_output_commit(&self) -> bool {
        self.mode == ConsistencyMode::OutputCommit
    }
}

impl FromStr for Quorum {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse::<u32>()) {
            ("any", _) => Ok(Self::Any),
            ("all", _) => Ok(Self::All),
            (_, Ok(count)) if (1..=MAX_QUORUM).contains(&count) => Ok(Self::Count(count)),
            _ => Err(format!("quorum {text:?}: must be any, all, or a number from 1 to {MAX_QUORUM}")),
        }
    }
}

impl TryFrom<String> for Quorum {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Quorum> for String {
    fn from(quorum: Quorum) -> Self {
        quorum.to_string()
    }
}

impl fmt::Display for Quorum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::All => f.write_str("all"),
            Self::Count(count) => count.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quorums_are_read_as_they_are_written() {
        for quorum in [Quorum::Any, Quorum::All, Quorum::Count(3)] {
            assert_eq!(quorum.to_string().parse(), Ok(quorum));
        }
        for bad in ["", "0", "9", "most", "-1", "99999999999"] {
            assert!(bad.parse::<Quorum>().unwrap_err().contains("any, all"), "{bad}");
        }
    }

    #[test]
    fn plans_that_were_saved_before_there_was_a_choice_are_async() {
        let read = |json: &str| serde_json::from_str::<Consistency>(json).unwrap();
        assert_eq!(read("{}"), Consistency::default());
        let strict = read(r#"{"mode":"output-commit","quorum":"2","on_loss":"consistency"}"#);
        assert!(strict.is_output_commit() && strict.quorum == Quorum::Count(2));
    }
}

//! TOML read by hand, so that every refusal has its line.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Why a file is not taken: the line, counted from 1, and the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct FileError {
    pub line: usize,
    pub reason: String,
}

/// Most of a file that is read.
const MAX_BYTES: usize = 16 << 20;
/// Longest name.
const MAX_NAME: usize = 128;

pub(super) struct Document<'i> {
    text: &'i str,
    table: Spanned<DeTable<'i>>,
}

/// A table of a document, and where it begins.
#[derive(Clone, Copy)]
pub(super) struct Table<'d> {
    text: &'d str,
    table: &'d DeTable<'d>,
    at: usize,
}

fn error(text: &str, at: usize, reason: impl Into<String>) -> FileError {
    let line = 1 + text.as_bytes()[..at.min(text.len())].iter().filter(|&&byte| byte == b'\n').count();
    FileError { line, reason: reason.into() }
}

impl<'i> Document<'i> {
    pub(super) fn parse(text: &'i str) -> Result<Self, FileError> {
        if text.len() > MAX_BYTES {
            return Err(error(text, 0, format!("{} bytes; at most {MAX_BYTES} are read", text.len())));
        }
        let table = DeTable::parse(text)
            .map_err(|bad| error(text, bad.span().map_or(0, |span: Range<usize>| span.start), bad.message()))?;
        Ok(Self { text, table })
    }

    pub(super) fn root(&self) -> Table<'_> {
        Table { text: self.text, table: self.table.get_ref(), at: 0 }
    }
}

impl<'d> Table<'d> {
    /// Refuses the table as a whole.
    pub(super) fn refuse(&self, reason: impl Into<String>) -> FileError {
        error(self.text, self.at, reason)
    }

    /// Refuses what `key` says.
    pub(super) fn refuse_key(&self, key: &str, reason: impl Into<String>) -> FileError {
        let at = self.table.get(key).map_or(self.at, |value| value.span().start);
        error(self.text, at, format!("{key}: {}", reason.into()))
    }

    /// Refuses keys that mean nothing here: they are typing errors.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), FileError> {
        for key in self.table.keys() {
            let name: &str = key.get_ref();
            if !known.contains(&name) {
                let reason = format!("{name}: no such key here; there are {}", known.join(", "));
                return Err(error(self.text, key.span().start, reason));
            }
        }
        Ok(())
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// The tables of `[[key]]`.
    pub(super) fn tables(&self, key: &str) -> Result<Vec<Table<'d>>, FileError> {
        let Some(value) = self.table.get(key) else { return Ok(Vec::new()) };
        let Some(items) = value.get_ref().as_array() else {
            return Err(self.refuse_key(key, format!("has to be written as [[{key}]]")));
        };
        let table = |item: &'d Spanned<DeValue<'d>>| match item.get_ref().as_table() {
            Some(table) => Ok(Table { text: self.text, table, at: item.span().start }),
            None => Err(self.refuse_key(key, format!("has to be written as [[{key}]]"))),
        };
        items.iter().map(table).collect()
    }

    pub(super) fn name(&self, key: &str) -> Result<String, FileError> {
        self.optional_name(key)?.ok_or_else(|| self.refuse(format!("{key} is missing")))
    }

    pub(super) fn optional_name(&self, key: &str) -> Result<Option<String>, FileError> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        self.a_name(key, value).map(Some)
    }

    fn a_name(&self, key: &str, value: &Spanned<DeValue<'_>>) -> Result<String, FileError> {
        let at = value.span().start;
        let Some(name) = value.get_ref().as_str() else {
            let kind = value.get_ref().type_str();
            return Err(error(self.text, at, format!("{key}: has to be a text, not {kind}")));
        };
        let usable = !name.is_empty() && name.len() <= MAX_NAME && !name.chars().any(char::is_control);
        if !usable || name.trim() != name {
            let reason = format!("{key}: {name:?} is no name: 1 to {MAX_NAME} characters, no blanks around them");
            return Err(error(self.text, at, reason));
        }
        Ok(name.to_owned())
    }

    /// A text, or a list of them.
    pub(super) fn names(&self, key: &str) -> Result<Option<Vec<String>>, FileError> {
        self.one_or_more(key, |table, value| table.a_name(key, value))
    }

    pub(super) fn integer(&self, key: &str, allowed: Range<i64>) -> Result<Option<i64>, FileError> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        self.an_integer(key, value, &allowed).map(Some)
    }

    /// A number, or a list of them.
    pub(super) fn integers(&self, key: &str, allowed: Range<i64>) -> Result<Option<Vec<i64>>, FileError> {
        self.one_or_more(key, |table, value| table.an_integer(key, value, &allowed))
    }

    fn an_integer(&self, key: &str, value: &Spanned<DeValue<'_>>, allowed: &Range<i64>) -> Result<i64, FileError> {
        let at = value.span().start;
        let number = value.get_ref().as_integer();
        let Some(number) = number.and_then(|number| i64::from_str_radix(number.as_str(), number.radix()).ok()) else {
            let kind = value.get_ref().type_str();
            return Err(error(self.text, at, format!("{key}: has to be a whole number, not {kind}")));
        };
        if !allowed.contains(&number) {
            let (low, high) = (allowed.start, allowed.end - 1);
            return Err(error(self.text, at, format!("{key}: {number} is outside {low} to {high}")));
        }
        Ok(number)
    }

    fn one_or_more<T>(
        &self,
        key: &str,
        read: impl Fn(&Self, &Spanned<DeValue<'_>>) -> Result<T, FileError>,
    ) -> Result<Option<Vec<T>>, FileError> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        match value.get_ref().as_array() {
            Some(items) => items.iter().map(|item| read(self, item)).collect::<Result<_, _>>().map(Some),
            None => Ok(Some(vec![read(self, value)?])),
        }
    }
}

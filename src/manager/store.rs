//! The manager's memory: one SQLite file, written before anything is said.
//!
//! ```text
//! hosts       who there is                        guests   the plan of each, as JSON, with its key figures as columns
//! promotions  (guest, term) -> host, once         events   what happened, the newest MAX_EVENTS
//! forgotten   guests disabled, with their last term
//! ```
//! `synchronous=FULL` and one transaction per step. The table of promotions repeats, in a form that the database
//! enforces, what [`placement::guardian`] promises: a term is given to one host.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use placement::guardian::{
    Failover, FailoverStep, GuestPlan, HostIntro, Level, Note, Phase, Save, Switchover, SwitchoverStep,
};
use placement::{GuestId, Term};
use rusqlite::{Connection, OptionalExtension, Transaction, params};

use serde_json::Value;

use crate::api::types::EventView;

/// Grows with every change of the tables.
const SCHEMA_VERSION: i64 = 1;
/// How long a manager that is just ending may hold the file, milliseconds.
const BUSY_TIMEOUT_MS: u32 = 2_000;
/// Events kept.
const MAX_EVENTS: i64 = 10_000;
/// Disabled guests remembered.
const MAX_FORGOTTEN: i64 = 10_000;
/// The oldest are removed once in so many.
const PRUNE_EVERY: i64 = 256;

const SCHEMA: &str = "
    CREATE TABLE hosts (
        name TEXT PRIMARY KEY, rack TEXT NOT NULL, probe_addr TEXT NOT NULL, sync_addr TEXT NOT NULL
    ) STRICT;
    CREATE TABLE guests (
        uuid TEXT PRIMARY KEY, domain TEXT NOT NULL, term INTEGER NOT NULL, primary_host TEXT NOT NULL,
        document TEXT NOT NULL
    ) STRICT;
    CREATE TABLE promotions (
        uuid TEXT NOT NULL, term INTEGER NOT NULL, host TEXT NOT NULL, time_ms INTEGER NOT NULL,
        PRIMARY KEY (uuid, term)
    ) STRICT;
    CREATE TABLE forgotten (
        uuid TEXT PRIMARY KEY, term INTEGER NOT NULL, time_ms INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, time_ms INTEGER NOT NULL, level TEXT NOT NULL, kind TEXT NOT NULL,
        domain TEXT, host TEXT, message TEXT NOT NULL, figures TEXT NOT NULL
    ) STRICT;
";

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{path}: {source}")]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} has version {found} of its tables, this program knows {SCHEMA_VERSION}; use a matching virtshadowd"
    )]
    Version { path: PathBuf, found: i64 },
    #[error("{path}: {what} cannot be read: {detail}")]
    Corrupt { path: PathBuf, what: String, detail: String },
    /// An alarm: the state machine broke its promise, or the file was changed by another hand.
    #[error("guest {uuid}: term {term} was given to {first} and must not be given to {second}")]
    TermGivenTwice { uuid: String, term: u64, first: String, second: String },
    #[error("guest {uuid}: term {term} must not go back")]
    TermGoesBack { uuid: String, term: u64 },
}

pub struct Store {
    path: PathBuf,
    db: Connection,
}

impl Store {
    /// Opens or makes the file. It stays locked, so that no second manager uses it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let io = |source| StoreError::Io { path: path.into(), source };
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(io)?;
        }
        let sqlite = |source| StoreError::Sqlite { path: path.into(), source };
        let db = Connection::open(path).map_err(sqlite)?;
        // As a pragma: the method of that name needs a newer SQLite than Debian 12 has.
        db.pragma_update(None, "busy_timeout", BUSY_TIMEOUT_MS).map_err(sqlite)?;
        // Before WAL, so that its index lives in memory and the lock is held from here on.
        db.pragma_update(None, "locking_mode", "EXCLUSIVE").map_err(sqlite)?;
        db.pragma_update(None, "journal_mode", "WAL").map_err(sqlite)?;
        db.pragma_update(None, "synchronous", "FULL").map_err(sqlite)?;
        let mut store = Self { path: path.into(), db };
        store.migrate()?;
        Ok(store)
    }

    fn migrate(&mut self) -> Result<(), StoreError> {
        let path = self.path.clone();
        let sqlite = |source| StoreError::Sqlite { path: path.clone(), source };
        let found: i64 = self.db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(sqlite)?;
        match found {
            SCHEMA_VERSION => Ok(()),
            0 => {
                let new = self.db.transaction().map_err(sqlite)?;
                new.execute_batch(SCHEMA).map_err(sqlite)?;
                new.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(sqlite)?;
                new.commit().map_err(sqlite)
            }
            found => Err(StoreError::Version { path, found }),
        }
    }

    fn sqlite(&self, source: rusqlite::Error) -> StoreError {
        StoreError::Sqlite { path: self.path.clone(), source }
    }

    fn corrupt(&self, what: String, detail: impl ToString) -> StoreError {
        StoreError::Corrupt { path: self.path.clone(), what, detail: detail.to_string() }
    }

    pub fn hosts(&self) -> Result<Vec<HostIntro>, StoreError> {
        let rows = self.rows("SELECT name, rack, probe_addr, sync_addr FROM hosts ORDER BY name", |row| {
            Ok((row.get::<_, String>(0)?, row.get(1)?, row.get::<_, String>(2)?, row.get::<_, String>(3)?))
        })?;
        let addr = |name: &str, text: &str| {
            text.parse().map_err(|error| self.corrupt(format!("address {text:?} of host {name}"), error))
        };
        rows.into_iter()
            .map(|(name, rack, probe, sync)| {
                let (probe_addr, sync_addr) = (addr(&name, &probe)?, addr(&name, &sync)?);
                Ok(HostIntro { name: name.into(), rack, probe_addr, sync_addr })
            })
            .collect()
    }

    pub fn guests(&self) -> Result<Vec<GuestPlan>, StoreError> {
        let rows = self.rows("SELECT uuid, document FROM guests ORDER BY uuid", |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
        })?;
        rows.into_iter()
            .map(|(uuid, text)| {
                serde_json::from_str(&text).map_err(|error| self.corrupt(format!("guest {uuid}"), error))
            })
            .collect()
    }

    pub fn forgotten(&self) -> Result<Vec<(GuestId, Term)>, StoreError> {
        self.rows("SELECT uuid, term FROM forgotten ORDER BY uuid", |row| {
            Ok((row.get::<_, String>(0)?.into(), Term(row.get::<_, i64>(1)? as u64)))
        })
    }

    fn rows<T>(
        &self,
        sql: &str,
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let read_all = || self.db.prepare(sql)?.query_map([], read)?.collect::<rusqlite::Result<Vec<T>>>();
        read_all().map_err(|error| self.sqlite(error))
    }

    /// Writes a step, whole or not at all; it is durable when this returns. -> number of the newest event
    pub fn save(&mut self, changes: &[Save]) -> Result<u64, StoreError> {
        let path = self.path.clone();
        let sqlite = |source| StoreError::Sqlite { path: path.clone(), source };
        let step = self.db.transaction().map_err(sqlite)?;
        for change in changes {
            match change {
                Save::Host(intro) => save_host(&step, intro).map_err(sqlite)?,
                Save::Guest(plan) => save_guest(&step, plan, &path)?,
                Save::ForgetGuest { guest, term } => forget_guest(&step, guest.as_str(), term.0).map_err(sqlite)?,
                Save::Note(note) => save_note(&step, note).map_err(sqlite)?,
            }
        }
        let newest = newest_event(&step).map_err(sqlite)?;
        step.commit().map_err(sqlite)?;
        Ok(newest as u64)
    }

    pub fn newest_event(&self) -> Result<u64, StoreError> {
        newest_event(&self.db).map(|seq| seq as u64).map_err(|error| self.sqlite(error))
    }

    /// At most `limit` events after `since`, oldest first.
    pub fn events(&self, since: u64, limit: u32) -> Result<Vec<EventView>, StoreError> {
        let read = || {
            self.db
                .prepare(
                    "SELECT seq, time_ms, level, kind, domain, host, message, figures FROM events WHERE seq > ?1
                     ORDER BY seq LIMIT ?2",
                )?
                .query_map(params![as_i64(since), limit], |row| {
                    Ok(EventView {
                        seq: row.get::<_, i64>(0)? as u64,
                        time_ms: row.get::<_, i64>(1)? as u64,
                        level: row.get(2)?,
                        kind: row.get(3)?,
                        domain: row.get(4)?,
                        host: row.get(5)?,
                        message: row.get(6)?,
                        figures: serde_json::from_str(&row.get::<_, String>(7)?).unwrap_or_default(),
                    })
                })?
                .collect::<rusqlite::Result<Vec<_>>>()
        };
        read().map_err(|error| self.sqlite(error))
    }
}

fn newest_event(db: &Connection) -> rusqlite::Result<i64> {
    db.query_row("SELECT ifnull(max(seq), 0) FROM events", [], |row| row.get(0))
}

fn forget_guest(step: &Transaction<'_>, uuid: &str, term: u64) -> rusqlite::Result<()> {
    step.execute("DELETE FROM guests WHERE uuid = ?1", [uuid])?;
    step.execute("DELETE FROM promotions WHERE uuid = ?1", [uuid])?;
    step.execute(
        "INSERT OR REPLACE INTO forgotten (uuid, term, time_ms) VALUES (?1, ?2, ?3)",
        params![uuid, as_i64(term), now_ms()],
    )?;
    step.execute(
        "DELETE FROM forgotten WHERE uuid IN (SELECT uuid FROM forgotten ORDER BY time_ms DESC LIMIT -1 OFFSET ?1)",
        [MAX_FORGOTTEN],
    )?;
    Ok(())
}

fn save_host(step: &Transaction<'_>, host: &HostIntro) -> rusqlite::Result<()> {
    let (probe, sync) = (host.probe_addr.to_string(), host.sync_addr.to_string());
    step.prepare("INSERT OR REPLACE INTO hosts (name, rack, probe_addr, sync_addr) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![host.name.as_str(), host.rack, probe, sync])?;
    Ok(())
}

fn save_guest(step: &Transaction<'_>, plan: &GuestPlan, path: &Path) -> Result<(), StoreError> {
    let sqlite = |source| StoreError::Sqlite { path: path.into(), source };
    let (uuid, term) = (plan.id.as_str(), as_i64(plan.term.0));
    let former: Option<i64> = step
        .query_row("SELECT term FROM guests WHERE uuid = ?1", [uuid], |row| row.get(0))
        .optional()
        .map_err(sqlite)?;
    if former.is_some_and(|former| former > term) {
        return Err(StoreError::TermGoesBack { uuid: uuid.into(), term: plan.term.0 });
    }
    if let Some(host) = promoted(plan) {
        let given: Option<String> = step
            .query_row("SELECT host FROM promotions WHERE uuid = ?1 AND term = ?2", params![uuid, term], |row| {
                row.get(0)
            })
            .optional()
            .map_err(sqlite)?;
        match given {
            Some(first) if first == host => (),
            Some(first) => {
                let second = host.into();
                return Err(StoreError::TermGivenTwice { uuid: uuid.into(), term: plan.term.0, first, second });
            }
            None => {
                step.execute(
                    "INSERT INTO promotions (uuid, term, host, time_ms) VALUES (?1, ?2, ?3, ?4)",
                    params![uuid, term, host, now_ms()],
                )
                .map_err(sqlite)?;
            }
        }
    }
    let document = serde_json::to_string(plan).map_err(|error| StoreError::Corrupt {
        path: path.into(),
        what: format!("guest {uuid}"),
        detail: error.to_string(),
    })?;
    step.prepare(
        "INSERT OR REPLACE INTO guests (uuid, domain, term, primary_host, document) VALUES (?1, ?2, ?3, ?4, ?5)",
    )
    .and_then(|mut sql| sql.execute(params![uuid, plan.domain, term, plan.primary.as_str(), document]))
    .map_err(sqlite)?;
    Ok(())
}

/// The host that `plan` orders to become primary with its term.
fn promoted(plan: &GuestPlan) -> Option<&str> {
    match &plan.phase {
        Phase::FailingOver(Failover { step: FailoverStep::Promote { to, .. }, .. })
        | Phase::SwitchingOver(Switchover { to, step: SwitchoverStep::Promote { .. } }) => Some(to.as_str()),
        _ => None,
    }
}

fn save_note(step: &Transaction<'_>, note: &Note) -> rusqlite::Result<()> {
    let level = match note.level {
        Level::Info => "info",
        Level::Warning => "warning",
        Level::Alarm => "alarm",
    };
    let host = note.host.as_ref().map(|host| host.as_str());
    let figures: serde_json::Map<String, Value> =
        note.figures.iter().map(|(name, value)| ((*name).to_owned(), Value::from(*value))).collect();
    let figures = Value::from(figures).to_string();
    step.prepare(
        "INSERT INTO events (time_ms, level, kind, domain, host, message, figures)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?
    .execute(params![now_ms(), level, note.kind, note.domain, host, note.message, figures])?;
    let seq = step.last_insert_rowid();
    if seq % PRUNE_EVERY == 0 {
        step.execute("DELETE FROM events WHERE seq <= ?1", [seq - MAX_EVENTS])?;
    }
    Ok(())
}

fn now_ms() -> i64 {
    // A clock before 1970 gives 0: events stay in order by their number.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

fn as_i64(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

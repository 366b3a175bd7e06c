//! The database: what is written is read back, and what must not be written is not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use placement::guardian::{
    Failover, FailoverStep, GuestPlan, HostIntro, Leave, Level, Note, Phase, Save, Switchover, SwitchoverStep,
};
use placement::{Epoch, HostName, Term};

use super::store::{Store, StoreError};

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("virt-shadow-store-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        Self(dir)
    }
    fn file(&self) -> PathBuf {
        self.0.join("deeper").join("manager.sqlite")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn plan(term: u64, phase: Phase) -> GuestPlan {
    GuestPlan {
        id: "0d8f9bd2-0000-4000-8000-000000000001".into(),
        domain: "web".into(),
        term: Term(term),
        primary: "h1".into(),
        shadows_wanted: 2,
        interval_ms: 50,
        budget: Default::default(),
        mirror_mib: 256,
        consistency: Default::default(),
        keep: Default::default(),
        memory_mib: 1024,
        needs: Default::default(),
        policy: "shadows = 2\ngroup = \"web\"\n".to_owned().try_into().unwrap(),
        order: vec!["h3".into(), "h2".into()],
        going: BTreeSet::from(["h2".into()]),
        home: None,
        on: vec!["h3".into()],
        seats: BTreeSet::from(["h2".into(), "h3".into()]),
        former: BTreeMap::from([("h4".into(), Leave::Retire)]),
        phase,
    }
}

fn promoting(term: u64, to: &str) -> GuestPlan {
    let step = FailoverStep::Promote { to: to.into(), after_epoch: Epoch(7) };
    let tried = BTreeMap::from([(HostName::from("h3"), "no memory".to_owned())]);
    let failover = Failover { cause: "down".into(), only_to: None, back_to: None, last_epoch: Epoch(9), tried, step };
    plan(term, Phase::FailingOver(failover))
}

fn note(text: &str) -> Save {
    let (kind, domain, host) = ("test".into(), Some("web".into()), None);
    Save::Note(Note { level: Level::Warning, kind, domain, host, message: text.into(), figures: vec![("n", 1)] })
}

#[test]
fn every_phase_is_read_back_as_it_was() {
    let dir = Dir::new("phases");
    let to = HostName::from("h2");
    let steps = [
        SwitchoverStep::Cut,
        SwitchoverStep::Promote { epoch: Epoch(3) },
        SwitchoverStep::Undo { reason: "no".into() },
    ];
    let mut plans = vec![plan(1, Phase::Steady), plan(1, Phase::Stopped { how: "saved".into() }), promoting(2, "h2")];
    plans.extend(steps.map(|step| plan(3, Phase::SwitchingOver(Switchover { to: to.clone(), step }))));
    plans.extend([plan(3, Phase::Lost { reason: "all down".into() }), plan(3, Phase::Leaving)]);
    let addr = "[fd00::1]:7710".parse().unwrap();
    let host = HostIntro { name: to.clone(), rack: "r1".into(), probe_addr: addr, sync_addr: addr };
    for plan in plans {
        let mut store = Store::open(&dir.file()).unwrap();
        store.save(&[Save::Host(host.clone()), Save::Guest(plan.clone())]).unwrap();
        drop(store);
        let store = Store::open(&dir.file()).unwrap();
        assert_eq!((store.guests().unwrap(), store.hosts().unwrap()), (vec![plan], vec![host.clone()]));
    }
    let mut store = Store::open(&dir.file()).unwrap();
    let guest = plan(3, Phase::Leaving).id;
    store.save(&[Save::ForgetGuest { guest: guest.clone(), term: Term(3) }]).unwrap();
    assert_eq!((store.guests().unwrap(), store.forgotten().unwrap()), (vec![], vec![(guest, Term(3))]));
}

#[test]
fn the_file_itself_refuses_a_term_for_two_hosts_and_a_step_is_whole_or_nothing() {
    let dir = Dir::new("terms");
    let mut store = Store::open(&dir.file()).unwrap();
    store.save(&[Save::Guest(promoting(2, "h2"))]).unwrap();
    store.save(&[Save::Guest(promoting(2, "h2"))]).unwrap();
    let newest = store.newest_event().unwrap();
    let error = store.save(&[note("must not stay"), Save::Guest(promoting(2, "h3"))]).unwrap_err();
    assert!(
        matches!(&error, StoreError::TermGivenTwice { term: 2, first, second, .. } if first == "h2" && second == "h3")
    );
    let error = store.save(&[Save::Guest(plan(1, Phase::Steady))]).unwrap_err();
    assert!(matches!(error, StoreError::TermGoesBack { term: 1, .. }), "{error}");
    assert_eq!((store.newest_event().unwrap(), store.guests().unwrap()), (newest, vec![promoting(2, "h2")]));
    store.save(&[Save::Guest(promoting(3, "h3"))]).unwrap();
}

#[test]
fn events_are_numbered_and_bounded() {
    let dir = Dir::new("events");
    let mut store = Store::open(&dir.file()).unwrap();
    assert_eq!(store.save(&[note("one"), note("two")]).unwrap(), 2);
    let events = store.events(1, 10).unwrap();
    assert_eq!((events.len(), events[0].message.as_str(), events[0].level.as_str()), (1, "two", "warning"));
    let many: Vec<_> = (0..11_000).map(|n| note(&n.to_string())).collect();
    assert_eq!(store.save(&many).unwrap(), 11_002);
    let oldest = store.events(0, 1).unwrap()[0].seq;
    assert!(11_003 - oldest <= 10_000 + 256 && oldest < 1_003, "{oldest}");
    assert_eq!(store.events(u64::MAX, 10).unwrap().len(), 0);
}

#[test]
fn a_second_manager_and_an_unknown_version_are_kept_out() {
    let dir = Dir::new("locked");
    let store = Store::open(&dir.file()).unwrap();
    assert!(matches!(Store::open(&dir.file()), Err(StoreError::Sqlite { .. })));
    drop(store);
    let db = rusqlite::Connection::open(dir.file()).unwrap();
    db.pragma_update(None, "user_version", 99).unwrap();
    drop(db);
    let error = Store::open(&dir.file()).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("version 99") && error.contains("manager.sqlite"), "{error}");
    std::fs::write(dir.file(), b"no database, but long enough to look at it twice").unwrap();
    assert!(Store::open(&dir.file()).is_err());
}

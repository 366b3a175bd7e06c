//! Databases on a guest's disks, clients outside, and power cuts of the host at random moments: Redis with
//! `appendfsync always`, PostgreSQL under pgbench, with either consistency.
//!
//! `ROUNDS` sets how often the power is cut in each mode (1), `SEED` when; `MODE` (`async`, `output-commit`) leaves the other
//! one out. Downloads packages the first time.

mod database;
mod support;

use std::process::Stdio;
use std::time::{Duration, Instant};

use database::postgres::Postgres;
use database::redis::Redis;
use database::{Clients, Loss, Site, rounds};
use support::{Random, one_lab};
use virt_shadow::api::types::ConsistencyMode::{self, Async, OutputCommit};
use virt_shadow::lab::Software;

/// What is done with a database.
struct Kind {
    software: Software,
    disks: &'static [&'static str],
    connections: usize,
    /// Done once.
    prepare: fn(&Site),
    /// Writes numbers, and tells when they are acknowledged, until it is to stop.
    client: fn(&Site, &Clients, usize, ConsistencyMode),
    /// Other load beside the clients.
    load: fn(&Site) -> Option<Load>,
    /// The newest number of each client, as the running database has it.
    in_memory: fn(&Site) -> Vec<u64>,
    /// The same as the disks of this moment have it, after everything on them was checked.
    on_disk: fn(&Site) -> Vec<u64>,
}

/// Ends the clients whatever happens, or they would be waited for.
struct StopOnDrop<'a>(&'a Clients);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// What all rounds of a test came to.
#[derive(Default)]
struct Tally {
    lost: u64,
    longest_loss: Duration,
    longest_lag: Duration,
    over_lag_before: u32,
}

impl Tally {
    /// Compares what each client was told with what the database has.
    fn count(&mut self, what: &str, clients: &Clients, loss: &Loss, found: &[u64]) {
        let (mut lost, mut ago) = (0, Duration::ZERO);
        for (client, found) in found.iter().enumerate() {
            let (more, since) = clients.of(client).found(*found, loss.cut);
            (lost, ago) = (lost + more, ago.max(since));
        }
        let (before, shown) = (loss.lag_before, loss.lag_shown);
        println!(
            "{what}: {} -> {}; {} writes acknowledged so far, {lost} lost now, the first {} ms before the cut; lag shown: {} \
             ms before it, {} ms at last; longest wait before: {} ms",
            loss.from,
            loss.to,
            clients.acknowledged(),
            ago.as_millis(),
            before.as_millis(),
            shown.as_millis(),
            loss.waited.as_millis()
        );
        assert!(ago <= shown, "{what}: lost {} ms, lag shown {} ms", ago.as_millis(), shown.as_millis());
        self.lost += lost;
        self.over_lag_before += u32::from(ago > before);
        (self.longest_loss, self.longest_lag) = (self.longest_loss.max(ago), self.longest_lag.max(shown));
    }
}

fn name_of(mode: ConsistencyMode) -> &'static str {
    if mode == Async { "async" } else { "output-commit" }
}

/// What the database has once it has answered what its former clients asked.
fn settled(kind: &Kind, site: &Site) -> Vec<u64> {
    let mut found = (kind.in_memory)(site);
    loop {
        std::thread::sleep(Duration::from_millis(300));
        let again = (kind.in_memory)(site);
        if again == found {
            return found;
        }
        found = again;
    }
}

/// Both modes one after the other, or the one that `MODE` names.
fn over_power_cuts(kind: &Kind) {
    let _one_lab = one_lab();
    let mut random = Random::from_env();
    let site = Site::raise(kind.software, kind.disks);
    (kind.prepare)(&site);
    let clients = Clients::new(kind.connections);
    let wanted = std::env::var("MODE").ok();
    for mode in
        [Async, OutputCommit].into_iter().filter(|mode| wanted.as_ref().is_none_or(|name| name == name_of(*mode)))
    {
        site.protect(mode);
        let (what, mut tally) = (format!("{}, {}", kind.software, name_of(mode)), Tally::default());
        let before = clients.acknowledged();
        for round in 0..rounds() {
            site.wait_kept(mode);
            clients.restart();
            one_round(kind, &site, &clients, mode, &mut random, &mut tally, &format!("{what}, round {round}"));
        }
        println!(
            "{what}: {} power cuts, {} writes acknowledged, {} lost; longest loss {} ms, largest lag shown {} ms ({} losses \
             longer than what was shown last before the cut); all file systems clean",
            rounds(),
            clients.acknowledged() - before,
            tally.lost,
            tally.longest_loss.as_millis(),
            tally.longest_lag.as_millis(),
            tally.over_lag_before
        );
    }
    let report = site.bed.watch.report();
    assert_eq!((report.boots.len(), report.guest_errors), (1, 0), "{report:?}");
}

fn one_round(
    kind: &Kind,
    site: &Site,
    clients: &Clients,
    mode: ConsistencyMode,
    random: &mut Random,
    tally: &mut Tally,
    what: &str,
) {
    let loss = std::thread::scope(|scope| {
        let _stop = StopOnDrop(clients);
        for client in 0..kind.connections {
            scope.spawn(move || (kind.client)(site, clients, client, mode));
        }
        let load = (kind.load)(site);
        let loss = site.lose_host(random, clients);
        if mode == OutputCommit {
            // All connections live on, over the failover and until the guest is protected again.
            site.give_power_back(&loss.from);
            site.wait_kept(mode);
            if let Some(load) = load {
                load.lost_nothing(site);
            }
            clients.while_paused(|| {
                let found = (kind.in_memory)(site);
                let told: Vec<u64> = (0..kind.connections).map(|client| clients.of(client).number).collect();
                assert_eq!(found, told, "{what}: not what clients were told");
                tally.count(what, clients, &loss, &found);
                assert_eq!((kind.on_disk)(site), found, "{what}: memory and disks are of different moments");
            });
        }
        loss
    });
    if mode == Async {
        let found = settled(kind, site);
        tally.count(what, clients, &loss, &found);
        let on_disk = (kind.on_disk)(site);
        let later = (kind.in_memory)(site);
        let between =
            found.iter().zip(&on_disk).zip(&later).all(|((found, disk), later)| found <= disk && disk <= later);
        assert!(between, "{what}: memory and disks are of different moments: {found:?}, {on_disk:?}, {later:?}");
        clients.begin_at(&later);
        site.give_power_back(&loss.from);
        site.wait_kept(mode);
    }
    let silence = site.bed.watch.longest_silence(loss.cut, Instant::now());
    println!(
        "{what}: the guest's longest silence from the cut until it was protected again: {} ms",
        silence.as_millis()
    );
}

// --- Redis

const REDIS: Kind = Kind {
    software: Software::Redis,
    disks: &["512"],
    connections: 50,
    prepare: |_| (),
    client: count_in_redis,
    load: |_| None,
    in_memory: |site| {
        let mut redis = Redis::connect(site);
        redis_numbers(|key| redis.number(&format!("GET {key}")).unwrap())
    },
    on_disk: redis_on_disk,
};

fn count_in_redis(site: &Site, clients: &Clients, client: usize, mode: ConsistencyMode) {
    let mut redis = Redis::connect(site);
    clients.connected(redis.socket());
    // The last round may have ended between the two.
    let begun = clients.of(client).number;
    if begun > 0 {
        redis.ask(&format!("SET told:value:{client} {begun}")).unwrap();
    }
    while clients.go_on() {
        let asked = Instant::now();
        let next = clients.of(client).number + 1;
        let answers = redis.number(&format!("INCR told:count:{client}")).and_then(|number| {
            assert_eq!(number, next, "client {client}: an acknowledged write is lost on a living connection");
            clients.tell(client, number, asked);
            redis.ask(&format!("SET told:value:{client} {number}"))
        });
        match answers {
            Ok(answer) => assert_eq!(answer.as_deref(), Some("OK")),
            Err(error) if mode == OutputCommit && !clients.stopped() => {
                panic!("client {client}: its connection is lost: {error}")
            }
            // What it was told may be undone now.
            Err(_) => return,
        }
    }
}

/// The counters of all clients; a value is its counter's or, of a client that was stopped in between, the one before.
fn redis_numbers(mut number: impl FnMut(&str) -> u64) -> Vec<u64> {
    let read = |client| {
        let (count, value) = (number(&format!("told:count:{client}")), number(&format!("told:value:{client}")));
        assert!(value == count || value + 1 == count, "client {client}: counted to {count}, wrote {value}");
        count
    };
    (0..REDIS.connections).map(read).collect()
}

/// A log that needs no repair, and is loaded without.
fn redis_on_disk(site: &Site) -> Vec<u64> {
    let work = site.look_at_disks(&["/redis"]);
    let keys: String = (0..REDIS.connections).map(|n| format!(" told:count:{n} told:value:{n}")).collect();
    let script = format!(
        "set -eu; cp -r /work/vda.files/redis /tmp/redis; cd /tmp/redis
         redis-check-aof appendonlydir/appendonly.aof.manifest >/tmp/checked 2>&1 || {{ cat /tmp/checked; exit 1; }}
         redis-server --dir /tmp/redis --appendonly yes --aof-load-truncated no --save '' --port 0 --unixsocket /tmp/s \
           >/tmp/log 2>&1 &
         server=$!
         until [ \"$(redis-cli -s /tmp/s ping 2>/dev/null)\" = PONG ]; do
           kill -0 $server || {{ cat /tmp/log; exit 1; }}; usleep 50000; done
         ! grep -i truncat /tmp/log
         redis-cli -s /tmp/s mget{keys}
         kill $server"
    );
    let answer = site.run_beside(&work, &script);
    let values: Vec<u64> = answer.lines().map(|line| line.trim().parse().unwrap_or(0)).collect();
    assert_eq!(values.len(), 2 * REDIS.connections, "{answer}");
    let mut values = values.into_iter();
    redis_numbers(|_| values.next().unwrap_or(0))
}

#[test]
fn redis_loses_at_most_the_lag_shown_or_nothing() {
    over_power_cuts(&REDIS);
}

// --- PostgreSQL: data on one disk, write-ahead log on another

const POSTGRES: Kind = Kind {
    software: Software::Postgres,
    disks: &["512", "256"],
    connections: 8,
    prepare: |site| {
        let table = "create table told (client int, number bigint, primary key (client, number))";
        postgres(site).ask(table).unwrap();
    },
    client: insert_into_postgres,
    load: |site| Some(Load::start(site)),
    in_memory: |site| postgres_numbers(&postgres(site).ask(NUMBERS).unwrap()),
    on_disk: postgres_on_disk,
};
const NUMBERS: &str = "select client, max(number), count(*) from told group by client order by client";
/// The four are equal in every state that ever was: each transaction adds the same to a row of each.
const SUMS: &str = "select (select coalesce(sum(delta), 0) from pgbench_history), \
                    (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches), \
                    (select sum(abalance) from pgbench_accounts)";

fn postgres(site: &Site) -> Postgres {
    Postgres::connect(site)
}

fn insert_into_postgres(site: &Site, clients: &Clients, client: usize, mode: ConsistencyMode) {
    let mut postgres = postgres(site);
    clients.connected(postgres.socket());
    while clients.go_on() {
        let asked = Instant::now();
        let number = clients.of(client).number + 1;
        match postgres.ask(&format!("insert into told values ({client}, {number})")) {
            Ok(_) => clients.tell(client, number, asked),
            Err(error) if mode == OutputCommit && !clients.stopped() => {
                panic!("client {client}: its connection is lost: {error}")
            }
            Err(error) => {
                // An error that PostgreSQL itself reports is a number that was there: one that had been taken for lost.
                assert_ne!(error.kind(), std::io::ErrorKind::Other, "client {client}, {number}: {error}");
                return;
            }
        }
    }
}

/// None is missing in between.
fn postgres_numbers(rows: &[Vec<String>]) -> Vec<u64> {
    let mut numbers = vec![0; POSTGRES.connections];
    for row in rows {
        let [client, newest, count] = &row[..] else { panic!("{row:?}") };
        assert_eq!(newest, count, "numbers of client {client} are missing");
        numbers[client.parse::<usize>().unwrap()] = newest.parse().unwrap();
    }
    numbers
}

fn assert_sums(sums: &[Vec<String>]) {
    let [history, others @ ..] = &sums[0][..] else { panic!("{sums:?}") };
    assert!(others.len() == 3 && others.iter().all(|sum| sum == history), "history and balances differ: {sums:?}");
}

/// Starts from the disks alone, as after a power cut; then all is checked, indexes against their tables too.
fn postgres_on_disk(site: &Site) -> Vec<u64> {
    assert_sums(&postgres(site).ask(SUMS).unwrap());
    let work = site.look_at_disks(&["/data", "/pg_wal"]);
    let script = format!(
        "set -eu; cp -r /work/vda.files/data /work/vdb.files/pg_wal /tmp; ln -sfn /tmp/pg_wal /tmp/data/pg_wal
         chown -R postgres:postgres /tmp/data /tmp/pg_wal; chmod 700 /tmp/data
         as_owner() {{ su -s /bin/sh postgres -c \"export PATH=$PATH; $1\"; }}
         as_owner \"pg_ctl -D /tmp/data -s -w -t 120 -l /tmp/log -o '-c listen_addresses= -c fsync=off' start\" ||
           {{ cat /tmp/log; exit 1; }}
         if grep -E ' (PANIC|FATAL|ERROR|WARNING): ' /tmp/log | grep -v 'the database system is starting up'; then exit 1; fi
         psql='psql -h /tmp -U postgres -AtqF, bench'
         $psql -c '{NUMBERS}'; echo; $psql -c '{SUMS}'
         pg_amcheck -h /tmp -U postgres --heapallindexed --install-missing bench >&2
         as_owner 'pg_ctl -D /tmp/data -s -m immediate stop'"
    );
    let answer = site.run_beside(&work, &script);
    let rows = |text: &str| text.lines().map(|l| l.split(',').map(str::to_owned).collect()).collect::<Vec<Vec<_>>>();
    let (numbers, sums) = answer.split_once("\n\n").or(answer.split_once('\n')).expect("two answers");
    assert_sums(&rows(sums.trim()));
    postgres_numbers(&rows(numbers))
}

/// It runs for ten seconds.
const LOAD_ENDS_WITHIN: Duration = Duration::from_secs(90);

/// pgbench at the client's place, over the network.
struct Load {
    child: std::process::Child,
    history_before: u64,
}

impl Load {
    fn start(site: &Site) -> Self {
        // Clients of a guest that was taken back are gone. PostgreSQL does not hear of it for two hours, and keeps the locks
        // of the transaction that they were in.
        let gone = "select pg_terminate_backend(pid, 10000) from pg_stat_activity where state = 'idle in transaction'";
        postgres(site).ask(gone).unwrap();
        let history_before = history(site);
        let script = format!("exec pgbench -n -h {} -U postgres -c 4 -T 10 bench", site.bed.guest.ip);
        let mut command = site.lab().at_client_with(Software::Postgres, &std::env::temp_dir(), &script).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Self { child, history_before }
    }

    /// It went on over the failover, and each transaction that it was told to be committed is there.
    fn lost_nothing(mut self, site: &Site) {
        let output = {
            use std::io::Read;
            let began = Instant::now();
            let status = loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    break status;
                }
                if began.elapsed() > LOAD_ENDS_WITHIN {
                    let busy =
                        "select state, wait_event, xact_start, query from pg_stat_activity where state <> 'idle'";
                    panic!("pgbench does not end: {:#?}", postgres(site).ask(busy));
                }
                std::thread::sleep(Duration::from_millis(50));
            };
            let (mut out, mut err) = (String::new(), String::new());
            self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
            self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
            assert!(status.success(), "{out}{err}");
            out
        };
        let line = output.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
        let processed: u64 = line.and_then(|rest| rest.split(['/', ' ']).next()?.parse().ok()).expect(&output);
        let added = history(site) - self.history_before;
        println!("pgbench: {processed} transactions, {added} of them there");
        assert_eq!(added, processed, "{output}");
    }
}

/// Ends it: after a failover that lost something it waits for answers that will not come.
impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn history(site: &Site) -> u64 {
    postgres(site).ask("select count(*) from pgbench_history").unwrap()[0][0].parse().unwrap()
}

#[test]
fn postgres_loses_at_most_the_lag_shown_or_no_commit() {
    over_power_cuts(&POSTGRES);
}

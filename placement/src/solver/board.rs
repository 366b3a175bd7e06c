//! The state of a plan in the making: where each shadow is, and what every host, rack and link carries.
//!
//! [`Board::whole`] gives a view that may do everything. [`Board::zones`] gives one view a zone, to be used side by
//! side: such a view moves shadows within rooms of its zone only, by which nothing changes that another view reads.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::load::{Change, Load};
use super::problem::{NONE, Problem, Shadow, Site, Zone, round_trip_us};
use crate::instance::{HostState, Level};

pub(super) struct Board {
    /// Host of each shadow. Atomic as views of zones share it; none reads what another one's moves decide: a sibling
    /// in another zone is never in the way, wherever it stands there.
    at: Vec<AtomicU32>,
    loads: Vec<Load>,
    rack_in: Vec<i64>,
    rack_out: Vec<i64>,
    host_out: Vec<i64>,
    links: Links,
}

/// What crosses rooms and regions, Mbit/s.
#[derive(Clone, Default)]
pub(super) struct Links {
    pub(super) room_in: Vec<i64>,
    pub(super) room_out: Vec<i64>,
    pub(super) region_in: Vec<i64>,
    pub(super) region_out: Vec<i64>,
}

pub(super) struct View<'a> {
    pub(super) problem: &'a Problem<'a>,
    at: &'a [AtomicU32],
    loads: &'a mut [Load],
    first_host: u32,
    host_out: &'a mut [i64],
    rack_in: &'a mut [i64],
    rack_out: &'a mut [i64],
    first_rack: u32,
    /// None: shadows neither change rooms nor get placed in, or left out of, another room than the primary's.
    links: Option<&'a mut Links>,
    /// Whether prices contain the strain of hosts: see [`super::strain`].
    gentle: bool,
}

impl Board {
    pub(super) fn new(problem: &Problem<'_>) -> Self {
        let instance = problem.instance;
        let loads =
            problem.original.iter().map(|&host| Load::new(&instance.hosts[host as usize], &problem.balance)).collect();
        let (rooms, regions) = (problem.rooms.len(), problem.regions.len());
        let (hosts, racks) = (problem.sites.len(), problem.racks.len());
        let links = Links {
            room_in: vec![0; rooms],
            room_out: vec![0; rooms],
            region_in: vec![0; regions],
            region_out: vec![0; regions],
        };
        let at = problem.shadows.iter().map(|_| AtomicU32::new(NONE)).collect();
        Self { at, loads, rack_in: vec![0; racks], rack_out: vec![0; racks], host_out: vec![0; hosts], links }
    }

    pub(super) fn whole<'a>(&'a mut self, problem: &'a Problem<'a>) -> View<'a> {
        View {
            problem,
            at: &self.at,
            loads: &mut self.loads,
            first_host: 0,
            host_out: &mut self.host_out,
            rack_in: &mut self.rack_in,
            rack_out: &mut self.rack_out,
            first_rack: 0,
            links: Some(&mut self.links),
            gentle: true,
        }
    }

    /// One view for each of `problem.zones`.
    pub(super) fn zones<'a>(&'a mut self, problem: &'a Problem<'a>) -> Vec<View<'a>> {
        let (mut loads, mut host_out) = (Cutter::new(&mut self.loads), Cutter::new(&mut self.host_out));
        let (mut rack_in, mut rack_out) = (Cutter::new(&mut self.rack_in), Cutter::new(&mut self.rack_out));
        let at = &self.at;
        let view = |zone: &Zone| View {
            problem,
            at,
            loads: loads.cut(&zone.hosts),
            first_host: zone.hosts.start,
            host_out: host_out.cut(&zone.hosts),
            rack_in: rack_in.cut(&zone.racks),
            rack_out: rack_out.cut(&zone.racks),
            first_rack: zone.racks.start,
            links: None,
            gentle: true,
        };
        problem.zones.iter().map(view).collect()
    }

    pub(super) fn at(&self, id: u32) -> u32 {
        self.at[id as usize].load(Ordering::Relaxed)
    }

    /// What the plan costs as it is, and how many shadows are nowhere.
    pub(super) fn total(&self, problem: &Problem<'_>) -> (i64, usize) {
        let balance = &problem.balance;
        let hosts: i64 = self.loads.iter().map(|load| load.cost).sum();
        let racks: i64 = self
            .rack_in
            .iter()
            .zip(&problem.racks)
            .map(|(&mbit, rack)| balance.rack * balance.phi(mbit, rack.in_mbit))
            .sum();
        let (mut own, mut unplaced) = (0, 0);
        for (id, shadow) in problem.shadows.iter().enumerate() {
            own += match self.at(id as u32) {
                NONE => {
                    unplaced += 1;
                    View::left_out(shadow)
                }
                host => own_cost(problem, shadow, host),
            };
        }
        (hosts + racks + own, unplaced)
    }

    /// Where every shadow is.
    pub(super) fn snapshot(&self) -> Vec<u32> {
        self.at.iter().map(|at| at.load(Ordering::Relaxed)).collect()
    }
}

/// Cuts a slice into disjoint ranges, in ascending order.
struct Cutter<'a, T> {
    rest: &'a mut [T],
    done: u32,
}

impl<'a, T> Cutter<'a, T> {
    fn new(all: &'a mut [T]) -> Self {
        Self { rest: all, done: 0 }
    }
    fn cut(&mut self, range: &Range<u32>) -> &'a mut [T] {
        let rest = std::mem::take(&mut self.rest);
        let (_, rest) = rest.split_at_mut((range.start - self.done) as usize);
        let (cut, rest) = rest.split_at_mut(range.len());
        self.rest = rest;
        self.done = range.end;
        cut
    }
}

impl<'a> View<'a> {
    /// The same with prices that are those of the objective alone.
    pub(super) fn strict(self) -> Self {
        Self { gentle: false, ..self }
    }

    pub(super) fn is_whole(&self) -> bool {
        self.links.is_some()
    }

    pub(super) fn at(&self, id: u32) -> u32 {
        self.at[id as usize].load(Ordering::Relaxed)
    }

    pub(super) fn holds(&self, host: u32) -> bool {
        host.wrapping_sub(self.first_host) < self.loads.len() as u32
    }

    pub(super) fn hosts(&self) -> Range<u32> {
        self.first_host..self.first_host + self.loads.len() as u32
    }

    pub(super) fn load(&self, host: u32) -> &Load {
        &self.loads[(host - self.first_host) as usize]
    }

    pub(super) fn rack_in(&self, rack: u32) -> i64 {
        self.rack_in[(rack - self.first_rack) as usize]
    }

    /// `host` with nothing of ours on it.
    pub(super) fn empty(&self, host: u32) -> Load {
        let host = &self.problem.instance.hosts[self.problem.original[host as usize] as usize];
        Load::new(host, &self.problem.balance)
    }

    /// Whether rules that know nothing of other shadows let `shadow` stand on `host`.
    pub(super) fn allowed(&self, shadow: &Shadow, host: u32) -> bool {
        let (site, primary) = (&self.problem.sites[host as usize], &self.problem.sites[shadow.primary as usize]);
        if site.rack == primary.rack || site.switch == primary.switch || site.power == primary.power {
            return false;
        }
        let usable = match site.state {
            HostState::Up => true,
            HostState::Drain => shadow.current == host,
            HostState::Down => false,
        };
        usable
            && site.generation >= shadow.generation
            && site.labels & shadow.need == shadow.need
            && site.labels & shadow.avoid == 0
            && !self.problem.bars(shadow, host)
            && match shadow.apart {
                Level::Room => site.room != primary.room,
                Level::Region => site.region != primary.region,
                _ => true,
            }
            && round_trip_us(primary, site) <= shadow.latency_us
    }

    /// Another copy of the guest that stands too near to `host`.
    pub(super) fn sibling_near(&self, id: u32, shadow: &Shadow, host: u32) -> Option<u32> {
        let site = &self.problem.sites[host as usize];
        self.problem.shadows_of(shadow.guest).find(|&other| {
            let at = self.at(other);
            other != id && at != NONE && too_near(site, &self.problem.sites[at as usize])
        })
    }

    /// Whether `host` holds a copy or the primary of another guest of the group.
    pub(super) fn group_there(&self, shadow: &Shadow, host: u32) -> bool {
        shadow.group != NONE
            && (self.load(host).groups.contains(&shadow.group)
                || self.problem.groups[shadow.group as usize].contains(&host))
    }

    fn rack_cost(&self, rack: u32, mbit: i64) -> i64 {
        let (balance, cap) = (&self.problem.balance, self.problem.racks[rack as usize].in_mbit);
        if mbit <= balance.calm(cap) { 0 } else { balance.rack * balance.phi(mbit, cap) }
    }

    /// What a host costs now, with its strain if that counts.
    fn now(&self, load: &Load) -> i64 {
        load.cost + if self.gentle { load.strain } else { 0 }
    }

    fn weighed(&self, change: Change) -> i64 {
        change.cost + if self.gentle { change.strain } else { 0 }
    }

    /// How much less everything costs without `shadow` on `host`, where it is: on the host and for itself, and
    /// on the rack's link.
    pub(super) fn relief(&self, shadow: &Shadow, host: u32) -> (i64, i64) {
        let load = self.load(host);
        let without = self.weighed(load.removing(self.problem, shadow));
        let rack = self.problem.sites[host as usize].rack;
        let mbit = self.rack_in(rack);
        let link = self.rack_cost(rack, mbit) - self.rack_cost(rack, mbit - i64::from(shadow.mbit));
        (self.now(load) - without + own_cost(self.problem, shadow, host), link)
    }

    /// How much more everything costs with shadow `id` on `host`; none if a rule forbids it. The shadow may still be
    /// counted on `from` (`NONE`: nowhere), where it would be taken away; the price of its rack's link there is the
    /// caller's unless the rack is the same.
    pub(super) fn price(&self, id: u32, from: u32, host: u32) -> Option<i64> {
        let shadow = &self.problem.shadows[id as usize];
        if !self.allowed(shadow, host) {
            return None;
        }
        let site = &self.problem.sites[host as usize];
        let mut cost = 0;
        if from == NONE || self.problem.sites[from as usize].rack != site.rack {
            let (mbit, more) = (self.rack_in(site.rack), i64::from(shadow.mbit));
            if mbit + more > self.problem.racks[site.rack as usize].in_mbit {
                return None;
            }
            cost += self.rack_cost(site.rack, mbit + more) - self.rack_cost(site.rack, mbit);
        }
        let load = self.load(host);
        cost += self.weighed(load.adding(self.problem, shadow)?) - self.now(load);
        if self.sibling_near(id, shadow, host).is_some() || self.group_there(shadow, host) {
            return None;
        }
        self.links_carry(shadow, from, site).then(|| cost + own_cost(self.problem, shadow, host))
    }

    /// Whether the links between rooms and regions, and those out of the primary's host and rack, carry the stream.
    fn links_carry(&self, shadow: &Shadow, from: u32, site: &Site) -> bool {
        let primary = &self.problem.sites[shadow.primary as usize];
        // A stream that merely moves leaves the primary as before; in a view of another zone all do.
        if from == NONE
            && self.holds(shadow.primary)
            && self.source_lack(shadow.primary, primary.rack, i64::from(shadow.mbit)) > 0
        {
            return false;
        }
        if site.room == primary.room {
            return true;
        }
        let (rooms, regions) = self.between_lack(shadow, from, site);
        rooms <= 0 && regions <= 0
    }

    /// Mbit/s that the links out of host `primary` and its rack lack for `more`; at most 0: they carry it.
    pub(super) fn source_lack(&self, primary: u32, rack: u32, more: i64) -> i64 {
        let problem = self.problem;
        let host = &problem.instance.hosts[problem.original[primary as usize] as usize];
        let host = self.host_out[(primary - self.first_host) as usize] + more - host.out_mbit;
        host.max(self.rack_out[(rack - self.first_rack) as usize] + more - problem.racks[rack as usize].out_mbit)
    }

    /// Mbit/s that the links between rooms, and between regions, lack for the stream of `shadow` to `site`; at most 0:
    /// they carry it. What the stream takes now to `from` is given back first.
    pub(super) fn between_lack(&self, shadow: &Shadow, from: u32, site: &Site) -> (i64, i64) {
        let problem = self.problem;
        let primary = &problem.sites[shadow.primary as usize];
        let Some(links) = self.links.as_deref().filter(|_| site.room != primary.room) else { return (0, 0) };
        let more = i64::from(shadow.mbit);
        let before = (from != NONE).then(|| &problem.sites[from as usize]);
        let lack = |used: i64, given_back: bool, limit: i64| used + if given_back { 0 } else { more } - limit;
        let (to, of) = (&problem.rooms[site.room as usize], &problem.rooms[primary.room as usize]);
        let room = before.map(|site| site.room).filter(|&room| room != primary.room);
        let rooms = lack(links.room_in[site.room as usize], room == Some(site.room), to.in_mbit).max(lack(
            links.room_out[primary.room as usize],
            room.is_some(),
            of.out_mbit,
        ));
        if site.region == primary.region {
            return (rooms, 0);
        }
        let (to, of) = (&problem.regions[site.region as usize], &problem.regions[primary.region as usize]);
        let region = before.map(|site| site.region).filter(|&region| region != primary.region);
        let regions = lack(links.region_in[site.region as usize], region == Some(site.region), to.in_mbit).max(lack(
            links.region_out[primary.region as usize],
            region.is_some(),
            of.out_mbit,
        ));
        (rooms, regions)
    }

    fn count_links(&mut self, shadow: &Shadow, host: u32, sign: i64) {
        let problem = self.problem;
        let (site, primary) = (&problem.sites[host as usize], &problem.sites[shadow.primary as usize]);
        let mbit = sign * i64::from(shadow.mbit);
        self.rack_in[(site.rack - self.first_rack) as usize] += mbit;
        if self.holds(shadow.primary) {
            self.host_out[(shadow.primary - self.first_host) as usize] += mbit;
            self.rack_out[(primary.rack - self.first_rack) as usize] += mbit;
        }
        let Some(links) = &mut self.links else { return };
        if site.room != primary.room {
            links.room_in[site.room as usize] += mbit;
            links.room_out[primary.room as usize] += mbit;
            if site.region != primary.region {
                links.region_in[site.region as usize] += mbit;
                links.region_out[primary.region as usize] += mbit;
            }
        }
    }

    /// Puts shadow `id`, which is nowhere, on `host`. Whether a rule forbids it has been asked; if it does not fit
    /// the host itself nothing is done and false returned.
    pub(super) fn put(&mut self, id: u32, host: u32) -> bool {
        let problem = self.problem;
        let shadow = &problem.shadows[id as usize];
        let load = &mut self.loads[(host - self.first_host) as usize];
        let Some(change) = load.adding(problem, shadow) else { return false };
        load.add(problem, id, shadow, change);
        self.count_links(shadow, host, 1);
        self.at[id as usize].store(host, Ordering::Relaxed);
        true
    }

    /// Takes shadow `id` from where it is, if anywhere.
    pub(super) fn take(&mut self, id: u32) {
        let problem = self.problem;
        let host = self.at(id);
        if host == NONE {
            return;
        }
        let shadow = &problem.shadows[id as usize];
        let load = &mut self.loads[(host - self.first_host) as usize];
        let change = load.removing(problem, shadow);
        load.remove(problem, id, shadow, change);
        self.count_links(shadow, host, -1);
        self.at[id as usize].store(NONE, Ordering::Relaxed);
    }

    /// Cost of leaving `shadow` out.
    pub(super) fn left_out(shadow: &Shadow) -> i64 {
        shadow.unplaced + shadow.churn
    }
}

/// Whether two copies of a guest on these hosts could be lost together.
fn too_near(a: &Site, b: &Site) -> bool {
    a.rack == b.rack || a.switch == b.switch || a.power == b.power
}

/// What the stream of `shadow` to `host`, and standing there instead of where it stood, cost.
fn own_cost(problem: &Problem<'_>, shadow: &Shadow, host: u32) -> i64 {
    let (site, primary) = (&problem.sites[host as usize], &problem.sites[shadow.primary as usize]);
    let reach = if site.room == primary.room { 0 } else { 1 + usize::from(site.region != primary.region) };
    let churn = if shadow.current == host { 0 } else { shadow.churn };
    i64::from(shadow.mbit) * problem.net[reach] + churn
}

//! What stands on one host, what that reserves, and what it costs.
//!
//! The reserve for promotions is, per resource, the largest sum over the domains that can fail: a short list of sums
//! with a cached peak makes adding a shadow a look at one entry, and taking one away a look at the list at most.

use super::problem::{Balance, Problem, Shadow};
use super::strain;
use crate::instance;

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Peak {
    pub(super) cpu: i64,
    pub(super) mem: i64,
    pub(super) vf: i64,
}

/// Sum of the promotions that the loss of one domain causes here. Each is at most what is free here, so it fits.
#[derive(Clone, Copy)]
pub(super) struct DomainSum {
    pub(super) domain: u32,
    pub(super) cpu: i32,
    pub(super) mem: i32,
    pub(super) vf: i32,
}

impl DomainSum {
    /// Adds (1) what the promotion of `shadow` adds, or takes it away (-1).
    pub(super) fn shift(&mut self, shadow: &Shadow, sign: i32) {
        // Only sums that nothing bounds, those by power domain, can wrap, and that back and forth.
        self.cpu = self.cpu.wrapping_add(sign * shadow.more_cpu);
        self.mem = self.mem.wrapping_add(sign * shadow.more_mem);
        self.vf = self.vf.wrapping_add(sign * shadow.more_vf);
    }
}

fn shift(sums: &mut Vec<DomainSum>, domain: u32, shadow: &Shadow, sign: i32) {
    let known = sums.iter().position(|sum| sum.domain == domain);
    let at = known.unwrap_or_else(|| {
        sums.push(DomainSum { domain, cpu: 0, mem: 0, vf: 0 });
        sums.len() - 1
    });
    sums[at].shift(shadow, sign);
    // An entry of zeros may stand for a shadow that adds nothing; without it the sums are the same.
    if (sums[at].cpu, sums[at].mem, sums[at].vf) == (0, 0, 0) {
        sums.swap_remove(at);
    }
}

#[derive(Clone, Copy, Default)]
pub(super) struct Amounts {
    pub(super) cpu: i64,
    pub(super) mem: i64,
    pub(super) far: i64,
    pub(super) vf: i64,
    pub(super) mbit: i64,
}

#[derive(Clone)]
pub(super) struct Load {
    pub(super) free: Amounts,
    pub(super) used: Amounts,
    pub(super) peak: Peak,
    /// Use up to which load costs nothing.
    calm: [i64; 3],
    cap: [i64; 3],
    /// In use besides: by primaries, and by all that is not ours.
    base: [i64; 2],
    /// What `base` alone costs: not ours to pay.
    idle: i64,
    mem_price: i64,
    /// Everything this host costs now.
    pub(super) cost: i64,
    /// See [`strain`]; not part of `cost`.
    pub(super) strain: i64,
    /// See [`strain::rates`].
    pub(super) as_cpu: [i64; 2],
    sums: Vec<DomainSum>,
    /// By the primary's power domain; kept only where strain counts.
    powers: Vec<DomainSum>,
    pub(super) shadows: Vec<u32>,
    /// Anti-affinity groups of `shadows`, one entry each.
    pub(super) groups: Vec<u32>,
}

/// What a shadow would make of a host.
#[derive(Clone, Copy)]
pub(super) struct Change {
    pub(super) peak: Peak,
    pub(super) cost: i64,
    pub(super) strain: i64,
}

impl Load {
    pub(super) fn new(host: &instance::Host, balance: &Balance) -> Self {
        let cap = [host.cpu_cap_milli, host.memory_cap_mib, host.in_mbit];
        let base = [host.cpu_cap_milli - host.cpu_milli, host.memory_cap_mib - host.memory_mib];
        let calm = |r: usize, base: i64| if cap[r] == 0 { i64::MAX } else { balance.calm(cap[r]) - base };
        let mut load = Self {
            free: Amounts {
                cpu: host.cpu_milli,
                mem: host.memory_mib,
                far: host.far_mib,
                vf: host.vfs,
                mbit: host.in_mbit,
            },
            used: Amounts::default(),
            peak: Peak::default(),
            calm: [calm(0, base[0]), calm(1, base[1]), calm(2, 0)],
            cap,
            base,
            idle: 0,
            mem_price: host.mem_cost,
            cost: 0,
            strain: 0,
            as_cpu: strain::rates(host),
            sums: Vec::new(),
            powers: Vec::new(),
            shadows: Vec::new(),
            groups: Vec::new(),
        };
        load.idle = load.balance(balance, 0, 0, 0);
        load
    }

    fn balance(&self, balance: &Balance, cpu: i64, mem: i64, mbit: i64) -> i64 {
        let mut phi = 0;
        if cpu > self.calm[0] {
            phi += balance.phi(self.base[0] + cpu, self.cap[0]);
        }
        if mem > self.calm[1] {
            phi += balance.phi(self.base[1] + mem, self.cap[1]);
        }
        if mbit > self.calm[2] {
            phi += balance.phi(mbit, self.cap[2]);
        }
        balance.host * phi
    }

    fn cost_of(&self, problem: &Problem<'_>, used: &Amounts, peak: Peak) -> i64 {
        let (cpu, mem) = (used.cpu + peak.cpu, used.mem + peak.mem);
        self.mem_price * mem
            + problem.far_price * used.far
            + problem.cpu_price * cpu
            + self.balance(&problem.balance, cpu, mem, used.mbit)
            - self.idle
    }

    fn peak_with(&self, shadow: &Shadow, levels: usize) -> Peak {
        let mut peak = self.peak;
        if !shadow.promotes {
            return peak;
        }
        for &domain in &shadow.domains[..levels] {
            let (mut cpu, mut mem, mut vf) = (shadow.more_cpu, shadow.more_mem, shadow.more_vf);
            if let Some(sum) = self.sums.iter().find(|sum| sum.domain == domain) {
                cpu += sum.cpu;
                mem += sum.mem;
                vf += sum.vf;
            }
            peak.cpu = peak.cpu.max(i64::from(cpu));
            peak.mem = peak.mem.max(i64::from(mem));
            peak.vf = peak.vf.max(i64::from(vf));
        }
        peak
    }

    fn peak_without(&self, shadow: &Shadow, levels: usize) -> Peak {
        if !shadow.promotes {
            return self.peak;
        }
        let domains = &shadow.domains[..levels];
        let below = |sum: &DomainSum| {
            i64::from(sum.cpu) < self.peak.cpu && i64::from(sum.mem) < self.peak.mem && i64::from(sum.vf) < self.peak.vf
        };
        let mut peak = Peak::default();
        let mut lowers = false;
        for sum in &self.sums {
            let (mut cpu, mut mem, mut vf) = (sum.cpu, sum.mem, sum.vf);
            if domains.contains(&sum.domain) {
                lowers |= !below(sum);
                cpu -= shadow.more_cpu;
                mem -= shadow.more_mem;
                vf -= shadow.more_vf;
            }
            peak.cpu = peak.cpu.max(i64::from(cpu));
            peak.mem = peak.mem.max(i64::from(mem));
            peak.vf = peak.vf.max(i64::from(vf));
        }
        if lowers { peak } else { self.peak }
    }

    /// What is used with `shadow` too, and the peak. Nothing is said of whether it fits.
    pub(super) fn with(&self, shadow: &Shadow, levels: usize) -> (Amounts, Peak) {
        let used = Amounts {
            cpu: self.used.cpu + i64::from(shadow.cpu),
            mem: self.used.mem + i64::from(shadow.mem),
            far: self.used.far + i64::from(shadow.far),
            vf: self.used.vf + i64::from(shadow.vf),
            mbit: self.used.mbit + i64::from(shadow.mbit),
        };
        (used, self.peak_with(shadow, levels))
    }

    /// Peak and cost with `shadow`; none if it does not fit.
    pub(super) fn adding(&self, problem: &Problem<'_>, shadow: &Shadow) -> Option<Change> {
        let (used, peak) = self.with(shadow, problem.levels);
        let free = &self.free;
        let fits = used.mem + peak.mem <= free.mem
            && used.far <= free.far
            && used.vf + peak.vf <= free.vf
            && used.cpu + peak.cpu <= free.cpu
            && used.mbit <= free.mbit;
        fits.then(|| self.change(problem, &used, peak, shadow, 1))
    }

    /// Peak and cost without `shadow`, which is here.
    pub(super) fn removing(&self, problem: &Problem<'_>, shadow: &Shadow) -> Change {
        let used = self.without(shadow);
        let peak = self.peak_without(shadow, problem.levels);
        self.change(problem, &used, peak, shadow, -1)
    }

    fn change(&self, problem: &Problem<'_>, used: &Amounts, peak: Peak, shadow: &Shadow, sign: i32) -> Change {
        let strain = match problem.strain_price {
            0 => 0,
            _ => strain::of(problem, self, &self.powers, (used, peak), (shadow, sign)),
        };
        Change { peak, cost: self.cost_of(problem, used, peak), strain }
    }

    fn without(&self, shadow: &Shadow) -> Amounts {
        Amounts {
            cpu: self.used.cpu - i64::from(shadow.cpu),
            mem: self.used.mem - i64::from(shadow.mem),
            far: self.used.far - i64::from(shadow.far),
            vf: self.used.vf - i64::from(shadow.vf),
            mbit: self.used.mbit - i64::from(shadow.mbit),
        }
    }

    /// Adds `shadow`, number `id`, of which [`adding`](Self::adding) said what it changes.
    pub(super) fn add(&mut self, problem: &Problem<'_>, id: u32, shadow: &Shadow, change: Change) {
        self.used = self.with(shadow, 0).0;
        self.shift(problem, shadow, 1);
        self.peak = change.peak;
        self.cost = change.cost;
        self.strain = change.strain;
        self.shadows.push(id);
        if shadow.group != super::problem::NONE {
            self.groups.push(shadow.group);
        }
    }

    fn shift(&mut self, problem: &Problem<'_>, shadow: &Shadow, sign: i32) {
        if !shadow.promotes {
            return;
        }
        for &domain in &shadow.domains[..problem.levels] {
            shift(&mut self.sums, domain, shadow, sign);
        }
        if problem.strain_price > 0 {
            shift(&mut self.powers, shadow.power, shadow, sign);
        }
    }

    /// Takes `shadow`, number `id`, away; `change` is what [`removing`](Self::removing) said.
    pub(super) fn remove(&mut self, problem: &Problem<'_>, id: u32, shadow: &Shadow, change: Change) {
        self.used = self.without(shadow);
        self.shift(problem, shadow, -1);
        self.peak = change.peak;
        self.cost = change.cost;
        self.strain = change.strain;
        if let Some(at) = self.shadows.iter().position(|&other| other == id) {
            self.shadows.swap_remove(at);
        }
        if shadow.group != super::problem::NONE
            && let Some(at) = self.groups.iter().position(|&group| group == shadow.group)
        {
            self.groups.swap_remove(at);
        }
    }
}

//! What a host lacks to hold, after the loss of a domain, the guests that are promoted there, all else that stands there
//! and the reserve for one more loss.
//!
//! Nothing obliges a plan to have that: the format's objective does not count it, and promotions have room after any one
//! loss that is to be survived. But where it is lacking, shadows that are well have to move when a domain is lost, and
//! promoted guests get less CPU than they ask for where a loss was not to be survived. So large plans pay for it with a
//! share of what the same amount costs where it is used: see decision 38.

use super::load::{Amounts, DomainSum, Load, Peak};
use super::problem::{Problem, Shadow};
use crate::instance::Host;

/// Bits after the point of [`rates`].
const SHIFT: u32 = 16;

/// Far more than any host has or lacks; keeps products within bounds.
const MOST: i64 = 1 << 30;

/// More than any plan costs that matters; may be added to what one does.
const DEAREST: i64 = 1 << 50;

/// How much CPU stands for a MiB, and for a VF, of a host: as much as there is of one for the other.
pub(super) fn rates(host: &Host) -> [i64; 2] {
    let rate = |all: i64| ((host.cpu_cap_milli << SHIFT) / all.max(1)).min(MOST);
    [rate(host.memory_cap_mib), rate(host.vfs)]
}

/// Strain of a host that would use `used` and reserve `peak`; in milli-points. `powers` are sums of promotions by power
/// domain, to which those of `shadow` are still to be added (1) or from which they are to be taken (-1).
pub(super) fn of(
    problem: &Problem<'_>,
    load: &Load,
    powers: &[DomainSum],
    (used, peak): (&Amounts, Peak),
    (shadow, sign): (&Shadow, i32),
) -> i64 {
    let left = Peak {
        cpu: load.free.cpu - used.cpu - peak.cpu,
        mem: load.free.mem - used.mem - peak.mem,
        vf: load.free.vf - used.vf - peak.vf,
    };
    // Whatever is scarcest decides what has to go; all is measured in CPU.
    let [cpu_of_mem, cpu_of_vf] = load.as_cpu;
    let lacks = |cpu: i64, mem: i64, vf: i64| {
        let mem = ((mem - left.mem).max(0) * cpu_of_mem) >> SHIFT;
        let vf = ((vf - left.vf).max(0) * cpu_of_vf) >> SHIFT;
        (cpu - left.cpu).max(mem).max(vf).clamp(0, MOST)
    };
    // The largest reserve is that of a rack or switch, unless more is to be survived.
    let mut strain = 2 * lacks(peak.cpu, peak.mem, peak.vf);
    let mut counted = !shadow.promotes;
    let mut add = |mut sum: DomainSum, counted: &mut bool| {
        if !*counted && sum.domain == shadow.power {
            sum.shift(shadow, sign);
            *counted = true;
        }
        strain += lacks(i64::from(sum.cpu), i64::from(sum.mem), i64::from(sum.vf));
    };
    powers.iter().for_each(|&sum| add(sum, &mut counted));
    if !counted {
        add(DomainSum { domain: shadow.power, cpu: 0, mem: 0, vf: 0 }, &mut counted);
    }
    strain.saturating_mul(problem.strain_price).min(DEAREST)
}

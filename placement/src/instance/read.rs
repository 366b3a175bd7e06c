//! Reading an instance: what is malformed or contradicts itself is refused with its place and the reason.

use super::{FORMAT, Host, Instance, Level, MAX_AMOUNT, MAX_COPIES, MAX_HOSTS};

/// Why an instance cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// serde_json's text ends with the line and the column.
    #[error("not a {FORMAT} instance: {0}")]
    Syntax(#[from] serde_json::Error),
    #[error("{place}: {reason}")]
    Content { place: String, reason: String },
}

/// Largest price, and largest total, that is computed with: far from where an `i64` ends.
const MAX_PRICE: i64 = 1 << 40;
const MAX_TOTAL: i128 = 1 << 60;
/// Longest latency of one link: 10 s.
const MAX_LATENCY_US: i64 = 10_000_000;

/// Parses and validates an instance.
pub fn parse(json: &[u8]) -> Result<Instance, InstanceError> {
    let instance: Instance = serde_json::from_slice(json)?;
    instance.validate()?;
    Ok(instance)
}

fn content(place: impl Into<String>, reason: impl Into<String>) -> InstanceError {
    InstanceError::Content { place: place.into(), reason: reason.into() }
}

fn bounded(value: i64, low: i64, high: i64, place: impl Fn() -> String) -> Result<(), InstanceError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(content(place(), format!("{value} is outside {low} to {high}")))
}

fn index(value: usize, count: usize, what: &str, place: impl Fn() -> String) -> Result<(), InstanceError> {
    if value < count {
        return Ok(());
    }
    Err(content(place(), format!("refers to {what} {value}, but there are {count}")))
}

impl Instance {
    /// Refuses what cannot be planned or would not be what it says. [`parse`] has called it.
    pub fn validate(&self) -> Result<(), InstanceError> {
        if self.format != FORMAT {
            return Err(content("format", format!("is {:?}; only {FORMAT:?} is understood", self.format)));
        }
        bounded(self.hosts.len() as i64, 1, MAX_HOSTS as i64, || "hosts: their number".into())?;
        bounded(self.copies() as i64, 0, MAX_COPIES as i64, || "vms: the number of their copies".into())?;
        self.validate_params()?;
        self.validate_sites()?;
        for (i, host) in self.hosts.iter().enumerate() {
            self.validate_host(i, host)?;
        }
        for i in 0..self.vms.len() {
            self.validate_guest(i)?;
        }
        self.validate_total()
    }

    fn validate_params(&self) -> Result<(), InstanceError> {
        for (i, tier) in self.params.tiers.iter().enumerate() {
            let parts =
                [("mem_pm", tier.memory_permille), ("far_pm", tier.far_permille), ("cpu_pm", tier.cpu_permille)];
            for (name, value) in parts {
                bounded(value, 0, 1000, || format!("params.tiers[{i}].{name}"))?;
            }
            bounded(tier.vf, 0, 1, || format!("params.tiers[{i}].vf"))?;
        }
        let cost = &self.params.cost;
        let prices = [
            ("cpu", cost.cpu),
            ("far", cost.far),
            ("move", cost.moved),
            ("net_room", cost.net_room),
            ("net_xroom", cost.net_xroom),
            ("net_xregion", cost.net_xregion),
            ("unplaced_fixed", cost.unplaced_fixed),
            ("unplaced_mem", cost.unplaced_mem),
            ("unplaced_first", cost.unplaced_first),
            ("bal_host", cost.bal_host),
            ("bal_rack", cost.bal_rack),
        ];
        for (name, value) in prices {
            bounded(value, 0, MAX_PRICE, || format!("params.cost.{name}"))?;
        }
        for (i, &(knot, slope)) in cost.bal_knots.iter().enumerate() {
            bounded(knot, 0, 1000, || format!("params.cost.bal_knots[{i}]: its knot"))?;
            bounded(slope, 0, MAX_PRICE, || format!("params.cost.bal_knots[{i}]: its slope"))?;
        }
        Ok(())
    }

    fn validate_sites(&self) -> Result<(), InstanceError> {
        for (i, region) in self.regions.iter().enumerate() {
            site(region.latency_us, region.in_mbit, region.out_mbit, || format!("regions[{i}]"))?;
        }
        for (i, room) in self.rooms.iter().enumerate() {
            index(room.region, self.regions.len(), "region", || format!("rooms[{i}].region"))?;
            site(room.latency_us, room.in_mbit, room.out_mbit, || format!("rooms[{i}]"))?;
        }
        for (i, rack) in self.racks.iter().enumerate() {
            index(rack.room, self.rooms.len(), "room", || format!("racks[{i}].room"))?;
            site(rack.latency_us, rack.in_mbit, rack.out_mbit, || format!("racks[{i}]"))?;
            // Utilisation is a share of it.
            bounded(rack.in_mbit, 1, MAX_AMOUNT, || format!("racks[{i}].in"))?;
        }
        Ok(())
    }

    fn validate_host(&self, i: usize, host: &Host) -> Result<(), InstanceError> {
        index(host.rack, self.racks.len(), "rack", || format!("hosts[{i}].rack"))?;
        let amounts = [
            ("cpu_cap", host.cpu_cap_milli),
            ("mem_cap", host.memory_cap_mib),
            ("cpu", host.cpu_milli),
            ("mem", host.memory_mib),
            ("far", host.far_mib),
            ("vf", host.vfs),
            ("in", host.in_mbit),
            ("out", host.out_mbit),
        ];
        for (name, value) in amounts {
            bounded(value, 0, MAX_AMOUNT, || format!("hosts[{i}].{name}"))?;
        }
        bounded(host.generation, i64::from(i32::MIN), i64::from(i32::MAX), || format!("hosts[{i}].gen"))?;
        bounded(host.mem_cost, 0, MAX_PRICE, || format!("hosts[{i}].mem_cost"))?;
        let pairs = [("cpu", host.cpu_milli, host.cpu_cap_milli), ("mem", host.memory_mib, host.memory_cap_mib)];
        for (name, free, cap) in pairs {
            if free > cap {
                return Err(content(format!("hosts[{i}].{name}"), format!("{free} free of {cap} in all")));
            }
        }
        Ok(())
    }

    fn validate_guest(&self, i: usize) -> Result<(), InstanceError> {
        let vm = &self.vms[i];
        index(vm.primary, self.hosts.len(), "host", || format!("vms[{i}].p"))?;
        for (name, value) in [("cpu", vm.cpu_milli), ("mem", vm.memory_mib), ("vf", vm.vfs)] {
            bounded(value, 0, MAX_AMOUNT, || format!("vms[{i}].{name}"))?;
        }
        bounded(vm.weight, 0, MAX_AMOUNT, || format!("vms[{i}].w"))?;
        bounded(vm.generation, i64::from(i32::MIN), i64::from(i32::MAX), || format!("vms[{i}].gen"))?;
        bounded(vm.group, -1, i64::from(i32::MAX), || format!("vms[{i}].grp"))?;
        if vm.need & vm.avoid != 0 {
            let both = vm.need & vm.avoid;
            return Err(content(format!("vms[{i}]"), format!("needs and avoids the same labels ({both:#x})")));
        }
        for &host in &vm.barred {
            index(host, self.hosts.len(), "host", || format!("vms[{i}].bar"))?;
        }
        for (k, copy) in vm.copies.iter().enumerate() {
            let place = |field: &str| format!("vms[{i}].copies[{k}].{field}");
            index(copy.tier, self.params.tiers.len(), "tier", || place("t"))?;
            bounded(copy.latency_us, 0, i64::from(i32::MAX), || place("lat"))?;
            bounded(copy.mbit, 0, MAX_AMOUNT, || place("bw"))?;
            bounded(copy.current, -1, self.hosts.len() as i64 - 1, || place("cur"))?;
            if !matches!(copy.apart, Level::Rack | Level::Room | Level::Region) {
                return Err(content(place("div"), "has to be rack, room or region"));
            }
        }
        Ok(())
    }

    /// No plan's objective may come near the end of an `i64`.
    fn validate_total(&self) -> Result<(), InstanceError> {
        let cost = &self.params.cost;
        let amount = i128::from(MAX_AMOUNT);
        let slopes: i128 = cost.bal_knots.iter().map(|&(_, slope)| i128::from(slope) * 1000).sum();
        let mut total = i128::from(cost.bal_rack) * slopes * self.racks.len() as i128;
        for host in &self.hosts {
            total += i128::from(host.mem_cost) * i128::from(host.memory_mib)
                + i128::from(cost.far) * i128::from(host.far_mib)
                + i128::from(cost.cpu) * i128::from(host.cpu_milli)
                + 3 * i128::from(cost.bal_host) * slopes;
        }
        let net = i128::from(cost.net_room.max(cost.net_xroom).max(cost.net_xregion));
        for vm in &self.vms {
            let memory = i128::from(vm.memory_mib);
            let unplaced = i128::from(vm.weight)
                * (i128::from(cost.unplaced_fixed) + i128::from(cost.unplaced_mem) * memory)
                * i128::from(cost.unplaced_first.max(1));
            let moved = i128::from(cost.moved) * memory;
            let streams: i128 = vm.copies.iter().map(|copy| net * i128::from(copy.mbit)).sum();
            total += (unplaced + moved) * vm.copies.len() as i128 + streams;
        }
        if total < MAX_TOTAL && slopes < amount << 16 {
            return Ok(());
        }
        Err(content("params.cost", "prices so high that the objective could overflow"))
    }
}

fn site(
    latency_us: i64,
    in_mbit: i64,
    out_mbit: i64,
    place: impl Fn() -> String + std::marker::Copy,
) -> Result<(), InstanceError> {
    bounded(latency_us, 0, MAX_LATENCY_US, || place() + ".lat")?;
    bounded(in_mbit, 0, MAX_AMOUNT, || place() + ".in")?;
    bounded(out_mbit, 0, MAX_AMOUNT, || place() + ".out")
}

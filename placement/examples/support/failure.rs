//! What the loss of a domain makes of an instance: the first shadows of its guests have been promoted.

use placement::checker;
use placement::instance::{HostState, Instance, Level, Plan};

/// The instance after `level` number `domain` was lost while `plan` was in force. Guests that cannot be promoted are gone.
pub fn after(instance: &Instance, plan: &Plan, level: Level, domain: u64) -> Instance {
    let mut after = instance.clone();
    after.name = format!("{}+{}{domain}", instance.name, format!("{level:?}").to_lowercase());
    let down: Vec<bool> =
        (0..instance.hosts.len()).map(|host| checker::domain(instance, level, host) == domain).collect();
    let lost = |host: i64| usize::try_from(host).is_ok_and(|host| down[host]);
    for (host, _) in after.hosts.iter_mut().zip(&down).filter(|(_, down)| **down) {
        host.state = HostState::Down;
    }
    let guests = std::mem::take(&mut after.vms);
    for (mut vm, hosts) in guests.into_iter().zip(&plan.place) {
        let mut stand = hosts.clone();
        if down[vm.primary] {
            let promoted = stand.first().copied().filter(|&host| !lost(host));
            let Some(promoted) = promoted.and_then(|host| usize::try_from(host).ok()) else { continue };
            vm.primary = promoted;
            stand[0] = -1;
            let host = &mut after.hosts[promoted];
            host.cpu_milli = (host.cpu_milli - vm.cpu_milli).max(0);
            host.memory_mib = (host.memory_mib - vm.memory_mib).max(0);
            host.vfs = (host.vfs - vm.vfs).max(0);
        }
        for (copy, &host) in vm.copies.iter_mut().zip(&stand) {
            copy.current = if lost(host) { -1 } else { host };
        }
        after.vms.push(vm);
    }
    after
}

//! Raising a lab and taking it down, whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::LabOptions;
use super::error::{LabError, Result};
use super::guest::uuid_from;
use super::host::{self, Programs};
use super::namespace::{self, FABRIC, SPINE, UPLINK};
use super::pki::Authority;
use super::process::ProcessRef;
use super::state::{
    self, CLIENT, CLIENT_IP, HOSTS_MAX, LOG_ROOT, LabLock, LabState, MANAGER, MANAGER_IP, NodeState, RUN_ROOT, Role,
    VAR_ROOT, host_ip, run_dir,
};

/// Directories of the real file system that nodes lay their own over, made by a lab if they were missing.
const MOUNT_POINTS: [&str; 2] = ["/etc/virt-shadow", "/var/lib/virt-shadow"];

pub fn rack_names(racks: u8) -> impl Iterator<Item = String> {
    (1..=racks).map(|i| format!("rack{i}"))
}

fn check(options: &LabOptions) -> Result<()> {
    let range = |what, value: u8, max: u8| {
        let reason = format!("must be within 1 to {max}");
        if (1..=max).contains(&value) {
            Ok(())
        } else {
            Err(LabError::Invalid { what, value: value.to_string(), reason })
        }
    };
    range("hosts", options.hosts, HOSTS_MAX)?;
    range("racks", options.racks, HOSTS_MAX)?;
    if options.power_domains == 0 { Ok(()) } else { range("power domains", options.power_domains, options.racks) }
}

pub fn up(options: &LabOptions, programs: &Programs) -> Result<()> {
    check(options)?;
    let lock = LabLock::acquire(&options.name)?;
    match lock.load() {
        // One that lives and dies with a process is that one's alone.
        Ok(state) if options.owned && in_use(&state) => {
            let owner = state.owner.filter(ProcessRef::is_alive).map(|owner| owner.pid);
            return Err(LabError::UpAlready { lab: state.name, owner });
        }
        Ok(state) if state.complete && has_power(&state) => return resume(&lock, state, options, programs),
        Ok(_) | Err(LabError::Corrupt { .. }) => {
            say(options, "removing what an earlier lab of this name left behind");
            clear(&options.name)?;
        }
        Err(LabError::NotUp { .. }) => clear(&options.name)?,
        Err(error) => return Err(error),
    }
    let mut state = plan(options)?;
    let raised = lock.save(&state).and_then(|()| raise(&lock, &mut state, options, programs));
    if let Err(error) = raised {
        say(options, "removing the unfinished lab");
        clear(&options.name)?;
        lock.remove();
        return Err(error);
    }
    Ok(())
}

fn has_power(state: &LabState) -> bool {
    state.nodes.iter().any(|node| state.running(&node.name).is_ok())
}

/// Whoever raised it has not done with it.
fn in_use(state: &LabState) -> bool {
    match state.owner {
        Some(owner) => owner.is_alive(),
        None => state.complete && has_power(state),
    }
}

/// A lab that is up: checks that it is what was asked for, and starts what crashed.
fn resume(lock: &LabLock, mut state: LabState, options: &LabOptions, programs: &Programs) -> Result<()> {
    let have = (state.hosts().count() as u8, state.racks, state.qemu_user, state.transport, state.daemons);
    if have != (options.hosts, options.racks, options.qemu_user, options.transport, options.daemons)
        || state.power_domains != options.power_domains
    {
        let reason = format!(
            "is up with other options ({} hosts, {} racks, {} power domains, QEMU as {:?}, {:?}, daemons: {}); take it \
             down first",
            have.0, have.1, state.power_domains, have.2, have.3, have.4
        );
        return Err(LabError::Invalid { what: "lab", value: options.name.clone(), reason });
    }
    say(options, "is up already");
    // No power is a wish; a first process that is gone without a power cut is a crash.
    let crashed: Vec<_> =
        state.nodes.iter().filter(|n| n.init.is_some_and(|i| !i.is_alive())).map(|n| n.name.clone()).collect();
    for node in crashed {
        say(options, &format!("{node} crashed; starting it"));
        host::power_cut(&state.name, state.node(&node)?)?;
        power_on(lock, &mut state, &node, programs)?;
    }
    Ok(())
}

fn plan(options: &LabOptions) -> Result<LabState> {
    let node = |name: String, role, rack: String, ip| {
        let id = xxhash_rust::xxh3::xxh3_128(format!("{}/{name}", options.name).as_bytes());
        NodeState { name, role, rack, ip, uuid: uuid_from(id.to_be_bytes()), init: None, link_cut: false }
    };
    let mut nodes = vec![node(MANAGER.into(), Role::Manager, SPINE.into(), MANAGER_IP)];
    for i in 1..=options.hosts {
        let rack = format!("rack{}", (i - 1) % options.racks + 1);
        nodes.push(node(format!("host{i}"), Role::Host, rack, host_ip(i)));
    }
    let owner = match options.owned {
        true => Some(ProcessRef::current().ok_or_else(|| {
            let source = std::io::ErrorKind::NotFound.into();
            LabError::System { action: "read this process's own start time; is /proc mounted?".into(), source }
        })?),
        false => None,
    };
    Ok(LabState {
        name: options.name.clone(),
        owner,
        racks: options.racks,
        power_domains: options.power_domains,
        qemu_user: options.qemu_user,
        transport: options.transport,
        daemons: options.daemons,
        record_dir: options.record_dir.clone(),
        complete: false,
        nodes,
        cut_racks: Vec::new(),
        guests: Default::default(),
    })
}

fn raise(lock: &LabLock, state: &mut LabState, options: &LabOptions, programs: &Programs) -> Result<()> {
    let go_on = || match options.interrupt.load(Ordering::Relaxed) {
        true => Err(LabError::Interrupted),
        false => Ok(()),
    };
    if state.daemons && programs.daemon.is_none() {
        say(options, "no virtshadowd beside virt-shadow-lab: raising the lab without it");
    }
    let begin = Instant::now();
    make_mount_points()?;
    namespace::add_fabric(&state.name, &rack_names(state.racks).collect::<Vec<_>>())?;
    namespace::add(&state.name, CLIENT)?;
    namespace::plug(&state.name, CLIENT, SPINE, CLIENT_IP, false)?;
    namespace::wait_forwarding(&state.name, &[(FABRIC, CLIENT), (CLIENT, UPLINK)])?;
    go_on()?;
    say(options, &format!("network of {} racks is there", state.racks));

    let authority = Authority::new(&state.name)?;
    let started = each(state, |node| {
        host::prepare(state, node, programs, &authority)?;
        go_on()?;
        host::power_on(&state.name, node, programs)
    });
    // Record whatever was started before looking at what failed.
    let mut failed = None;
    for (index, result) in started.into_iter().enumerate() {
        match result {
            Ok(init) => state.nodes[index].init = Some(init),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    lock.save(state)?;
    failed.map_or(Ok(()), Err)?;
    go_on()?;
    say(options, &format!("{} hosts and the manager are started", state.hosts().count()));

    let answered = each(state, |node| wait_services(state, node));
    let running = answered.into_iter().collect::<Result<Vec<_>>>()?;
    for (node, _) in state.nodes.iter().zip(running).filter(|(_, running)| !running) {
        say(
            options,
            &format!("virtshadowd of {} does not start; see {}", node.name, daemon_log(state, node).display()),
        );
    }
    go_on()?;
    host::keep_capabilities(state, "host1")?;
    state.complete = true;
    lock.save(state)?;
    say(options, &format!("up after {:.1} s", begin.elapsed().as_secs_f64()));
    Ok(())
}

/// Does the same to all nodes at once; results in their order.
fn each<T: Send>(state: &LabState, work: impl Fn(&NodeState) -> Result<T> + Sync) -> Vec<Result<T>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = state.nodes.iter().map(|node| scope.spawn(|| work(node))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Waits for a node's libvirtd, without which it is no host, and for its virtshadowd, whose failure it only tells.
fn wait_services(state: &LabState, node: &NodeState) -> Result<bool> {
    if node.role == Role::Host {
        host::wait_libvirt(&state.name, &node.name)?;
    }
    Ok(host::wait_daemon(&state.name, node))
}

fn daemon_log(state: &LabState, node: &NodeState) -> PathBuf {
    state::node_var_dir(&state.name, &node.name).join("log/virtshadowd.log")
}

/// Starts a node and waits for its services. A virtshadowd that does not start is seen in the status only: a test may
/// have made it so.
pub fn power_on(lock: &LabLock, state: &mut LabState, node: &str, programs: &Programs) -> Result<()> {
    let started = host::power_on(&state.name, state.node(node)?, programs);
    if started.is_err() {
        let _ = host::power_cut(&state.name, state.node(node)?);
    }
    state.node_mut(node)?.init = Some(started?);
    lock.save(state)?;
    wait_services(state, state.node(node)?).map(drop)
}

pub fn down(lab: &str, keep_logs: bool) -> Result<Option<PathBuf>> {
    let lock = LabLock::acquire(lab)?;
    let there = matches!(lock.load(), Ok(_) | Err(LabError::Corrupt { .. })) || !namespace::list(lab).is_empty();
    if !there {
        clear(lab)?;
        lock.remove();
        return Err(LabError::NotUp { lab: lab.into() });
    }
    // The processes first: a log that is moved must be complete.
    end_all(lab)?;
    let kept = if keep_logs { Some(save_logs(lab)?) } else { None };
    clear(lab)?;
    lock.remove();
    Ok(kept)
}

fn end_all(lab: &str) -> Result<()> {
    let nodes = state::load(lab).ok().flatten().map(|s| s.nodes).unwrap_or_default();
    let inits = || nodes.iter().filter_map(|n| n.init);
    inits().try_for_each(|init| init.kill())?;
    inits().try_for_each(|init| init.wait_end())?;
    namespace::list(lab).iter().try_for_each(|node| namespace::remove(lab, node))
}

/// Removes all of a lab; what is not there is fine.
fn clear(lab: &str) -> Result<()> {
    end_all(lab)?;
    for dir in [Path::new(VAR_ROOT).join(lab), run_dir(lab)] {
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(LabError::io("remove", &dir)(error));
            }
            _ => {}
        }
    }
    if state::all_labs().is_empty() {
        remove_mount_points();
        // Only if nothing is left in it.
        let _ = fs::remove_dir(VAR_ROOT);
    }
    Ok(())
}

fn save_logs(lab: &str) -> Result<PathBuf> {
    let target = Path::new(LOG_ROOT).join(lab);
    let nodes = state::load(lab).ok().flatten().map(|s| s.nodes).unwrap_or_default();
    for node in nodes {
        let dir = target.join(&node.name);
        fs::create_dir_all(&dir).map_err(LabError::io("create", &dir))?;
        let var = state::node_var_dir(lab, &node.name);
        for from in [var.join("log"), var.join("var-log-libvirt/console"), var.join("var-log-libvirt/qemu")] {
            let Ok(entries) = fs::read_dir(&from) else { continue };
            for entry in entries.flatten().filter(|e| e.path().is_file()) {
                let kind = from.file_name().unwrap_or_default().to_string_lossy().replace("log", "service");
                let name = format!("{kind}-{}", entry.file_name().to_string_lossy());
                fs::copy(entry.path(), dir.join(name)).map_err(LabError::io("copy", &entry.path()))?;
            }
        }
    }
    Ok(target)
}

/// Removes labs of test processes that are gone.
pub fn sweep() {
    for lab in state::all_labs() {
        let orphan = |state: Option<LabState>| state.and_then(|s| s.owner).is_some_and(|o| !o.is_alive());
        if !orphan(state::load(&lab).ok().flatten()) {
            continue;
        }
        match down(&lab, false) {
            // Another process swept it meanwhile.
            Ok(_) | Err(LabError::NotUp { .. }) => {}
            // The lab that is being raised now does not depend on it.
            Err(error) => eprintln!("lab {lab}: left by a test that died, cannot be removed: {error}"),
        }
    }
}

fn made_by_us() -> PathBuf {
    Path::new(RUN_ROOT).join("mount-points")
}

fn make_mount_points() -> Result<()> {
    let record = made_by_us();
    for point in MOUNT_POINTS.map(Path::new).into_iter().filter(|p| !p.is_dir()) {
        let known = fs::read_to_string(&record).unwrap_or_default();
        fs::write(&record, format!("{known}{}\n", point.display())).map_err(LabError::io("write", &record))?;
        fs::create_dir_all(point).map_err(LabError::io("create", point))?;
    }
    Ok(())
}

/// Only empty directories that a lab made, and only when no lab is left that may have laid something over them.
fn remove_mount_points() {
    let record = made_by_us();
    for point in fs::read_to_string(&record).unwrap_or_default().lines().filter(|l| MOUNT_POINTS.contains(l)) {
        let _ = fs::remove_dir(point);
    }
    let _ = fs::remove_file(record);
}

fn say(options: &LabOptions, line: &str) {
    if options.verbose {
        eprintln!("lab {}: {line}", options.name);
    }
}

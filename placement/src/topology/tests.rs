use super::*;

fn host(line: &str) -> HostFacts {
    let mut words = line.split_whitespace();
    let mut word = || words.next().expect("name rack free [down|silent]");
    let (name, rack, free) = (word(), word(), word());
    let availability = match line.split_whitespace().nth(3) {
        Some("down") => Availability::Down,
        Some("silent") => Availability::Silent,
        _ => Availability::Up,
    };
    HostFacts {
        name: name.into(),
        rack: rack.into(),
        availability,
        memory_free_mib: free.parse().expect("MiB"),
        excluded: line.contains("refused").then(|| "no KVM".to_owned()),
    }
}

/// `primary wanted [on...] [existing: +name]`, and what comes out.
fn choose(hosts: &str, request: &str) -> String {
    let hosts: Vec<_> = hosts.lines().map(str::trim).filter(|l| !l.is_empty()).map(host).collect();
    let words: Vec<_> = request.split_whitespace().collect();
    let primary = words[0].into();
    let (existing, on): (Vec<&str>, Vec<&str>) = words[2..].iter().copied().partition(|word| word.starts_with('+'));
    let on: Vec<HostName> = on.into_iter().map(HostName::from).collect();
    let existing: Vec<HostName> = existing.into_iter().map(|name| HostName::from(&name[1..])).collect();
    let wanted = words[1].parse().expect("a number");
    let request = ShadowRequest { primary: &primary, guest_memory_mib: 1024, wanted, on: &on };
    match choose_shadow_hosts(&request, &hosts, &existing) {
        Ok(names) => names.iter().map(HostName::as_str).collect::<Vec<_>>().join(" "),
        Err(refusal) => format!("no: {refusal}"),
    }
}

const SIX: &str = "
    a1 ra 9000
    a2 ra 9000
    b1 rb 4000
    b2 rb 5000
    c1 rc 3000
    c2 rc 3000";

#[test]
fn cases() {
    for (hosts, request, expected) in [
        (SIX, "a1 1", "b2"),
        (SIX, "a1 2", "b2 c1"),
        (SIX, "b1 2", "a1 c1"),
        (SIX, "a1 1 +b1", "c1"),
        (SIX, "a1 1 c2", "c2"),
        (SIX, "a1 2 c2", "c2 b2"),
        (
            SIX,
            "a1 3",
            "no: 3 shadows wanted, 2 possible in 3 racks; 4 hosts not: 2 same rack as another shadow \
             (b1 in rb with b2, c2 in rc with c1), 1 same rack as the primary (a2 in ra), 1 the primary itself (a1); \
             nearest remedy: ask for at most 2 with --shadows, or add a host in another rack",
        ),
        (
            SIX,
            "a1 1 a2",
            "no: of the hosts named, 1 host cannot keep a shadow: 1 same rack as the primary (a2 in ra); \
             nearest remedy: name other hosts with --on, or leave the choice to the manager",
        ),
        (
            SIX,
            "a1 2 b1 zz",
            "no: of the hosts named, 1 host cannot keep a shadow: 1 unknown (zz); \
             nearest remedy: name other hosts with --on, or leave the choice to the manager",
        ),
        (
            "p ra 9000
             q ra 9000
             r rb 512
             s rc 9000 down",
            "p 1",
            "no: 1 shadow wanted, 0 possible in 3 racks; 4 hosts not: 1 down (s), 1 no memory (needs 1088 MiB, r has \
             512), 1 same rack as the primary (q in ra), 1 the primary itself (p); nearest remedy: free 576 MiB on r",
        ),
        (
            "p ra 9000
             s rc 9000 silent",
            "p 1",
            "no: 1 shadow wanted, 0 possible in 2 racks; 2 hosts not: 1 agent silent (s), 1 the primary itself (p); \
             nearest remedy: bring back s",
        ),
        (
            "p ra 9000
             s rc 9000 up refused",
            "p 1",
            "no: 1 shadow wanted, 0 possible in 2 racks; 2 hosts not: 1 refused it (s: no KVM), 1 the primary itself \
             (p); nearest remedy: add a host in another rack",
        ),
    ] {
        assert_eq!(choose(hosts, request), expected, "{request}");
    }
}

#[test]
fn a_choice_does_not_depend_on_the_order_of_hosts() {
    let mut lines: Vec<_> = SIX.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    lines.reverse();
    assert_eq!(choose(&lines.join("\n"), "a1 2"), "b2 c1");
}

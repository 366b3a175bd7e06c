//! The checker against the benchmark's reference checker, on a plan of the instance `XS-tight-1`.

use placement::checker::{Audit, audit, check};
use placement::instance::{self, Plan};
use placement::solver::{OneByOne, Options, Stage, solve};

const INSTANCE: &[u8] = include_bytes!("data/xs-tight.json");
const PLAN: &[u8] = include_bytes!("data/xs-tight.plan.json");

#[test]
fn both_find_the_same() {
    let instance = instance::parse(INSTANCE).unwrap();
    let plan = Plan::parse(PLAN, &instance).unwrap();
    let report = check(&instance, &plan).unwrap();
    assert!(report.is_feasible(), "{:?}", report.examples);
    let terms = report.terms;
    assert_eq!(
        [terms.unplaced, terms.mem, terms.far, terms.cpu, terms.net, terms.churn, terms.balance],
        REFERENCE_TERMS
    );
    assert_eq!((report.copies, report.unplaced), (144, REFERENCE_UNPLACED));
    let audit = audit(&instance, &plan, usize::MAX).unwrap();
    assert_eq!(audit, Audit { audited: REFERENCE_UNPLACED, ..Audit::default() });
}

/// The proven bound is 133.62 million; the issue asks for at most 1 % above it.
#[test]
fn a_tight_instance_is_solved_to_within_a_percent_of_its_bound() {
    let instance = instance::parse(INSTANCE).unwrap();
    let mut stages = Vec::new();
    let outcome = solve(&instance, &Options::default(), &OneByOne, &mut |stage| stages.push(stage));
    assert!(outcome.objective >= 133_620_000, "{}: better than what is possible", outcome.objective);
    assert!(outcome.objective <= 133_620_000 / 100 * 101, "{}", outcome.objective);
    assert_eq!(stages.first(), Some(&Stage::Ready));
    let last = Stage::Placed { objective: outcome.objective, unplaced: outcome.unplaced };
    assert_eq!(stages.last(), Some(&last));
}

#[test]
fn bad_instances_are_refused_with_place_and_reason() {
    let text = std::str::from_utf8(INSTANCE).unwrap();
    let cases = [
        ("\"format\":\"shadow-place/1\"", "\"format\":\"shadow-place/2\"", "format: is \"shadow-place/2\""),
        (
            "\"rooms\":[{\"region\":0",
            "\"rooms\":[{\"region\":1",
            "rooms[0].region: refers to region 1, but there are 1",
        ),
        ("\"hosts\":[{\"rack\":0", "\"hosts\":[{\"rack\":8", "hosts[0].rack: refers to rack 8, but there are 8"),
        ("\"state\":\"up\"", "\"state\":\"open\"", "unknown variant `open`"),
        ("\"cpu_cap\":", "\"cpu_cap\":-", "hosts[0].cpu_cap: -"),
        ("\"cpu_cap\":", "\"cpu_cap\":1,\"cpu_top\":", "hosts[0].cpu: "),
        ("\"vms\":[{\"p\":", "\"vms\":[{\"p\":99", "vms[0].p: refers to host 99"),
        ("\"copies\":[{\"t\":", "\"copies\":[{\"t\":3", "vms[0].copies[0].t: refers to tier 3"),
        ("\"div\":\"rack\"", "\"div\":\"power\"", "div: has to be rack, room or region"),
        ("\"cur\":-1", "\"cur\":8", "cur: 8 is outside -1 to 7"),
        ("\"mem_cost\":10", "\"mem_cost\":9999999999999999", "hosts[0].mem_cost: 9999999999999999 is outside"),
        ("\"need\":0,\"avoid\":0", "\"need\":3,\"avoid\":1", "needs and avoids the same labels (0x1)"),
        ("\"survive\":[\"rack\"", "\"survive\":[\"luck\"", "line 1 column"),
    ];
    for (from, to, reason) in cases {
        assert!(text.contains(from), "{from}");
        let error = instance::parse(text.replacen(from, to, 1).as_bytes()).unwrap_err().to_string();
        assert!(error.contains(reason), "{to}: {error}");
    }
    assert!(instance::parse(b"").is_err() && instance::parse(&INSTANCE[..5000]).is_err());
}

/// What `bench.py check` prints of this plan: unplaced, mem, far, cpu, net, churn, balance.
const REFERENCE_TERMS: [i64; 7] = [130_940_160, 11_238_718, 951_324, 1_526_080, 2_126_200, 0, 2_784_500];
const REFERENCE_UNPLACED: usize = 22;

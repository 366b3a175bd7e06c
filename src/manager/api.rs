//! The REST API of the fleet: one function, used by the manager's own unix socket and for calls that agents forward.

use std::collections::BTreeSet;
use std::time::Duration;

use placement::fleet::{MAX_SHADOWS, Policy};
use placement::guardian::{Guest, GuestPlan, INTERVAL_MS, Phase, Reply, Request, Wish};
use placement::{Epoch, HostName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::core::State;
use super::links::CallError;
use super::planner::Draft;
use super::{Manager, translate};
use crate::api::control::{Command, Done, GuestNeeds};
use crate::api::percent;
use crate::api::types::{
    ApiError, DEFAULT_INTERVAL_MS, EnableRequest, GuestState, MoveReport, MoveRequest, PolicyRequest, PolicyView,
    ShadowEpochs, VerifyShadow,
};

/// Longest wait for new events, milliseconds.
pub const MAX_WAIT_MS: u64 = 30_000;
const MAX_EVENTS: u32 = 1_000;
const DEFAULT_EVENTS: u32 = 200;
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(10);
const EPOCHS_TIMEOUT: Duration = Duration::from_secs(10);
const MOVE_TIMEOUT: Duration = Duration::from_secs(60);
const DISABLE_TIMEOUT: Duration = Duration::from_secs(30);
const VERIFY_TIMEOUT: Duration = Duration::from_secs(120);

impl Manager {
    /// Answers one call. `path` begins with `/v1/` and may have a query. -> HTTP status, body
    pub async fn api(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        match self.route(method, path, body).await {
            Ok(answer) => (200, answer),
            Err(error) => failure(&error),
        }
    }

    async fn route(&self, method: &str, path: &str, body: Value) -> Result<Value, ApiError> {
        let (path, query) = match path.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (path, None),
        };
        let segments: Vec<String> = path
            .trim_start_matches('/')
            .split('/')
            .map(|segment| percent::decode(segment).ok_or_else(|| invalid(format!("{segment:?} is not UTF-8"))))
            .collect::<Result<_, _>>()?;
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        match (method, segments.as_slice()) {
            ("GET", ["v1", "hosts"]) => self.read(|state| to_json(&state.host_views())).await?,
            ("GET", ["v1", "guests"]) => self.read(|state| to_json(&state.guest_views())).await?,
            ("POST", ["v1", "guests"]) => self.enable(parse(body)?).await,
            ("GET", ["v1", "guests", domain]) => {
                self.with_guest(domain, |state, guest| to_json(&state.guest_view(guest))).await?
            }
            ("DELETE", ["v1", "guests", domain]) => self.disable(domain).await,
            ("POST", ["v1", "guests", domain, "promote"]) => self.promote(domain, parse_or_default(body)?).await,
            ("POST", ["v1", "guests", domain, "switchover"]) => self.switch_over(domain, parse_or_default(body)?).await,
            ("POST", ["v1", "guests", domain, "verify"]) => self.verify(domain).await,
            ("GET", ["v1", "guests", domain, "policy"]) => self.policy(domain, None).await,
            ("POST", ["v1", "guests", domain, "policy"]) => self.policy(domain, Some(parse(body)?)).await,
            ("GET", ["v1", "plan"]) => self.plan(query).await,
            ("GET", ["v1", "guests", domain, "epochs"]) => to_json(&self.epochs(domain).await?),
            ("GET", ["v1", "events"]) => self.events(query).await,
            (
                _,
                ["v1", "hosts" | "guests" | "events" | "plan"]
                | ["v1", "guests", _]
                | ["v1", "guests", _, "promote" | "switchover" | "verify" | "policy" | "epochs"],
            ) => Err(ApiError::new("method-not-allowed", format!("{method} is not possible on {path}"))),
            _ => Err(ApiError::new("not-found", format!("the API has no {path}"))),
        }
    }

    /// Finds a guest by name or UUID and looks at it.
    async fn with_guest<T: Send + 'static>(
        &self,
        domain: &str,
        look: impl FnOnce(&State, &Guest) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let domain = domain.to_owned();
        self.read(move |state| Ok(look(state, find(state, &domain)?))).await?
    }

    async fn enable(&self, request: EnableRequest) -> Result<Value, ApiError> {
        let (host, found) = self.find_domain(&request.domain, request.host.as_deref()).await?;
        let id = translate::guest_id(&found.uuid);
        let wish = self.wish(request, host, found)?;
        self.request(Request::Enable(wish), DISABLE_TIMEOUT).await?;
        self.with_guest(id.as_str(), |state, guest| to_json(&state.guest_view(guest))).await?
    }

    /// A domain where it runs. Shadows are domains of the same name and UUID, so one that is known is looked for there
    /// first, and never on hosts of its shadows.
    async fn find_domain(&self, domain: &str, here: Option<&str>) -> Result<(HostName, Found), ApiError> {
        let known = self.with_guest(domain, |_, guest| guest.plan.clone()).await;
        match known {
            Ok(plan) => match self.describe(&plan.primary, plan.id.as_str()).await {
                Ok(found) if found.running || plan.phase == Phase::Steady => Ok((plan.primary, found)),
                Err(error) if plan.phase == Phase::Steady => Err(error),
                Ok(_) | Err(_) => self.locate(plan.id.as_str(), None, &plan.seats).await,
            },
            Err(_) => self.locate(domain, here, &BTreeSet::new()).await,
        }
    }

    /// What is asked for, with what the guest's policy says of what is not.
    fn wish(&self, request: EnableRequest, host: HostName, found: Found) -> Result<Wish, ApiError> {
        let Found { uuid, domain, memory_bytes, running, mut refusals, output_refusals, needs, policy } = found;
        if request.consistency.is_output_commit() {
            refusals.extend(output_refusals);
        }
        if !running {
            return Err(ApiError::new(
                "not-running",
                format!("domain {domain} on {host} is not running; start it with `virsh start {domain}`"),
            ));
        }
        if !refusals.is_empty() {
            return Err(ApiError::new("refused", format!("domain {domain} on {host}: {}", refusals.join("; "))));
        }
        let policy = read_policy(&domain, &policy)?;
        let named = u32::try_from(request.on.len()).unwrap_or(u32::MAX);
        let shadows = request.shadows.unwrap_or_else(|| (policy.shadows.len() as u32).max(named));
        if request.shadows.is_none() && shadows == 0 {
            let how = format!("give their number with --shadows, or change it with `virt-shadow policy {domain}`");
            return Err(ApiError::new("refused", format!("the policy of domain {domain} asks for no shadows; {how}")));
        }
        let bounds = (*INTERVAL_MS.start(), *INTERVAL_MS.end());
        let by_policy = policy.interval_ms.map(|ms| u64::from(ms).clamp(bounds.0, bounds.1));
        Ok(Wish {
            guest: translate::guest_id(&uuid),
            domain,
            host,
            memory_mib: memory_bytes.div_ceil(1 << 20),
            needs: translate::needs(&needs),
            policy: policy.resized(shadows.min(MAX_SHADOWS) as usize),
            shadows,
            interval_ms: request.interval_ms.or(by_policy).unwrap_or(DEFAULT_INTERVAL_MS),
            budget: request.budget,
            mirror_mib: request.mirror_mib,
            consistency: request.consistency,
            keep: request.keep,
            on: request.on.into_iter().map(HostName::from).collect(),
        })
    }

    /// Shows what a domain asks of its shadows, after it was changed if there is something to change.
    async fn policy(&self, domain: &str, change: Option<PolicyRequest>) -> Result<Value, ApiError> {
        if change.is_none()
            && let Ok(plan) = self.with_guest(domain, |_, guest| guest.plan.clone()).await
        {
            // Its host need not be asked.
            let (uuid, host, policy) = (plan.id.to_string(), plan.primary.to_string(), plan.policy.to_string());
            return to_json(&PolicyView { domain: plan.domain, uuid, host, protected: true, policy });
        }
        let (host, found) = self.find_domain(domain, None).await?;
        let id = translate::guest_id(&found.uuid);
        let known = self.with_guest(id.as_str(), |_, guest| guest.plan.policy.clone()).await.ok();
        let (protected, domain) = (known.is_some(), found.domain);
        let mut policy = match (known, &change) {
            (Some(policy), _) => policy,
            // What cannot be understood can be replaced.
            (None, Some(PolicyRequest { policy: Some(_), .. })) => Policy::default(),
            (None, _) => read_policy(&domain, &found.policy)?,
        };
        if let Some(change) = change {
            let bad = |error: placement::fleet::FileError| invalid(format!("policy of domain {domain}, {error}"));
            let bad_key = |error: placement::fleet::FileError| invalid(format!("policy of {domain}: {}", error.reason));
            if let Some(text) = &change.policy {
                policy = Policy::parse(text).map_err(bad)?;
            }
            policy = policy.changed(&change.set).map_err(bad_key)?;
            if protected {
                let request = Request::SetPolicy { guest: id.clone(), policy: policy.clone() };
                self.request(request, DISABLE_TIMEOUT).await?;
            }
            let order = Command::SetPolicy { domain: id.to_string(), policy: policy.to_string() };
            self.call(&host, order, DESCRIBE_TIMEOUT).await?;
        }
        let uuid = id.to_string();
        to_json(&PolicyView { domain, uuid, host: host.to_string(), protected, policy: policy.to_string() })
    }

    /// Shows a plan before it is made: for all that is protected, or for one domain, protected or not.
    async fn plan(&self, query: Option<&str>) -> Result<Value, ApiError> {
        let [domain, shadows, explain, host] = percent::query(query, ["domain", "shadows", "explain", "host"])
            .map_err(|key| invalid(format!("plan knows domain, shadows, explain and host, not {key:?}")))?;
        let explain = match explain.as_deref() {
            None | Some("0" | "false") => false,
            Some("" | "1" | "true") => true,
            Some(other) => return Err(invalid(format!("explain: {other:?} is neither 0 nor 1"))),
        };
        let shadows = match shadows.map(|text| text.parse::<u32>().map_err(|_| text)) {
            None => None,
            Some(Ok(number)) if (1..=MAX_SHADOWS).contains(&number) => Some(number),
            Some(_) => return Err(invalid(format!("shadows: has to be a number from 1 to {MAX_SHADOWS}"))),
        };
        let Some(domain) = domain else {
            if shadows.is_some() {
                return Err(invalid("shadows: of which domain?".into()));
            }
            let draft = self.read(|state| Draft::of(state, None)).await?;
            return to_json(&draft.view(None, explain).await?);
        };
        let known = self.with_guest(&domain, |_, guest| guest.plan.clone()).await;
        let (id, wish) = match known {
            Ok(plan) => (plan.id.clone(), shadows.map(|shadows| wish_again(plan, shadows))),
            Err(_) => {
                let (on, found) = self.find_domain(&domain, host.as_deref()).await?;
                let request = EnableRequest { shadows, ..EnableRequest::of(&domain) };
                let wish = self.wish(request, on, found)?;
                (wish.guest.clone(), Some(wish))
            }
        };
        let draft = self.read(move |state| Draft::of(state, wish)).await?;
        let view = draft.view(Some(id), explain).await?;
        if view.guests.is_empty() {
            let message = format!("guest {domain} is not at rest, or its host is not in the topology file");
            return Err(ApiError::new("conflict", message));
        }
        to_json(&view)
    }

    /// The host that `domain` is on: `here`, where it was asked for, or else the only one that has it.
    /// Hosts in `not_on` have copies that do not count.
    async fn locate(
        &self,
        domain: &str,
        here: Option<&str>,
        not_on: &BTreeSet<HostName>,
    ) -> Result<(HostName, Found), ApiError> {
        let mut hosts = self.links.connected();
        hosts.retain(|host| !not_on.contains(host));
        if let Some(here) = here.map(HostName::from) {
            match self.describe(&here, domain).await {
                Ok(found) if found.running => return Ok((here, found)),
                Err(error) if error.code != "not-found" => return Err(error),
                // It may be defined here and run elsewhere; if not, this is what is told.
                Ok(found) => match self.describe_on(hosts.iter().filter(|host| **host != here), domain).await.pop() {
                    Some((host, Ok(elsewhere))) if elsewhere.running && elsewhere.uuid == found.uuid => {
                        return Ok((host, elsewhere));
                    }
                    _ => return Ok((here, found)),
                },
                Err(_) => hosts.retain(|host| *host != here),
            }
        }
        let mut found = Vec::new();
        let mut silent = Vec::new();
        for (host, result) in self.describe_on(hosts.iter(), domain).await {
            match result {
                Ok(what) => found.push((host, what)),
                Err(error) if error.code == "not-found" => (),
                Err(error) => silent.push(format!("{host}: {}", error.message)),
            }
        }
        if found.iter().any(|(_, what)| what.running) {
            found.retain(|(_, what)| what.running);
        }
        let names: Vec<_> = found.iter().map(|(host, _)| host.to_string()).collect();
        match found.pop() {
            Some(one) if found.is_empty() => Ok(one),
            Some(_) => Err(ApiError::new(
                "conflict",
                format!("domain {domain} is on {}; enable it on the host that is meant", names.join(", ")),
            )),
            None if silent.is_empty() => Err(ApiError::new(
                "not-found",
                format!("no domain {domain} on any of the {} connected hosts", self.links.connected().len()),
            )),
            None => Err(ApiError::new("unavailable", format!("domain {domain} was not found; {}", silent.join("; ")))),
        }
    }

    async fn describe_on<'a>(
        &self,
        hosts: impl Iterator<Item = &'a HostName>,
        domain: &str,
    ) -> Vec<(HostName, Result<Found, ApiError>)> {
        let mut asked = JoinSet::new();
        for host in hosts.cloned() {
            let (manager, domain) = (self.clone(), domain.to_owned());
            asked.spawn(async move {
                let result = manager.describe(&host, &domain).await;
                (host, result)
            });
        }
        let mut answers = asked.join_all().await;
        answers.sort_by(|(a, _), (b, _)| a.cmp(b));
        // Those that have it come last, running ones at the very end.
        answers.sort_by_key(|(_, result)| result.as_ref().map_or(0, |found| 1 + u8::from(found.running)));
        answers
    }

    async fn describe(&self, host: &HostName, domain: &str) -> Result<Found, ApiError> {
        match self.call(host, Command::Describe { domain: domain.into() }, DESCRIBE_TIMEOUT).await? {
            Done::Described { uuid, domain, memory_bytes, running, refusals, output_refusals, needs, policy } => {
                Ok(Found { uuid, domain, memory_bytes, running, refusals, output_refusals, needs, policy })
            }
            other => Err(strange(host, &other)),
        }
    }

    async fn call(&self, host: &HostName, command: Command, timeout: Duration) -> Result<Done, ApiError> {
        self.links.call(host, command, timeout).await.map_err(|error| match error {
            CallError::Refused(error) => error,
            CallError::Unknown(why) => ApiError::new("unavailable", why),
        })
    }

    async fn disable(&self, domain: &str) -> Result<Value, ApiError> {
        let (id, domain) =
            self.with_guest(domain, |_, guest| (guest.plan.id.clone(), guest.plan.domain.clone())).await?;
        let reply = self.request(Request::Disable { guest: id.clone() }, DISABLE_TIMEOUT).await?;
        let message = if let Reply::Disabled { message } = reply { message } else { String::new() };
        Ok(json!({ "domain": domain, "uuid": id.to_string(), "message": message }))
    }

    async fn promote(&self, domain: &str, request: MoveRequest) -> Result<Value, ApiError> {
        let guest = self.with_guest(domain, |_, guest| guest.plan.id.clone()).await?;
        let mut to = request.to.map(HostName::from);
        let back_to = request.epoch.map(Epoch);
        if let Some(epoch) = request.epoch {
            to = Some(self.hold_epoch(domain, guest.as_str(), to.as_ref(), epoch).await?);
        }
        self.moved(domain, Request::Promote { guest, to, force: request.force, back_to }).await
    }

    /// What each shadow of a guest could be promoted from.
    async fn epochs(&self, domain: &str) -> Result<Vec<ShadowEpochs>, ApiError> {
        let plan = self.with_guest(domain, |_, guest| guest.plan.clone()).await?;
        let mut asked = JoinSet::new();
        for host in plan.seats {
            let (manager, uuid) = (self.clone(), plan.id.to_string());
            asked.spawn(async move {
                let (epochs, problem) = match manager.call(&host, Command::Epochs { uuid }, EPOCHS_TIMEOUT).await {
                    Ok(Done::Epochs { epochs }) => (epochs, String::new()),
                    Ok(other) => (Vec::new(), strange(&host, &other).message),
                    Err(error) => (Vec::new(), error.message),
                };
                ShadowEpochs { host: host.to_string(), problem, epochs }
            });
        }
        let mut shadows = asked.join_all().await;
        shadows.sort_by(|a, b| a.host.cmp(&b.host));
        Ok(shadows)
    }

    /// Finds a shadow that keeps this epoch, and has it kept until the promotion is done: before anything is stopped.
    async fn hold_epoch(
        &self,
        domain: &str,
        uuid: &str,
        to: Option<&HostName>,
        epoch: u64,
    ) -> Result<HostName, ApiError> {
        let shadows = self.epochs(domain).await?;
        let has_it = |shadow: &&ShadowEpochs| {
            to.is_none_or(|to| to.as_str() == shadow.host) && shadow.epochs.iter().any(|kept| kept.epoch == epoch)
        };
        let mut why = Vec::new();
        for shadow in shadows.iter().filter(has_it) {
            let host = HostName::from(&*shadow.host);
            let hold = Command::HoldEpoch { uuid: uuid.into(), epoch, hold_ms: MOVE_TIMEOUT.as_millis() as u64 };
            // All that leads back there is read.
            match self.call(&host, hold, MOVE_TIMEOUT).await {
                Ok(_) => return Ok(host),
                Err(error) => why.push(error.message),
            }
        }
        if why.is_empty() {
            why = shadows.iter().map(describe_epochs).collect();
        }
        let message = format!(
            "epoch {epoch} of guest {domain} is not kept any more, never was, or is damaged: {}",
            why.join("; ")
        );
        Err(ApiError::new("not-found", message))
    }

    async fn switch_over(&self, domain: &str, request: MoveRequest) -> Result<Value, ApiError> {
        if request.epoch.is_some() {
            return Err(invalid(
                "a switchover loses nothing, so it cannot go back; that is what promote is for".into(),
            ));
        }
        if request.force {
            return Err(invalid("a switchover cannot be forced; that is what promote is for".into()));
        }
        let guest = self.with_guest(domain, |_, guest| guest.plan.id.clone()).await?;
        self.moved(domain, Request::Switchover { guest, to: request.to.map(HostName::from) }).await
    }

    async fn moved(&self, domain: &str, request: Request) -> Result<Value, ApiError> {
        match self.request(request, MOVE_TIMEOUT).await? {
            Reply::Moved { from, to, term, epoch, epochs_lost, took_us, pause_us } => to_json(&MoveReport {
                domain: domain.into(),
                from: from.to_string(),
                to: to.to_string(),
                term: term.0,
                epoch: epoch.0,
                epochs_lost,
                took_ms: took_us as f64 / 1e3,
                pause_ms: pause_us.map(|us| us as f64 / 1e3),
            }),
            Reply::Enabled | Reply::PolicySet | Reply::Disabled { .. } => {
                Err(ApiError::new("failed", "the manager answered another question"))
            }
        }
    }

    pub(super) async fn verify(&self, domain: &str) -> Result<Value, ApiError> {
        let (id, host, state, reason) = self
            .with_guest(domain, |state, guest| {
                let view = state.guest_view(guest);
                (guest.plan.id.clone(), guest.plan.primary.clone(), view.state, view.reason)
            })
            .await?;
        if !matches!(state, GuestState::Protected | GuestState::Degraded) {
            let message = format!("guest {domain} has no shadow to compare with: {reason}");
            return Err(ApiError::new("conflict", message));
        }
        match self.call(&host, Command::Verify { uuid: id.to_string() }, VERIFY_TIMEOUT).await? {
            Done::Verified(report) => {
                for shadow in report.shadows.iter().filter(|shadow| shadow.pages_compared > 0 && !shadow.equal) {
                    self.distrust(&report.domain, &id.to_string(), shadow).await;
                }
                to_json(&report)
            }
            other => Err(strange(&host, &other)),
        }
    }

    /// A shadow that differs from its guest must not be promoted.
    async fn distrust(&self, domain: &str, uuid: &str, shadow: &VerifyShadow) {
        let host = HostName::from(&*shadow.host);
        let command = Command::DistrustShadow { uuid: uuid.into(), difference: shadow.difference.clone() };
        if let Err(error) = self.call(&host, command, EPOCHS_TIMEOUT).await {
            tracing::error!(domain, %host, %error, "a shadow that differs from its guest may be promoted; drop it");
        }
    }

    async fn events(&self, query: Option<&str>) -> Result<Value, ApiError> {
        let [since, wait_ms, limit] = percent::query(query, ["since", "wait_ms", "limit"])
            .map_err(|key| invalid(format!("events know since, wait_ms and limit, not {key:?}")))?;
        let number = |name: &str, value: Option<String>, default: u64| match value {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| invalid(format!("{name}: {text:?} is not a number"))),
        };
        let since = number("since", since, 0)?;
        let wait = Duration::from_millis(number("wait_ms", wait_ms, 0)?.min(MAX_WAIT_MS));
        let limit = number("limit", limit, DEFAULT_EVENTS.into())?.clamp(1, MAX_EVENTS.into()) as u32;
        let mut newest = self.newest_event.clone();
        // Whether it came or the wait is over: what there is gets answered.
        let _ = tokio::time::timeout(wait, newest.wait_for(|newest| *newest > since)).await;
        let events = self.read(move |state| state.store.events(since, limit)).await?;
        to_json(&events.map_err(|error| ApiError::new("failed", error.to_string()))?)
    }
}

/// One shadow's epochs in a few words.
fn describe_epochs(shadow: &ShadowEpochs) -> String {
    let host = &shadow.host;
    match (shadow.epochs.first(), shadow.epochs.last()) {
        (Some(first), Some(last)) => {
            format!("{host} has {} from {} to {}", shadow.epochs.len(), first.epoch, last.epoch)
        }
        _ if shadow.problem.is_empty() => format!("{host} has none"),
        _ => format!("{host}: {}", shadow.problem),
    }
}

/// A domain on a host.
struct Found {
    uuid: String,
    domain: String,
    memory_bytes: u64,
    running: bool,
    refusals: Vec<String>,
    output_refusals: Vec<String>,
    needs: GuestNeeds,
    policy: String,
}

/// What is kept with the definition of a domain.
fn read_policy(domain: &str, text: &str) -> Result<Policy, ApiError> {
    Policy::parse(text).map_err(|error| {
        let how = format!("set another one with `virt-shadow policy {domain} --set FILE`, or --clear it");
        invalid(format!("policy in the metadata of domain {domain}, {error}; {how}"))
    })
}

/// The same guest with another number of shadows.
fn wish_again(plan: GuestPlan, shadows: u32) -> Wish {
    Wish {
        guest: plan.id,
        domain: plan.domain,
        host: plan.primary,
        memory_mib: plan.memory_mib,
        needs: plan.needs,
        policy: plan.policy.resized(shadows as usize),
        shadows,
        interval_ms: plan.interval_ms,
        budget: plan.budget,
        mirror_mib: plan.mirror_mib,
        consistency: plan.consistency,
        keep: plan.keep,
        on: Vec::new(),
    }
}

fn find<'a>(state: &'a State, key: &str) -> Result<&'a Guest, ApiError> {
    if let Some(guest) = state.guardian.guest(&translate::guest_id(key)) {
        return Ok(guest);
    }
    let mut named = state.guardian.guests().filter(|guest| guest.plan.domain == key);
    match (named.next(), named.next()) {
        (Some(guest), None) => Ok(guest),
        (Some(_), Some(_)) => {
            Err(ApiError::new("conflict", format!("several protected guests are named {key}; give the UUID")))
        }
        (None, _) => Err(ApiError::new(
            "not-found",
            format!("no protected guest {key}; see `virt-shadow list`, or protect it with `virt-shadow enable {key}`"),
        )),
    }
}

/// Status and body of an answer that is not 2xx.
pub(crate) fn failure(error: &ApiError) -> (u16, Value) {
    (error.http_status(), json!({ "code": error.code, "message": error.message }))
}

fn invalid(message: String) -> ApiError {
    ApiError::new("invalid", message)
}

fn strange(host: &HostName, done: &Done) -> ApiError {
    ApiError::new("failed", format!("agent of {host} answered something else than was asked: {done:?}"))
}

fn parse<T: DeserializeOwned>(body: Value) -> Result<T, ApiError> {
    // A list would be taken for the fields in their order.
    if !body.is_object() {
        return Err(invalid("request: expected a JSON object".into()));
    }
    serde_json::from_value(body).map_err(|error| invalid(format!("request: {error}")))
}

fn parse_or_default<T: DeserializeOwned + Default>(body: Value) -> Result<T, ApiError> {
    if body.is_null() { Ok(T::default()) } else { parse(body) }
}

fn to_json<T: Serialize>(value: &T) -> Result<Value, ApiError> {
    serde_json::to_value(value).map_err(|error| ApiError::new("failed", format!("answer: {error}")))
}

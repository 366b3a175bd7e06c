//! What the manager may ask of an agent. Repeating a command is harmless; a lower term than the one known is
//! refused.

use std::sync::Arc;
use std::time::Duration;

use crate::api::control::{Command, Done, GuestEvent, GuestNeeds, GuestRecord, Role, ShadowTarget};
use crate::api::link::{CommandHandler, StartRefusal};
use crate::api::types::{ApiError, Budget, Consistency, Keep};
use crate::hypervisor::xml::{self, GuestDefinition};
use crate::hypervisor::{Domain, DomainState, HypervisorError, XmlKind};
use crate::standby::is_uuid;
use crate::transport;

use super::primary::{self, Primary, PrimarySpec};
use super::records::RecordError;
use super::{Agent, doctor, inventory, lock};

/// Namespace of a guest's policy in its domain's metadata.
const POLICY_NAMESPACE: &str = "urn:virt-shadow:policy:1";
/// How long an order waits for a libvirtd that is starting; less than the manager waits for the answer.
const LIBVIRT_WITHIN: Duration = Duration::from_secs(4);

impl CommandHandler for Agent {
    async fn handle(&self, command: Command) -> Result<Done, ApiError> {
        if let Some(uuid) = uuid_of(&command).filter(|uuid| !is_uuid(uuid)) {
            return Err(ApiError::new("invalid", format!("{uuid:?} is not a UUID")));
        }
        match command {
            Command::Describe { domain } => self.describe(domain, None).await,
            Command::SetPolicy { domain, policy } => self.describe(domain, Some(policy)).await,
            Command::Protect { uuid, domain, term, interval_ms, budget, mirror_mib, consistency, policy, shadows } => {
                self.keep_policy(&uuid, policy).await;
                self.protect(uuid, domain, term, (interval_ms, budget), (mirror_mib, consistency), shadows).await
            }
            Command::Release { uuid } => self.release(uuid).await,
            Command::AcceptShadow { uuid, domain, term, primary, keep } => {
                self.accept_shadow(uuid, domain, term, primary, keep).await
            }
            Command::DropShadow { uuid } => self.drop_shadow(uuid).await,
            Command::Promote { uuid, term, after_epoch, back_to } => {
                self.promote(uuid, term, after_epoch, back_to).await
            }
            Command::Epochs { uuid } => {
                let shadows = Arc::clone(&self.shadows);
                Ok(Done::Epochs { epochs: blocking(move || shadows.epochs(&uuid)).await? })
            }
            Command::HoldEpoch { uuid, epoch, hold_ms } => {
                let shadows = Arc::clone(&self.shadows);
                blocking(move || shadows.hold_epoch(&uuid, epoch, hold_ms)).await??;
                Ok(Done::Nothing)
            }
            Command::DistrustShadow { uuid, difference } => {
                let (shadows, id) = (Arc::clone(&self.shadows), uuid.clone());
                let message = blocking(move || shadows.distrust(&id, &difference)).await??;
                let (level, name) = ("alarm".into(), "shadow-damaged".into());
                (self.context.report)(GuestEvent::Notice { uuid: Some(uuid), level, name, message });
                Ok(Done::Nothing)
            }
            Command::FinalCut { uuid, to } => {
                let answer = self.ask_primary(&uuid, |primary| primary.final_cut(to))?.await?;
                Ok(Done::FinalCut { epoch: answer.0, paused_for_us: answer.1 })
            }
            Command::UndoFinalCut { uuid, term } => {
                self.record(&uuid, None, term, Role::Primary)?;
                match self.ask_primary(&uuid, |primary| primary.undo_final_cut(term)) {
                    Ok(answer) => answer.await?,
                    // This agent was restarted and has not taken the guest up again; it stands still meanwhile.
                    Err(no_session) => self.resume_held(uuid, no_session).await?,
                }
                Ok(Done::Nothing)
            }
            Command::Retire { uuid, term } => self.retire(uuid, term).await,
            Command::Verify { uuid } => Ok(Done::Verified(self.ask_primary(&uuid, |primary| primary.verify())?.await?)),
            Command::Witness { addr, timeout_ms, uuid } => {
                let within = Duration::from_millis(timeout_ms.clamp(1, 10_000));
                let answers = blocking(move || transport::answers(addr, within)).await?;
                // After the attempts: their time counts as silence too.
                let stream_silent_ms = uuid.and_then(|uuid| self.shadows.silent_ms(&uuid));
                Ok(Done::Witnessed { answers, stream_silent_ms })
            }
            Command::ShadowStatus { uuid } => Ok(Done::Shadow { status: self.shadows.status(&uuid) }),
            Command::Doctor => {
                let (config, libvirt) = (self.config.clone(), Arc::clone(&self.libvirt));
                let connected = self.link.get().is_some_and(|link| *link.connected().borrow());
                Ok(Done::Doctor(blocking(move || doctor::examine(&config, &libvirt, connected)).await?))
            }
        }
    }

    fn may_start(&self, uuid: &str) -> Result<(), StartRefusal> {
        self.start_allowed(uuid)
    }
}

fn uuid_of(command: &Command) -> Option<&String> {
    match command {
        Command::Protect { uuid, .. }
        | Command::Release { uuid }
        | Command::AcceptShadow { uuid, .. }
        | Command::DropShadow { uuid }
        | Command::Promote { uuid, .. }
        | Command::Epochs { uuid }
        | Command::HoldEpoch { uuid, .. }
        | Command::DistrustShadow { uuid, .. }
        | Command::FinalCut { uuid, .. }
        | Command::UndoFinalCut { uuid, .. }
        | Command::Retire { uuid, .. }
        | Command::Verify { uuid }
        | Command::ShadowStatus { uuid } => Some(uuid),
        Command::Witness { uuid, .. } => uuid.as_ref(),
        Command::Describe { .. } | Command::SetPolicy { .. } | Command::Doctor => None,
    }
}

/// Runs what blocks (libvirt, files, joining threads) off the runtime.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| ApiError::new("failed", format!("the agent: {error}")))
}

impl From<RecordError> for ApiError {
    fn from(error: RecordError) -> Self {
        Self::new("failed", error.to_string())
    }
}

fn hypervisor_error(error: HypervisorError) -> ApiError {
    let code = match error {
        HypervisorError::NotFound { .. } => "not-found",
        HypervisorError::NotConnected { .. } => "unavailable",
        _ => "failed",
    };
    ApiError::new(code, error.to_string())
}

impl Agent {
    fn ask_primary<'a, F>(&self, uuid: &str, ask: impl FnOnce(super::primary::Asker) -> F) -> Result<F, ApiError>
    where
        F: Future + 'a,
    {
        let primaries = lock(&self.primaries);
        let primary = primaries.get(uuid).ok_or_else(|| {
            ApiError::new("not-found", format!("{} is not primary of guest {uuid}", self.config.host))
        })?;
        Ok(ask(primary.asker()))
    }

    /// Records a role; `domain` `None` keeps the name known.
    fn record(&self, uuid: &str, domain: Option<&str>, term: u64, role: Role) -> Result<(), ApiError> {
        let known = self.records.get(uuid).map(|record| record.domain).unwrap_or_default();
        let set = self.records.set_role(uuid, domain.unwrap_or(&known), term, role)?;
        set.map_err(|newer| self.term_is_over(uuid, term, newer))
    }

    fn term_is_over(&self, uuid: &str, term: u64, newer: u64) -> ApiError {
        let host = &self.config.host;
        ApiError::new("conflict", format!("{host} knows term {newer} of guest {uuid}; term {term} is over"))
    }

    /// Has libvirt keep a protected guest's policy with its definition. The manager has it as well, so a libvirt that
    /// cannot is no reason to leave the guest without shadows.
    async fn keep_policy(&self, uuid: &str, policy: String) {
        let (libvirt, guest) = (Arc::clone(&self.libvirt), uuid.to_owned());
        let kept = blocking(move || {
            let domain = libvirt.lookup(&guest)?;
            if policy_of(&domain)? == policy.trim() { Ok(()) } else { set_policy(&domain, &policy) }
        });
        match kept.await {
            Ok(Ok(()) | Err(HypervisorError::NotFound { .. })) => (),
            Ok(Err(error)) => tracing::warn!(uuid, "policy not kept with the definition: {error}"),
            Err(error) => tracing::warn!(uuid, "policy not kept with the definition: {error}"),
        }
    }

    /// What there is to know of a domain, after its policy has been set, if there is one to set.
    async fn describe(&self, domain: String, policy: Option<String>) -> Result<Done, ApiError> {
        let (libvirt, shadows) = (Arc::clone(&self.libvirt), Arc::clone(&self.shadows));
        blocking(move || {
            let hypervisor = libvirt.wait(LIBVIRT_WITHIN).map_err(hypervisor_error)?;
            let domain = hypervisor.lookup(&domain).map_err(hypervisor_error)?;
            if let Some(policy) = policy {
                set_policy(&domain, &policy).map_err(hypervisor_error)?;
            }
            let (state, _) = domain.state().map_err(hypervisor_error)?;
            let is_shadow = shadows.status(domain.uuid()).is_some();
            let running = matches!(state, DomainState::Running | DomainState::Paused) && !is_shadow;
            let kind = if running { XmlKind::Migratable } else { XmlKind::Inactive };
            let xml = domain.xml(kind).map_err(hypervisor_error)?;
            let definition =
                GuestDefinition::parse(&xml).map_err(|e| ApiError::new("failed", format!("{}: {e}", domain.name())))?;
            let mut refusals: Vec<String> = definition.refusals().iter().map(ToString::to_string).collect();
            let output_refusals = output_refusals(&domain, running).map_err(hypervisor_error)?;
            if running {
                let blockers = domain.migration_blockers().map_err(hypervisor_error)?;
                refusals.extend(blockers.into_iter().map(|reason| format!("QEMU: {reason}")));
                match crate::disk::mirror::check_sizes(&domain, &definition) {
                    Err(crate::disk::DiskProblem::Hypervisor(error)) => return Err(hypervisor_error(error)),
                    Err(unfit) if refusals.is_empty() => refusals.push(unfit.to_string()),
                    _ => {}
                }
                if !has_cut_command(&domain).map_err(hypervisor_error)? {
                    refusals.push("its QEMU lacks the command xen-save-devices-state: use a QEMU that has it".into());
                }
            }
            Ok(Done::Described {
                uuid: domain.uuid().into(),
                domain: domain.name().into(),
                memory_bytes: definition.memory_bytes,
                running,
                refusals,
                output_refusals,
                needs: GuestNeeds {
                    vcpus: definition.vcpus,
                    cpu_model: definition.cpu_model.map(|model| match model.strip_suffix("/host-passthrough") {
                        Some(_) => format!("{model}/{}", inventory::processor()),
                        None => model,
                    }),
                    machine_type: definition.machine_type,
                },
                policy: policy_of(&domain).map_err(hypervisor_error)?,
            })
        })
        .await?
    }

    async fn protect(
        &self,
        uuid: String,
        domain: String,
        term: u64,
        (interval_ms, budget): (u64, Budget),
        (mirror_mib, consistency): (u64, Consistency),
        shadows: Vec<ShadowTarget>,
    ) -> Result<Done, ApiError> {
        self.record(&uuid, Some(&domain), term, Role::Primary)?;
        let (promoted, guest) = (Arc::clone(&self.shadows), uuid.clone());
        blocking(move || promoted.wait_finished(&guest)).await?;
        let interval = Duration::from_millis(interval_ms.clamp(10, 60_000));
        let after_epoch = self.shadows.promoted_epoch(&uuid);
        let spec = PrimarySpec {
            uuid: uuid.clone(),
            domain,
            term,
            interval,
            budget,
            mirror_mib,
            consistency,
            shadows,
            after_epoch,
        };
        let mut primaries = lock(&self.primaries);
        match primaries.get(&uuid).filter(|primary| primary.is_running()) {
            Some(primary) => primary.update(spec),
            None => {
                let started = Primary::start(Arc::clone(&self.context), spec)
                    .map_err(|error| ApiError::new("failed", format!("cannot start a session: {error}")))?;
                primaries.insert(uuid, started);
            }
        }
        Ok(Done::Nothing)
    }

    async fn release(&self, uuid: String) -> Result<Done, ApiError> {
        let primary = lock(&self.primaries).remove(&uuid);
        let (libvirt, disk_dir, guest) = (Arc::clone(&self.libvirt), self.config.agent.disk_dir.clone(), uuid.clone());
        blocking(move || {
            if let Some(primary) = primary {
                primary.release();
                super::shadows::remove_images(&libvirt, &disk_dir, &guest);
            }
        })
        .await?;
        self.records.remove(&uuid)?;
        Ok(Done::Nothing)
    }

    async fn accept_shadow(
        &self,
        uuid: String,
        domain: String,
        term: u64,
        primary: String,
        keep: Keep,
    ) -> Result<Done, ApiError> {
        let record = GuestRecord {
            uuid: uuid.clone(),
            domain: domain.clone(),
            term,
            role: Role::Shadow,
            primary: Some(primary.clone()),
            keep,
            active: false,
        };
        self.records.set(record)?.map_err(|known| self.term_is_over(&uuid, term, known.term))?;
        if lock(&self.primaries).contains_key(&uuid) {
            self.stop_copy(uuid.clone(), term).await?;
        }
        let shadows = Arc::clone(&self.shadows);
        blocking(move || shadows.accept(&uuid, &domain, term, &primary, keep)).await??;
        Ok(Done::Nothing)
    }

    async fn drop_shadow(&self, uuid: String) -> Result<Done, ApiError> {
        let shadows = Arc::clone(&self.shadows);
        let guest = uuid.clone();
        blocking(move || shadows.drop_shadow(&guest)).await??;
        if self.records.get(&uuid).is_some_and(|record| record.role == Role::Shadow) {
            self.records.remove(&uuid)?;
        }
        Ok(Done::Nothing)
    }

    async fn promote(&self, uuid: String, term: u64, after_epoch: u64, back_to: Option<u64>) -> Result<Done, ApiError> {
        let shadows = Arc::clone(&self.shadows);
        let guest = uuid.clone();
        let promoted = blocking(move || shadows.promote(&guest, term, after_epoch, back_to)).await??;
        self.record(&uuid, None, term, Role::Primary)?;
        Ok(Done::Promoted { epoch: promoted.epoch, took_us: promoted.took_us })
    }

    async fn resume_held(&self, uuid: String, no_session: ApiError) -> Result<(), ApiError> {
        let (libvirt, run_dir) = (Arc::clone(&self.libvirt), self.config.run_dir.clone());
        blocking(move || {
            let domain = libvirt.lookup(&uuid).map_err(hypervisor_error)?;
            if !primary::is_held(&run_dir, &uuid) {
                return Err(no_session);
            }
            domain.resume().map_err(hypervisor_error)?;
            primary::forget_held(&run_dir, &uuid);
            Ok(())
        })
        .await?
    }

    async fn retire(&self, uuid: String, term: u64) -> Result<Done, ApiError> {
        // First: a start that is under way asks the hook, and ending that copy waits for it.
        self.record(&uuid, None, term, Role::Retired)?;
        self.stop_copy(uuid.clone(), term).await?;
        // It may be a shadow that could not take over.
        let (shadows, guest) = (Arc::clone(&self.shadows), uuid.clone());
        blocking(move || shadows.drop_shadow(&guest)).await??;
        Ok(Done::Nothing)
    }

    /// Ends the copy of a guest that another host runs by now.
    async fn stop_copy(&self, uuid: String, term: u64) -> Result<(), ApiError> {
        let primary = lock(&self.primaries).remove(&uuid);
        let libvirt = Arc::clone(&self.libvirt);
        let is_shadow = self.shadows.status(&uuid).is_some();
        blocking(move || {
            drop(primary);
            if is_shadow {
                return Ok(());
            }
            let domain = match libvirt.lookup(&uuid) {
                Ok(domain) => domain,
                Err(HypervisorError::NotFound { .. }) => return Ok(()),
                Err(error) => return Err(hypervisor_error(error)),
            };
            if domain.is_active().map_err(hypervisor_error)? {
                tracing::warn!(
                    guest = domain.name(),
                    term,
                    "another host runs this guest by now; ending the copy here"
                );
                domain.destroy().map_err(hypervisor_error)?;
            }
            Ok(())
        })
        .await?
    }
}

/// Why the output of a running domain cannot be held.
fn output_refusals(domain: &Domain, running: bool) -> Result<Vec<String>, HypervisorError> {
    if !running {
        return Ok(Vec::new());
    }
    let xml = domain.xml(XmlKind::Live)?;
    let nics = xml::output_nics(&xml).unwrap_or_default();
    Ok(nics.iter().filter_map(|nic| nic.refusal.as_ref()).map(ToString::to_string).collect())
}

/// What is kept with the definition of a domain.
fn policy_of(domain: &Domain) -> Result<String, HypervisorError> {
    let element = domain.metadata(POLICY_NAMESPACE)?.unwrap_or_default();
    // What cannot be read was not written by us; it says nothing.
    Ok(if element.is_empty() { element } else { xml::policy_text(&element).unwrap_or_default() })
}

fn set_policy(domain: &Domain, policy: &str) -> Result<(), HypervisorError> {
    let element = (!policy.trim().is_empty()).then(|| xml::policy_element(policy.trim())).transpose();
    let Ok(element) = element else { return Ok(()) };
    if element.is_none() && domain.metadata(POLICY_NAMESPACE)?.is_none() {
        return Ok(());
    }
    domain.set_metadata(POLICY_NAMESPACE, "shadow", element.as_deref())
}

fn has_cut_command(domain: &Domain) -> Result<bool, HypervisorError> {
    let commands = domain.qmp_call("query-commands", serde_json::Value::Null)?;
    let named =
        |command: &serde_json::Value| command.get("name").and_then(|n| n.as_str()) == Some("xen-save-devices-state");
    Ok(commands.as_array().is_some_and(|commands| commands.iter().any(named)))
}

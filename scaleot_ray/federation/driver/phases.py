"""The phases of a run: the owner builds, data owners tune in rounds, evaluators measure.

Actors that are there for one part only come and go with it; the coordinator comes back from its registry
when it dies. What happens to data owners is in :mod:`scaleot_ray.federation.driver.tuning_rounds`.
"""

from __future__ import annotations

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.errors import RunFailed, ScaleOTError
from scaleot_ray.federation.driver.actors import Running
from scaleot_ray.federation.driver.measuring import Measuring
from scaleot_ray.federation.driver.report import RunReport, TenantResult
from scaleot_ray.federation.driver.run_state import RunState, Tenant
from scaleot_ray.federation.driver.tuning_rounds import TuningRounds
from scaleot_ray.federation.driver.works import building
from scaleot_ray.federation.roles.coordinator import MODEL_OWNER, Charge, data_owner, evaluator
from scaleot_ray.federation.roles.model_owner import ModelOwner, OwnerSections
from scaleot_ray.federation.rounds.administration import Request, note_registry, pending, reply
from scaleot_ray.federation.rounds.registry import PlugIn
from scaleot_ray.stages.build import BuildResult


class Phases:
    """The driver of one run.

    Args:
        state: the run's, its actors on a connected Ray.
    """

    def __init__(self, state: RunState) -> None:
        self.state = state
        self._rounds = TuningRounds(state, self._start_what_fits)
        self._measuring = Measuring(state)
        self._administering = 0  # requests whose consequences are not all known yet

    def run(self) -> RunReport:
        """All phases, one after the other; the report lacks the totals that only the caller knows."""
        actors, settings, tenants = self.state.actors, self.state.settings, self.state.tenants
        actors.between = self._answer_early
        self._start_coordinator()
        built = self._build()
        for tenant in tenants:
            tenant.token = actors.ask_coordinator("admit", tenant.name, tenant.settings.model_dump(mode="json"))
            # Of one that was revoked nothing is measured any more; what a cancelled one submitted counts.
            known = tenant.token is not None or actors.ask_coordinator("entry", tenant.name) is not None
            tenant.measured = settings.evaluator and known
        recipients = [data_owner(tenant.name) for tenant in tenants if tenant.token is not None]
        recipients += [evaluator(tenant.name) for tenant in tenants if tenant.measured]
        actors.ask_coordinator("publish", recipients)
        actors.between = self._administer  # there is a registry now
        for tenant in tenants:
            if tenant.measured:
                actors.ask_coordinator("declare_evaluator", tenant.name, self.state.rows_bytes[tenant.name])
        self._rounds.run()
        if settings.aggregation is not None:
            self._measuring.take_aggregate(actors.ask_coordinator("in_common"))
        actors.until(self._measured)
        actors.between = lambda: None  # whoever asks now does it when the run has ended
        actors.ask_coordinator("finish")
        return self._report(built)

    def failure(self) -> ScaleOTError | None:
        """What is wrong with a run that has come to its report, and what it was asked for is not in there."""
        return self._measuring.failure()

    def _start_coordinator(self) -> None:
        settings, folder = self.state.settings, self.state.folder
        charge = Charge(
            str(folder.path),
            str(note_registry(folder, settings.registry)),
            settings.rounds,
            settings.aggregation,
            {tenant.name: tenant.weight for tenant in settings.tenants},
            {tenant.name: tenant.metric for tenant in self.state.tenants} if settings.evaluator else {},
            settings.artifacts,
            tunes={tenant.name: settings.tune_of(tenant) for tenant in settings.tenants},
        )
        self.state.actors.start_coordinator(charge)

    def _build(self) -> BuildResult:
        state, settings, folder, actors = self.state, self.state.settings, self.state.folder, self.state.actors
        sections = OwnerSections(settings.model, settings.public, settings.stage_one, settings.emulator)
        owners: list[Running] = []

        def begin() -> None:
            cpus, gpus = settings.owner_cpus, settings.owner_gpus
            owners.append(actors.start(MODEL_OWNER, ModelOwner, cpus, gpus, sections, str(folder.model_owner)))

        def begun() -> bool:
            state.schedule.start(lambda: [] if owners else [building(settings, state.needs, begin)])
            return bool(owners)

        actors.until(begun)
        (owner,) = owners
        built: BuildResult = actors.ask(owner, owner.handle.build.remote(str(folder.emulator)))
        if not actors.ask_coordinator("has_emulator", built.manifest.digest()):
            actors.ask_coordinator("take_emulator", owner.handle.emulator.remote(str(folder.emulator)))
        # The artefact on disk is the truth; the full model's memory is free before anyone tunes.
        state.end_work(MODEL_OWNER)
        return built

    def _start_what_fits(self) -> None:
        # Tuning comes first: the rows of the full model fill processors that it leaves idle.
        self.state.schedule.start(lambda: self._rounds.possible() + self._measuring.possible())

    def _measured(self) -> bool:
        self._start_what_fits()
        return self._measuring.is_over() and not self._administering

    def _answer_early(self) -> None:
        """Tells whoever asks at once that there is no registry yet: building may take hours."""
        for name, _ in pending(self.state.folder):
            problem = RunFailed(
                f"{self.state.folder.path}: the run that is under way builds its emulator, and nobody takes part yet.",
                "Ask once more when `scaleot status` shows a round; to keep a data owner out of all of it, end the run "
                "and take it out of tenants.",
            )
            reply(self.state.folder, name, problem)

    def _administer(self) -> None:
        for name, request in pending(self.state.folder):
            self._carry_out(name, request)

    def _carry_out(self, name: str, request: Request) -> None:
        """Does what an administrator asks of the run that is under way."""
        actors, folder = self.state.actors, self.state.folder

        self._administering += 1

        def remade(found: PlugIn | None) -> None:
            self._measuring.take_aggregate(found)
            self._administering -= 1

        def done(changed: list[int]) -> None:
            verb = {"pause": "paused", "cancel": "cancelled", "revoke": "revoked"}.get(request.action)
            for tenant in self.state.tenants:
                if tenant.name == request.tenant and verb is not None:
                    if verb == "revoked":
                        tenant.submitted, tenant.entry = 0, None
                        self._measuring.forget_delta(tenant)
                    why = f": {request.reason}" if request.reason else ""
                    self._rounds.leave_out(tenant, f"{tenant.name} was {verb}{why}")
            # Also where nothing changed now: a coordinator that died meanwhile has done it before it was asked again.
            if self._measuring.aggregate is not None and (changed or verb == "revoked"):
                actors.call_coordinator("in_common", then=remade)
            else:
                self._administering -= 1
            reply(folder, name, changed)

        def failed(error: Exception) -> bool:
            self._administering -= 1
            reply(folder, name, actors.failure(actors.coordinator, error))
            return True

        actors.call_coordinator("carry_out", request, then=done, failed=failed)

    def _report(self, built: BuildResult) -> RunReport:
        state = self.state
        audit = state.folder.audit
        return RunReport(
            model=state.settings.model.path,
            directory=state.folder.path,
            emulator=built.manifest,
            privacy=built.privacy,
            reused_stage_one=built.reused_stage_one,
            rounds=self._rounds.finished,
            aggregate=self._measuring.aggregate,
            tenants=[_result(tenant) for tenant in state.tenants],
            seconds={**built.seconds, **{stage: last - first for stage, (first, last) in state.spans.items()}},
            peak_rss_bytes=0,
            audit=audit,
            audit_head=AuditLog(audit).head(),
        )


def _result(tenant: Tenant) -> TenantResult:
    return TenantResult(
        name=tenant.name,
        metric=tenant.metric,
        metrics=tenant.entry.metrics if tenant.entry is not None else {},
        measured=tenant.table,
        delta_bytes=tenant.entry.delta_bytes if tenant.entry is not None else None,
        delta_digest=tenant.entry.delta_digest if tenant.entry is not None else None,
        seconds=tenant.seconds,
        unmeasured=tenant.trouble.problem if tenant.trouble is not None else None,
    )

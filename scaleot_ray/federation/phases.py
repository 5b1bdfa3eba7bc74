"""The phases of a run: the owner builds, data owners tune, evaluators measure; actors come and go.

The driver of a run waits for all its actors at once. Whatever one of them raises, and the death of any
of them, ends the run with an error that names it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.config import RunSettings, TenantSettings
from scaleot_ray.data.sources import find_sources
from scaleot_ray.evaluation.table import TenantTable
from scaleot_ray.federation.coordinator import COORDINATOR, MODEL_OWNER, Coordinator, Entry, data_owner, evaluator
from scaleot_ray.federation.data_owner import DataOwner, Part
from scaleot_ray.federation.evaluator import Evaluator
from scaleot_ray.federation.failure import actor_failure
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.machine import Machine
from scaleot_ray.federation.model_owner import ModelOwner, OwnerSections
from scaleot_ray.federation.needs import RAY, Memory, Needs
from scaleot_ray.federation.processes import PeakMemory, end, end_marked, wait_for_end
from scaleot_ray.federation.report import RunReport, TenantResult
from scaleot_ray.federation.role import ACTORS, Present, start, stop
from scaleot_ray.federation.schedule import Work, next_work
from scaleot_ray.federation.session import Session
from scaleot_ray.federation.starting import Starts
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.build import BuildResult

FULL_ROWS = ("full_zero_shot", "full_tuned")
# The data owner has sent the tuned emulator's value as a number. The evaluator measures it again, block by
# block: an interval for Δ needs the same blocks in both rows, and no more of a data owner's rows has to be sent.
ALL_ROWS = (*FULL_ROWS, "emulator_tuned", "plug_in")

_LOOK_SECONDS = 0.2
_UNWIND_SECONDS = 3.0
_ANSWER_SECONDS = 120.0  # for an answer that is ready, or that the coordinator gives at once


@dataclass(eq=False)
class Running:
    """An actor of the run that lives.

    Attributes:
        role: who it is.
        handle: Ray's handle.
        pid: its process, once it has started.
    """

    role: str
    handle: Any
    pid: int | None = None


@dataclass(eq=False)
class Tenant:
    """How far a data owner is.

    Attributes:
        settings: its section.
        tuning, measuring: an actor does that now.
        entry: what the coordinator has of it; None until its delta has crossed.
        table: the evaluator's rows so far.
        seconds: ``tune`` and ``evaluate``.
    """

    settings: TenantSettings
    tuning: bool = False
    measuring: bool = False
    entry: Entry | None = None
    table: TenantTable | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The data owner's name."""
        return self.settings.name

    @property
    def metric(self) -> str:
        """What its rows are measured by."""
        return "accuracy" if self.settings.test.task == "choice" else "loss"

    @property
    def measured(self) -> bool:
        """Whether all the evaluator's rows are there."""
        return self.table is not None and set(ALL_ROWS) <= self.table.rows.keys()


class Phases:
    """The driver of one run on a connected Ray; a context manager that leaves no actor behind."""

    def __init__(
        self,
        settings: RunSettings,
        session: Session,
        machine: Machine,
        needs: Needs,
        folder: RunFolder,
        memory: PeakMemory,
        on_progress: OnProgress | None,
    ) -> None:
        self.settings, self.session, self.machine, self.needs = settings, session, machine, needs
        self.folder, self.memory, self.on_progress = folder, memory, on_progress
        self.tenants = [Tenant(tenant) for tenant in settings.tenants]
        self.actors: list[Running] = []
        self._starts = Starts(session, on_progress)
        self._mark = secrets.token_hex(8)
        self._waiting: dict[ray.ObjectRef, tuple[Running, Callable[[Any], None]]] = {}
        self._works: list[Work] = []
        self._spans: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Phases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            end({actor.pid for actor in self.actors if actor.pid is not None}, _UNWIND_SECONDS)
        for actor in self.actors:
            stop(actor.handle)
        # Told to end, not ended yet; and an actor that was still starting has not told us its process.
        end_marked(ACTORS, self._mark)
        self.actors.clear()

    def run(self) -> RunReport:
        """All phases, one after the other; the report lacks the totals that only the caller knows."""
        self.coordinator = Running(COORDINATOR, None)
        self._start(self.coordinator, Coordinator, 1, 0, str(self.folder.audit), claim=False)
        built = self._build()
        recipients = [data_owner(tenant.name) for tenant in self.tenants]
        if self.settings.evaluator:
            recipients += [evaluator(tenant.name) for tenant in self.tenants]
        self._emulator = self._ask_coordinator("publish", str(self.folder.emulator), recipients)
        if self.settings.evaluator:
            for tenant in self.tenants:
                self._ask_coordinator("declare_evaluator", tenant.name, _rows_bytes(tenant.settings), tenant.metric)
        self._until(self._tenants_finished)
        self._ask_coordinator("finish")
        return self._report(built)

    def _build(self) -> BuildResult:
        settings = self.settings
        sections = OwnerSections(settings.model, settings.public, settings.stage_one, settings.emulator)
        owner = Running(MODEL_OWNER, None)
        self._start(owner, ModelOwner, settings.owner_cpus, settings.owner_gpus, sections, str(self.folder.model_owner))
        built: BuildResult = self._ask(owner, owner.handle.build.remote(str(self.folder.emulator)))
        # The artefact on disk is the truth; the full model's memory is free before anyone tunes.
        self._stop(owner)
        return built

    def _tenants_finished(self) -> bool:
        """Starts what can start; true when everything is done."""
        memory = self.machine.memory - RAY - self.needs.emulator
        while (
            work := next_work(self._possible(), self._works, self.machine.cpus, self.machine.gpus, memory)
        ) is not None:
            self._works.append(work)
            work.begin()
        return all(
            tenant.entry is not None and (tenant.measured or not self.settings.evaluator) for tenant in self.tenants
        )

    def _possible(self) -> list[Work]:
        tuning = [tenant for tenant in self.tenants if tenant.entry is None and not tenant.tuning]
        works = [self._work(data_owner(tenant.name), tenant, self.needs.data_owners, self._tune) for tenant in tuning]
        if self.settings.evaluator:
            # Before the delta is there, the rows of the full model can be measured, and only once.
            measuring = [
                tenant
                for tenant in self.tenants
                if not tenant.measuring and not tenant.measured and (tenant.table is None or tenant.entry is not None)
            ]
            works += [
                self._work(evaluator(tenant.name), tenant, self.needs.evaluators, self._measure) for tenant in measuring
            ]
        return works

    def _work(self, role: str, tenant: Tenant, memory: dict[str, Memory], begin: Callable[[Tenant, str], None]) -> Work:
        settings = tenant.settings
        return Work(role, settings.cpus, settings.gpus, memory[tenant.name].total, lambda: begin(tenant, role))

    def _part(self, tenant: Tenant, output: Path) -> Part:
        return Part(
            tenant.settings, self.settings.tune_of(tenant.settings), self.settings.evaluate_examples, str(output)
        )

    def _tune(self, tenant: Tenant, role: str) -> None:
        tenant.tuning = True
        actor = Running(role, None)
        part = self._part(tenant, self.folder.tenant(tenant.name))
        self._start(actor, DataOwner, tenant.settings.cpus, tenant.settings.gpus, part)
        begun = time.monotonic()

        def tuned(_: None) -> None:
            # What counts is what passed the gate, so the coordinator is asked, not the data owner.
            self._call(self.coordinator, self.coordinator.handle.entry.remote(tenant.name), took)

        def took(entry: Entry) -> None:
            self._finish(actor, tenant, "tune", begun)
            tenant.tuning, tenant.entry = False, entry

        self._call(actor, actor.handle.tune.remote(self._emulator), tuned)

    def _measure(self, tenant: Tenant, role: str) -> None:
        tenant.measuring = True
        actor = Running(role, None)
        part = self._part(tenant, self.folder.evaluator(tenant.name))
        self._start(actor, Evaluator, tenant.settings.cpus, tenant.settings.gpus, self.settings.model, part)
        begun = time.monotonic()

        def measure() -> None:
            rows = ALL_ROWS if tenant.entry is not None else FULL_ROWS
            self._call(actor, actor.handle.evaluate.remote(rows, self._emulator), measured)

        def measured(_: None) -> None:
            self._call(self.coordinator, self.coordinator.handle.table.remote(tenant.name), took)

        def took(table: TenantTable) -> None:
            tenant.table = table
            if tenant.entry is not None and not tenant.measured:
                measure()  # the delta came meanwhile: the model is loaded already
                return
            self._finish(actor, tenant, "evaluate", begun)
            tenant.measuring = False

        measure()

    def _finish(self, actor: Running, tenant: Tenant, stage: str, begun: float) -> None:
        self._stop(actor)
        self._works = [work for work in self._works if work.role != actor.role]
        now = time.monotonic()
        tenant.seconds[stage] = tenant.seconds.get(stage, 0.0) + now - begun
        first, _ = self._spans.get(stage, (begun, now))
        self._spans[stage] = (min(first, begun), now)

    def _start(self, actor: Running, kind: Any, cpus: int, gpus: float, *arguments: Any, claim: bool = True) -> None:
        if actor is not self.coordinator:
            arguments = (cpus, self.coordinator.handle, *arguments)
        actor.handle = start(kind, self.session, cpus, gpus, *arguments, mark=self._mark, claim=claim)
        self.actors.append(actor)
        self._starts.asked(actor.role, actor.handle, cpus if claim else 0, gpus)

        def present(answer: Present) -> None:
            self._starts.over(actor.role)
            actor.pid = answer.pid
            self.memory.others.add(answer.pid)

        self._call(actor, actor.handle.present.remote(), present)

    def _stop(self, actor: Running) -> None:
        """Ends an actor and waits until its memory is free."""
        self.actors.remove(actor)
        self._starts.over(actor.role)
        self._waiting = {ref: call for ref, call in self._waiting.items() if call[0] is not actor}
        stop(actor.handle)
        if actor.pid is not None:
            wait_for_end(actor.pid, _UNWIND_SECONDS)

    def _call(self, actor: Running, answer: ray.ObjectRef, then: Callable[[Any], None]) -> None:
        self._waiting[answer] = (actor, then)

    def _ask(self, actor: Running, answer: ray.ObjectRef) -> Any:
        """Waits for one answer, as attentive to all other actors as ever."""
        found: list[Any] = []
        self._call(actor, answer, found.append)
        self._until(lambda: bool(found))
        return found[0]

    def _ask_coordinator(self, method: str, *arguments: Any) -> Any:
        return self._ask(self.coordinator, getattr(self.coordinator.handle, method).remote(*arguments))

    def _until(self, finished: Callable[[], bool]) -> None:
        while not finished():
            ready, _ = ray.wait(list(self._waiting), num_returns=1, timeout=_LOOK_SECONDS)
            for answer in ready:
                actor, then = self._waiting.pop(answer)
                then(self._get(actor, answer))
            self._starts.look()
            if self.coordinator.pid is None:
                continue  # it is still starting
            # Asked in every round, so that a dead coordinator is noticed as soon as any other actor.
            for report in self._get(self.coordinator, self.coordinator.handle.reports.remote()):
                if self.on_progress is not None:
                    self.on_progress(report)

    def _get(self, actor: Running, answer: ray.ObjectRef) -> Any:
        try:
            return ray.get(answer, timeout=_ANSWER_SECONDS)
        except Exception as error:  # Ray raises many types here, the actors' own among them
            if isinstance(error, RayTaskError) and isinstance(error.cause, RayActorError):
                actor = self.coordinator  # the only actor that others wait for
                error = error.cause
            raise actor_failure(error, actor.role, actor.pid, self.session.logs) from error

    def _report(self, built: BuildResult) -> RunReport:
        seconds = {**built.seconds, **{stage: last - first for stage, (first, last) in self._spans.items()}}
        return RunReport(
            model=self.settings.model.path,
            directory=self.folder.path,
            emulator=built.manifest,
            privacy=built.privacy,
            reused_stage_one=built.reused_stage_one,
            tenants=[_result(tenant) for tenant in self.tenants],
            seconds=seconds,
            peak_rss_bytes=0,
            audit=self.folder.audit,
            audit_head=AuditLog(self.folder.audit).head(),
        )


def _result(tenant: Tenant) -> TenantResult:
    assert tenant.entry is not None
    return TenantResult(
        name=tenant.name,
        metric=tenant.metric,
        metrics=tenant.entry.metrics,
        measured=tenant.table,
        delta_bytes=tenant.entry.delta_bytes,
        delta_digest=tenant.entry.delta_digest,
        seconds=tenant.seconds,
    )


def _rows_bytes(settings: TenantSettings) -> int:
    """Bytes of a tenant's datasets on disk."""
    datasets = [data for data in (settings.train, settings.test, settings.validation) if data is not None]
    paths = {source.path for data in datasets for source in find_sources(data)}
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    return sum(file.stat().st_size for file in files)

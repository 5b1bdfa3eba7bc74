"""The phases of a run: the owner builds, data owners tune in rounds, evaluators measure; actors come and go.

The driver of a run waits for all its actors at once. A data owner whose process dies starts again, and is
left out where the quorum holds without it; the coordinator comes back from its registry. Whatever else
an actor raises, and the death of any other, ends the run with an error that names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.config import RunSettings, TenantSettings
from scaleot_ray.data.sources import find_sources
from scaleot_ray.errors import RunFailed, ScaleOTError
from scaleot_ray.evaluation.table import AGGREGATE, TenantTable
from scaleot_ray.federation.administration import Request, note_registry, pending, reply
from scaleot_ray.federation.coordinator import (
    COORDINATOR,
    MODEL_OWNER,
    Charge,
    Coordinator,
    Entry,
    Opened,
    data_owner,
    evaluator,
)
from scaleot_ray.federation.data_owner import DataOwner, Part
from scaleot_ray.federation.evaluator import Evaluator
from scaleot_ray.federation.failure import actor_failure, has_died
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.machine import Machine
from scaleot_ray.federation.model_owner import ModelOwner, OwnerSections
from scaleot_ray.federation.needs import RAY, Memory, Needs
from scaleot_ray.federation.processes import PeakMemory, end, end_marked, wait_for_end
from scaleot_ray.federation.registry import PlugIn, Round
from scaleot_ray.federation.report import RoundResult, RunReport, TenantResult
from scaleot_ray.federation.role import ACTORS, Present, start, stop
from scaleot_ray.federation.schedule import Work, next_work
from scaleot_ray.federation.session import Session
from scaleot_ray.federation.starting import Starts
from scaleot_ray.progress import OnProgress, Progress
from scaleot_ray.stages.build import BuildResult

FULL_ROWS = ("full_zero_shot", "full_tuned")
# The data owner has sent the tuned emulator's value as a number. The evaluator measures it again, block by
# block: an interval for Δ needs the same blocks in both rows, and no more of a data owner's rows has to be sent.
ALL_ROWS = (*FULL_ROWS, "emulator_tuned", "plug_in")

_NAMESPACE = "scaleot"
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
        token: what its submissions must carry; None where it takes no part.
        tuning: the round that an actor tunes for now; ``since``: when it was started.
        measuring: an actor does that now.
        submitted: the latest round that has its delta.
        attempts: how often its tuning was started in the round under way.
        left_out: why nothing more is expected of it in the round under way.
        entry: what the coordinator has of it, once that will not change any more.
        table: the evaluator's rows so far.
        seconds: ``tune`` and ``evaluate``.
    """

    settings: TenantSettings
    token: str | None = None
    tuning: int | None = None
    since: float = 0.0
    measuring: bool = False
    submitted: int = 0
    attempts: int = 0
    left_out: ScaleOTError | None = None
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

    def has_rows(self, rows: Sequence[str]) -> bool:
        """Whether the evaluator has measured these rows."""
        return self.table is not None and set(rows) <= self.table.rows.keys()


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
        self.rounds: list[RoundResult] = []
        self._open: Opened | None = None
        self._published = False
        self._aggregate: PlugIn | None = None
        self._last = False  # the round under way is the last: what data owners submit stays
        self._starts = Starts(session, on_progress)
        self._mark = secrets.token_hex(8)
        self._waiting: dict[ray.ObjectRef, tuple[Running, Callable[[Any], None], Callable[[Exception], bool]]] = {}
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
        self._start_coordinator()
        built = self._build()
        recipients = [data_owner(tenant.name) for tenant in self.tenants]
        if self.settings.evaluator:
            recipients += [evaluator(tenant.name) for tenant in self.tenants]
        self._ask_coordinator("publish", recipients)
        self._published = True
        for tenant in self.tenants:
            tenant.token = self._ask_coordinator("admit", tenant.name, tenant.settings.model_dump(mode="json"))
            if self.settings.evaluator:
                self._ask_coordinator("declare_evaluator", tenant.name, _rows_bytes(tenant.settings))
        while (opened := self._ask_coordinator("begin_round", [tenant.name for tenant in self.tenants])) is not None:
            self._round(opened)
            if self._last:
                break
        last = self.rounds[-1].number if self.rounds else None  # without one, all were finished before
        for tenant in self.tenants:
            tenant.entry = tenant.entry or self._ask_coordinator("entry", tenant.name, last)
        self._open = None
        if self.settings.aggregation is not None:
            self._aggregate = self._ask_coordinator("in_common")
        self._until(self._measured)
        self._ask_coordinator("finish")
        return self._report(built)

    def _start_coordinator(self) -> None:
        settings = self.settings
        charge = Charge(
            str(self.folder.path),
            str(note_registry(self.folder, settings.registry)),
            settings.rounds,
            settings.aggregation,
            {tenant.name: tenant.weight for tenant in settings.tenants},
            {tenant.name: tenant.metric for tenant in self.tenants} if settings.evaluator else {},
        )
        name = f"coordinator-{hashlib.sha256(str(self.folder.path).encode()).hexdigest()[:16]}"
        with contextlib.suppress(ValueError):  # of a driver that was killed; we hold the folder now
            ray.kill(ray.get_actor(name, _NAMESPACE), no_restart=True)
        detached: dict[str, Any] = {"name": name, "namespace": _NAMESPACE, "lifetime": "detached"}
        self._start(self.coordinator, Coordinator, 1, 0, charge, claim=False, **detached)

    def _round(self, opened: Opened) -> None:
        """One round, from its opening to its plug-ins."""
        begun, number = time.monotonic(), opened.round.number
        self._open, self._last = opened, opened.last
        for tenant in self.tenants:
            tenant.attempts, tenant.left_out = 0, None
            if opened.submitted.get(tenant.name):
                tenant.submitted = number
        self._until(self._round_over)
        self._stop_late()
        ended: Opened = self._ask_coordinator("end_round", number)
        self.rounds.append(RoundResult.of(ended, time.monotonic() - begun, self._missing(ended)))
        if ended.round.state == "failed":
            raise self._failure(ended)

    def _round_over(self) -> bool:
        """Starts what can start; true when nothing more is to be waited for."""
        for tenant in self._taking_part():
            longest, took = tenant.settings.deadline, time.monotonic() - tenant.since
            if tenant.tuning is not None and longest is not None and took > longest:
                self._leave_out(tenant, f"{tenant.name} took longer than its deadline of {longest:g} seconds")
        self._start_what_fits()
        assert self._open is not None
        waiting = [tenant for tenant in self._taking_part() if tenant.submitted < self._open.round.number]
        hopeful = [tenant for tenant in waiting if tenant.left_out is None]
        there = len(self._taking_part()) - len(waiting)
        return not hopeful or _is_over(self._open.round) or there + len(hopeful) < self._open.round.quorum

    def _taking_part(self) -> list[Tenant]:
        return [tenant for tenant in self.tenants if self._open is not None and tenant.name in self._open.submitted]

    def _stop_late(self) -> None:
        """Ends tuning that nothing waits for; what may be late goes on, unless no round will take it."""
        assert self._open is not None
        for tenant in self.tenants:
            # The next round takes what is at most so late.
            useful = (tenant.tuning or 0) + self.settings.rounds.staleness > self._open.round.number
            if self._last or not useful:
                self._end_tuning(tenant)

    def _end_tuning(self, tenant: Tenant) -> None:
        for actor in [actor for actor in self.actors if actor.role == data_owner(tenant.name)]:
            self._stop(actor)
        self._works = [work for work in self._works if work.role != data_owner(tenant.name)]
        tenant.tuning = None

    def _missing(self, ended: Opened) -> dict[str, str]:
        """Who is not in a round, and why."""
        late = "submitted nothing in time" if _is_over(ended.round) else "ended, since the quorum was out of reach"
        missing = [tenant for tenant in self._taking_part() if not ended.submitted.get(tenant.name)]
        return {tenant.name: tenant.left_out.problem if tenant.left_out else late for tenant in missing}

    def _failure(self, ended: Opened) -> ScaleOTError:
        """Why a round stays below its quorum: the one data owner's own error, or all of them."""
        errors = [tenant.left_out for tenant in self._taking_part() if tenant.left_out is not None]
        if len(errors) == 1 and not _is_over(ended.round):
            return errors[0]
        names = "; ".join(f"{name}: {reason}" for name, reason in self._missing(ended).items())
        return RunFailed(
            f"Round {ended.round.number} has {sum(ended.submitted.values())} of the {ended.round.quorum} deltas of its "
            f"quorum ({names}).",
            "Mend what is said of them, lower rounds.quorum or raise rounds.deadline, and run the same command again: "
            "what was submitted counts.",
        )

    def _build(self) -> BuildResult:
        settings = self.settings
        sections = OwnerSections(settings.model, settings.public, settings.stage_one, settings.emulator)
        owner = Running(MODEL_OWNER, None)
        self._start(owner, ModelOwner, settings.owner_cpus, settings.owner_gpus, sections, str(self.folder.model_owner))
        built: BuildResult = self._ask(owner, owner.handle.build.remote(str(self.folder.emulator)))
        # The artefact on disk is the truth; the full model's memory is free before anyone tunes.
        self._stop(owner)
        return built

    def _measured(self) -> bool:
        """Starts what can start; true when every data owner that has a delta is measured."""
        self._start_what_fits()
        return not self.settings.evaluator or all(tenant.has_rows(self._rows_of(tenant)) for tenant in self.tenants)

    def _rows_of(self, tenant: Tenant) -> tuple[str, ...]:
        """What is to be measured of a data owner by now."""
        rows = ALL_ROWS if tenant.entry is not None else FULL_ROWS
        return (*rows, AGGREGATE) if self._aggregate is not None else rows

    def _start_what_fits(self) -> None:
        memory = self.machine.memory - RAY - self.needs.emulator
        while (
            work := next_work(self._possible(), self._works, self.machine.cpus, self.machine.gpus, memory)
        ) is not None:
            self._works.append(work)
            work.begin()

    def _possible(self) -> list[Work]:
        most = self.settings.tenants_at_once
        room = most is None or sum(tenant.tuning is not None for tenant in self.tenants) < most
        works = [
            self._work(data_owner(tenant.name), tenant, self.needs.data_owners, self._tune)
            for tenant in self._taking_part()
            if self._open is not None
            and room
            and tenant.tuning is None
            and tenant.left_out is None
            and tenant.submitted < self._open.round.number
        ]
        if self.settings.evaluator:
            # Before the delta is there, the rows of the full model can be measured.
            measuring = [
                tenant for tenant in self.tenants if not tenant.measuring and not tenant.has_rows(self._rows_of(tenant))
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
        assert self._open is not None
        number, final = self._open.round.number, self._last
        tenant.tuning, tenant.attempts, tenant.since = number, tenant.attempts + 1, time.monotonic()
        actor = Running(role, None)
        part = self._part(tenant, self.folder.tenant(tenant.name))
        self._call(self.coordinator, self.coordinator.handle.begin_part.remote(number, tenant.name), lambda _: None)
        self._start(actor, DataOwner, tenant.settings.cpus, tenant.settings.gpus, part, failed=lambda e: failed(e))
        begun = time.monotonic()

        def tuned(_: None) -> None:
            # What counts is what passed the gate, so the coordinator is asked, not the data owner.
            self._call(self.coordinator, self.coordinator.handle.entry.remote(tenant.name), took)

        def took(entry: Entry | None) -> None:
            if actor not in self.actors:
                return  # left out, or its round closed, while the coordinator was asked
            self._finish(actor, tenant, "tune", begun)
            tenant.tuning = None
            if entry is None:
                return  # revoked meanwhile
            tenant.submitted = entry.round  # of a late one: the round that it counts in
            if final or self._last:
                tenant.entry = entry

        def failed(error: Exception) -> bool:
            return self._tuning_failed(tenant, actor, error)

        self._call(actor, actor.handle.tune.remote(number, tenant.token), tuned, failed)

    def _tuning_failed(self, tenant: Tenant, actor: Running, error: Exception) -> bool:
        """What becomes of a data owner whose tuning failed: it starts again, or is left out of the round."""
        if actor not in self.actors:
            return True  # both answers of a dead actor fail; the first has been seen to
        problem = actor_failure(error, actor.role, actor.pid, self.session.logs)
        self._end_tuning(tenant)
        attempts = self.settings.rounds.attempts
        if has_died(error) and tenant.attempts < attempts:
            self._tell(f"{actor.role} died and starts again ({tenant.attempts + 1} of {attempts})")
            return True
        tenant.left_out = problem
        self._record_left_out(tenant, problem.problem)
        return True

    def _carry_out(self, name: str, request: Request) -> None:
        """Does what an administrator asks of the run that is under way."""

        def remade(found: PlugIn | None) -> None:
            self._aggregate = found

        def done(changed: list[int]) -> None:
            verb = {"pause": "paused", "cancel": "cancelled", "revoke": "revoked"}.get(request.action)
            for tenant in self.tenants:
                if tenant.name == request.tenant and verb is not None:
                    if verb == "revoked":
                        tenant.submitted, tenant.entry = 0, None
                    why = f": {request.reason}" if request.reason else ""
                    self._leave_out(tenant, f"{tenant.name} was {verb}{why}")
            if self._aggregate is not None and changed:
                self._call(self.coordinator, self.coordinator.handle.in_common.remote(), remade)
            reply(self.folder, name, changed)

        def failed(error: Exception) -> bool:
            reply(self.folder, name, actor_failure(error, COORDINATOR, self.coordinator.pid, self.session.logs))
            return True

        self._call(self.coordinator, self.coordinator.handle.carry_out.remote(request), done, failed)

    def _leave_out(self, tenant: Tenant, why: str) -> None:
        """Expects nothing more of a data owner in the round under way, and ends its tuning."""
        if self._open is None or tenant.submitted >= self._open.round.number:
            return
        tenant.left_out = RunFailed(f"{why}.", "`scaleot tenants` shows who takes part, `scaleot status` in what.")
        self._end_tuning(tenant)
        self._record_left_out(tenant, why)

    def _record_left_out(self, tenant: Tenant, why: str) -> None:
        assert self._open is not None
        leave_out = self.coordinator.handle.leave_out
        self._call(self.coordinator, leave_out.remote(self._open.round.number, tenant.name, why), lambda _: None)

    def _measure(self, tenant: Tenant, role: str) -> None:
        tenant.measuring = True
        actor = Running(role, None)
        part = self._part(tenant, self.folder.evaluator(tenant.name))
        self._start(actor, Evaluator, tenant.settings.cpus, tenant.settings.gpus, self.settings.model, part)
        begun = time.monotonic()

        def measure() -> None:
            self._call(actor, actor.handle.evaluate.remote(self._rows_of(tenant)), measured)

        def measured(_: None) -> None:
            self._call(self.coordinator, self.coordinator.handle.table.remote(tenant.name), took)

        def took(table: TenantTable) -> None:
            tenant.table = table
            if not tenant.has_rows(self._rows_of(tenant)):
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

    def _start(
        self,
        actor: Running,
        kind: Any,
        cpus: int,
        gpus: float,
        *arguments: Any,
        claim: bool = True,
        failed: Callable[[Exception], bool] = lambda _: False,
        **options: Any,
    ) -> None:
        if actor is not self.coordinator:
            arguments = (cpus, self.coordinator.handle, *arguments)
        actor.handle = start(kind, self.session, cpus, gpus, *arguments, mark=self._mark, claim=claim, **options)
        self.actors.append(actor)
        self._starts.asked(actor.role, actor.handle, cpus if claim else 0, gpus)

        def present(answer: Present) -> None:
            self._starts.over(actor.role)
            actor.pid = answer.pid
            self.memory.others.add(answer.pid)

        self._call(actor, actor.handle.present.remote(), present, failed)

    def _stop(self, actor: Running) -> None:
        """Ends an actor and waits until its memory is free."""
        self.actors.remove(actor)
        self._starts.over(actor.role)
        self._waiting = {ref: call for ref, call in self._waiting.items() if call[0] is not actor}
        stop(actor.handle)
        if actor.pid is not None:
            wait_for_end(actor.pid, _UNWIND_SECONDS)

    def _call(
        self,
        actor: Running,
        answer: ray.ObjectRef,
        then: Callable[[Any], None],
        failed: Callable[[Exception], bool] = lambda _: False,
    ) -> None:
        """Has an answer seen to when it comes; ``failed`` says whether an error has been."""
        self._waiting[answer] = (actor, then, failed)

    def _tell(self, what: str) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(what, 1, 1))

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
                actor, then, failed = self._waiting.pop(answer)
                try:
                    found = ray.get(answer, timeout=_ANSWER_SECONDS)
                except Exception as error:  # Ray raises many types here, the actors' own among them
                    if not failed(error):
                        raise self._fatal(actor, error) from error
                else:
                    then(found)
            self._starts.look()
            if self.coordinator.pid is None:
                continue  # it is still starting
            if self._published:
                for name, request in pending(self.folder):
                    self._carry_out(name, request)
            # Asked in every round, so that the coordinator hears of its driver, and we of everyone.
            try:
                reports = ray.get(self.coordinator.handle.reports.remote(), timeout=_ANSWER_SECONDS)
            except Exception as error:
                raise self._fatal(self.coordinator, error) from error
            for report in reports:
                if self.on_progress is not None:
                    self.on_progress(report)

    def _fatal(self, actor: Running, error: Exception) -> ScaleOTError:
        if isinstance(error, RayTaskError) and isinstance(error.cause, RayActorError):
            actor = self.coordinator  # the only actor that others wait for
            error = error.cause
        return actor_failure(error, actor.role, actor.pid, self.session.logs)

    def _report(self, built: BuildResult) -> RunReport:
        seconds = {**built.seconds, **{stage: last - first for stage, (first, last) in self._spans.items()}}
        return RunReport(
            model=self.settings.model.path,
            directory=self.folder.path,
            emulator=built.manifest,
            privacy=built.privacy,
            reused_stage_one=built.reused_stage_one,
            rounds=self.rounds,
            aggregate=self._aggregate,
            tenants=[_result(tenant) for tenant in self.tenants],
            seconds=seconds,
            peak_rss_bytes=0,
            audit=self.folder.audit,
            audit_head=AuditLog(self.folder.audit).head(),
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
    )


def _is_over(one: Round) -> bool:
    return one.deadline is not None and time.time() > one.deadline


def _rows_bytes(settings: TenantSettings) -> int:
    """Bytes of a tenant's datasets on disk."""
    datasets = [data for data in (settings.train, settings.test, settings.validation) if data is not None]
    paths = {source.path for data in datasets for source in find_sources(data)}
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    return sum(file.stat().st_size for file in files)

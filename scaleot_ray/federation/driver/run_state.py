"""How far a run is, as its driver knows: each data owner, what is being worked on, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scaleot_ray.config import RunSettings, TenantSettings
from scaleot_ray.errors import ScaleOTError
from scaleot_ray.evaluation.table import TenantTable
from scaleot_ray.federation.driver.actors import Actors, Running
from scaleot_ray.federation.driver.schedule import Schedule
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.roles.coordinator import Entry, evaluator
from scaleot_ray.federation.roles.data_owner import Part
from scaleot_ray.progress import OnTenantState, State, TenantState
from scaleot_ray.resources.needs import Needs


@dataclass(eq=False)
class Tenant:
    """How far a data owner is.

    Attributes:
        settings: its section.
        token: what its submissions must carry; None where it takes no part.
        tuning: the round that an actor tunes for now; ``since``: when it was started; ``spent``: seconds that earlier
            attempts in this round took.
        submitted: the latest round that has its delta.
        attempts: how often its tuning was started in the round under way.
        alone: it shares no process any more: one that it shared died, or found no place.
        left_out: why nothing more is expected of it in the round under way.
        measured: an evaluator measures its rows; ``measurings``: how often one was started, each time it died.
        failed_rows: of those that could not be measured, why; ``unmeasured``: why nothing more is in this run.
        entry: what the coordinator has of it, once that will not change any more.
        table: the evaluator's rows so far.
        seconds: ``tune`` and ``evaluate``.
    """

    settings: TenantSettings
    token: str | None = None
    tuning: int | None = None
    since: float = 0.0
    spent: float = 0.0
    submitted: int = 0
    attempts: int = 0
    alone: bool = False
    left_out: ScaleOTError | None = None
    measured: bool = False
    measurings: int = 0
    failed_rows: dict[str, ScaleOTError] = field(default_factory=dict)
    unmeasured: ScaleOTError | None = None
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
    def trouble(self) -> ScaleOTError | None:
        """Why rows are missing that its evaluator should have measured; None where none is."""
        if self.unmeasured is not None or not self.failed_rows:
            return self.unmeasured
        first, rows = next(iter(self.failed_rows.values())), self.failed_rows.items()
        problem = "; ".join(f"{row}: {error.problem}" for row, error in rows)
        return type(first)(f"{evaluator(self.name)}: {problem}", first.remedy)

    def begin_tuning(self, number: int, now: float) -> None:
        """An actor tunes for it from now on; once more where one has before in this round."""
        self.tuning, self.attempts, self.since = number, self.attempts + 1, now

    def end_tuning(self, now: float) -> None:
        """No actor tunes for it any more."""
        self.spent, self.tuning = self.tuned_for(now), None

    def tuned_for(self, now: float) -> float:
        """Seconds that it has tuned in this round, all attempts together; waiting for its turn does not count."""
        return self.spent + (now - self.since if self.tuning is not None else 0.0)

    def begin_round(self) -> None:
        """A new round begins for it; what tunes still for the one before goes on as it is."""
        self.attempts, self.left_out = 0, None
        if self.tuning is None:
            self.spent = 0.0

    def has_rows(self, rows: Sequence[str]) -> bool:
        """Whether the evaluator has measured these rows."""
        return self.table is not None and set(rows) <= self.table.rows.keys()


@dataclass(eq=False)
class RunState:
    """What the phases of a run share.

    Attributes:
        settings: the run's.
        folder: the run's.
        needs: memory of every part.
        actors: those that live.
        schedule: what runs now, and what there is for it.
        tenants: the data owners.
        rows_bytes: of each one's datasets on disk.
        spans: by stage, when the first of its kind began and the last ended.
        on_state: hears what each data owner is about.
    """

    settings: RunSettings
    folder: RunFolder
    needs: Needs
    actors: Actors
    schedule: Schedule
    tenants: list[Tenant]
    rows_bytes: dict[str, int]
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    on_state: OnTenantState | None = None

    def part(self, tenant: Tenant, output: Path) -> Part:
        """A data owner's part of the run, for an actor that works in ``output``."""
        tune = self.settings.tune_of(tenant.settings)
        return Part(tenant.settings, tune, self.settings.evaluate_examples, str(output), self.settings.rounds.count)

    def tell(self, tenant: Tenant, state: State, number: int | None = None, reason: str = "") -> None:
        """Says what a data owner is about from now on, in the round of that number."""
        if self.on_state is not None:
            self.on_state(TenantState(tenant.name, state, number, reason))

    def finish(self, actor: Running, tenants: Sequence[Tenant], stage: str, begun: float) -> None:
        """Ends an actor that has done its work for these data owners, and notes how long that took."""
        self.actors.stop(actor)
        self.schedule.over(actor.role)
        now = time.monotonic()
        for tenant in tenants:
            tenant.seconds[stage] = tenant.seconds.get(stage, 0.0) + now - begun
        first, _ = self.spans.get(stage, (begun, now))
        self.spans[stage] = (min(first, begun), now)

    def end_work(self, role: str) -> None:
        """Ends whoever has this role in the midst of its work, if anyone."""
        for actor in self.actors.of(role):
            self.actors.stop(actor)
        self.schedule.over(role)

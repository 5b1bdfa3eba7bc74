"""The driver's side of the evaluators: which rows are still wanted of whom, and what has come."""

from __future__ import annotations

import time
from functools import partial

from scaleot_ray.evaluation.table import AGGREGATE, TenantTable
from scaleot_ray.federation.driver.run_state import RunState, Tenant
from scaleot_ray.federation.driver.schedule import Work
from scaleot_ray.federation.driver.works import measuring
from scaleot_ray.federation.roles.coordinator import evaluator
from scaleot_ray.federation.roles.evaluator import Evaluator
from scaleot_ray.federation.rounds.registry import PlugIn

FULL_ROWS = ("full_zero_shot", "full_tuned")
# The data owner has sent the tuned emulator's value as a number. The evaluator measures it again, block by
# block: an interval for Δ needs the same blocks in both rows, and no more of a data owner's rows has to be sent.
ALL_ROWS = (*FULL_ROWS, "emulator_tuned", "plug_in")


class Measuring:
    """Has every data owner's rows measured, where the settings declare evaluators.

    Args:
        state: the run's.

    Attributes:
        aggregate: the last round's, once it is known: it has a row of its own.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.aggregate: PlugIn | None = None

    def possible(self) -> list[Work]:
        """What could be measured now: before a delta is there, the rows of the full model."""
        state = self._state
        return [
            measuring(state.settings, state.needs, tenant.settings, partial(self._measure, tenant))
            for tenant in state.tenants
            if not state.schedule.has(evaluator(tenant.name)) and not self._has_all(tenant)
        ]

    def is_over(self) -> bool:
        """Whether every data owner that has a delta is measured."""
        return all(self._has_all(tenant) for tenant in self._state.tenants)

    def _has_all(self, tenant: Tenant) -> bool:
        return not tenant.measured or tenant.has_rows(self._rows_of(tenant))

    def _rows_of(self, tenant: Tenant) -> tuple[str, ...]:
        """What is to be measured of a data owner by now."""
        rows = ALL_ROWS if tenant.entry is not None else FULL_ROWS
        return (*rows, AGGREGATE) if self.aggregate is not None else rows

    def _measure(self, tenant: Tenant) -> None:
        state, actors = self._state, self._state.actors
        part = state.part(tenant, state.folder.evaluator(tenant.name))
        cpus, gpus = tenant.settings.cpus, tenant.settings.gpus
        actor = actors.start(evaluator(tenant.name), Evaluator, cpus, gpus, state.settings.model, part)
        begun = time.monotonic()
        state.tell(tenant, "measuring")

        def measure() -> None:
            actors.call(actor, actor.handle.evaluate.remote(self._rows_of(tenant)), measured)

        def measured(_: None) -> None:
            actors.call_coordinator("table", tenant.name, then=took)

        def took(table: TenantTable) -> None:
            tenant.table = table
            if not self._has_all(tenant):
                measure()  # the delta came meanwhile: the model is loaded already
                return
            state.finish(actor, [tenant], "evaluate", begun)
            state.tell(tenant, "measured")

        measure()

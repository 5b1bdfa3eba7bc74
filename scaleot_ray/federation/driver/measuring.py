"""The driver's side of the evaluators: which rows are still wanted of whom, and what has come.

A row that cannot be measured, or an evaluator that fails, is missing from its own data owner's table; all that the
others do goes on. An evaluator whose process dies starts again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from scaleot_ray.errors import ConfigError, RunFailed, ScaleOTError
from scaleot_ray.evaluation.table import AGGREGATE, TenantTable
from scaleot_ray.federation.driver.actors import Running
from scaleot_ray.federation.driver.run_state import RunState, Tenant
from scaleot_ray.federation.driver.schedule import Work
from scaleot_ray.federation.driver.works import measuring
from scaleot_ray.federation.roles.coordinator import evaluator
from scaleot_ray.federation.roles.evaluator import Evaluator
from scaleot_ray.federation.rounds.registry import PlugIn
from scaleot_ray.resources.failure import has_died

FULL_ROWS = ("full_zero_shot", "full_tuned")
# The data owner has sent the tuned emulator's value as a number. The evaluator measures it again, block by
# block: an interval for Δ needs the same blocks in both rows, and no more of a data owner's rows has to be sent.
_DELTA_ROWS = ("emulator_tuned", "plug_in")
ALL_ROWS = (*FULL_ROWS, *_DELTA_ROWS)


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
            measuring(
                state.settings,
                state.needs,
                tenant.settings,
                partial(self._measure, tenant),
                partial(self._give_up, tenant),
            )
            for tenant in state.tenants
            if not state.schedule.has(evaluator(tenant.name)) and not self._has_all(tenant)
        ]

    def is_over(self) -> bool:
        """Whether every data owner's rows are measured, as far as they can be."""
        return all(self._has_all(tenant) for tenant in self._state.tenants)

    def take_aggregate(self, found: PlugIn | None) -> None:
        """Takes what data owners have in common from now on; what was measured of another one does not count."""
        before, self.aggregate = self.aggregate, found
        if before is not None and (found is None or found.digest != before.digest):
            for tenant in self._state.tenants:
                tenant.failed_rows.pop(AGGREGATE, None)
                if tenant.table is not None:
                    tenant.table = _without(tenant.table, AGGREGATE)

    def forget_delta(self, tenant: Tenant) -> None:
        """What a data owner submitted is withdrawn, and with it what was measured of that."""
        for row in _DELTA_ROWS:
            tenant.failed_rows.pop(row, None)
        if tenant.table is not None:
            tenant.table = _without(tenant.table, *_DELTA_ROWS)

    def failure(self) -> ScaleOTError | None:
        """What is wrong where evaluators were declared and not one of them has measured anything; else None."""
        asked = [tenant for tenant in self._state.tenants if tenant.measured]
        without = [tenant for tenant in asked if tenant.table is None or not tenant.table.rows]
        problems = {tenant.name: tenant.trouble for tenant in without if tenant.trouble is not None}
        if not problems or len(problems) < len(asked):
            return None
        kept = "The report is written and what data owners tuned is kept: the same command again only measures."
        first, *others = problems.values()
        if not others:
            return type(first)(first.problem, f"{first.remedy} {kept}")
        why = "; ".join(f"{name}: {problem.problem}" for name, problem in problems.items())
        kind = ConfigError if all(isinstance(one, ConfigError) for one in problems.values()) else RunFailed
        return kind(f"No data owner's rows could be measured ({why}).", f"Mend what is said of them. {kept}")

    def _has_all(self, tenant: Tenant) -> bool:
        return not tenant.measured or tenant.unmeasured is not None or tenant.has_rows(self._rows_of(tenant))

    def _rows_of(self, tenant: Tenant) -> tuple[str, ...]:
        """What is to be measured of a data owner by now."""
        rows = ALL_ROWS if tenant.entry is not None else FULL_ROWS
        rows = (*rows, AGGREGATE) if self.aggregate is not None else rows
        return tuple(row for row in rows if row not in tenant.failed_rows)

    def _measure(self, tenant: Tenant) -> None:
        state, actors = self._state, self._state.actors
        tenant.measurings += 1
        again = f"its evaluator died and starts again ({tenant.measurings} of {state.settings.rounds.attempts})"
        state.tell(tenant, "measuring", reason=again if tenant.measurings > 1 else "")
        begun = time.monotonic()

        def failed(error: Exception) -> bool:
            return self._failed(tenant, actor, error)

        part = state.part(tenant, state.folder.evaluator(tenant.name))
        cpus, gpus = tenant.settings.cpus, tenant.settings.gpus
        role = evaluator(tenant.name)
        actor = actors.start(role, Evaluator, cpus, gpus, state.settings.model, part, failed=failed)

        def measure() -> None:
            aggregate = self.aggregate
            answer = actor.handle.evaluate.remote(self._rows_of(tenant))
            actors.call(actor, answer, partial(measured, aggregate), failed)

        def measured(aggregate: PlugIn | None, failures: dict[str, ScaleOTError]) -> None:
            if aggregate != self.aggregate:
                failures.pop(AGGREGATE, None)
            tenant.failed_rows |= failures
            for row, problem in failures.items():
                actors.call_coordinator("note", f"{row} could not be measured: {problem.problem}", tenant.name)
            actors.call_coordinator("table", tenant.name, then=partial(took, aggregate))

        def took(aggregate: PlugIn | None, table: TenantTable) -> None:
            # Made anew since this was asked for, it is not what was measured.
            tenant.table = table if aggregate == self.aggregate else _without(table, AGGREGATE)
            if tenant.entry is None:
                self.forget_delta(tenant)
            if not self._has_all(tenant):
                measure()  # the delta came meanwhile: the model is loaded already
                return
            tenant.measurings = 0
            state.finish(actor, [tenant], "evaluate", begun)
            if tenant.trouble is None:
                state.tell(tenant, "measured")
            else:
                state.tell(tenant, "not measured", reason=tenant.trouble.problem)

        measure()

    def _failed(self, tenant: Tenant, actor: Running, error: Exception) -> bool:
        """What becomes of a data owner whose evaluator failed: it starts again, or its rows are left out."""
        actors = self._state.actors
        if actor not in actors.living:
            return True  # both answers of a dead actor fail; the first has been seen to
        problem = actors.failure(actor, error)
        self._state.end_work(actor.role)
        if has_died(error) and tenant.measurings < self._state.settings.rounds.attempts:
            actors.call_coordinator("note", problem.problem.splitlines()[0], tenant.name)
        else:
            self._give_up(tenant, problem)
        return True

    def _give_up(self, tenant: Tenant, problem: ScaleOTError) -> None:
        tenant.unmeasured = problem
        self._state.tell(tenant, "not measured", reason=problem.problem)
        self._state.actors.call_coordinator("note", f"not measured: {problem.problem}", tenant.name)


def _without(table: TenantTable, *rows: str) -> TenantTable:
    return replace(table, rows={row: score for row, score in table.rows.items() if row not in rows})

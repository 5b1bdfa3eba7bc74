"""The evaluator's actor: where the settings declare one, it holds the full model and a tenant's data at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from scaleot_ray.config import ModelSettings
from scaleot_ray.errors import ScaleOTError
from scaleot_ray.evaluation.table import AGGREGATE
from scaleot_ray.families.loading import BaseModel, load_base_model
from scaleot_ray.federation.roles.coordinator import evaluator
from scaleot_ray.federation.roles.data_owner import Part
from scaleot_ray.federation.roles.object_store import Shared, check_unchanged, from_shared
from scaleot_ray.federation.roles.role import Role
from scaleot_ray.federation.roles.table_gate import pack_table
from scaleot_ray.stages.evaluate import INPUTS, evaluate_rows

WITH_DELTA = {row for row, inputs in INPUTS.items() if "delta" in inputs}


@ray.remote
class Evaluator(Role):
    """Measures the rows of one tenant's table that need both secrets, and the emulator's row that Δ is against.

    Args:
        cpus: threads it computes with.
        coordinator: hands out the tenant's delta, takes its table, and hears of progress.
        model: the full model.
        part: the tenant's section; its ``output`` is the evaluator's folder, where rows are kept.
    """

    def __init__(self, cpus: int, coordinator: Any, model: ModelSettings, part: Part) -> None:
        super().__init__(evaluator(part.tenant.name), cpus, coordinator)
        self._model, self._part = model, part
        self._base: BaseModel | None = None

    def evaluate(self, rows: tuple[str, ...]) -> dict[str, ScaleOTError]:
        """Measures the given rows, and sends them through the coordinator's gate.

        Those measured before, in this actor or an earlier one, come from its folder.

        Args:
            rows: names of rows.

        Returns:
            What went wrong, by row; nothing of those that have passed the gate.

        Raises:
            RunFailed: the shared emulator is not what was put.
            ArtifactRefused: the gate does not let the table pass.
        """
        part, tenant = self._part, self._part.tenant
        shared = self.shared_emulator()  # says which layers are tuned
        delta: Shared | None = None
        aggregate: Shared | None = None
        if WITH_DELTA & set(rows):
            delta = ray.get(self.coordinator.delta.remote(tenant.name))
        if AGGREGATE in rows:
            aggregate = ray.get(self.coordinator.aggregate.remote(tenant.name))
        failures: dict[str, ScaleOTError] = {}
        if self._base is None:
            self._base = load_base_model(self._model)
        table = evaluate_rows(
            rows,
            name=tenant.name,
            test=tenant.test,
            base=self._base,
            emulator=shared,
            delta=from_shared(delta) if delta is not None else None,
            aggregate=from_shared(aggregate) if aggregate is not None else None,
            train=tenant.train,
            validation=tenant.validation,
            tune=part.tune,
            rounds=part.rounds,
            evaluate_examples=part.evaluate_examples,
            block_size=part.tune.block_size,
            folder=Path(part.output),
            on_progress=self.reporter(),
            failed=failures.__setitem__,
        )
        check_unchanged(shared, self.name)
        ray.get(self.coordinator.submit_table.remote(tenant.name, pack_table(table)))
        return failures

"""A data owner's actor: it tunes on the tenant's rows, and sends back a delta and numbers, never a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import TenantSettings, TuneSettings
from scaleot_ray.federation.coordinator import data_owner
from scaleot_ray.federation.object_store import Shared, check_unchanged, from_shared, to_shared
from scaleot_ray.federation.role import Role
from scaleot_ray.stages.identity import keyed_digest
from scaleot_ray.stages.tune import tune_emulator


@dataclass(frozen=True)
class Part:
    """One data owner's part of a run, as its actor is told.

    Attributes:
        tenant: its own section of the settings.
        tune: how it tunes (the run's section with its own keys).
        evaluate_examples: at most so many test rows, and so many validation rows.
        output: its own folder.
    """

    tenant: TenantSettings
    tune: TuneSettings
    evaluate_examples: int | None
    output: str


@ray.remote
class DataOwner(Role):
    """Tunes the shared emulator on its own data.

    Args:
        cpus: threads it computes with.
        coordinator: takes the delta and the metrics, and hears of progress.
        part: what to do.
    """

    def __init__(self, cpus: int, coordinator: Any, part: Part) -> None:
        super().__init__(data_owner(part.tenant.name), cpus, coordinator)
        self._part = part

    def tune(self, number: int, token: str) -> None:
        """Tunes for a round, and sends what came out through the coordinator's gate.

        Args:
            number: of the round.
            token: what its submission must carry.

        Raises:
            RunFailed: the shared emulator is not what was put.
            ArtifactRefused: the gate does not let the delta or the metrics pass.
        """
        part = self._part
        artifact = self.shared_emulator()
        artifact.verify()
        start: Shared | None = ray.get(self.coordinator.start.remote(number, part.tenant.name))
        result = tune_emulator(
            artifact,
            part.tenant.train,
            part.tune,
            Path(part.output),
            start=from_shared(start) if start is not None else None,
            name=part.tenant.name,
            test=part.tenant.test,
            validation=part.tenant.validation,
            device="auto",
            evaluate_examples=part.evaluate_examples,
            overwrite=True,
            on_progress=self.reporter(number),
        )
        check_unchanged(artifact, self.name)
        metrics = read_artifact(result.directory / "metrics", expected_kind="metrics")
        digest = keyed_digest(part.tenant.train, Path(part.output))
        sent = (part.tenant.name, token, number, to_shared(result.delta), to_shared(metrics), digest)
        ray.get(self.coordinator.submit.remote(*sent))

"""Data owners' actors: they tune on the tenants' rows, and send back deltas and numbers, never a row."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import TenantSettings, TuneSettings
from scaleot_ray.errors import RunFailed, ScaleOTError
from scaleot_ray.federation.roles.coordinator import data_owner
from scaleot_ray.federation.roles.object_store import Shared, check_unchanged, from_shared, to_shared
from scaleot_ray.federation.roles.role import Role
from scaleot_ray.progress import Progress
from scaleot_ray.resources.failure import actor_failure
from scaleot_ray.stages.identity import keyed_digest
from scaleot_ray.stages.tune import TuneRequest, TuneResult, tune_emulator
from scaleot_ray.stages.tune_packed import tune_emulator_packed

_BETWEEN_ROUNDS_SECONDS = 1.0


@dataclass(frozen=True)
class Part:
    """One data owner's part of a run, as its actor is told.

    Attributes:
        tenant: its own section of the settings.
        tune: how it tunes (the run's section with its own keys).
        evaluate_examples: at most so many test rows, and so many validation rows.
        output: its own folder.
        rounds: how many there are, for who compares with tuning the full model.
    """

    tenant: TenantSettings
    tune: TuneSettings
    evaluate_examples: int | None
    output: str
    rounds: int = 1


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
            earlier_steps=_earlier_steps(part, number),
            on_progress=self.reporter(number),
        )
        _submit(self, part, artifact, result, number, token)


@ray.remote(concurrency_groups={"administration": 1})
class PackedDataOwners(Role):
    """Several data owners that tune low-rank pairs in one process, which holds the shared emulator once.

    Args:
        cpus: threads it computes with.
        coordinator: takes the deltas and the metrics, and hears of progress.
        name: who they are together.
        parts: what to do, each with ``tune.method=lora``.
    """

    def __init__(self, cpus: int, coordinator: Any, name: str, parts: Sequence[Part]) -> None:
        super().__init__(name, cpus, coordinator)
        self._parts = {part.tenant.name: part for part in parts}
        self._left: set[str] = set()

    def tune(self, number: int, tokens: Mapping[str, str]) -> dict[str, ScaleOTError]:
        """Tunes for a round, and sends what comes of it through the coordinator's gate, each as soon as it is there.

        Args:
            number: of the round.
            tokens: what each one's submission must carry.

        Returns:
            What went wrong, by data owner; nothing of those whose delta has passed the gate.

        Raises:
            ConfigError: the emulator's model cannot be shared in one pass.
            RunFailed: the shared emulator is not what was put.
        """
        artifact = self.shared_emulator()
        artifact.verify()
        reporters = {name: self.reporter(number, data_owner(name)) for name in self._parts}
        failures: dict[str, ScaleOTError] = {}

        def finished(name: str, result: TuneResult) -> None:
            self._check_expected(name)
            _submit(self, self._parts[name], artifact, result, number, tokens[name])

        def failed(name: str, error: Exception) -> None:
            failures[name] = actor_failure(error, data_owner(name), None, Path())

        def on_progress(name: str, progress: Progress) -> None:
            self._check_expected(name)
            reporters[name](progress)

        requests = [self._request(part, number) for part in self._parts.values()]
        tune_emulator_packed(artifact, requests, finished=finished, failed=failed, on_progress=on_progress)
        return failures

    @ray.method(concurrency_group="administration")
    def leave(self, name: str) -> None:
        """Nothing is expected of a data owner any more: its tuning ends at its next step."""
        self._left.add(name)

    def _check_expected(self, name: str) -> None:
        if name in self._left:
            raise RunFailed(f"Nothing is expected of {name} any more.", "`scaleot status` shows why.")

    def _request(self, part: Part, number: int) -> TuneRequest:
        start: Shared | None = ray.get(self.coordinator.start.remote(number, part.tenant.name))
        return TuneRequest(
            name=part.tenant.name,
            train=part.tenant.train,
            tune=part.tune,
            output=Path(part.output),
            start=from_shared(start) if start is not None else None,
            test=part.tenant.test,
            validation=part.tenant.validation,
            evaluate_examples=part.evaluate_examples,
            overwrite=True,
            earlier_steps=_earlier_steps(part, number),
        )


def _earlier_steps(part: Part, number: int) -> int:
    """Steps before round ``number``, of rounds that the data owner missed too: each round reads rows further on.

    Where rounds do not build on one another, a later one is the same command again: it finds what was tuned.
    """
    return (number - 1) * part.tune.steps if part.rounds > 1 else 0


def _submit(role: Role, part: Part, emulator: Artifact, result: TuneResult, number: int, token: str) -> None:
    """Sends what came of a data owner's tuning, once it is sure that the emulator was what it was meant to be."""
    check_unchanged(emulator, role.name)
    metrics = read_artifact(result.directory / "metrics", expected_kind="metrics")
    digest = keyed_digest(part.tenant.train, Path(part.output))
    # Put once, however often it is sent.
    delta, numbers = ray.put(to_shared(result.delta)), ray.put(to_shared(metrics))
    while not ray.get(role.coordinator.submit.remote(part.tenant.name, token, number, delta, numbers, digest)):
        time.sleep(_BETWEEN_ROUNDS_SECONDS)  # late, and the round that it may still count in is not open yet

"""A tiny emulator, and deltas on it that the gate lets pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.delta_gate import expected_tensors
from scaleot_ray.artifacts.manifest import DeltaContent, MetricsContent
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.artifacts.tensor_roles import family_named
from scaleot_ray.config import AggregationSettings, RoundSettings, TuneSettings
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.rounds.administration import note_registry
from scaleot_ray.federation.rounds.artifact_location import Location
from scaleot_ray.federation.rounds.intake import Sent
from scaleot_ray.federation.rounds.round_keeper import RoundKeeper
from scaleot_ray.stages.build import build
from scaleot_ray.tuning.delta import Delta
from scaleot_ray.tuning.lora import LowRank
from tests.tiny_run import write_tiny_run


@dataclass
class TinyDeltas:
    """Deltas of any size on one emulator."""

    folder: Path
    emulator: Artifact

    @classmethod
    def build(cls, folder: Path, **changes: Any) -> TinyDeltas:
        """Builds the emulator in ``folder``; ``changes`` as :func:`write_tiny_run` takes them."""
        settings = write_tiny_run(folder, **changes)
        build(settings.model, settings.public, settings.stage_one, settings.emulator, folder / "emulator")
        return cls(folder, read_artifact(folder / "emulator"))

    @property
    def positions(self) -> tuple[int, ...]:
        """The plug-in layers."""
        roles = self.emulator.manifest.content.layer_map  # type: ignore[union-attr]
        return tuple(index for index, role in enumerate(roles) if role == "plug_in")

    def delta(self, value: float, start: str | None = None) -> Artifact:
        """A delta of method ``layers`` that is ``value`` everywhere."""
        prefixes = tuple(f"model.layers.{position}." for position in self.positions)
        tensors = {
            name: torch.full(entry.shape, value)
            for name, entry in self.emulator.manifest.tensors.items()
            if name.startswith(prefixes)
        }
        return Delta("layers", self.positions, {}, tensors).to_artifact(self.emulator.manifest, start)

    def low_rank(self, value: float, rank: int = 2, alpha: float = 2.0, start: str | None = None) -> Artifact:
        """A delta of method ``lora`` whose factors are ``value`` everywhere."""
        family = family_named(self.emulator.manifest)
        settings = {**LowRank.settings(TuneSettings(lora_rank=rank), family), "alpha": alpha}
        content = DeltaContent(method="lora", positions=list(self.positions), settings=settings)
        shapes = expected_tensors(content, self.emulator.manifest, family)
        tensors = {name: torch.full(shape, value) for name, shape in shapes.items()}
        return Delta("lora", self.positions, settings, tensors).to_artifact(self.emulator.manifest, start)

    def metrics(self, value: float = 2.0) -> Artifact:
        """Numbers beside a delta."""
        return Artifact.made_from(self.emulator.manifest, "metrics", MetricsContent(values={"emulator_tuned": value}))


def ended_run(tiny: TinyDeltas, folder: Path, artifacts: str | None = None) -> RunFolder:
    """The folder of a run that has ended: one round of ann and ben, and its aggregate; no actor was there."""
    run = RunFolder(folder / "run")
    run.path.mkdir()
    run.emulator.symlink_to(tiny.folder / "emulator")
    registry, audit = note_registry(run, str(folder / "elsewhere")), AuditLog(run.audit)
    location = Location.of(artifacts) if artifacts is not None else None
    settings = (RoundSettings(), AggregationSettings(), dict[str, float](), location)
    with RoundKeeper(tiny.emulator.manifest, run.emulator, run.coordinator, registry, audit, *settings) as keeper:
        tokens = {name: keeper.admit(name, {}) for name in ("ann", "ben")}
        keeper.begin(list(tokens))
        for value, (name, token) in enumerate(tokens.items(), start=1):
            delta = tiny.delta(float(value))
            keeper.take(Sent(name, token or "", 1, lambda delta=delta: delta, tiny.metrics))  # type: ignore[misc]
        keeper.end(1)
    return run

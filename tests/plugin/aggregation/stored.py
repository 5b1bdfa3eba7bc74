"""Deltas written to disk, as data owners send them."""

from __future__ import annotations

from pathlib import Path

import torch

from scaleot_ray.artifacts import Artifact, DeltaContent, write_artifact
from scaleot_ray.tuning import Delta
from tests.plugin.deltas import random_delta
from tests.tiny_models import tiny_model

PARENT = "ab" * 32

Given = list[tuple[str, Path, float]]


def write_delta(delta: Delta, directory: Path, parent: str = PARENT, start: str | None = None) -> Path:
    """Writes a delta without an emulator to belong to; ``start``: digest of what its tuning began with."""
    content = DeltaContent(
        method=delta.method, positions=list(delta.positions), settings=dict(delta.settings), start=start
    )
    return write_artifact(Artifact.create("delta", content, delta.tensors, parent_digest=parent), directory)


def plain_delta(values: dict[str, torch.Tensor]) -> Delta:
    """A ``layers`` delta of any tensors."""
    return Delta("layers", (0,), {}, values)


def random_deltas(
    folder: Path, method: str, count: int, weights: list[float] | None = None
) -> tuple[Given, list[Delta]]:
    """``count`` deltas on disk with their weights (1 each), and the same in memory."""
    model = tiny_model("llama")
    deltas = [random_delta(model, method, seed) for seed in range(count)]
    given = [
        (f"owner-{index}", write_delta(delta, folder / str(index)), (weights or [1.0] * count)[index])
        for index, delta in enumerate(deltas)
    ]
    return given, deltas

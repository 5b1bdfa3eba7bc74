"""Tokens/s of :func:`scaleot_ray.tuning.tune` against a bare loop, on the same emulator and batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.overhead.bare_loop import bare_loop
from benchmarks.overhead.spread import ratios, spread
from benchmarks.overhead.subjects import random_batches
from scaleot_ray.artifacts import Artifact
from scaleot_ray.config import TuneSettings
from scaleot_ray.data import TokenBatches
from scaleot_ray.emulator.assemble import assemble, emulator_content
from scaleot_ray.families import family_of
from scaleot_ray.stages.limits import vocabulary_size
from scaleot_ray.tuning import tune
from scaleot_ray.tuning.layers import WholeLayers, layer_parameters

Say = Callable[[str], None]


@dataclass
class _Timed:
    seconds: float
    processor_seconds: float
    changes: dict[str, torch.Tensor]


def compare_trainers(emulator: Artifact, settings: TuneSettings, pairs: int, say: Say) -> dict[str, Any]:
    """Runs both in turn (A B A B …) in this process; each measurement is one whole call, set-up included.

    Args:
        emulator: what is tuned, with the method ``layers``.
        settings: steps and batch of one call.
        pairs: how often each is measured, after one short call of each that is not.
        say: hears of each pair.

    Returns:
        ``tune`` and ``bare`` (tokens/s), ``ratio`` tune / bare (aim: at least 0.97), ``processor_ratio``
        (bare / tune processor seconds, which other work on the machine disturbs less), and
        ``difference`` between what both made of the weights (norm, relative to the change's), which shows
        that they did the same work.
    """
    model = assemble(emulator)
    positions = emulator_content(emulator.manifest).plug_in_positions
    batches = random_batches(vocabulary_size(model), settings.batch_size, settings.block_size)
    short = settings.model_copy(update={"steps": 2})
    for run in (_tune, _bare):
        run(model, positions, batches, short)
    tuned, bare = [], []
    for pair in range(pairs):
        tuned.append(_tune(model, positions, batches, settings))
        bare.append(_bare(model, positions, batches, settings))
        say(f"trainer, pair {pair + 1} of {pairs}: tune / bare loop = {bare[-1].seconds / tuned[-1].seconds:.3f}")
    tokens = settings.steps * settings.batch_size * settings.block_size
    return {
        "steps": settings.steps,
        "tune": spread([tokens / run.seconds for run in tuned]),
        "bare": spread([tokens / run.seconds for run in bare]),
        "ratio": ratios([run.seconds for run in bare], [run.seconds for run in tuned]),
        "processor_ratio": ratios([run.processor_seconds for run in bare], [run.processor_seconds for run in tuned]),
        "difference": _difference(tuned[0].changes, bare[0].changes),
    }


def _tune(model: Any, positions: tuple[int, ...], batches: TokenBatches, settings: TuneSettings) -> _Timed:
    wall, processor = time.perf_counter(), time.process_time()
    delta = tune(model, family_of(model.config), positions, batches, settings).delta
    return _Timed(time.perf_counter() - wall, time.process_time() - processor, delta.tensors)


def _bare(model: Any, positions: tuple[int, ...], batches: TokenBatches, settings: TuneSettings) -> _Timed:
    parameters = layer_parameters(model, family_of(model.config), positions)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    wall, processor = time.perf_counter(), time.process_time()
    bare_loop(model, list(parameters.values()), batches.batches(), settings, WholeLayers.learning_rate)
    timed = _Timed(time.perf_counter() - wall, time.process_time() - processor, {})
    model.eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in parameters.items():
            timed.changes[name] = parameter - before[name]
            parameter.copy_(before[name])
            parameter.grad = None
    return timed


def _difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    apart = sum((one[name] - change).double().square().sum().item() for name, change in other.items())
    whole = sum(change.double().square().sum().item() for change in other.values())
    return math.sqrt(apart / whole)

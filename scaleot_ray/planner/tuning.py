"""What a data owner's tuning needs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from scaleot_ray.config import TuneSettings
from scaleot_ray.families import family_of
from scaleot_ray.planner.blueprint import Blueprint
from scaleot_ray.planner.emulator import parameters
from scaleot_ray.planner.plan import Parts, Phase, Process
from scaleot_ray.tuning.gradient_checkpointing import gradient_checkpointing
from scaleot_ray.tuning.methods import method_named


def tuning_process(
    emulator: Any, positions: tuple[int, ...], tune: TuneSettings, *, gpu: bool = False, mapped: bool = True
) -> Process:
    """One data owner, tuning an emulator.

    Every token counts as labelled, as in plain text; of rows that are mostly prompt, less is needed.

    Args:
        emulator: on the meta device; it is changed.
        positions: of the plug-in layers.
        tune: method, batches, precision.
        gpu: whether it computes on a GPU.
        mapped: whether the weights are pages of a file or of the object store as long as nothing changes them.
    """
    dtype: torch.dtype = emulator.dtype
    weights = parameters(emulator) * dtype.itemsize
    method = method_named(tune.method)()
    family = family_of(emulator.config)
    trained = method.attach(emulator, family, positions, method.settings(tune, family)).values()
    numbers = sum(parameter.numel() for parameter in trained)
    values = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    masters = sum(4 * parameter.numel() for parameter in trained if parameter.element_size() < 4)
    autocast = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[tune.precision]
    with gradient_checkpointing(emulator) if tune.gradient_checkpointing else nullcontext():
        emulator.train()
        step = Blueprint(emulator, dtype).tuning_step(tune.batch_size, tune.block_size, autocast)
    device: Parts = {
        **({"weights": weights} if gpu or not mapped else {}),
        "trained weights": values + masters,
        "optimizer": 2 * max(4, dtype.itemsize) * numbers,
        # Gradients of narrow weights go over to float32 one by one.
        "activations and gradients": step + masters - (values if masters else 0),
        **({"best weights": max(4, dtype.itemsize) * numbers} if tune.patience is not None else {}),
    }
    delta = {"delta": max(4, dtype.itemsize) * numbers} if gpu else {}
    return Process("data owner", 1, gpu, (Phase("tune", device, delta),), 0 if gpu or not mapped else weights)

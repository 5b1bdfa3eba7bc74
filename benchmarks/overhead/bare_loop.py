"""The loop one writes by hand: what a data owner's tuning is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from scaleot_ray.config import TuneSettings
from scaleot_ray.data import Batch
from scaleot_ray.tuning.optimization import BETAS, learning_rate


def bare_loop(
    model: Any,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Batch],
    settings: TuneSettings,
    peak: float,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains ``parameters`` of ``model`` in place, as plainly as it can be written.

    The same AdamW (fused), learning rates and clipping as :func:`scaleot_ray.tuning.tune`, the loss as the
    model itself gives it for ``labels``; no checks, checkpoints, accumulation or mixed precision.

    Args:
        model: a Hugging Face causal LM in fp32.
        parameters: all others are frozen already.
        batches: at least ``settings.steps`` of them, without padding.
        settings: steps, clipping, warm-up.
        peak: learning rate.
        on_step: hears of every finished step, from 1.

    Returns:
        The loss of every step.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=BETAS, weight_decay=settings.weight_decay, fused=True)
    model.train()
    losses = []
    for step, batch in zip(range(1, settings.steps + 1), batches, strict=False):
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.warmup_fraction, peak)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step)
    return losses

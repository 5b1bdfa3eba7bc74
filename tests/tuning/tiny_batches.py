"""Batches in the tiny models' vocabulary, of uneven lengths and partly labelled."""

from __future__ import annotations

import random

import torch

from scaleot_ray.config import TuneSettings
from scaleot_ray.data.batches import TokenBatches
from scaleot_ray.data.examples import IGNORED, TokenExample

POSITIONS = (0, 1, 6, 7)


def tiny_examples(count: int = 24, seed: int = 0) -> list[TokenExample]:
    """Sequences of 6 to 20 tokens; the first few of each carry no label, as prompts do."""
    order, result = random.Random(seed), []
    for _ in range(count):
        ids = [order.randrange(3, 97) for _ in range(order.randrange(6, 21))]
        prompt = order.randrange(0, 5)
        result.append(TokenExample(ids, [IGNORED] * prompt + ids[prompt:]))
    return result


def tiny_batches(batch_size: int = 4, seed: int = 0, count: int = 24) -> TokenBatches:
    """Endless shuffled batches of :func:`tiny_examples`."""
    return TokenBatches(tiny_examples(count, seed), batch_size, pad_id=0, seed=seed)


def tiny_settings(method: str = "layers", **values: object) -> TuneSettings:
    """Few steps, small rank and width."""
    plain = {"method": method, "steps": 6, "lora_rank": 3, "lora_alpha": 5.0, "bottleneck_width": 7}
    return TuneSettings.model_validate({**plain, **values})


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}

"""Log-probabilities of chosen tokens, with the head run on the positions that predict them and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scaleot_ray.data.encoding import check_vocabulary
from scaleot_ray.errors import DataError
from scaleot_ray.families.family import text_config
from scaleot_ray.families.head import HeadPositions

# Logits turned into fp32 log-probabilities at a time; the rest waits in the model's own type.
_CHUNK = 256


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients; each module's mode comes back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a buffer that a model makes in there could not be used in training later.
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def check_tokens(model: Any, input_ids: Tensor, targets: Tensor) -> None:
    """Refuses input that the model has no embedding or no position for.

    Args:
        model: a causal LM.
        input_ids: (batch, time) int64, on the CPU.
        targets: tokens to be predicted, int64 of any shape; negative ones (no label) do not count.

    Raises:
        DataError: a sequence is longer than the model's context, or a token id beyond its vocabulary.
    """
    check_vocabulary([int(input_ids.max()), int(targets.max())], model.get_input_embeddings().weight.shape[0])
    positions = getattr(text_config(model.config), "max_position_embeddings", None)
    if positions is not None and input_ids.shape[1] > positions:
        raise DataError(
            f"A row to evaluate has {input_ids.shape[1]} tokens; the model's context has {positions}.",
            "Set a smaller block_size, or shorten the prompts.",
        )


def log_likelihoods(
    model: Any, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, targets: Tensor
) -> Tensor:
    """log p(target | tokens up to and including its position), for each of N (position, target) pairs.

    Args:
        model: a Hugging Face causal LM, in eval mode.
        input_ids: (batch, time) int64, padded on the right.
        attention_mask: (batch, time) int64.
        positions: (N,) int64 into the batch taken as one row (row · time + t); repeats are welcome.
        targets: (N,) int64 token ids.

    Returns:
        (N,) float64 on the CPU, in nats.
    """
    device = model.get_input_embeddings().weight.device
    head = HeadPositions(model)
    try:
        with head.at(positions.to(device)):
            output = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
    finally:
        head.close()
    logits = output.logits.squeeze(0)
    parts = [
        -nn.functional.cross_entropy(_wide(chunk), wanted.to(logits.device), reduction="none")
        for chunk, wanted in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True)
    ]
    return torch.cat(parts).double().cpu()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

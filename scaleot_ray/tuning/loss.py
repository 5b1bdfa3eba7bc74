"""Causal-LM loss that computes logits only where there is a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from scaleot_ray.data.batches import Batch, stacked
from scaleot_ray.data.examples import IGNORED
from scaleot_ray.families.head import HeadPositions


class LabelledLoss:
    """Cross entropy summed over the labelled tokens of a batch, in nats, for any causal LM.

    The head runs on those positions alone (:class:`~scaleot_ray.families.head.HeadPositions`). Divided by
    the number of labelled tokens it is the loss that the model gives for ``labels``.

    Args:
        model: a Hugging Face causal LM; carries the hook until :meth:`close`.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._head = model, HeadPositions(model)

    def __call__(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """The summed loss of ``batch``, a 0-d tensor of at least fp32; ``batch`` may be on the CPU."""
        return self.each([batch], device)[0]

    def each(self, batches: Sequence[Batch], device: torch.device) -> list[torch.Tensor]:
        """The summed losses of several batches, one forward pass for the rows of all of them."""
        batch = stacked(batches)
        labels = batch["labels"]
        # On the CPU where batches are made, so that a GPU need not be waited for.
        positions = labelled_positions(labels)
        targets = labels.reshape(-1)[positions + 1].to(device, non_blocking=True)
        mask = batch.get("attention_mask")
        with self._head.at(positions.to(device, non_blocking=True)):
            logits = self._model(
                input_ids=batch["input_ids"].to(device, non_blocking=True),
                attention_mask=None if mask is None else mask.to(device, non_blocking=True),
                use_cache=False,
            ).logits
        logits = logits.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        counts = [labelled_tokens(each) for each in batches]
        parts = zip(logits.split(counts), targets.split(counts), strict=True)
        return [nn.functional.cross_entropy(own, wanted, reduction="sum") for own, wanted in parts]

    def close(self) -> None:
        """Takes the hook off the model."""
        self._head.close()


def labelled_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose logits have a label, in ``labels`` (batch, time) taken as one row: (N,) int64.

    Position t predicts token t + 1, so a label on a sequence's first token counts nowhere.
    """
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORED
    return wanted.reshape(-1).nonzero().squeeze(1)


def labelled_tokens(batch: Batch) -> int:
    """Number of tokens that the loss of ``batch`` sums over."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())

"""Language-model loss on held-out text, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scaleot_ray.data.batches import Batch
from scaleot_ray.data.examples import IGNORED
from scaleot_ray.errors import DataError, RunFailed
from scaleot_ray.evaluation.log_likelihood import check_tokens, evaluating, log_likelihoods
from scaleot_ray.evaluation.score import Blocks
from scaleot_ray.progress import OnProgress, ProgressMeter


@dataclass(frozen=True)
class LossScore:
    """Cross entropy in nats per token.

    Attributes:
        sums: (n,) float64, nats summed over the labelled tokens of each block.
        counts: (n,) int64, labelled tokens of each block.
    """

    sums: np.ndarray
    counts: np.ndarray
    metric: str = "loss"

    @property
    def value(self) -> float:
        """Nats per token over all blocks."""
        return self.blocks("loss").mean

    def blocks(self, measure: str) -> Blocks:
        """The loss block by block."""
        assert measure == "loss"
        return Blocks(self.sums, self.counts, higher_is_better=False)


def perplexity(loss: float) -> float:
    """e to a loss in nats per token; infinite beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluate_loss(
    model: Any,
    batches: Iterable[Batch],
    on_progress: OnProgress | None = None,
    stage: str = "evaluate",
) -> LossScore:
    """Loss of ``model`` over one pass of ``batches``; logits exist for one batch at a time.

    Args:
        model: a Hugging Face causal LM; its training mode comes back afterwards.
        batches: padded on the right, e.g. :func:`scaleot_ray.data.batches.fixed`.
        on_progress: receives a report after each batch, counted in blocks.
        stage: name in the reports.

    Raises:
        DataError: there is no labelled token at all, or a token or length the model cannot take.
        RunFailed: the loss is NaN or infinite.
    """
    sums: list[float] = []
    counts: list[int] = []
    meter = ProgressMeter(stage, 0, on_progress)
    with evaluating(model):
        for index, batch in enumerate(batches):
            batch_sums, batch_counts = _block_losses(model, batch, index)
            sums += batch_sums
            counts += batch_counts
            # How many there are is known only where batches have a length.
            meter.steps = max(len(sums), len(batches) * len(batch_sums) if isinstance(batches, Sized) else 0)
            meter.advance(len(batch_sums), int(batch["attention_mask"].sum()), _mean(batch_sums, batch_counts))
    if not sum(counts):
        raise DataError(
            "There is no token to score in the rows to evaluate.", "Give rows with text (or a completion) in them."
        )
    return LossScore(np.array(sums, dtype=np.float64), np.array(counts, dtype=np.int64))


def _block_losses(model: Any, batch: Batch, index: int) -> tuple[list[float], list[int]]:
    labels = batch["labels"].cpu()
    check_tokens(model, batch["input_ids"].cpu(), labels)
    wanted = labels[:, 1:] != IGNORED  # position t predicts token t + 1
    counts = wanted.sum(dim=1)
    sums = torch.zeros(len(labels), dtype=torch.float64)
    if wanted.any():
        rows, times = wanted.nonzero(as_tuple=True)
        positions = rows * labels.shape[1] + times
        losses = -log_likelihoods(
            model, batch["input_ids"], batch["attention_mask"], positions, labels[rows, times + 1]
        )
        sums.index_add_(0, rows, losses)
    if not torch.isfinite(sums).all():
        raise RunFailed(
            f"The loss is {sums[~torch.isfinite(sums)][0].item()} in batch {index} of the evaluation.",
            "Lower tune.learning_rate if this is a tuned model; else set model.dtype to float32 and check its weights.",
        )
    return sums.tolist(), counts.tolist()


def _mean(sums: list[float], counts: list[int]) -> float | None:
    return sum(sums) / sum(counts) if sum(counts) else None

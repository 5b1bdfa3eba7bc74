"""A data owner's test rows, made once, on which any number of models is measured the same way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

from scaleot_ray.config import DataSettings
from scaleot_ray.data import Batch, Rows, TokenExample, choice_examples, fixed, padding_id, token_examples
from scaleot_ray.data.examples import TooLong
from scaleot_ray.evaluation.choice import ChoiceScore, evaluate_choice
from scaleot_ray.evaluation.loss import LossScore, evaluate_loss
from scaleot_ray.evaluation.score import ReportedScore
from scaleot_ray.evaluation.table import SECONDARY
from scaleot_ray.progress import OnProgress

BATCH_SIZE = 8
"""Sequences per forward pass of an evaluation, where nothing else is asked for."""


class TestRows:
    """Test rows as tokens, at most ``limit`` of them, held in memory.

    A ``choice`` task is measured by accuracy, everything else by its loss.

    Args:
        settings: the rows.
        tokenizer: of the models to be measured.
        block_size: tokens per sequence.
        limit: rows or blocks at most; None takes all.
        too_long: what to do with longer rows.
        batch_size: sequences per forward pass.
        part: takes some of the rows; default: all.

    Raises:
        DataError: rows cannot be read, or are not what the settings say.
    """

    __test__ = False  # pytest takes the name for a test class

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Any,
        block_size: int,
        limit: int | None = None,
        too_long: TooLong = "error",
        batch_size: int = BATCH_SIZE,
        part: Callable[[Rows], Rows] | None = None,
    ) -> None:
        self.metric = "accuracy" if settings.task == "choice" else "loss"
        self._pad, self._batch_size = padding_id(tokenizer), batch_size
        if self.metric == "accuracy":
            questions = choice_examples(settings, tokenizer, block_size, too_long, part)
            self._questions = list(itertools.islice(questions, limit))
        else:
            examples = token_examples(settings, tokenizer, block_size, too_long, part)
            self._batches = _Batches(list(itertools.islice(examples, limit)), batch_size, self._pad)

    def score(
        self, model: Any, stage: str = "evaluate", on_progress: OnProgress | None = None
    ) -> LossScore | ChoiceScore:
        """Measures a causal LM on all rows."""
        if self.metric == "accuracy":
            return evaluate_choice(
                model, self._questions, self._pad, self._batch_size, on_progress=on_progress, stage=stage
            )
        return evaluate_loss(model, self._batches, on_progress=on_progress, stage=stage)

    def loss(self, model: Any) -> float:
        """Nats, lower is better: per token, or per right answer of a ``choice`` task; for early stopping."""
        score = self.score(model)
        return -score.mean_log_likelihood if isinstance(score, ChoiceScore) else score.value


def numbers(score: LossScore | ChoiceScore, name: str) -> dict[str, float]:
    """A score as the numbers that may leave: the metric under ``name``, further measures beside it."""
    values = {name: score.value}
    if isinstance(score, ChoiceScore):
        values |= {f"{name}.normalised": score.normalised, f"{name}.log_likelihood": score.mean_log_likelihood}
    return values


def reported(values: Mapping[str, float], name: str, metric: str) -> ReportedScore | None:
    """What :func:`numbers` was given, as far as its numbers tell; None where the metric is not among them."""
    if name not in values:
        return None
    further = {measure: values[key] for measure in SECONDARY[metric] if (key := f"{name}.{measure}") in values}
    return ReportedScore(metric, values[name], further)


class _Batches(Sized):
    """One ordered pass over examples, any number of times; its length lets progress know the end."""

    def __init__(self, examples: list[TokenExample], batch_size: int, pad: int) -> None:
        self._examples, self._batch_size, self._pad = examples, batch_size, pad

    def __len__(self) -> int:
        return math.ceil(len(self._examples) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return fixed(self._examples, self._batch_size, self._pad)

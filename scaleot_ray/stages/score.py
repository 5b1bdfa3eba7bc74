"""A data owner's test rows, the same ones for any number of models, read anew for each of them."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Generic, TypeVar

import numpy as np

from scaleot_ray.config import DataSettings
from scaleot_ray.data import (
    Batch,
    Rows,
    TokenExample,
    choice_examples,
    fixed,
    padding_id,
    token_examples,
)
from scaleot_ray.data.examples import TooLong
from scaleot_ray.errors import DataError
from scaleot_ray.evaluation.choice import ChoiceScore, evaluate_choice
from scaleot_ray.evaluation.loss import LossScore, evaluate_loss
from scaleot_ray.evaluation.score import ReportedScore
from scaleot_ray.evaluation.table import SECONDARY
from scaleot_ray.progress import OnProgress

BATCH_SIZE = 8
"""Sequences per forward pass of an evaluation, where nothing else is asked for."""

Example = TypeVar("Example")
AnyScore = LossScore | ChoiceScore


class TestRows:
    """Test rows as tokens, at most ``limit`` of them; they may exceed memory.

    A ``choice`` task is measured by accuracy, everything else by its loss. Rows are read and made into
    tokens once here, so that mistakes show before anything is computed, and again on every pass.

    Args:
        settings: the rows.
        tokenizer: of the models to be measured.
        block_size: tokens per sequence.
        limit: rows or blocks at most; None takes all.
        too_long: what to do with longer rows.
        batch_size: sequences per forward pass.
        part: takes some of the rows; default: all.

    Raises:
        DataError: rows cannot be read, or are not what the settings say; from a later pass also when
            they have changed since.
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
            self._questions = _Unchanged(questions, limit, settings.path)
        else:
            examples = token_examples(settings, tokenizer, block_size, too_long, part)
            self._batches = _Batches(_Unchanged(examples, limit, settings.path), batch_size, self._pad)

    def score(self, model: Any, stage: str = "evaluate", on_progress: OnProgress | None = None) -> AnyScore:
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


def numbers(score: AnyScore, name: str) -> dict[str, float]:
    """A score as the numbers that may leave: the metric under ``name``, further measures beside it."""
    values = {name: score.value}
    if isinstance(score, ChoiceScore):
        values[f"{name}.normalised"] = score.normalised
        values[f"{name}.log_likelihood"] = score.mean_log_likelihood
        values[f"{name}.log_probability"] = score.mean_log_probability
    return values


def reported(values: Mapping[str, float], name: str, metric: str) -> ReportedScore | None:
    """What :func:`numbers` was given, as far as its numbers tell; None where the metric is not among them."""
    if name not in values:
        return None
    further = {measure: values[key] for measure in SECONDARY[metric] if (key := f"{name}.{measure}") in values}
    return ReportedScore(metric, values[name], further)


def score_record(score: AnyScore) -> dict[str, Any]:
    """A score as plain values, block by block."""
    if isinstance(score, LossScore):
        return {"sums": score.sums.tolist(), "counts": score.counts.tolist()}
    return {
        "correct": score.correct.tolist(),
        "correct_normalised": score.correct_normalised.tolist(),
        "log_likelihood": score.log_likelihood.tolist(),
        "log_probability": score.log_probability.tolist(),
    }


def score_from_record(record: dict[str, Any]) -> AnyScore:
    """What :func:`score_record` was given."""
    if "sums" in record:
        return LossScore(np.array(record["sums"], dtype=np.float64), np.array(record["counts"], dtype=np.int64))
    return ChoiceScore(
        np.array(record["correct"]),
        np.array(record["correct_normalised"]),
        np.array(record["log_likelihood"]),
        np.array(record["log_probability"]),
    )


class _Unchanged(Iterable[Example], Sized, Generic[Example]):
    """The first ``limit`` examples, made anew on every pass; one that differs from the first is an error."""

    def __init__(self, examples: Iterable[Example], limit: int | None, path: str) -> None:
        self._examples, self._limit, self._path = examples, limit, path
        self._first: tuple[int, int] | None = None
        for _ in self:
            pass

    def __len__(self) -> int:
        assert self._first is not None
        return self._first[0]

    def __iter__(self) -> Iterator[Example]:
        count = checksum = 0
        for example in itertools.islice(self._examples, self._limit):
            count, checksum = count + 1, zlib.crc32(repr(example).encode(), checksum)
            yield example
        if self._first is None:
            self._first = count, checksum
        elif self._first != (count, checksum):
            # Models measured on different rows would be compared as if these were the same.
            raise DataError(
                f"{self._path}: its rows have changed since the command began.",
                "Leave the dataset alone while a command reads it, and run again.",
            )


class _Batches(Sized):
    """One ordered pass over examples, any number of times; its length lets progress know the end."""

    def __init__(self, examples: _Unchanged[TokenExample], batch_size: int, pad: int) -> None:
        self._examples, self._batch_size, self._pad = examples, batch_size, pad

    def __len__(self) -> int:
        return math.ceil(len(self._examples) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return fixed(self._examples, self._batch_size, self._pad)

"""Multiple choice by log-likelihood, as lm-evaluation-harness scores it (``acc`` and ``acc_norm``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from scaleot_ray.data.examples import ChoiceExample
from scaleot_ray.errors import DataError, RunFailed
from scaleot_ray.evaluation.log_likelihood import check_tokens, evaluating, log_likelihoods
from scaleot_ray.evaluation.score import Blocks
from scaleot_ray.progress import OnProgress, ProgressMeter

ROWS_AT_A_TIME = 4096
"""Rows held in memory at once. Their sequences are sorted by length, so a batch never spans more of them."""


@dataclass(frozen=True)
class ChoiceScore:
    """Multiple choice, row by row.

    Attributes:
        correct: (n,) bool, the right answer has the highest log-likelihood.
        correct_normalised: (n,) bool, the same after division by each answer's characters.
        log_likelihood: (n,) float64, nats of the right answer: paired, far less noisy than accuracy. Much of what
            tuning gains in it is form: that the answer is one of a few words at all.
        log_probability: (n,) float64, nats of the right answer among the row's answers alone (their likelihoods
            sum to one): what is known beyond the form, as smooth as the above.
    """

    correct: np.ndarray
    correct_normalised: np.ndarray
    log_likelihood: np.ndarray
    log_probability: np.ndarray
    metric: str = "accuracy"

    @property
    def value(self) -> float:
        """Accuracy."""
        return self.blocks("accuracy").mean

    @property
    def normalised(self) -> float:
        """Length-normalised accuracy."""
        return self.blocks("normalised").mean

    @property
    def mean_log_probability(self) -> float:
        """Nats of the right answer among all, mean over rows."""
        return self.blocks("log_probability").mean

    @property
    def mean_log_likelihood(self) -> float:
        """Nats of the right answer, mean over rows."""
        return self.blocks("log_likelihood").mean

    def blocks(self, measure: str) -> Blocks:
        """``accuracy``, ``normalised``, ``log_likelihood`` or ``log_probability``, one row a block."""
        by_name = {
            "accuracy": self.correct,
            "normalised": self.correct_normalised,
            "log_likelihood": self.log_likelihood,
            "log_probability": self.log_probability,
        }
        sums = by_name[measure].astype(np.float64)
        return Blocks(sums, np.ones(len(sums), dtype=np.int64), higher_is_better=True)


@dataclass
class _Sequence:
    """Tokens to run once, and the answers that are read off it."""

    tokens: list[int]
    start: int  # position that predicts an answer's first token
    answers: list[tuple[int, int, list[int]]]  # row, choice, tokens


def evaluate_choice(
    model: Any,
    examples: Iterable[ChoiceExample],
    pad_id: int,
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
    stage: str = "evaluate",
) -> ChoiceScore:
    """Scores every answer by the sum of its tokens' log-probabilities after the context.

    ``acc`` takes the highest sum, ``acc_norm`` the highest sum divided by the answer's characters, as
    lm-evaluation-harness does (``ConfigurableTask.process_results``: ``len`` of the choice's text, in
    characters, without the space in front of it); of equal ones the first. At most
    ``ROWS_AT_A_TIME`` rows are held, so there may be more than fit into memory.

    Args:
        model: a Hugging Face causal LM; its training mode comes back afterwards.
        examples: see :func:`scaleot_ray.data.examples.choice_examples`; read once.
        pad_id: fills up the right of shorter sequences.
        batch_size: sequences (context and one answer) per forward pass.
        on_progress: receives a report after each batch, counted in sequences.
        stage: name in the reports.

    Raises:
        DataError: no row, a label that names no answer, an empty context or answer, or tokens or a
            length that the model cannot take.
        RunFailed: a log-likelihood is NaN or infinite.
    """
    source = iter(examples)
    total = len(examples) if isinstance(examples, Sized) else 0
    parts: list[ChoiceScore] = []
    read = 0
    meter = ProgressMeter(stage, 0, on_progress)
    with evaluating(model):
        while rows := list(islice(source, ROWS_AT_A_TIME)):
            for index, row in enumerate(rows, start=read):
                _check(row, index)
            sums = [np.zeros(len(row.continuations)) for row in rows]
            # Sequences of like length side by side waste little on padding; the longest first, so that memory
            # that does not suffice shows at once.
            sequences = sorted(_sequences(rows), key=lambda sequence: -len(sequence.tokens))
            # Rows yet to be read are taken to be like those that were.
            seen = read + len(rows)
            meter.steps = (meter.done + len(sequences)) * max(total, seen) // seen
            for first in range(0, len(sequences), batch_size):
                batch = sequences[first : first + batch_size]
                _score(model, batch, pad_id, sums)
                meter.advance(len(batch), sum(len(sequence.tokens) for sequence in batch))
            parts.append(_read_off(rows, sums, read))
            read = seen
    if not parts:
        raise DataError("The multiple-choice dataset has no row to evaluate.", "Give a dataset with at least one row.")
    return ChoiceScore(
        correct=np.concatenate([part.correct for part in parts]),
        correct_normalised=np.concatenate([part.correct_normalised for part in parts]),
        log_likelihood=np.concatenate([part.log_likelihood for part in parts]),
        log_probability=np.concatenate([part.log_probability for part in parts]),
    )


def _check(row: ChoiceExample, index: int) -> None:
    sizes = {len(row.continuations), len(row.lengths)}
    if len(sizes) != 1 or not 0 <= row.label < len(row.continuations):
        raise DataError(
            f"Row {index}: label {row.label} names none of its {len(row.continuations)} answers.",
            "Labels count from 0; check label_column and choices_column.",
        )
    if not row.context or not all(row.continuations) or min(row.lengths) < 1:
        raise DataError(f"Row {index}: its prompt or one of its answers is empty.", "Remove or complete the row.")


def _sequences(rows: Sequence[ChoiceExample]) -> list[_Sequence]:
    sequences: list[_Sequence] = []
    for index, row in enumerate(rows):
        # The last token of an answer is predicted, never read: one-token answers share one sequence.
        same: dict[tuple[int, ...], _Sequence] = {}
        for choice, answer in enumerate(row.continuations):
            tokens = [*row.context, *answer[:-1]]
            sequence = same.setdefault(tuple(tokens), _Sequence(tokens, len(row.context) - 1, []))
            sequence.answers.append((index, choice, answer))
        sequences += same.values()
    return sequences


def _score(model: Any, batch: Sequence[_Sequence], pad_id: int, sums: list[np.ndarray]) -> None:
    time = max(len(sequence.tokens) for sequence in batch)
    input_ids = torch.full((len(batch), time), pad_id)
    mask = torch.zeros_like(input_ids)
    positions: list[int] = []
    targets: list[int] = []
    for line, sequence in enumerate(batch):
        length = len(sequence.tokens)
        input_ids[line, :length] = torch.tensor(sequence.tokens)
        mask[line, :length] = 1
        for _, _, answer in sequence.answers:
            start = line * time + sequence.start
            positions += range(start, start + len(answer))
            targets += answer
    wanted = torch.tensor(targets)
    check_tokens(model, input_ids, wanted)
    scored = log_likelihoods(model, input_ids, mask, torch.tensor(positions), wanted).numpy()
    at = 0
    for sequence in batch:
        for row, choice, answer in sequence.answers:
            sums[row][choice] = scored[at : at + len(answer)].sum()
            at += len(answer)


def _read_off(rows: Sequence[ChoiceExample], sums: Sequence[np.ndarray], first: int) -> ChoiceScore:
    for index, values in enumerate(sums, start=first):
        if not np.isfinite(values).all():
            raise RunFailed(
                f"An answer of row {index} has the log-likelihood {values[~np.isfinite(values)][0]}.",
                "Lower tune.learning_rate if this is a tuned model; else set model.dtype to float32.",
            )
    pairs = list(zip(rows, sums, strict=True))
    return ChoiceScore(
        correct=np.array([values.argmax() == row.label for row, values in pairs]),
        correct_normalised=np.array([(values / np.array(row.lengths)).argmax() == row.label for row, values in pairs]),
        log_likelihood=np.array([values[row.label] for row, values in pairs]),
        log_probability=np.array([values[row.label] - np.logaddexp.reduce(values) for row, values in pairs]),
    )

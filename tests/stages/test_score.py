"""Test rows: read anew on every pass and never held, with the scores that held ones have."""

from __future__ import annotations

import gc
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaleot_ray.config import DataSettings
from scaleot_ray.data import ChoiceExample, TokenExample, choice_examples, fixed, token_examples
from scaleot_ray.errors import DataError
from scaleot_ray.evaluation import choice
from scaleot_ray.evaluation.choice import ChoiceScore, evaluate_choice
from scaleot_ray.evaluation.loss import LossScore, evaluate_loss
from scaleot_ray.progress import Progress
from scaleot_ray.stages.score import TestRows
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.tiny_run import WORDS

BLOCK = 32
TASKS = ("text", "completion", "choice")


def dataset(folder: Path, task: str, rows: int) -> DataSettings:
    """Rows of random words for a task, as JSON Lines."""
    draw = random.Random(0)

    def row() -> dict[str, Any]:
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 5))]
        if task == "choice":
            return {"prompt": words[0], "choices": draw.sample(WORDS, 2), "label": draw.randrange(2)}
        return {"text": " ".join(words)} if task == "text" else {"prompt": words[0], "completion": words[1]}

    path = folder / f"{task}-{rows}.jsonl"
    path.write_text("".join(json.dumps(row()) + "\n" for _ in range(rows)))
    return DataSettings.model_validate({"path": str(path), "task": task})


def rows_of(data: DataSettings, limit: int | None = None) -> TestRows:
    """The rows under test."""
    return TestRows(data, tiny_tokenizer(), BLOCK, limit, batch_size=4)


def tokens_alive() -> int:
    """Token ids in examples and in integer tensors, anywhere in this process."""
    count = 0
    for item in gc.get_objects():
        if type(item) is TokenExample:
            count += len(item.input_ids)
        elif type(item) is ChoiceExample:
            count += len(item.context) + sum(map(len, item.continuations))
        elif type(item) is torch.Tensor and not item.is_floating_point():
            count += item.numel()
    return count


def most_tokens_alive(data: DataSettings) -> int:
    """The most there are while a model is measured, above what there was before."""
    model, seen = tiny_model("llama"), [0]
    before = tokens_alive()

    def look(progress: Progress) -> None:
        if progress.step % 12 == 0:  # looking takes a while
            seen.append(tokens_alive())

    rows_of(data).score(model, on_progress=look)
    return max(seen) - before


@pytest.mark.parametrize("task", TASKS)
def test_memory_does_not_grow_with_the_rows(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "ROWS_AT_A_TIME", 8)
    few, many = (most_tokens_alive(dataset(tmp_path, task, rows)) for rows in (40, 160))
    assert 0 < many < 1.5 * few


def test_the_measure_sees_rows_that_are_kept(tmp_path: Path) -> None:
    data, before = dataset(tmp_path, "completion", 240), tokens_alive()
    kept = list(token_examples(data, tiny_tokenizer(), BLOCK))
    assert tokens_alive() - before == sum(len(example.input_ids) for example in kept)


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize("task", ["text", "completion"])
def test_the_loss_is_that_of_held_rows_bit_for_bit(task: str, limit: int | None, tmp_path: Path) -> None:
    data, model = dataset(tmp_path, task, 50), tiny_model("llama")
    rows = rows_of(data, limit)
    scores = [rows.score(model) for _ in range(2)]
    held = list(itertools.islice(token_examples(data, tiny_tokenizer(), BLOCK), limit))
    expected = evaluate_loss(model, fixed(held, 4, 0))
    for score in scores:
        assert isinstance(score, LossScore)
        assert np.array_equal(score.sums, expected.sums)
        assert np.array_equal(score.counts, expected.counts)
    assert len(expected.counts) == limit or limit is None


def choices(folder: Path) -> Sequence[ChoiceExample]:
    """Fifty questions, held in memory."""
    return list(choice_examples(dataset(folder, "choice", 50), tiny_tokenizer(), BLOCK))


@pytest.mark.parametrize("at_a_time", [1, 8, 49, 50])
def test_multiple_choice_is_the_same_however_many_rows_are_held(
    at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, model = choices(tmp_path), tiny_model("llama")
    expected = evaluate_choice(model, questions, 0)
    monkeypatch.setattr(choice, "ROWS_AT_A_TIME", at_a_time)
    heard: list[Progress] = []
    score = rows_of(dataset(tmp_path, "choice", 50)).score(model, on_progress=heard.append)
    assert isinstance(score, ChoiceScore)
    assert np.allclose(score.log_likelihood, expected.log_likelihood, atol=1e-4)
    assert np.array_equal(score.correct, expected.correct)
    # The end is known from the start, and reached.
    assert abs(heard[0].steps - heard[-1].steps) <= heard[-1].steps // 4
    assert heard[-1].step == heard[-1].steps
    assert all(report.step <= report.steps for report in heard)


def test_a_row_that_cannot_be_scored_is_counted_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "ROWS_AT_A_TIME", 8)
    questions = [*choices(tmp_path)[:20], ChoiceExample([3], [[4], [5]], 2, [1, 1])]
    with pytest.raises(DataError, match="Row 20: label 2"):
        evaluate_choice(tiny_model("llama"), questions, 0)


@pytest.mark.parametrize("task", TASKS)
def test_a_mistake_in_a_late_row_shows_before_anything_is_computed(task: str, tmp_path: Path) -> None:
    data = dataset(tmp_path, task, 30)
    with Path(data.path).open("a") as file:
        file.write('{"nothing": 1}\n')
    with pytest.raises(DataError, match="line 31: there is no column"):
        rows_of(data)
    rows_of(data, limit=5)  # beyond what is asked for nobody looks


@pytest.mark.parametrize("task", TASKS)
def test_rows_that_change_between_two_models_are_an_error(task: str, tmp_path: Path) -> None:
    data, model = dataset(tmp_path, task, 30), tiny_model("llama")
    rows = rows_of(data)
    rows.score(model)
    path = Path(data.path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(DataError, match=r"rows have changed since") as caught:
        rows.score(model)
    assert str(path) in caught.value.problem

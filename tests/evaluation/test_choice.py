"""Multiple choice: log-likelihoods one by one by hand, the two accuracies, and rows that cannot be scored."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleot_ray.data.examples import ChoiceExample
from scaleot_ray.errors import DataError, RunFailed
from scaleot_ray.evaluation.choice import ChoiceScore, evaluate_choice
from scaleot_ray.progress import Progress
from tests.tiny_models import TINY, tiny_model


def _rows(count: int = 6, seed: int = 0) -> list[ChoiceExample]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        answers = [[draw.randrange(3, 97) for _ in range(draw.randint(1, 5))] for _ in range(draw.randint(2, 5))]
        context = [draw.randrange(3, 97) for _ in range(draw.randint(1, 20))]
        rows.append(ChoiceExample(context, answers, draw.randrange(len(answers)), [3 * len(a) for a in answers]))
    return rows


@torch.no_grad()
def _by_hand(model: Any, row: ChoiceExample) -> list[float]:
    """Each answer alone, token by token, as its definition says."""
    sums = []
    for answer in row.continuations:
        tokens = row.context + answer
        logs = model(torch.tensor([tokens])).logits.double().log_softmax(-1)[0]
        sums.append(sum(logs[len(row.context) + i - 1, token].item() for i, token in enumerate(answer)))
    return sums


class _Counter:
    """A model whose forward passes are counted; its next-token distribution is a fixed one."""

    def __init__(self, probabilities: dict[int, float]) -> None:
        self.model = tiny_model("llama-untied-bias")
        logits = torch.full((97,), -1e4)
        for token, probability in probabilities.items():
            logits[token] = math.log(probability)
        # Whatever comes in, the head gives these logits.
        self.model.lm_head.weight.data.zero_()
        self.model.lm_head.bias = torch.nn.Parameter(logits)
        self.rows = 0
        self.model.model.register_forward_hook(self._count)

    def _count(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.rows += output.last_hidden_state.shape[0]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_log_likelihoods_are_those_of_each_answer_alone(name: str, batch_size: int) -> None:
    model = tiny_model(name)
    rows = _rows()
    score = evaluate_choice(model, rows, pad_id=0, batch_size=batch_size)
    expected = [_by_hand(model, row) for row in rows]
    right = [sums[row.label] for sums, row in zip(expected, rows, strict=True)]
    assert score.log_likelihood.tolist() == pytest.approx(right, abs=1e-3)
    shares = [math.exp(own) / sum(map(math.exp, sums)) for own, sums in zip(right, expected, strict=True)]
    assert np.exp(score.log_probability).tolist() == pytest.approx(shares, abs=1e-3)
    assert score.correct.tolist() == [
        int(np.argmax(sums)) == row.label for sums, row in zip(expected, rows, strict=True)
    ]
    assert score.correct_normalised.tolist() == [
        int(np.argmax(np.array(sums) / row.lengths)) == row.label for sums, row in zip(expected, rows, strict=True)
    ]


def test_plain_and_normalised_accuracy_by_hand() -> None:
    # Tokens 5, 6, 7 and 8 have the probabilities 1/2, 1/4, 1/8 and 1/8.
    model = _Counter({5: 0.5, 6: 0.25, 7: 0.125, 8: 0.125}).model
    rows = [
        # −ln 4 against −ln 8 = 3·ln 2: shorter wins plainly; per character 2·ln2/2 against 3·ln2/9 the longer.
        ChoiceExample([3], [[6], [5, 6]], 0, [2, 9]),
        ChoiceExample([3, 4], [[6], [5, 6]], 1, [2, 9]),
        # Both agree.
        ChoiceExample([9], [[7], [5]], 1, [4, 4]),
        # A tie goes to the first.
        ChoiceExample([9], [[6], [6]], 1, [4, 4]),
    ]
    score = evaluate_choice(model, rows, pad_id=0)
    assert score.correct.tolist() == [True, False, True, False]
    assert score.correct_normalised.tolist() == [False, True, True, False]
    assert score.value == 0.5
    assert score.normalised == 0.5
    halves = [2, 3, 1, 2]
    assert score.log_likelihood.tolist() == pytest.approx([-half * math.log(2) for half in halves], abs=1e-5)
    assert score.mean_log_likelihood == pytest.approx(-2 * math.log(2), abs=1e-5)
    assert score.metric == "accuracy"


def test_answers_of_one_token_share_one_forward_pass() -> None:
    counter = _Counter({5: 0.5, 6: 0.25, 7: 0.125})
    rows = [ChoiceExample([3, 4], [[5], [6], [7]], 0, [1, 1, 1]) for _ in range(5)]
    score = evaluate_choice(counter.model, rows, pad_id=0, batch_size=2)
    assert counter.rows == 5
    assert score.value == 1.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), batch_size=st.integers(1, 9), pad_id=st.integers(0, 96))
def test_batching_and_padding_change_nothing(seed: int, batch_size: int, pad_id: int) -> None:
    model = tiny_model("opt")
    rows = _rows(4, seed)
    alone = evaluate_choice(model, rows, pad_id=0, batch_size=1)
    together = evaluate_choice(model, rows, pad_id=pad_id, batch_size=batch_size)
    assert together.log_likelihood.tolist() == pytest.approx(alone.log_likelihood.tolist(), abs=1e-3)


def test_rows_keep_their_order() -> None:
    model = tiny_model("llama")
    rows = _rows(8)
    forwards = evaluate_choice(model, rows, pad_id=0, batch_size=3)
    backwards = evaluate_choice(model, rows[::-1], pad_id=0, batch_size=3)
    assert forwards.log_likelihood.tolist() == pytest.approx(backwards.log_likelihood[::-1].tolist(), abs=1e-4)


def test_progress_and_mode() -> None:
    seen: list[Progress] = []
    model = tiny_model("llama").train()
    score = evaluate_choice(model, _rows(), pad_id=0, batch_size=4, on_progress=seen.append)
    assert model.training
    assert isinstance(score, ChoiceScore)
    assert seen[-1].step == seen[-1].steps
    assert [report.step for report in seen] == sorted(report.step for report in seen)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ChoiceExample([3], [[4], [5]], 2, [1, 1]), "label 2"),
        (ChoiceExample([3], [[4], [5]], -1, [1, 1]), "label -1"),
        (ChoiceExample([3], [[4], [5]], 0, [1]), "answers"),
        (ChoiceExample([], [[4], [5]], 0, [1, 1]), "empty"),
        (ChoiceExample([3], [[4], []], 0, [1, 1]), "empty"),
        (ChoiceExample([3], [[4], [5]], 0, [1, 0]), "empty"),
        (ChoiceExample([3] * 64, [[4, 4], [5]], 0, [1, 1]), "65 tokens"),
        (ChoiceExample([97], [[4], [5]], 0, [1, 1]), "97"),
        (ChoiceExample([3], [[4], [97]], 0, [1, 1]), "97"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(row: ChoiceExample, words: str) -> None:
    with pytest.raises(DataError, match=words):
        evaluate_choice(tiny_model("llama"), [_rows(1)[0], row], pad_id=0)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="no row"):
        evaluate_choice(tiny_model("llama"), [], pad_id=0)


def test_a_log_likelihood_that_is_no_number_ends_the_run() -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(RunFailed, match="nan"):
        evaluate_choice(model, _rows(2), pad_id=0)

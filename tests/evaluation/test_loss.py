"""Loss on held-out text: equal to the model's own, block by block, and loud where it cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from scaleot_ray.data.batches import Batch
from scaleot_ray.errors import DataError, RunFailed
from scaleot_ray.evaluation.log_likelihood import log_likelihoods
from scaleot_ray.evaluation.loss import LossScore, evaluate_loss, perplexity
from scaleot_ray.progress import Progress
from tests.tiny_models import TINY, tiny_model


def _batch(lengths: tuple[int, ...] = (12, 7, 9), unlabelled: int = 0, seed: int = 0) -> Batch:
    """Rows of the given lengths padded on the right; the first ``unlabelled`` tokens carry no label."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    ids = torch.randint(3, 97, shape, generator=generator)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    ids[mask == 0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :unlabelled] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_the_loss_is_the_models_own(name: str) -> None:
    model = tiny_model(name)
    batch = _batch(unlabelled=3)
    score = evaluate_loss(model, [batch])
    assert score.counts.tolist() == [9, 4, 6]
    assert score.value == pytest.approx(model(**batch).loss.item(), abs=1e-5)
    for row, length in enumerate((12, 7, 9)):
        alone = {key: tensor[row : row + 1, :length] for key, tensor in batch.items()}
        assert score.sums[row] / score.counts[row] == pytest.approx(model(**alone).loss.item(), abs=1e-4)


@torch.no_grad()
def test_log_likelihoods_at_chosen_positions_are_those_of_the_full_logits() -> None:
    model = tiny_model("gemma2")  # caps its logits after the head
    batch = _batch()
    positions, targets = torch.tensor([0, 5, 5, 12 + 6, 24 + 8]), torch.tensor([9, 8, 7, 6, 96])
    found = log_likelihoods(model, batch["input_ids"], batch["attention_mask"], positions, targets)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.shape == (3, 12, 97)
    expected = logits.log_softmax(-1).flatten(0, 1)[positions, targets]
    assert torch.allclose(found, expected.double(), atol=1e-5)
    assert model.lm_head._forward_pre_hooks == {}


def test_a_uniform_model_has_the_loss_log_of_its_vocabulary() -> None:
    model = tiny_model("gpt2")
    model.get_output_embeddings().weight.data.zero_()
    score = evaluate_loss(model, [_batch(), _batch(seed=1)])
    assert score.value == pytest.approx(math.log(97), abs=1e-6)
    assert perplexity(score.value) == pytest.approx(97, abs=1e-3)
    assert score.sums.tolist() == pytest.approx((score.counts * math.log(97)).tolist())


def test_value_is_a_mean_over_tokens_not_over_blocks() -> None:
    score = LossScore(np.array([1.0, 9.0]), np.array([1, 3]))
    assert score.value == 2.5
    assert score.metric == "loss"


def test_progress_counts_blocks() -> None:
    seen: list[Progress] = []
    evaluate_loss(tiny_model("llama"), [_batch(), _batch(seed=1)], on_progress=seen.append, stage="evaluate alice")
    assert [(report.step, report.steps) for report in seen] == [(3, 6), (6, 6)]
    assert seen[0].stage == "evaluate alice"
    assert seen[0].loss is not None
    assert 3 < seen[0].loss < 7
    assert all(report.seconds_left is not None and report.seconds_left >= 0 for report in seen)


def test_modes_and_hooks_are_as_before() -> None:
    model = tiny_model("opt").train()
    model.model.decoder.layers[2].eval()
    before = [module.training for module in model.modules()]
    first = evaluate_loss(model, [_batch()])
    assert [module.training for module in model.modules()] == before
    assert np.array_equal(first.sums, evaluate_loss(model.eval(), [_batch()]).sums)  # no dropout either time
    with pytest.raises(RuntimeError):
        evaluate_loss(model.train(), [{**_batch(), "input_ids": torch.zeros(3, 12)}])
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(value: float) -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(RunFailed, match="nan in batch 0") as caught:
        evaluate_loss(model, [_batch()])
    assert caught.value.exit_code == 5


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="no token to score"):
        evaluate_loss(tiny_model("llama"), [])
    with pytest.raises(DataError, match="no token to score"):
        evaluate_loss(tiny_model("llama"), [_batch(unlabelled=12)])
    # A row without labels beside one with labels is fine.
    assert evaluate_loss(tiny_model("llama"), [_batch((12, 2), unlabelled=2)]).counts.tolist() == [10, 0]


def test_tokens_and_lengths_the_model_cannot_take_are_errors() -> None:
    batch = _batch()
    batch["input_ids"][1, 1] = 97
    with pytest.raises(DataError, match="97"):
        evaluate_loss(tiny_model("llama"), [batch])
    with pytest.raises(DataError, match="65 tokens"):
        evaluate_loss(tiny_model("gpt2"), [_batch((65,))])


def test_logits_exist_for_labelled_positions_only() -> None:
    model = tiny_model("llama")
    sizes: list[tuple[int, ...]] = []
    handle: Any = model.lm_head.register_forward_hook(lambda _m, _i, output: sizes.append(tuple(output.shape)))
    evaluate_loss(model, [_batch(unlabelled=5), _batch(seed=1)])
    handle.remove()
    assert sizes == [(1, 7 + 2 + 4, 97), (1, 11 + 6 + 8, 97)]

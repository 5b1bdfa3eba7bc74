from __future__ import annotations

from itertools import islice

import pytest
import torch

from scaleot_ray.tuning.loss import LabelledLoss, labelled_positions, labelled_tokens
from tests.tiny_models import TINY, tiny_model, tiny_tokens
from tests.tuning.tiny_batches import tiny_batches

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", TINY)
def test_it_is_the_models_own_loss_and_gradient(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = next(tiny_batches().batches())
    own = model(**batch).loss
    own.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    loss = LabelledLoss(model)
    ours = loss(batch, CPU) / labelled_tokens(batch)
    ours.backward()
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=0)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_the_soft_cap_is_the_models_own() -> None:
    model = tiny_model("gemma2")
    batch = next(tiny_batches().batches())
    plain = LabelledLoss(model)(batch, CPU)
    model.config.final_logit_softcapping = 0.5
    assert not torch.allclose(LabelledLoss(model)(batch, CPU), plain)


def test_the_head_sees_labelled_positions_only_and_others_are_left_alone() -> None:
    model, rows = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    loss = LabelledLoss(model)
    for batch in islice(tiny_batches().batches(), 3):
        loss(batch, CPU)
        assert rows[-1] == labelled_tokens(batch) < batch["input_ids"].numel()
    ids = tiny_tokens()
    assert model(ids).logits.shape == (*ids.shape, 97)
    with pytest.raises(IndexError):
        loss({**batch, "input_ids": batch["input_ids"] + 1000}, CPU)
    assert model(ids).logits.shape == (*ids.shape, 97)
    loss.close()
    assert not model.lm_head._forward_pre_hooks


def test_a_label_on_the_first_token_counts_nowhere() -> None:
    labels = torch.tensor([[5, -100, 7], [1, 2, -100]])
    assert labelled_positions(labels).tolist() == [1, 3]
    assert labelled_tokens({"labels": labels}) == 2


def test_double_precision_stays() -> None:
    model = tiny_model("llama").double()
    batch = next(tiny_batches().batches())
    assert LabelledLoss(model)(batch, CPU).dtype is torch.float64

"""Privacy levels on a tiny model that every emulator falls short of, with bounds between its measured margins."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from scaleot_ray.artifacts.manifest import EmulatorContent
from scaleot_ray.config import EmulatorSettings, StageOneSettings
from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator import privacy
from scaleot_ray.emulator.build import FullModelFacts, build_emulator
from scaleot_ray.emulator.layer_replace import train_stage_one
from scaleot_ray.emulator.privacy import (
    LADDER,
    SEQUENCES,
    PrivacyLevel,
    PrivacyResult,
    Rung,
    build_for_privacy,
    loss_margin,
)
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import ConfigError, DataError
from scaleot_ray.evaluation.gain import bootstrap_means
from scaleot_ray.evaluation.loss import LossScore, evaluate_loss
from scaleot_ray.families import family_of
from scaleot_ray.families.loading import BaseModel
from tests.emulator.token_stream import RandomTokens
from tests.tiny_models import tiny_model, tiny_tokenizer

TIME = 24
SETTINGS = EmulatorSettings(plug_in_layers=2, compression="svd", privacy="medium")


@torch.no_grad()
def spoken(model: Any, seed: int) -> Batch:
    """Sixteen sequences that the model itself has spoken, so whatever is not the model is worse at them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 97, (16, 1), generator=generator)
    for _ in range(TIME - 1):
        chances = model(input_ids=tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


@cache
def owner() -> tuple[BaseModel, StageOne, FullModelFacts, list[Batch]]:
    """A model with strong layers and opinions, its stage 1, its held-out loss and text."""
    model = tiny_model("llama").requires_grad_(False)
    for name, parameter in model.model.named_parameters():
        if "layers" in name:
            parameter.mul_(4)
    model.model.norm.weight.mul_(10)
    base = BaseModel(model, tiny_tokenizer(), family_of(model.config), "tiny", "Apache-2.0")
    settings = StageOneSettings(harmonizer_rank=4, start_tokens=512, steps=2, block_size=TIME)
    held_out = [spoken(model, seed) for seed in range(2)]
    stage_one = train_stage_one(model, base.family, RandomTokens(), held_out, settings)
    return base, stage_one, FullModelFacts("0" * 64, evaluate_loss(model, held_out)), held_out


def measured(alpha: float, beta: float) -> EmulatorContent:
    """What the emulator of one rung says of itself."""
    base, stage_one, facts, held_out = owner()
    settings = SETTINGS.model_copy(update={"alpha": alpha, "beta": beta})
    content = build_emulator(base, stage_one, settings, facts, held_out)[0].manifest.content
    assert isinstance(content, EmulatorContent)
    return content


def build(monkeypatch: pytest.MonkeyPatch, margin: float, verbatim: float) -> PrivacyResult:
    """The emulator for a level with these bounds."""
    monkeypatch.setitem(privacy.LEVELS, "medium", PrivacyLevel(margin, verbatim))
    base, stage_one, facts, held_out = owner()
    return build_for_privacy(base, stage_one, SETTINGS, facts, held_out)


@pytest.mark.parametrize("chosen", [1, 5, 7])
def test_rungs_that_fall_short_of_the_margin_are_passed_over(chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    margins = [measured(alpha, beta).loss_margin or 0 for alpha, beta in LADDER[: chosen + 1]]
    below, above = max(margins[:-1]), margins[-1]
    assert above > below + 0.3
    # Two thirds of the way down: far enough for two standard errors.
    result = build(monkeypatch, margin=below + (above - below) / 3, verbatim=1.0)
    content = result.artifact.manifest.content
    assert isinstance(content, EmulatorContent)
    assert (content.alpha, content.beta) == LADDER[chosen]
    assert [(rung.alpha, rung.beta) for rung in result.tried] == list(LADDER[: chosen + 1])
    assert [rung.loss_margin for rung in result.tried] == pytest.approx(margins)
    assert all(rung.loss_margin < result.bounds.minimum_margin for rung in result.tried[:-1])
    assert result.tried[-1].safe_margin >= result.bounds.minimum_margin


def test_a_margin_within_its_error_of_the_bound_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    close = build(monkeypatch, margin=-1, verbatim=1).tried[0]
    bound = close.loss_margin - close.standard_error
    result = build(monkeypatch, margin=bound, verbatim=1)
    assert result.tried[0] == close
    assert close.loss_margin > bound > close.safe_margin
    assert len(result.tried) > 1


def test_rungs_that_leave_too_much_verbatim_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    result = build(monkeypatch, margin=-1, verbatim=0.4)
    content = result.artifact.manifest.content
    assert isinstance(content, EmulatorContent)
    assert content.verbatim_share <= 0.4
    assert len(result.tried) > 1
    assert all(rung.verbatim_share > 0.4 for rung in result.tried[:-1])
    assert (content.alpha, content.beta) == (result.tried[-1].alpha, result.tried[-1].beta)


def test_what_cannot_be_reached_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    match = r"at least 50 nats, 2 standard errors .*reached are at most 3\.\d+ nats \(standard error 0\.\d+\) and 29%"
    with pytest.raises(ConfigError, match=match) as caught:
        build(monkeypatch, margin=50, verbatim=0.7)
    assert "fewer plug-in layers" in caught.value.remedy


def test_text_that_is_too_short_for_an_error_is_refused() -> None:
    base, stage_one, facts, held_out = owner()
    few = [{name: tensor[: SEQUENCES - 1] for name, tensor in held_out[0].items()}]
    with pytest.raises(DataError, match=r"at least 8 held-out sequences; public gives 7"):
        build_for_privacy(base, stage_one, SETTINGS, facts, few)


def test_the_error_is_that_of_resampled_sequences() -> None:
    draw = np.random.default_rng(0)
    counts = draw.integers(5, 100, 200)
    difficulty = draw.normal(3, 1, 200)  # what both models find hard drops out
    full = LossScore(counts * difficulty, counts)
    emulator = LossScore(counts * (difficulty + draw.normal(0.4, 0.2, 200)), counts)
    margin, error = loss_margin(emulator, full)
    assert margin == pytest.approx(emulator.value - full.value)
    means = bootstrap_means((emulator.blocks("loss"), full.blocks("loss")))
    assert error == pytest.approx(np.std(means[0] - means[1]), rel=0.1)
    assert loss_margin(LossScore(full.sums + 0.5 * counts, counts), full) == pytest.approx((0.5, 0))


def test_the_result_says_what_was_compared() -> None:
    rung = Rung(0.25, 0.5, loss_margin=0.4, standard_error=0.03, verbatim_share=0.6)
    assert rung.safe_margin == pytest.approx(0.34)
    assert rung.meets(PrivacyLevel(0.33, 0.6))
    assert not rung.meets(PrivacyLevel(0.35, 0.6))
    assert not rung.meets(PrivacyLevel(0.33, 0.59))

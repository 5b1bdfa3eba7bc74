"""Tuning that begins with what was tuned before, as the rounds of a run do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaleot_ray.errors import ConfigError, RunFailed
from scaleot_ray.families import family_of
from scaleot_ray.plugin import plug
from scaleot_ray.tuning import METHODS, Delta, Tuned, tune
from tests.plugin.deltas import random_delta
from tests.tiny_models import tiny_model, tiny_tokens
from tests.tuning.tiny_batches import POSITIONS, bits, tiny_batches, tiny_settings


def tuned(method: str, start: Delta | None, steps: int = 4, **settings: object) -> Tuned:
    model = tiny_model("llama")
    before = bits(model)
    result = tune(
        model,
        family_of(model.config),
        POSITIONS,
        tiny_batches(),
        tiny_settings(method, steps=steps, learning_rate=1e-3, **settings),
        start=start,
    )
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    return result


@pytest.mark.parametrize("method", METHODS)
def test_tuning_goes_on_from_its_start(method: str) -> None:
    model = tiny_model("llama")
    start = random_delta(model, method, size=0.1)
    with plug(model, family_of(model.config), start), torch.no_grad():
        expected = float(tune_loss(model))
    result = tuned(method, start, warmup_fraction=0.0)
    assert result.history.losses[0] == pytest.approx(expected, rel=1e-5)
    assert result.delta.settings == start.settings
    # Few small steps: what came out is near the start, not near zero, and not the start itself.
    distance = sum(float((value - start.tensors[name]).square().sum()) for name, value in result.delta.tensors.items())
    length = sum(float(value.square().sum()) for value in start.tensors.values())
    assert 0 < distance < 0.1 * length


def tune_loss(model: torch.nn.Module) -> torch.Tensor:
    batch = next(tiny_batches().batches())
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("method", METHODS)
def test_without_steps_that_move_it_the_start_comes_back(method: str) -> None:
    start = random_delta(tiny_model("llama"), method, size=0.1)
    result = tuned(method, start, steps=1, warmup_fraction=1.0, max_grad_norm=1e-30)
    for name, value in result.delta.tensors.items():
        torch.testing.assert_close(value, start.tensors[name], rtol=1e-3, atol=2e-3)
    ids = tiny_tokens()
    with torch.no_grad():
        model = tiny_model("llama")
        with plug(model, family_of(model.config), start):
            before = model(ids).logits
        with plug(model, family_of(model.config), result.delta):
            torch.testing.assert_close(model(ids).logits, before, rtol=0.1, atol=0.1)


def test_an_interrupted_tuning_goes_on_with_its_own_start_only(tmp_path: Path) -> None:
    model = tiny_model("llama")
    family, place = family_of(model.config), tmp_path / "checkpoint"
    start, other = random_delta(model, "lora", 1), random_delta(model, "lora", 2)
    settings = tiny_settings("lora", steps=4, checkpoint_every=1)

    def run(start: Delta | None, stop: int | None = None) -> Tuned:
        heard = 0

        def progress(_: object) -> None:
            nonlocal heard
            heard += 1
            if heard == stop:
                raise RunFailed("stopped", "go on")

        return tune(
            model, family, POSITIONS, tiny_batches(), settings, start=start, checkpoint=place, on_progress=progress
        )

    whole = run(start)
    place.unlink()
    with pytest.raises(RunFailed, match="stopped"):
        run(start, stop=3)
    for another in (other, None):
        with pytest.raises(ConfigError, match="the checkpoint is of another run"):
            run(another)
    again = run(start)
    assert all(torch.equal(value, whole.delta.tensors[name]) for name, value in again.delta.tensors.items())


def test_a_start_of_another_kind_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="Tuning begins with a delta of lora") as refused:
        tuned("layers", random_delta(model, "lora"))
    assert "Set tune.method to lora" in refused.value.remedy
    with pytest.raises(ConfigError, match="same rank"):
        tuned("lora", random_delta(model, "lora"), lora_rank=5)

"""The importance signal is real: layers made to matter little in a trained model end up lowest."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers

from scaleot_ray.config import StageOneSettings
from scaleot_ray.emulator.layer_replace import train_stage_one
from scaleot_ray.emulator.layer_replace_steps import language_model_loss
from scaleot_ray.evaluation.loss import evaluate_loss
from scaleot_ray.families import family_of

TIME, BATCH, LAYERS, WEAK = 48, 16, 10, (3, 5, 8)


def _batch(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


class _Text:
    """The Python reference as bytes."""

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")[:300_000]
        blocks = torch.tensor(list(text[: len(text) // TIME * TIME])).view(-1, TIME)
        blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
        self.held_out = [_batch(blocks[:64])]
        self.train = blocks[64:]

    def batches(self, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        index = start
        while True:
            rows = torch.arange(index * BATCH, (index + 1) * BATCH) % len(self.train)
            yield _batch(self.train[rows])
            index += 1


@pytest.fixture(scope="module")
def text() -> _Text:
    return _Text()


@pytest.fixture(scope="module")
def trained(text: _Text) -> Any:
    """A small language model, trained."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TIME,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = 300
    for step, batch in zip(range(steps), text.batches(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = language_model_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    assert evaluate_loss(model, text.held_out).value < 2.5, "the model must have learnt something for layers to matter"
    return model


@pytest.fixture(scope="module")
def weakened(trained: Any) -> Any:
    """The same model with the residual branches of three layers scaled down."""
    model = copy.deepcopy(trained)
    for index in WEAK:
        layer = family_of(model.config).layers(model)[index]
        layer.self_attn.o_proj.weight.mul_(0.02)
        layer.mlp.down_proj.weight.mul_(0.02)
    return model


# The paper's: scores begin at zero, so that the order is the rewards' doing alone.
PAPER: dict[str, Any] = {"start": "random", "score_start": "zero", "objective": "lm", "steps": 40, "score_every": 1}


def _lowest(model: Any, text: _Text, seed: int, **settings: Any) -> tuple[int, ...]:
    settings = {"harmonizer_rank": 8, "batch_size": BATCH, "block_size": TIME, "seed": seed, **settings}
    result = train_stage_one(model, family_of(model.config), text, text.held_out, StageOneSettings(**settings))
    return result.least_important(tuple(result.scores), len(WEAK))


@pytest.mark.parametrize("settings", [PAPER, {}], ids=["paper", "defaults"])
@pytest.mark.parametrize("seed", range(3))
def test_layers_made_unimportant_are_ranked_lowest(
    weakened: Any, text: _Text, seed: int, settings: dict[str, Any]
) -> None:
    assert _lowest(weakened, text, seed, **settings) == WEAK


def test_with_shuffled_rewards_they_are_not(weakened: Any, text: _Text) -> None:
    found = [_lowest(weakened, text, seed, **PAPER, shuffle_rewards=True) for seed in range(2)]
    assert WEAK not in found


@pytest.mark.parametrize("settings", [PAPER, {}], ids=["paper", "defaults"])
def test_before_they_were_weakened_they_are_not(trained: Any, text: _Text, settings: dict[str, Any]) -> None:
    assert _lowest(trained, text, 0, **settings) != WEAK

"""Low-rank updates: what stacking gives exactly, what a fixed rank loses, and what a mean of factors is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaleot_ray.config import AggregationSettings
from scaleot_ray.families import family_of
from scaleot_ray.plugin import merged_weights
from scaleot_ray.plugin.aggregation import aggregate
from scaleot_ray.plugin.aggregation.low_rank import truncated
from scaleot_ray.tuning import Delta
from tests.plugin.aggregation.stored import random_deltas, write_delta
from tests.tiny_models import tiny_model

WEIGHTS = [1.0, 2.0, 5.0]


def updates(delta: Delta) -> dict[str, torch.Tensor]:
    """(alpha / rank) · B·A of every module."""
    scale = float(delta.settings["alpha"]) / int(delta.settings["rank"])
    names = [name.removesuffix(".lora_A") for name in delta.tensors if name.endswith(".lora_A")]
    return {
        name: scale * delta.tensors[f"{name}.lora_B"].double() @ delta.tensors[f"{name}.lora_A"].double()
        for name in names
    }


def mean_of_updates(deltas: list[Delta]) -> dict[str, torch.Tensor]:
    share = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    every = [updates(delta) for delta in deltas]
    return {name: sum(s * one[name] for s, one in zip(share, every, strict=True)) for name in every[0]}


def test_concat_is_exact_and_plugs_in(tmp_path: Path) -> None:
    given, deltas = random_deltas(tmp_path, "lora", 3, WEIGHTS)
    found = aggregate(given, AggregationSettings(method="concat")).delta
    assert found.settings["rank"] == 9
    expected = mean_of_updates(deltas)
    for name, update in updates(found).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-5, atol=1e-8)
    model = tiny_model("llama")
    merged = merged_weights(model, family_of(model.config), found)
    name = next(iter(expected))
    change = merged[f"{name}.weight"] - model.get_parameter(f"{name}.weight")
    torch.testing.assert_close(change.double(), expected[name], rtol=1e-3, atol=1e-6)


def test_concat_takes_different_ranks(tmp_path: Path) -> None:
    given, deltas = random_deltas(tmp_path, "lora", 3, WEIGHTS)
    wide = deltas[1]
    wide.tensors = {
        name: torch.cat([tensor, tensor], dim=0 if name.endswith("A") else 1) for name, tensor in wide.tensors.items()
    }
    wide.settings = {**wide.settings, "rank": 6}
    given[1] = (given[1][0], write_delta(wide, tmp_path / "wide"), WEIGHTS[1])
    found = aggregate(given, AggregationSettings(method="concat")).delta
    assert found.settings["rank"] == 12
    expected = mean_of_updates(deltas)
    for name, update in updates(found).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_svd_is_the_best_of_its_rank(tmp_path: Path, rank: int) -> None:
    given, deltas = random_deltas(tmp_path, "lora", 3, WEIGHTS)
    found = aggregate(given, AggregationSettings(method="svd", rank=rank))
    assert found.delta.settings["rank"] == rank
    worst = 0.0
    expected = mean_of_updates(deltas)
    for name, update in updates(found.delta).items():
        left, values, right = torch.linalg.svd(expected[name], full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(update, best, rtol=1e-4, atol=1e-6)
        worst = max(worst, float(values[rank:].square().sum() / values.square().sum()))
    assert found.lost == pytest.approx(worst, rel=1e-3)
    assert 0 < found.lost < 1


def test_svd_of_full_rank_is_exact_and_beyond_it_zeros(tmp_path: Path) -> None:
    given, deltas = random_deltas(tmp_path, "lora", 3, WEIGHTS)
    found = aggregate(given, AggregationSettings(method="svd", rank=11))
    assert found.lost < 1e-12
    expected = mean_of_updates(deltas)
    for name, update in updates(found.delta).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-4, atol=1e-6)


def test_svd_keeps_the_largest_rank_by_default(tmp_path: Path) -> None:
    given, _ = random_deltas(tmp_path, "lora", 3)
    assert aggregate(given, AggregationSettings(method="svd")).delta.settings["rank"] == 3


def test_a_mean_of_factors_is_another_update(tmp_path: Path) -> None:
    given, deltas = random_deltas(tmp_path, "lora", 3, WEIGHTS)
    found, expected = updates(aggregate(given, AggregationSettings()).delta), mean_of_updates(deltas)
    assert all((found[name] - expected[name]).norm() > 0.3 * expected[name].norm() for name in expected)
    # Of owners whose first factors are the same it is the mean of the updates.
    for delta in deltas[1:]:
        delta.tensors |= {name: deltas[0].tensors[name] for name in delta.tensors if name.endswith(".lora_A")}
    same = [
        (name, write_delta(delta, tmp_path / f"same-{name}"), w)
        for (name, _, w), delta in zip(given, deltas, strict=True)
    ]
    found, expected = updates(aggregate(same, AggregationSettings()).delta), mean_of_updates(deltas)
    for name, update in found.items():
        torch.testing.assert_close(update, expected[name], rtol=1e-5, atol=1e-8)


def test_truncation_of_nothing_is_nothing() -> None:
    down, up, lost = truncated(torch.zeros(4, 6).double(), torch.zeros(5, 4).double(), 2)
    assert not down.any()
    assert not up.any()
    assert lost == 0

"""Aggregates of a later round: what counts is how far each delta has come since the round began."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaleot_ray.config import AggregationSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.plugin.aggregation import aggregate, contributions
from scaleot_ray.tuning import Delta
from tests.plugin.aggregation.stored import Given, plain_delta, random_deltas, write_delta
from tests.plugin.aggregation.test_low_rank import updates
from tests.plugin.deltas import random_delta
from tests.tiny_models import tiny_model

START = torch.tensor([10.0, -20.0, 30.0])


def second_round(folder: Path, *changes: list[float]) -> tuple[Given, Path]:
    """Deltas that began with START and changed it."""
    start = write_delta(plain_delta({"w": START}), folder / "start")
    given = [
        (f"owner-{i}", write_delta(plain_delta({"w": START + torch.tensor(change)}), folder / str(i)), 1.0)
        for i, change in enumerate(changes)
    ]
    return given, start


def found(given: Given, start: Path, **settings: object) -> torch.Tensor:
    return aggregate(given, AggregationSettings.model_validate(settings), start).delta.tensors["w"]


def test_what_all_agree_on_is_the_start_and_the_change(tmp_path: Path) -> None:
    given, start = second_round(tmp_path, [2, 0, -1], [4, 0, -3], [6, 0, -8])
    torch.testing.assert_close(found(given, start), START + torch.tensor([4.0, 0, -4]))
    torch.testing.assert_close(found(given, start, method="median"), START + torch.tensor([4.0, 0, -3]))
    torch.testing.assert_close(found(given, start, method="ties", density=0.34), START + torch.tensor([3.0, 0, -8]))


def test_clipping_is_of_the_change_not_of_the_whole(tmp_path: Path) -> None:
    given, start = second_round(tmp_path, [3, 4, 0], [0, 0, 1])
    result = aggregate(given, AggregationSettings(clip_norm=2.5), start)
    assert result.clipped == ["owner-0"]
    torch.testing.assert_close(result.delta.tensors["w"], START + torch.tensor([0.75, 1.0, 0.5]))


def test_a_server_optimizer_sees_the_change(tmp_path: Path) -> None:
    given, start = second_round(tmp_path, [1, 0, -1], [3, 0, -3])
    torch.testing.assert_close(
        found(given, start, server="momentum", server_learning_rate=0.5), START + torch.tensor([1.0, 0, -1])
    )


def test_dare_drops_others_in_each_round(tmp_path: Path) -> None:
    settings, start, values = AggregationSettings(method="dare", density=0.5), None, torch.zeros(1000)
    for turn in range(12):  # each time one further
        given = [("owner", write_delta(plain_delta({"w": values + 1}), tmp_path / f"delta-{turn}"), 1.0)]
        values = aggregate(given, settings, start).delta.tensors["w"]
        assert torch.equal(values, aggregate(given, settings, start).delta.tensors["w"])
        start = write_delta(plain_delta({"w": values}), tmp_path / f"start-{turn}")
    assert values.mean().item() == pytest.approx(12, abs=0.5)
    # Half of 12 rounds count twice: a deviation of √12, where always the same ones would give 12.
    assert values.std().item() == pytest.approx(12**0.5, abs=0.5)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("method", ["concat", "svd"])
def test_low_rank_changes(tmp_path: Path, method: str, clip: bool) -> None:
    given, deltas = random_deltas(tmp_path, "lora", 2, [1.0, 3.0])
    start = random_delta(tiny_model("llama"), "lora", seed=9)
    place = write_delta(start, tmp_path / "start")
    before, now = updates(start), [updates(delta) for delta in deltas]
    norms = [sum((one[name] - before[name]).square().sum() for name in before) ** 0.5 for one in now]
    for part in contributions(given, place):
        assert part.norm() == pytest.approx(float(norms[int(part.name[-1])]), rel=1e-6)
    longest = float(min(norms)) / 2 if clip else None
    factors = [longest / float(norm) if longest else 1.0 for norm in norms]
    settings = AggregationSettings(method=method, clip_norm=longest, rank=9 if method == "svd" else None)
    result = aggregate(given, settings, place)
    assert result.delta.settings["rank"] == (9 if clip or method == "svd" else 6)
    for name, update in updates(result.delta).items():
        steps = [
            share * factor * (one[name] - before[name])
            for share, factor, one in zip((0.25, 0.75), factors, now, strict=True)
        ]
        torch.testing.assert_close(update, before[name] + sum(steps), rtol=1e-4, atol=1e-6)


def test_a_mean_of_factors_goes_on_from_the_start(tmp_path: Path) -> None:
    given, deltas = random_deltas(tmp_path, "lora", 2)
    start = write_delta(random_delta(tiny_model("llama"), "lora", seed=9), tmp_path / "start")
    result = aggregate(given, AggregationSettings(), start).delta
    for name, tensor in result.tensors.items():
        torch.testing.assert_close(tensor, (deltas[0].tensors[name] + deltas[1].tensors[name]) / 2)
    with pytest.raises(ConfigError, match="a mean of low-rank factors cannot be clipped"):
        aggregate(given, AggregationSettings(clip_norm=1.0), start)


def test_the_start_must_be_of_the_same_kind(tmp_path: Path) -> None:
    given, _ = second_round(tmp_path, [1, 0, -1])
    other = write_delta(Delta("bottleneck", (0,), {}, {"w": START}), tmp_path / "other")
    with pytest.raises(ConfigError, match="the start and owner-0 tuned with different methods"):
        aggregate(given, AggregationSettings(), other)

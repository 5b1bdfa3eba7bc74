"""Means, medians and trimmed means, value by value, against the same computed in memory at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleot_ray.config import AggregationSettings
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.plugin.aggregation import aggregate, combine
from scaleot_ray.tuning import Delta
from tests.plugin.aggregation.stored import plain_delta, random_deltas, write_delta

WEIGHTS = [3.0, 1.0, 0.0, 4.0, 2.0]


def all_of(deltas: list[Delta], name: str) -> torch.Tensor:
    return torch.stack([delta.tensors[name].double() for delta in deltas])


@pytest.mark.parametrize("method", ["layers", "bottleneck"])
def test_weighted_mean(tmp_path: Path, method: str) -> None:
    given, deltas = random_deltas(tmp_path, method, 5, WEIGHTS)
    found = aggregate(given, AggregationSettings()).delta
    assert (found.method, found.positions, found.settings) == (method, deltas[0].positions, deltas[0].settings)
    assert found.tensors.keys() == deltas[0].tensors.keys()
    share = torch.tensor(WEIGHTS, dtype=torch.float64) / 10
    for name, tensor in found.tensors.items():
        assert tensor.dtype == torch.float32
        expected = torch.tensordot(share, all_of(deltas, name), dims=1).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_median(tmp_path: Path, count: int) -> None:
    given, deltas = random_deltas(tmp_path, "layers", count)
    found = aggregate(given, AggregationSettings(method="median")).delta
    for name, tensor in found.tensors.items():
        expected = torch.quantile(all_of(deltas, name), 0.5, dim=0).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-9)


def test_trimmed_mean(tmp_path: Path) -> None:
    given, deltas = random_deltas(tmp_path, "layers", 10)
    found = aggregate(given, AggregationSettings(method="trimmed_mean", trim=0.2)).delta
    for name, tensor in found.tensors.items():
        expected = all_of(deltas, name).sort(dim=0).values[2:8].mean(dim=0).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["mean", "median", "trimmed_mean", "ties", "dare"])
def test_what_has_weight_0_is_in_no_aggregate(tmp_path: Path, method: str) -> None:
    how = AggregationSettings(method=method, trim=0.25, clip_norm=1e6)
    given, _ = random_deltas(tmp_path, "layers", 5, [1.0, 1.0, 0.0, 1.0, 1.0])
    loud = write_delta(random_deltas(tmp_path / "more", "layers", 1)[1][0], tmp_path / "loud")
    without = aggregate([one for one in given if one[2]], how)
    found = aggregate([*given, ("loud", loud, 0.0)], how)
    assert found.clipped == without.clipped
    assert all(torch.equal(tensor, without.delta.tensors[name]) for name, tensor in found.delta.tensors.items())
    counts = [(*one[:2], 1.0) for one in given]  # the control: with a weight it is in there
    assert any(
        not torch.equal(tensor, without.delta.tensors[name])
        for name, tensor in aggregate(counts, how).delta.tensors.items()
    )


def test_small_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = random_deltas(tmp_path, "layers", 4)
    whole = {method: aggregate(given, AggregationSettings(method=method)).delta for method in ("mean", "median")}
    monkeypatch.setattr(combine, "ACROSS_BYTES", 1)
    monkeypatch.setattr(combine, "_LEAST_PIECE", 7)
    again = aggregate(given, AggregationSettings(method="median")).delta
    assert all(torch.equal(tensor, whole["median"].tensors[name]) for name, tensor in again.tensors.items())
    assert not torch.equal(*(next(iter(delta.tensors.values())) for delta in whole.values()))


@pytest.mark.parametrize("method", ["mean", "median", "trimmed_mean", "ties", "dare"])
def test_the_order_of_arrival_does_not_matter(tmp_path: Path, method: str) -> None:
    given, _ = random_deltas(tmp_path, "layers", 5, WEIGHTS if method == "mean" else None)
    settings = AggregationSettings(method=method, trim=0.2)
    first = aggregate(given, settings).delta
    random.Random(1).shuffle(given)
    second = aggregate(given, settings).delta
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def test_nor_does_the_order_of_weights_whose_sum_is_rounded(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = [plain_delta({"w": torch.randn(1000, generator=generator, dtype=torch.float64)}) for _ in range(3)]
    given = [
        (f"owner-{i}", write_delta(delta, tmp_path / str(i)), weight)
        for i, (delta, weight) in enumerate(zip(deltas, (0.1, 0.2, 0.3), strict=True))
    ]
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    first, second = (aggregate(one, AggregationSettings()).delta.tensors["w"] for one in (given, given[::-1]))
    assert torch.equal(first, second)


@settings(deadline=None, max_examples=25)
@given(count=st.integers(3, 9), attack=st.sampled_from([1e6, -1e6, 1e30]), data=st.data())
def test_a_minority_cannot_move_median_or_trimmed_mean(
    tmp_path_factory: pytest.TempPathFactory, count: int, attack: float, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("minority")
    bad = data.draw(st.integers(1, (count - 1) // 2))
    honest = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) for seed in range(count - bad)]
    sent = [*honest, *[torch.full((50,), attack) for _ in range(bad)]]
    given = [(str(i), write_delta(plain_delta({"w": value}), folder / str(i)), 1.0) for i, value in enumerate(sent)]
    low, high = torch.stack(honest).amin(dim=0), torch.stack(honest).amax(dim=0)
    for robust in (
        AggregationSettings(method="median"),
        AggregationSettings(method="trimmed_mean", trim=bad / count),
    ):
        found = aggregate(given, robust).delta.tensors["w"]
        assert (found >= low - 1e-6).all(), robust.method
        assert (found <= high + 1e-6).all(), robust.method
    mean = aggregate(given, AggregationSettings()).delta.tensors["w"]
    assert mean.abs().max() > 1e4  # the control: a plain mean is theirs


def test_a_trim_that_leaves_none_out_is_refused(tmp_path: Path) -> None:
    given, _ = random_deltas(tmp_path, "layers", 3)
    with pytest.raises(ConfigError, match=r"0\.1 of 3 deltas is less than one") as refused:
        aggregate(given, AggregationSettings(method="trimmed_mean"))
    assert "0.334" in refused.value.remedy
    for few in (1, 2):  # no share below one half is a whole delta of so few
        with pytest.raises(ConfigError, match="is less than one") as refused:
            aggregate(given[:few], AggregationSettings(method="trimmed_mean", trim=0.4))
        assert refused.value.remedy == "Use method median, or wait for more data owners."


def test_a_delta_that_changed_on_disk_is_refused(tmp_path: Path) -> None:
    given, _ = random_deltas(tmp_path, "layers", 3)
    file = given[1][1] / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for method in ("mean", "median"):
        with pytest.raises(ArtifactRefused, match=f"{given[1][1]}: tensor .* was altered"):
            aggregate(given, AggregationSettings(method=method))

"""Which deltas may become one, what clipping does, and what a server optimizer makes of rounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scaleot_ray.config import AggregationSettings, parse
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.plugin.aggregation import ServerState, aggregate, clipped, contributions, working_bytes
from tests.plugin.aggregation.stored import plain_delta, random_deltas, write_delta
from tests.plugin.aggregation.test_low_rank import updates


def two(folder: Path, first: torch.Tensor, second: torch.Tensor) -> list[tuple[str, Path, float]]:
    return [
        ("alice", write_delta(plain_delta({"w": first}), folder / "alice"), 1.0),
        ("bob", write_delta(plain_delta({"w": second}), folder / "bob"), 1.0),
    ]


@pytest.mark.parametrize("method", ["layers", "lora"])
def test_clipping_shortens_the_change_itself(tmp_path: Path, method: str) -> None:
    given, deltas = random_deltas(tmp_path, method, 2)
    parts = {part.name: part for part in contributions(given)}
    norm = parts["owner-0"].norm()
    if method == "lora":
        expected = sum(update.square().sum() for update in updates(deltas[0]).values()) ** 0.5
    else:
        expected = sum(tensor.double().square().sum() for tensor in deltas[0].tensors.values()) ** 0.5
    assert norm == pytest.approx(float(expected), rel=1e-6)
    shorter = {part.name: part for part in clipped(contributions(given), norm / 2)}
    assert shorter["owner-0"].factor == pytest.approx(0.5)
    assert shorter["owner-0"].norm() == pytest.approx(norm / 2, rel=1e-6)


def test_a_bottlenecks_norm_counts_both_maps_and_is_not_clipped(tmp_path: Path) -> None:
    given, deltas = random_deltas(tmp_path, "bottleneck", 2)
    (norm,) = (part.norm() for part in contributions(given) if part.name == "owner-0")
    assert norm == pytest.approx(sum(t.double().square().sum() for t in deltas[0].tensors.values()) ** 0.5)
    with pytest.raises(ConfigError, match="bottleneck modules cannot be clipped") as caught:
        aggregate(given, AggregationSettings(clip_norm=1.0))
    assert "rounds.max_norm" in caught.value.remedy


def test_the_loudest_counts_no_more_than_clip_norm(tmp_path: Path) -> None:
    given = two(tmp_path, torch.tensor([3.0, 4.0]), torch.tensor([0.0, -0.5]))
    found = aggregate(given, AggregationSettings(clip_norm=1.0))
    assert found.clipped == ["alice"]
    torch.testing.assert_close(found.delta.tensors["w"], torch.tensor([0.3, 0.15]))


def test_momentum_over_rounds(tmp_path: Path) -> None:
    settings = AggregationSettings(server="momentum", server_learning_rate=0.5, server_momentum=0.9)
    given = two(tmp_path, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]))
    first = aggregate(given, settings)
    assert first.state is not None
    torch.testing.assert_close(first.delta.tensors["w"], torch.tensor([1.0, 1.0]))
    second = aggregate(given, settings, state=first.state)
    torch.testing.assert_close(second.delta.tensors["w"], torch.tensor([1.9, 1.9]))
    assert second.state is not None
    assert second.state.rounds == 2


def test_adam_is_that_of_the_paper(tmp_path: Path) -> None:
    settings = AggregationSettings(server="adam", server_learning_rate=0.01)
    given = two(tmp_path, torch.tensor([1.0, -2.0]), torch.tensor([3.0, -2.0]))
    first = aggregate(given, settings)
    mean = torch.tensor([2.0, -2.0]).double()
    m, v = 0.1 * mean, 0.01 * mean**2
    torch.testing.assert_close(first.delta.tensors["w"], (0.01 * m / (v.sqrt() + 1e-3)).float())
    second = aggregate(given, settings, state=first.state)
    m, v = 0.9 * m + 0.1 * mean, 0.99 * v + 0.01 * mean**2
    torch.testing.assert_close(second.delta.tensors["w"], (0.01 * m / (v.sqrt() + 1e-3)).float())


def test_the_server_state_survives_on_disk(tmp_path: Path) -> None:
    settings = AggregationSettings(server="adam")
    given = two(tmp_path, torch.tensor([1.0, -2.0]), torch.tensor([3.0, -2.0]))
    state = aggregate(given, settings).state
    assert state is not None
    state.write(tmp_path / "server.safetensors")
    read = ServerState.read(tmp_path / "server.safetensors")
    before, after = (aggregate(given, settings, state=one).delta.tensors["w"] for one in (state, read))
    assert torch.equal(before, after)
    damaged = bytearray((tmp_path / "server.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "server.safetensors").write_bytes(damaged)
    with pytest.raises(ArtifactRefused, match=r"server\.safetensors"):
        ServerState.read(tmp_path / "server.safetensors")
    with pytest.raises(ArtifactRefused, match="does not fit 'w'"):
        aggregate(given, AggregationSettings(server="momentum"), state=state)


def test_a_result_that_is_not_finite_is_refused_by_its_setting(tmp_path: Path) -> None:
    given = two(tmp_path, torch.ones(8), torch.ones(8))
    with pytest.raises(ConfigError, match=r"values in 'w' that torch\.float32 cannot hold") as caught:
        aggregate(given, AggregationSettings(server="momentum", server_learning_rate=1e39))
    assert "aggregation.server_learning_rate" in caught.value.remedy


def test_ties_keeps_what_a_majority_agrees_on(tmp_path: Path) -> None:
    given = two(tmp_path, torch.tensor([4.0, 1.0, -3.0, 0.1]), torch.tensor([2.0, 0.1, 5.0, 0.2]))
    found = aggregate(given, AggregationSettings(method="ties", density=0.5)).delta.tensors["w"]
    torch.testing.assert_close(found, torch.tensor([3.0, 0.0, 5.0, 0.0]))


def test_dare_is_right_in_the_mean_and_repeats_itself(tmp_path: Path) -> None:
    values = torch.ones(20_000)
    given = two(tmp_path, values, 3 * values)
    rng = torch.get_rng_state()
    found = aggregate(given, AggregationSettings(method="dare", density=0.25)).delta.tensors["w"]
    assert torch.equal(torch.get_rng_state(), rng)
    assert found.mean().item() == pytest.approx(2.0, abs=0.1)
    assert set(found.unique().tolist()) == {0.0, 2.0, 6.0, 8.0}
    again = aggregate(given, AggregationSettings(method="dare", density=0.25)).delta.tensors["w"]
    other = aggregate(given, AggregationSettings(method="dare", density=0.25, seed=1)).delta.tensors["w"]
    assert torch.equal(found, again)
    assert not torch.equal(found, other)


@pytest.mark.parametrize(
    ("method", "aggregation"),
    [("lora", "median"), ("lora", "ties"), ("layers", "concat"), ("layers", "svd"), ("bottleneck", "dare")],
)
def test_what_is_not_right_for_a_method_is_refused(tmp_path: Path, method: str, aggregation: str) -> None:
    given, _ = random_deltas(tmp_path, method, 3)
    with pytest.raises(ConfigError, match=f"{aggregation} is not right for deltas of tune.method={method}"):
        aggregate(given, AggregationSettings(method=aggregation))


def test_deltas_that_do_not_belong_together(tmp_path: Path) -> None:
    layers, made = random_deltas(tmp_path / "layers", "layers", 2)
    lora, low_rank = random_deltas(tmp_path / "lora", "lora", 2)
    alice = layers[0]
    with pytest.raises(ConfigError, match="owner-0 and bob tuned with different methods, layers and lora"):
        aggregate([alice, ("bob", lora[0][1], 1.0)], AggregationSettings())
    other = write_delta(made[1], tmp_path / "other", parent="cd" * 32)
    with pytest.raises(ConfigError, match="different emulators"):
        aggregate([alice, ("bob", other, 1.0)], AggregationSettings())
    made[1].tensors.popitem()
    with pytest.raises(ConfigError, match="different layers"):
        aggregate([alice, ("bob", write_delta(made[1], tmp_path / "fewer"), 1.0)], AggregationSettings())
    low_rank[1].settings = {**low_rank[1].settings, "alpha": 1.0}
    with pytest.raises(ConfigError, match="different settings of lora"):
        aggregate([lora[0], ("bob", write_delta(low_rank[1], tmp_path / "alpha"), 1.0)], AggregationSettings())


def test_the_most_precise_type_is_that_of_the_aggregate(tmp_path: Path) -> None:
    for value in range(6):  # whichever digest comes first
        given = two(tmp_path / str(value), torch.tensor([value, 2.0]), torch.tensor([value, 1.0]).half())
        assert aggregate(given, AggregationSettings()).delta.tensors["w"].dtype == torch.float32


def test_names_and_weights(tmp_path: Path) -> None:
    given, _ = random_deltas(tmp_path, "layers", 2)
    with pytest.raises(ConfigError, match="no delta"):
        aggregate([], AggregationSettings())
    with pytest.raises(ConfigError, match="owner-0 has two deltas"):
        aggregate([given[0], given[0]], AggregationSettings())
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="owner-1: the weight"):
            aggregate([given[0], (*given[1][:2], weight)], AggregationSettings())
    with pytest.raises(ConfigError, match="All weights are 0"):
        aggregate([(name, path, 0.0) for name, path, _ in given], AggregationSettings())
    (tmp_path / "none").mkdir()
    with pytest.raises(ArtifactRefused, match=r"manifest\.json"):
        aggregate([given[0], ("bob", tmp_path / "none", 1.0)], AggregationSettings())


def test_a_server_optimizer_needs_a_value_for_each_value() -> None:
    with pytest.raises(ConfigError, match="aggregate: server=adam keeps a running value"):
        parse(AggregationSettings, {"method": "svd", "server": "adam"}, "aggregate")


def test_memory_that_is_named_grows_only_where_it_must(tmp_path: Path) -> None:
    layers, _ = random_deltas(tmp_path / "layers", "layers", 8)
    lora, _ = random_deltas(tmp_path / "lora", "lora", 8)

    def named(given: list[tuple[str, Path, float]], method: str) -> list[int]:
        return [working_bytes(contributions(given[:n]), AggregationSettings(method=method)) for n in (2, 8)]

    for method in ("mean", "median", "trimmed_mean"):
        few, many = named(layers, method)
        assert few == many
    for given, method in ((layers, "ties"), (layers, "dare"), (lora, "concat"), (lora, "svd")):
        few, many = named(given, method)
        assert many == 4 * few


_MEASURE = """
import resource, sys
from scaleot_ray.config import AggregationSettings
from scaleot_ray.plugin.aggregation import aggregate
import torch
torch.set_num_threads(1)
folder, method, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
aggregate([(str(i), f"{folder}/{i}", 1.0) for i in range(count)], AggregationSettings(method=method))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Deltas of 8 MB each, 192 MB in all, and how many they are."""
    folder, size, count = tmp_path_factory.mktemp("many"), 2_000_000, 24
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        write_delta(plain_delta({"w": torch.randn(size, generator=generator)}), folder / str(index))
    return folder, count


@pytest.mark.parametrize("method", ["mean", "median"])
def test_memory_does_not_grow_with_the_number_of_deltas(many: tuple[Path, int], method: str) -> None:
    folder, count = many

    def peak(of: int) -> int:
        command = [sys.executable, "-c", _MEASURE, str(folder), method, str(of)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)

    few, most = peak(3), peak(count)
    assert most < few + 60e6, (few, most)  # the pieces of 64 MiB at most; the deltas themselves are 168 MB more

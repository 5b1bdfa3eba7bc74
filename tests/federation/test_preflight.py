"""What is missing is said before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from scaleot_ray.artifacts.storage import write_artifact
from scaleot_ray.config import ModelSettings, RoundSettings, RunSettings, TuneSettings
from scaleot_ray.errors import ConfigError, ResourcesMissing
from scaleot_ray.families.size import ModelSize, model_size
from scaleot_ray.federation.preflight import (
    check_aggregation,
    check_coordinator,
    check_disk,
    check_registry,
    preflight,
)
from scaleot_ray.federation.run import run_local
from scaleot_ray.plugin.aggregation import contributions, working_bytes
from scaleot_ray.resources import machine as machines
from scaleot_ray.resources.machine import Machine, this_machine, usable_memory
from scaleot_ray.resources.needs import RAY, Needs, activations, run_needs, trained_parameters
from tests.federation.rounds.tiny_deltas import TinyDeltas
from tests.tiny_models import TINY, save_tiny, tiny_model
from tests.tiny_run import write_tiny_run

LARGE = Machine(cpus=64, gpus=8, memory=10**12, shared_memory=10**12)
SEVEN_B = ModelSize(parameters=7 * 10**9, layer_parameters=2 * 10**8, layers=32, width=4096, vocabulary=32000)


@pytest.mark.parametrize("name", TINY)
def test_sizes_come_without_the_weights(name: str, tmp_path: Path) -> None:
    size = model_size(ModelSettings(path=str(save_tiny(tmp_path / "m", name))))
    model = tiny_model(name)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (size.layers, size.width, size.vocabulary) == (8, 32, 97)
    assert size.context == (None if name == "bloom" else 64)  # it has no positions to run out of


def test_a_gguf_header_is_enough() -> None:
    path = Path(__file__).parents[2] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("SmolLM2 is not here; `make demo` brings it")
    size = model_size(ModelSettings(path=str(path)))
    assert (size.layers, size.width, size.vocabulary, size.context) == (30, 576, 49152, 8192)
    assert 134e6 < size.parameters < 165e6


def test_an_ample_machine_passes(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path)
    preflight(settings, run_needs(settings, model_size(settings.model)), LARGE)


@pytest.mark.parametrize(
    ("machine", "problem", "remedy"),
    [
        ({"cpus": 1}, r"owner_cpus: 2 processors are asked for, 1 are there", "owner_cpus"),
        ({"cpus": 3}, r"tenants.1.cpus: 4 processors are asked for, 3 are there", r"tenants.1.cpus to 3"),
        ({"gpus": 0}, r"tenants.1.gpus: 1 GPUs are asked for, 0 are there", r"Use a larger machine"),
        (
            {"cpus": 3, "cpus_held": 5},
            r"4 processors are asked for, 3 are free .* \(5 are taken\)",
            r"tenants.1.cpus to 3",
        ),
        ({"cpus": 3, "cpus_held": 5}, r"tenants.1.cpus: 4 processors", "wait until others on this Ray have ended"),
        (
            {"gpus": 0.5, "gpus_held": 0.5},
            r"1 GPUs are asked for, 0.5 are free .* \(0.5 are taken",
            "gpus to 0.5 or less",
        ),
        ({"memory": 20 * 10**9}, r"memory: .* needs at least \d+ GB, 20 GB are free", "bfloat16"),
        ({"shared_memory": 64 << 20}, r"shared memory: .* needs \d+ GB .* 0.067 GB are free in /dev/shm", "shm-size"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, machine: dict[str, float], problem: str, remedy: str) -> None:
    settings = write_tiny_run(tmp_path, owner_cpus=2)
    bob = settings.tenants[1].model_copy(update={"cpus": 4, "gpus": 1.0})
    settings = settings.model_copy(update={"tenants": (settings.tenants[0], bob)})
    with pytest.raises(ResourcesMissing, match=problem) as caught:
        preflight(settings, run_needs(settings, SEVEN_B), replace(LARGE, **machine))
    assert remedy in caught.value.remedy


def test_disk_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = run_needs(write_tiny_run(tmp_path), SEVEN_B)
    with pytest.raises(ResourcesMissing, match=r"output: artefacts and checkpoints need up to \d+ GB"):
        check_disk(tmp_path / "new" / "run", replace(needs, disk=10**18))
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2 << 40)
    check_disk(tmp_path, replace(needs, disk=2 << 40))


def test_artefacts_kept_elsewhere_need_a_place_that_takes_them(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = write_tiny_run(tmp_path, artifacts=f"{tmp_path}/file/kept")
    size = model_size(settings.model)
    with pytest.raises(ConfigError, match=r"artifacts: .*/file/kept cannot be written to") as caught:
        preflight(settings, run_needs(settings, size), LARGE)
    assert "Set artifacts to a place" in caught.value.remedy
    settings = settings.model_copy(update={"artifacts": f"{tmp_path}/kept"})
    needs = run_needs(settings, size)
    preflight(settings, needs, LARGE)
    with pytest.raises(ResourcesMissing, match=r"artifacts: deltas and aggregates need up to .* in .*/kept"):
        preflight(settings, replace(needs, kept=10**18), LARGE)
    with (tmp_path / "kept" / "sparse").open("wb") as file:  # what is there from an earlier start
        file.truncate(2 << 40)
    preflight(settings, replace(needs, kept=2 << 40), LARGE)


def refusal(settings: RunSettings) -> ConfigError:
    """What a run of these settings is refused with, before it has made anything."""
    with pytest.raises(ConfigError) as caught:
        run_local(settings)
    assert not Path(settings.output).exists()
    return caught.value


def test_a_registry_on_a_network_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [("ext4", "/"), ("ext4", str(tmp_path)), ("nfs4", str(tmp_path / "run"))]
    found = [SimpleNamespace(fstype=kind, mountpoint=point) for kind, point in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    assert "registry: " in refusal(write_tiny_run(tmp_path)).problem
    check_registry(write_tiny_run(tmp_path, registry=str(tmp_path / "registry")))


def test_a_registry_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = refusal(write_tiny_run(tmp_path, registry=str(tmp_path / "file" / "registry")))
    assert error.problem.startswith(f"registry: {tmp_path}/file/registry cannot be written")


def test_a_data_owner_with_the_aggregates_name_is_refused_first(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path)
    tenants = (settings.tenants[0], settings.tenants[1].model_copy(update={"name": "aggregate"}))
    error = refusal(settings.model_copy(update={"tenants": tenants}))
    assert error.problem.startswith("tenants.1.name: no data owner can be called 'aggregate'")


def of_ten(folder: Path, trim: float, quorum: int | None) -> RunSettings:
    """A run of ten data owners with a trimmed mean."""
    rounds = {} if quorum is None else {"quorum": quorum}
    settings = write_tiny_run(folder, aggregation={"method": "trimmed_mean", "trim": trim})
    tenants = tuple(settings.tenants[0].model_copy(update={"name": f"tenant-{number}"}) for number in range(10))
    return settings.model_copy(update={"tenants": tenants, "rounds": RoundSettings(**rounds)})


def test_a_trimmed_mean_that_its_quorum_is_too_small_for_is_refused_first(tmp_path: Path) -> None:
    error = refusal(of_ten(tmp_path, 0.1, 9))
    assert error.problem.startswith("aggregation.trim: 0.1 of the 9 deltas of rounds.quorum is less than one")
    assert "aggregation.trim to 0.112 or more" in error.remedy
    assert "rounds.quorum to 10 or more" in error.remedy
    for trim, quorum in ((0.112, 9), (0.1, 10), (0.1, None), (0, 2)):  # the remedies, and what needs none
        check_aggregation(of_ten(tmp_path, trim, quorum))
    for quorum in (1, 2):  # of two deltas no trim leaves anything
        assert refusal(of_ten(tmp_path, 0.4, quorum)).remedy == (
            "Set rounds.quorum to 3 or more, or aggregation.method to median."
        )
    error = refusal(of_ten(tmp_path, 0.05, None))
    assert error.remedy == "Set aggregation.trim to 0.1 or more (below 0.5), or aggregation.method to median."


def test_who_has_weight_0_is_not_counted_for_a_trimmed_mean(tmp_path: Path) -> None:
    def silent(trim: float, quorum: int | None) -> RunSettings:
        settings = of_ten(tmp_path, trim, quorum)
        tenants = (settings.tenants[0].model_copy(update={"weight": 0.0}), *settings.tenants[1:])
        return settings.model_copy(update={"tenants": tenants})

    error = refusal(silent(0.1, None))
    assert error.problem == (
        "aggregation.trim: 0.1 of 9 deltas with a weight above 0 is less than one, so none would be left out."
    )
    check_aggregation(silent(0.112, None))
    error = refusal(silent(0.125, 8))
    assert error.problem.startswith("aggregation.trim: 0.125 of the 7 deltas of rounds.quorum with a weight above 0")
    assert "rounds.quorum to 9 or more" in error.remedy
    check_aggregation(silent(0.125, 9))


def tuned_by(folder: Path, count: int, how: str, **aggregation: Any) -> Needs:
    """What so many data owners need with a 7B model and a way of aggregating."""
    tune = {"method": "lora"} if how in ("concat", "svd") else {}
    settings = write_tiny_run(folder, tune=tune, aggregation={"method": how, **aggregation})
    names = [f"tenant-{number}" for number in range(count)]
    tenants = tuple(settings.tenants[0].model_copy(update={"name": name}) for name in names)
    return run_needs(settings.model_copy(update={"tenants": tenants}), SEVEN_B)


@pytest.mark.parametrize("how", ["concat", "svd", "ties", "dare"])
def test_what_aggregation_holds_of_all_data_owners_counts(tmp_path: Path, how: str) -> None:
    few, many = (tuned_by(tmp_path, count, how) for count in (2, 200))
    assert many.aggregation > 5 * few.aggregation
    many = replace(many, emulator=many.aggregation)
    enough = RAY + many.emulator + many.aggregation
    check_coordinator(many, enough)
    more = replace(many, aggregation=many.aggregation + 1)
    with pytest.raises(ResourcesMissing, match="memory: aggregating what data owners tuned needs at least") as caught:
        check_coordinator(more, enough)
    assert "aggregation.method to mean" in caught.value.remedy


def test_piece_by_piece_it_holds_the_same_of_few_and_many(tmp_path: Path) -> None:
    few, many = (tuned_by(tmp_path, count, "median").aggregation for count in (2, 200))
    assert few == many > 0
    server = [tuned_by(tmp_path, 2, "mean", server=name).aggregation for name in ("none", "momentum", "adam")]
    assert server == sorted(set(server))
    assert run_needs(write_tiny_run(tmp_path), SEVEN_B).aggregation == 0


def test_it_is_estimated_as_it_is_measured(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, aggregation={"method": "ties"})
    emulator = TinyDeltas.build(tmp_path)
    deltas = [(name, write_artifact(emulator.delta(1.0), tmp_path / name), 1.0) for name in ("alice", "bob")]
    measured = working_bytes(contributions(deltas), settings.aggregation)
    size = model_size(settings.model)
    estimated = run_needs(settings, size).aggregation - 12 * trained_parameters(settings.tune, 2, size)
    assert measured == pytest.approx(estimated, rel=0.5)


def test_of_artefacts_kept_elsewhere_two_rounds_are_here(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rounds": {"count": 5}, "aggregation": {}}
    here, folder, uri = (
        run_needs(write_tiny_run(tmp_path, artifacts=place, **changes), SEVEN_B)
        for place in (None, str(tmp_path / "kept"), f"file://{tmp_path}/kept")
    )
    assert (here.kept, folder.kept) == (0, uri.kept)
    assert here.disk - folder.disk == folder.kept
    assert uri.disk - folder.disk == folder.kept * 2 // 5 > 0


def test_needs_follow_the_settings(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path)
    full = run_needs(settings, SEVEN_B)
    bfloat16 = settings.model_copy(update={"model": settings.model.model_copy(update={"dtype": "bfloat16"})})
    assert run_needs(bfloat16, SEVEN_B).emulator == full.emulator // 2
    assert run_needs(settings.model_copy(update={"evaluator": False}), SEVEN_B).evaluators == {}
    assert full.object_store > full.emulator > 4 * SEVEN_B.parameters
    tune = TuneSettings()
    assert activations(tune.model_copy(update={"gradient_checkpointing": True}), SEVEN_B) < activations(tune, SEVEN_B)
    layers, lora, bottleneck = (
        trained_parameters(TuneSettings(method=method), 4, SEVEN_B) for method in ("layers", "lora", "bottleneck")
    )
    assert layers > 10 * lora > 0
    assert layers > 10 * bottleneck > 0


def test_this_machine_is_plausible() -> None:
    machine = this_machine()
    assert machine.cpus >= 1
    assert 0 < machine.memory == pytest.approx(usable_memory(), rel=0.5)


MIB = 1 << 20
VERSIONS = {
    "2": ("memory.max", "memory.current", "memory.stat", ""),
    "1": ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_containers_limit_counts_but_not_the_pages_of_files_it_has_read(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used, statistics, prefix = VERSIONS[version]
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text(f"{64 * MIB}\n")
    (tmp_path / used).write_text(f"{60 * MIB}\n")
    pages = {"anon": 9, "inactive_file": 40, "active_file": 10, "shmem": 1}
    (tmp_path / statistics).write_text("".join(f"{prefix}{kind} {count * MIB}\n" for kind, count in pages.items()))
    monkeypatch.setattr(machines, "_CONTROL_GROUP", tmp_path)
    assert usable_memory() == 54 * MIB
    (tmp_path / statistics).unlink()
    assert usable_memory() == 4 * MIB
    (tmp_path / limit).write_text("max\n" if version == "2" else f"{(1 << 63) - 4096}\n")
    assert usable_memory() > 64 * MIB

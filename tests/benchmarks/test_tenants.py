"""``python -m benchmarks.tenants`` on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.overhead.subjects import untrained_emulator
from benchmarks.tenants import aggregation
from benchmarks.tenants.__main__ import main
from benchmarks.tenants.aggregate_once import aggregate_once, plain_mean
from benchmarks.tenants.packing import WAYS, compare_packing
from benchmarks.tenants.recovery import KILLED, Kills
from benchmarks.tenants.run_processes import COORDINATOR, FIGURES, actor_processes
from benchmarks.tenants.scaling import crossed
from benchmarks.tenants.subject import random_llama
from benchmarks.tenants.tune_tenants import mapped_artifact, tune_tenants
from scaleot_ray.artifacts import Artifact, write_artifact
from scaleot_ray.config import AggregationSettings, EmulatorSettings, ModelSettings, TuneSettings
from scaleot_ray.errors import RunFailed
from scaleot_ray.families.loading import load_base_model
from scaleot_ray.progress import Progress
from tests.cli.command import PROJECT, environment, python
from tests.tiny_models import save_tiny

SETTINGS = TuneSettings(method="lora", steps=3, batch_size=2, block_size=16, lora_rank=2)
SMALL = ("--hidden", "64", "--layers", "6")
COMMAND = ("-m", "benchmarks.tenants")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tenants") / "model")


@pytest.fixture(scope="module")
def emulator(tiny: Path) -> Artifact:
    base = load_base_model(ModelSettings(path=str(tiny), device="cpu"))
    return untrained_emulator(base, EmulatorSettings(plug_in_layers=2, alpha=0.5, beta=0.5), block_size=16)


@pytest.mark.slow  # seven processes
def test_packing_is_written_with_what_was_compared(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "packing.json"
    fixed = ["packing", "--model", str(tiny), "--output", str(output), "--settings", "2,0.5,0.5", "--threads", "1"]
    assert main([*fixed, "--tenants", "2", "--steps", "3", "--block-size", "16", "--note", "a test"]) == 0
    text = output.read_text()
    assert str(tmp_path) not in text
    document = json.loads(text)
    assert document["note"] == "a test"
    (found,) = document["packing"]
    assert found["tenants"] == 2
    assert set(found["ways"]) == set(WAYS)
    for way in found["ways"].values():
        assert way["peak_pss"]["median"] > 50 << 20
        assert way["tenant_step_seconds"]["median"] > 0
    assert found["ways"]["separate"]["peak_rss"]["median"] > found["ways"]["packed"]["peak_rss"]["median"]
    assert set(found["ratios"]) == {"packed / in_turn", "packed / separate", "packed / separate_mapped"}
    assert found["loss_difference"] < 1e-4  # else the ratios would compare different work
    assert "| 2 | separate |" in capsys.readouterr().out


def test_both_ways_in_one_process_do_the_same_work(emulator: Artifact) -> None:
    losses = [tune_tenants(emulator, SETTINGS, 3, packed, lambda: None)["losses"] for packed in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 3


def test_a_mapped_emulator_is_the_same(emulator: Artifact, tmp_path: Path) -> None:
    write_artifact(emulator, tmp_path / "emulator")
    assert mapped_artifact(tmp_path / "emulator").digest == emulator.digest


def test_a_measuring_process_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="measuring process ended with"):
        compare_packing(tmp_path, SETTINGS, [1], 1, 1, print)


@pytest.mark.parametrize("wrong", [("--tenants", "2,x"), ("--tenants", "0"), ("--steps", "1")])
def test_wrong_numbers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, str]) -> None:
    assert main(["packing", "--model", "m", "--output", str(tmp_path / "x.json"), *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err


def document_of(tmp_path: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """What a benchmark wrote and printed, run in a process of its own: these runs need a Ray of their own."""
    output, scratch = tmp_path / "found.json", tmp_path / "scratch"
    scratch.mkdir()
    done = python(*COMMAND, *arguments, "--output", output, *SMALL, cwd=PROJECT, timeout=500, TMPDIR=str(scratch))
    assert done.code == 0, done.err
    assert not list(scratch.glob("scaleot-tenants-*"))
    text = output.read_text()
    assert str(tmp_path) not in text
    document = json.loads(text)
    assert document["benchmark"] == arguments[0]
    return document, done.out


@pytest.mark.slow  # whole runs
def test_scaling_shows_what_grows_with_the_number_of_data_owners(tmp_path: Path) -> None:
    document, printed = document_of(tmp_path, "scaling", "--tenants", "3,1", "--steps", "200")
    found, emulator = document["scaling"], document["emulator"]["bytes"]
    first, more = found["runs"]
    assert [first["tenants"], more["tenants"]] == [1, 3]
    assert found["compared_with"] == 1
    assert first["at_once"] == 1
    for run in (first, more):
        assert run["seconds"]["total"]["median"] > run["seconds"]["tune"]["median"] > 0
        # Once for all, with its manifest and a few small objects.
        assert emulator < run["store_bytes"] < 1.3 * emulator
        assert run["crossed"]["in"] == {"emulator": emulator}
        assert run["crossed"]["out"].keys() == {"delta", "metrics"}
        for key in FIGURES:
            assert run["coordinator"][key]["median"] > 50 << 20
    assert first["per_data_owner"]["tune"]["median"] == first["per_data_owner"]["total"]["median"] == 1
    share = more["seconds"]["total"]["median"] / 3 / first["seconds"]["total"]["median"]
    assert more["per_data_owner"]["total"]["median"] == pytest.approx(share)
    assert all(1 <= value < 1.3 for value in found["coordinator_growth"].values())
    assert "| 3 | " in printed


def test_of_what_crossed_the_data_owner_with_most_counts_and_refusals_do_not() -> None:
    def entry(sender: str, recipient: str, kind: str, size: int, decision: str = "sent") -> dict[str, Any]:
        return {"sender": sender, "recipient": recipient, "kind": kind, "bytes": size, "decision": decision}

    entries = [
        entry("model owner", "data owner a", "emulator", 7),
        entry("model owner", "data owner a", "delta", 3),
        entry("model owner", "data owner a", "delta", 3),
        entry("data owner a", "model owner", "delta", 5),
        entry("data owner b", "model owner", "delta", 4),
        entry("data owner b", "model owner", "delta", 100, "refused"),
        entry("evaluator a", "driver", "table", 50),
    ]
    assert crossed(entries, ["data owner a", "data owner b"]) == {
        "in": {"delta": 6, "emulator": 7},
        "out": {"delta": 5},
    }


@pytest.mark.slow  # processes start four times, two of them one after the other
def test_recovery_of_both_kinds_of_process(tmp_path: Path) -> None:
    document, printed = document_of(tmp_path, "recovery", "--repeats", "1", "--steps", "2000")
    assert set(document["recovery"]) == set(KILLED)
    for found in document["recovery"].values():
        for key in ("recovery", "start"):
            assert 0.2 < found[key]["median"] < 300
        ratio = found["recovery"]["median"] / found["start"]["median"]
        assert found["recovery / start"]["median"] == pytest.approx(ratio)
    assert "| data owner | " in printed


def test_nobody_is_killed_once_a_data_owner_is_done() -> None:
    kills = Kills({"a", "b"})
    kills.progress(Progress("tune a", 4, 4, tenant="a"))
    with pytest.raises(RunFailed, match="done before all of them tuned"):
        kills.progress(Progress("tune b", 1, 4, tenant="b"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_nothing(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, *COMMAND, "scaling", *SMALL, "--steps", "100000", "--output", str(tmp_path / "found.json")],
        cwd=PROJECT,
        env=environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while not set(actor_processes(COORDINATOR)) & set(family):
            assert process.poll() is None
            assert time.monotonic() < deadline
            family = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.1)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.terminate()  # killed, it could not end its Ray
        process.wait(timeout=60)
    assert process.returncode == 130
    assert signal.Signals(number).name in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())
    assert not psutil.wait_procs(family, timeout=5)[1]


@pytest.mark.slow
def test_aggregation_compares_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "aggregation.json"
    sizes = ["--deltas", "5", "--distinct", "2", "--repeats", "1", "--lora-rank", "2"]
    assert main(["aggregation", "--output", str(output), *SMALL, *sizes]) == 0
    document = json.loads(output.read_text())
    assert "warm" in document["page_cache"]
    assert document["settings"]["distinct"] == 2
    for method, found in document["aggregation"].items():
        assert tuple(found["ways"]) == aggregation.WAYS[method]
        assert len(found["ratios"]) == 3
        assert found["difference"] < 1e-5
        for way in found["ways"].values():
            assert way["gb_per_second"]["median"] > 0
            assert way["peak_bytes"]["median"] > way["added_bytes"]["median"] >= 0
    assert "| lora | svd |" in capsys.readouterr().out


def test_another_result_would_be_noticed(tmp_path: Path) -> None:
    size = aggregation.write_deltas(tmp_path, random_llama(64, 6), TuneSettings(), 3)
    deltas = [tmp_path / str(number) for number in range(3)]
    mean = aggregate_once(deltas, AggregationSettings(method="mean"))["sample"]
    median = aggregate_once(deltas, AggregationSettings(method="median"))["sample"]
    plain = aggregate_once(deltas, None)["sample"]
    assert sum(tensor.nbytes for tensor in plain_mean(deltas).values()) == size
    assert aggregation.difference(mean, plain) < 1e-5
    assert aggregation.difference(median, plain) > 0.1


@pytest.mark.parametrize(
    ("benchmark", "wrong", "named"),
    [
        ("scaling", ("--tenants", "1,,2"), "--tenants"),
        ("scaling", ("--steps", "0"), "--steps"),
        ("scaling", ("--layers", "5"), "--layers"),
        ("recovery", ("--repeats", "0"), "--repeats"),
        ("aggregation", ("--deltas", "2"), "--deltas"),
        ("aggregation", ("--hidden", "65"), "--hidden"),
    ],
)
def test_wrong_sizes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], benchmark: str, wrong: tuple[str, str], named: str
) -> None:
    assert main([benchmark, "--output", str(tmp_path / "x.json"), *wrong]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_ray_of_others_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(["scaling", "--output", str(tmp_path / "x.json"), *SMALL]) == 2
    assert "RAY_ADDRESS" in capsys.readouterr().err

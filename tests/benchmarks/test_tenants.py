"""``python -m benchmarks.tenants`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.overhead.subjects import untrained_emulator
from benchmarks.tenants.__main__ import main
from benchmarks.tenants.packing import WAYS, compare_packing
from benchmarks.tenants.tune_tenants import mapped_artifact, tune_tenants
from scaleot_ray.artifacts import Artifact, write_artifact
from scaleot_ray.config import EmulatorSettings, ModelSettings, TuneSettings
from scaleot_ray.errors import RunFailed
from scaleot_ray.families.loading import load_base_model
from tests.tiny_models import save_tiny

SETTINGS = TuneSettings(method="lora", steps=3, batch_size=2, block_size=16, lora_rank=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tenants") / "model")


@pytest.fixture(scope="module")
def emulator(tiny: Path) -> Artifact:
    base = load_base_model(ModelSettings(path=str(tiny), device="cpu"))
    return untrained_emulator(base, EmulatorSettings(plug_in_layers=2, alpha=0.5, beta=0.5), block_size=16)


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

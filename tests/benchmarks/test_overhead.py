"""``python -m benchmarks.overhead`` on a tiny model, part by part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.command import portable_command
from benchmarks.overhead.__main__ import main
from benchmarks.overhead.costs import compare_costs
from benchmarks.overhead.process_memory import forget_peak, peak_bytes
from benchmarks.overhead.subjects import untrained_emulator, whole_model
from benchmarks.overhead.train_once import MODES, train_once
from scaleot_ray.artifacts import Artifact, write_artifact
from scaleot_ray.config import EmulatorSettings, ModelSettings, TuneSettings
from scaleot_ray.errors import RunFailed
from scaleot_ray.families.loading import BaseModel, load_base_model
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from scaleot_ray.resources.session import Session

SETTINGS = TuneSettings(steps=3, batch_size=2, block_size=16, lora_rank=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("overhead") / "model")


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseModel:
    return load_base_model(ModelSettings(path=str(tiny), device="cpu"))


@pytest.fixture(scope="module")
def emulator(base: BaseModel) -> Artifact:
    return untrained_emulator(base, EmulatorSettings(plug_in_layers=2, alpha=0.5, beta=0.5), block_size=16)


def _run(tiny: Path, output: Path, *more: str) -> int:
    fixed = ["--model", str(tiny), "--output", str(output), "--settings", "2,0.5,0.5", "--threads", "1"]
    return main([*fixed, "--steps", "3", "--batch-size", "2", "--block-size", "16", *more])


def test_trainer_does_the_same_work_as_the_bare_loop(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tiny, tmp_path / "overhead.json", "--parts", "trainer", "--pairs", "2") == 0
    text = (tmp_path / "overhead.json").read_text()
    document = json.loads(text)
    assert str(tmp_path) not in text
    assert "--model model --output overhead.json" in document["command"]
    assert len(document["trainer"]["ratio"]["values"]) == 2
    # Else the ratio would compare different work.
    assert document["trainer"]["difference"] < 1e-3
    assert "| tuning / bare loop, tokens/s |" in capsys.readouterr().out


def test_object_store(tiny: Path, tmp_path: Path, connected_ray: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tiny, tmp_path / "overhead.json", "--parts", "object_store", "--rounds", "2") == 0
    found = json.loads((tmp_path / "overhead.json").read_text())["object_store"]
    assert set(found["ratios"]) == {"put / memcpy", "put / fresh_copy", "get / memcpy"}
    assert len(found["put"]["values"]) == 2
    assert found["zero_copy"]
    assert "| get / memcpy, seconds |" in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_tuning_trains_what_it_says(base: BaseModel, emulator: Artifact, mode: str) -> None:
    full = sum(parameter.numel() for parameter in base.model.parameters())
    layer = sum(parameter.numel() for parameter in base.family.layers(base.model)[0].parameters())
    copied = load_base_model(ModelSettings(path=base.source, device="cpu"))  # fine-tuning writes into it
    artifact = emulator if mode.startswith("emulator") else whole_model(copied, 2)
    found = train_once(artifact, mode, SETTINGS)
    assert found["tokens_per_second"] > 0
    assert found["peak_bytes"] > 50 << 20
    trained = found["trained_parameters"]
    if mode == "full_fine_tuning":
        assert trained == full
    elif mode == "emulator_layers":
        assert trained == 2 * layer
    elif mode == "emulator_lora":
        assert trained < layer
    else:
        # The same pairs as in the emulator's two plug-in layers, in all eight.
        assert trained == 4 * train_once(emulator, "emulator_lora", SETTINGS)["trained_parameters"]


def test_costs_run_in_processes_of_their_own(base: BaseModel, emulator: Artifact, tmp_path: Path) -> None:
    write_artifact(emulator, tmp_path / "emulator")
    write_artifact(whole_model(base, 2), tmp_path / "full")
    lines: list[str] = []
    modes = ("emulator_layers", "full_lora")
    found = compare_costs(tmp_path / "emulator", tmp_path / "full", SETTINGS, 1, 1, lines.append, modes)
    assert len(lines) == 2
    assert set(found["ratios"]) == {"emulator_layers / full_lora"}
    assert found["ratios"]["emulator_layers / full_lora"]["memory"]["median"] > 0


def test_a_measuring_process_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="emulator_layers"):
        compare_costs(tmp_path, tmp_path, SETTINGS, 1, 1, print, ("emulator_layers",))


def test_peak_begins_again_where_it_can() -> None:
    large = bytearray(64 << 20)
    high = peak_bytes()
    del large
    if forget_peak():
        assert peak_bytes() < high


def test_wrong_parts_are_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tiny, tmp_path / "x.json", "--parts", "trainer,magic") == 2
    assert "'magic'" in capsys.readouterr().err


def test_commands_hold_no_paths_of_the_machine() -> None:
    shown = portable_command(
        "m",
        ["--model", "/home/me/a.gguf", "--data=srv/data", "--steps", "2", "--set", "public.path=/srv/text", "/x/y"],
        ("--model", "--data"),
    )
    assert shown == "python -m m --model a.gguf --data=data --steps 2 --set public.path=text y"

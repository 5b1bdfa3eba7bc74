"""``python -m benchmarks.scale`` on a small shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scale.__main__ import main
from benchmarks.scale.checkpoint import Shape, write_checkpoint
from scaleot_ray.config import ModelSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.mapped import map_base_model

SMALL = ["--hidden", "64", "--intermediate", "96", "--layers", "8", "--heads", "4", "--vocabulary", "300"]


def test_a_checkpoint_is_whole_and_finished_where_it_was_left(tmp_path: Path) -> None:
    shape = Shape(hidden=64, intermediate=96, layers=4, heads=4, vocabulary=300)
    said: list[str] = []
    write_checkpoint(tmp_path, shape, said.append)
    assert len(said) == 5
    settings = ModelSettings(path=str(tmp_path), dtype="bfloat16", device="cpu")
    digest = map_base_model(settings).digest
    (tmp_path / "model-2.safetensors").unlink()
    write_checkpoint(tmp_path, shape, said.append)
    assert len(said) == 6
    assert map_base_model(settings).digest == digest


def test_shapes_that_no_model_has() -> None:
    for wrong in (Shape(hidden=65, heads=4), Shape(vocabulary=100), Shape(layers=2)):
        with pytest.raises(ConfigError, match="no Llama"):
            wrong.config()


@pytest.mark.slow
def test_builds_and_tunes(tmp_path: Path) -> None:
    command = ["--output", str(tmp_path / "run"), "--json", str(tmp_path / "scale.json"), *SMALL]
    command += ["--start-tokens", "512", "--fit-tokens", "512", "--fit-steps", "1", "--blocks", "24"]
    assert main(command) == 0
    text = (tmp_path / "scale.json").read_text()
    assert str(tmp_path) not in text
    found = json.loads(text)
    assert found["build"]["peak_bytes"]["anonymous"] > 50e6
    assert set(found["build"]["seconds_per_layer"]) == {"stage_one", "emulator"}
    assert found["tune"]["seconds"] > 0
    assert found["model"]["bytes"] > found["build"]["emulator"]["bytes"]

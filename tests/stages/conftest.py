"""A tiny run's files, and the emulator built from them once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import RunSettings
from scaleot_ray.families.loading import BaseModel, load_base_model
from scaleot_ray.stages.build import build
from tests.tiny_run import write_tiny_run


@dataclass
class Built:
    """The owner's side, ready: settings, full model, emulator."""

    folder: Path
    settings: RunSettings
    base: BaseModel
    emulator: Artifact


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A tiny emulator and what it came from."""
    folder = tmp_path_factory.mktemp("stages")
    settings = write_tiny_run(folder)
    base = load_base_model(settings.model)
    build(base, settings.public, settings.stage_one, settings.emulator, folder / "emulator", cache=folder / "cache")
    return Built(folder, settings, base, read_artifact(folder / "emulator"))

"""What a model allows is said before work is spent."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaleot_ray.config import TuneSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.families import Family, family_of
from scaleot_ray.progress import Progress
from scaleot_ray.stages.limits import check_delta_size
from scaleot_ray.stages.tune import tune_emulator
from tests.stages.conftest import Built


@pytest.fixture
def family(built: Built) -> Family:
    """Of the tiny model."""
    return family_of(built.base.model.config)


@pytest.mark.parametrize("tune", [{}, {"method": "lora"}, {"method": "bottleneck"}])
def test_deltas_of_the_defaults_may_cross(built: Built, family: Family, tune: dict[str, str]) -> None:
    check_delta_size(built.emulator.manifest, family, TuneSettings.model_validate(tune))


@pytest.mark.parametrize(("method", "key"), [("lora", "lora_rank"), ("bottleneck", "bottleneck_width")])
def test_a_delta_that_could_not_cross_is_not_tuned(built: Built, tmp_path: Path, method: str, key: str) -> None:
    tune = built.settings.tune.model_copy(update={"method": method, key: 400})
    heard: list[Progress] = []
    with pytest.raises(ConfigError, match=rf"^tune.{key}: with 400 a delta of method {method} has \d+ parameters"):
        tune_emulator(
            built.emulator, built.settings.tenants[0].train, tune, tmp_path, device="cpu", on_progress=heard.append
        )
    assert not heard
    assert not list(tmp_path.iterdir())

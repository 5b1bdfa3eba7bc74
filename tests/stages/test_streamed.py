"""Building with the model on disk: from settings to an emulator, again after a stop, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.checkpoints import CheckpointPace
from scaleot_ray.config import EmulatorSettings, ModelSettings, OwnerSettings, StageOneSettings
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import ConfigError, ScaleOTError
from scaleot_ray.progress import Progress
from scaleot_ray.stages.build import BuildResult, build
from scaleot_ray.stages.streamed import check_streamable
from scaleot_ray.stages.tune import tune_emulator
from tests.stages.conftest import Built
from tests.tiny_models import tiny_model, tiny_tokenizer

STAGE_ONE = StageOneSettings(harmonizer_rank=8, start_tokens=512, batch_size=4, block_size=16)
EMULATOR = EmulatorSettings(plug_in_layers=2, alpha=0.5, beta=0.6, fit_tokens=512, fit_steps=2)


class Stopped(Exception):
    """In place of a kill."""


@pytest.fixture
def model(tmp_path: Path) -> ModelSettings:
    """A checkpoint in bfloat16."""
    folder = tmp_path / "model"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return ModelSettings(path=str(folder), dtype="bfloat16", device="cpu")


def streamed(built: Built, model: ModelSettings, output: Path, **changes: Any) -> BuildResult:
    """A streamed build on the tiny run's public text."""
    arguments = {"stage_one": STAGE_ONE, "emulator": EMULATOR, "stream": True, **changes}
    return build(model, built.settings.public, output=output, **arguments)


def test_what_comes_out_can_be_tuned(built: Built, model: ModelSettings, tmp_path: Path) -> None:
    heard: list[Progress] = []
    result = streamed(built, model, tmp_path / "e", cache=tmp_path / "c", on_progress=heard.append)
    assert [*dict.fromkeys(report.stage for report in heard)] == ["layer damage", "fit in order", "measure fit"]
    content = emulator_content(result.manifest)
    assert content.loss_margin is not None
    assert content.stage_one is not None
    assert (content.stage_one.steps, content.stage_one.generated_tokens, content.stage_one.start) == (
        0,
        0,
        "closed_form",
    )
    assert not list((tmp_path / "c").rglob("layer-*")), "nothing is left of the parts"
    emulator = read_artifact(tmp_path / "e", expected_kind="emulator")
    tune = built.settings.tune.model_copy(update={"steps": 2})
    tuned = tune_emulator(emulator, built.settings.tenants[0].train, tune, tmp_path / "t", device="cpu")
    assert tuned.delta.manifest.parent_digest == result.manifest.digest()


def test_judges_layers_as_a_build_in_memory_that_takes_no_steps(
    built: Built, model: ModelSettings, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(model.path)
    wide = model.model_copy(update={"dtype": "float32"})
    found = streamed(built, wide, tmp_path / "e")
    none = STAGE_ONE.model_copy(update={"steps": 0, "generated_tokens": 0})
    expected = streamed(built, wide, tmp_path / "f", stage_one=none, stream=False)
    one, other = (emulator_content(result.manifest) for result in (found, expected))
    assert one.layer_map == other.layer_map
    assert one.full_loss == pytest.approx(other.full_loss, abs=1e-5)


def test_other_emulators_come_from_the_same_pass(built: Built, model: ModelSettings, tmp_path: Path) -> None:
    first = streamed(built, model, tmp_path / "e", cache=tmp_path / "c")
    assert not first.reused_stage_one
    heard: list[Progress] = []
    other = EMULATOR.model_copy(update={"alpha": 0.25})
    second = streamed(built, model, tmp_path / "f", emulator=other, cache=tmp_path / "c", on_progress=heard.append)
    assert second.reused_stage_one
    assert "layer damage" not in {report.stage for report in heard}
    again = streamed(built, model, tmp_path / "e", cache=tmp_path / "c", resume=True)
    assert again.manifest.digest() == first.manifest.digest()
    # A build in memory has a stage 1 of its own.
    none = STAGE_ONE.model_copy(update={"steps": 0, "generated_tokens": 0})
    assert not streamed(
        built, model, tmp_path / "g", stage_one=none, stream=False, cache=tmp_path / "c"
    ).reused_stage_one


@pytest.mark.parametrize("stage", ["layer damage", "fit in order"])
def test_a_stopped_build_goes_on(
    stage: str, built: Built, model: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointPace, "due", lambda *_: True)

    def stop(report: Progress) -> None:
        if (report.stage, report.step) == (stage, 6):
            raise Stopped

    with pytest.raises(Stopped):
        streamed(built, model, tmp_path / "e", cache=tmp_path / "c", on_progress=stop)
    heard: list[Progress] = []
    found = streamed(built, model, tmp_path / "e", cache=tmp_path / "c", on_progress=heard.append)
    assert min(report.step for report in heard if report.stage == stage) == 6
    assert found.manifest.digest() == streamed(built, model, tmp_path / "f").manifest.digest()
    assert not [path for path in (tmp_path / "c").rglob("*") if "position" in path.name or "layer-" in path.name]


@pytest.mark.parametrize("place", ["stage one", "emulator"])
def test_what_cannot_be_written_does_not_cost_what_was_done(
    place: str, built: Built, model: ModelSettings, tmp_path: Path
) -> None:
    cache = tmp_path / "c"
    streamed(built, model, tmp_path / "e", cache=cache)
    (folder,) = cache.iterdir()
    blocked = folder / "stage_one.safetensors" if place == "stage one" else tmp_path / "f"

    def block(report: Progress) -> None:
        if report.step == 1 and not blocked.exists():
            blocked.mkdir()
            (blocked / "in the way").touch()

    if place == "stage one":
        blocked.unlink()
    changed = EMULATOR.model_copy(update={"alpha": 0.25})
    with pytest.raises(ScaleOTError):
        streamed(built, model, tmp_path / "f", emulator=changed, cache=cache, on_progress=block)
    (blocked / "in the way").unlink()
    blocked.rmdir()
    heard: list[str] = []
    streamed(
        built,
        model,
        tmp_path / "f",
        emulator=changed,
        cache=cache,
        on_progress=lambda report: heard.append(report.stage),
    )
    assert ("layer damage" if place == "stage one" else "fit in order") not in heard
    assert not [path for path in cache.rglob("*") if "position" in path.name or "layer-" in path.name]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"steps": 5}, {}, "stage_one.steps"),
    ({"generated_tokens": 5}, {}, "stage_one.generated_tokens"),
    ({"start": "random"}, {}, "stage_one.start"),
    ({"score_start": "zero"}, {}, "stage_one.score_start"),
    ({}, {"builder": "uniform_drop"}, "emulator.builder"),
    ({}, {"compression": "svd"}, "emulator.compression"),
    ({}, {"privacy": "low"}, "emulator.privacy"),
    ({}, {"fit_tokens": 0}, "emulator.fit_tokens"),
]


@pytest.mark.parametrize(("stage_one", "emulator", "key"), REFUSED)
def test_settings_that_need_the_whole_model(stage_one: dict[str, Any], emulator: dict[str, Any], key: str) -> None:
    check_streamable(StageOneSettings(), EmulatorSettings())
    check_streamable(StageOneSettings(steps=0, generated_tokens=0), EmulatorSettings())
    with pytest.raises(ConfigError) as caught:
        check_streamable(StageOneSettings(**stage_one), EmulatorSettings(**emulator))
    assert caught.value.problem.startswith(f"{key}: ")
    assert caught.value.remedy


def test_what_the_recipe_sets_is_said_to_come_from_it(built: Built) -> None:
    values = {"model": built.settings.model, "public": built.settings.public, "recipe": "paper"}
    settings = OwnerSettings.model_validate(values)
    with pytest.raises(ConfigError) as caught:
        check_streamable(settings.stage_one, settings.emulator)
    assert "recipe" in caught.value.remedy
    with pytest.raises(ConfigError) as caught:
        check_streamable(StageOneSettings(steps=5), EmulatorSettings())
    assert "recipe" not in caught.value.remedy


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("cache", ["e", "e/cache", "f/../e/cache"])
def test_a_cache_in_what_is_written_whole(
    cache: str, stream: bool, built: Built, model: ModelSettings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^cache: "):
        streamed(built, model, tmp_path / "e", cache=tmp_path / cache, stream=stream)
    assert not (tmp_path / "e").exists()

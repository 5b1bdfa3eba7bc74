"""Build as a whole step: caches, resuming, refusals."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.storage import read_artifact, write_artifact
from scaleot_ray.config import DataSettings, EmulatorSettings
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import ConfigError, DataError
from scaleot_ray.progress import Progress
from scaleot_ray.stages import build as build_stage
from scaleot_ray.stages.build import BuildResult, build
from scaleot_ray.stages.public_text import HELD_OUT, read_public_text
from tests.stages.conftest import Built
from tests.tiny_models import swapped_tokenizer


def again(built: Built, output: Path, **changes: Any) -> BuildResult:
    """The same build with some arguments changed."""
    arguments = {
        "public": built.settings.public,
        "stage_one": built.settings.stage_one,
        "emulator": built.settings.emulator,
        "cache": built.folder / "cache",
        **changes,
    }
    return build(arguments.pop("base", built.base), output=output, **arguments)


def test_other_emulators_come_from_the_same_stage_one(built: Built, tmp_path: Path) -> None:
    heard: list[Progress] = []
    settings = EmulatorSettings(alpha=0.25, beta=0.5, plug_in_layers=2)
    result = again(built, tmp_path / "e", emulator=settings, on_progress=heard.append)
    assert result.reused_stage_one
    assert not {report.stage for report in heard} & {"stage 1", "measure full model"}
    content = emulator_content(result.manifest)
    assert (content.alpha, content.beta) == (0.25, 0.5)
    assert content.loss_margin is not None


def test_other_text_needs_a_stage_one_of_its_own(built: Built, tmp_path: Path) -> None:
    lines = Path(built.settings.public.path).read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(reversed(lines)))
    other = again(built, tmp_path / "e", public=DataSettings(path=str(tmp_path / "other.jsonl")))
    assert not other.reused_stage_one


def test_another_tokenizer_needs_a_stage_one_of_its_own(built: Built, tmp_path: Path) -> None:
    other = replace(built.base, tokenizer=swapped_tokenizer())
    assert other.digest == built.base.digest
    result = again(built, tmp_path / "e", base=other)
    assert not result.reused_stage_one
    # Nor is what was measured or finished with the first one taken for its own.
    assert emulator_content(result.manifest).full_loss != emulator_content(built.emulator.manifest).full_loss
    assert again(built, tmp_path / "e", resume=True, base=other).manifest.digest() == result.manifest.digest()
    with pytest.raises(ConfigError, match="holds something else"):
        again(built, tmp_path / "e", resume=True)


def test_a_stage_one_stopped_with_other_checkpoints_goes_on(built: Built, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(report: Progress) -> None:
        if (report.stage, report.step) == ("stage 1", 4):
            raise Stopped

    settings = built.settings.stage_one.model_copy(update={"checkpoint_every": 2})
    with pytest.raises(Stopped):
        again(built, tmp_path / "e", stage_one=settings, cache=tmp_path / "c", on_progress=stop)
    heard: list[Progress] = []
    found = again(built, tmp_path / "e", cache=tmp_path / "c", on_progress=heard.append)
    assert [report.step for report in heard if report.stage == "stage 1"] == [3, 4, 5, 6]
    assert found.manifest.digest() == built.emulator.digest
    assert again(built, tmp_path / "f", stage_one=settings, cache=tmp_path / "c").reused_stage_one


def test_a_stage_one_without_steps_that_was_stopped_is_not_called_reused(built: Built, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(report: Progress) -> None:
        if report.stage == "layer damage":
            raise Stopped

    arguments: dict[str, Any] = {
        "stage_one": built.settings.stage_one.model_copy(update={"steps": 0}),
        "cache": tmp_path / "c",
    }
    with pytest.raises(Stopped):
        again(built, tmp_path / "e", on_progress=stop, **arguments)
    assert not again(built, tmp_path / "e", **arguments).reused_stage_one
    assert again(built, tmp_path / "f", **arguments).reused_stage_one


@pytest.mark.parametrize("privacy", [{}, {"privacy": "low"}])
def test_too_many_plug_in_layers_are_refused_before_stage_one(
    built: Built, tmp_path: Path, privacy: dict[str, Any]
) -> None:
    heard: list[Progress] = []
    with pytest.raises(ConfigError, match=r"emulator.plug_in_layers: 7 of 8 decoder layers leave no middle layers"):
        again(
            built,
            tmp_path / "e",
            emulator=EmulatorSettings(plug_in_layers=7, **privacy),
            cache=tmp_path / "c",
            on_progress=heard.append,
        )
    assert not heard
    assert not (tmp_path / "c").exists()


def test_moved_text_is_the_same_text(built: Built, tmp_path: Path) -> None:
    shutil.copy(built.settings.public.path, tmp_path / "moved.jsonl")
    assert again(built, tmp_path / "e", public=DataSettings(path=str(tmp_path / "moved.jsonl"))).reused_stage_one


def test_the_very_emulator_is_taken_as_it_is(built: Built, tmp_path: Path) -> None:
    output = tmp_path / "e"
    first = again(built, output, resume=True)
    written = (output / "manifest.json").stat().st_mtime_ns
    assert again(built, output, resume=True).manifest.digest() == first.manifest.digest()
    assert (output / "manifest.json").stat().st_mtime_ns == written
    # A damaged one is not: it is built again.
    tensors = output / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    again(built, output, resume=True, overwrite=True)
    assert read_artifact(output).digest == first.manifest.digest()


def test_an_existing_output_is_kept(built: Built, tmp_path: Path) -> None:
    again(built, tmp_path / "e")
    with pytest.raises(ConfigError, match="exists already"):
        again(built, tmp_path / "e")


def test_what_is_no_artefact_is_never_overwritten_and_that_shows_early(built: Built, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    heard: list[Progress] = []
    with pytest.raises(ConfigError, match=r"exists and holds no manifest.json, so it is not overwritten"):
        again(built, tmp_path, overwrite=True, on_progress=heard.append)
    assert not heard
    assert (tmp_path / "thesis.txt").exists()


def test_stopped_after_writing_the_same_command_finds_its_own(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def write_and_stop(artifact: Artifact, directory: Path, overwrite: bool) -> None:
        write_artifact(artifact, directory, overwrite=overwrite)
        raise Stopped

    settings = EmulatorSettings(alpha=0.25, beta=0.25, plug_in_layers=2)
    monkeypatch.setattr(build_stage, "write_artifact", write_and_stop)
    with pytest.raises(Stopped):
        again(built, tmp_path / "e", emulator=settings, resume=True)
    monkeypatch.undo()
    heard: list[Progress] = []
    found = again(built, tmp_path / "e", emulator=settings, resume=True, on_progress=heard.append)
    assert not heard
    assert read_artifact(tmp_path / "e").digest == found.manifest.digest()
    with pytest.raises(ConfigError, match="holds something else"):
        again(built, tmp_path / "e", resume=True)


def test_one_plug_in_layer_leaves_the_last_layer_as_it_is(built: Built, tmp_path: Path) -> None:
    settings = EmulatorSettings(alpha=0.85, plug_in_layers=1)
    content = emulator_content(again(built, tmp_path / "e", emulator=settings).manifest)
    assert content.layer_map == ["plug_in", *["replaced"] * 6, "kept"]
    heard: list[Progress] = []
    with pytest.raises(ConfigError, match=r"emulator.alpha: 1.0 replaces 7 of the 7 .* only 6 can be") as caught:
        again(
            built,
            tmp_path / "f",
            emulator=settings.model_copy(update={"alpha": 1.0}),
            cache=tmp_path / "c",
            on_progress=heard.append,
        )
    assert "at most 0.85" in caught.value.remedy
    assert not heard  # said before stage 1
    # A privacy level's ladder leaves such a rung out, and says that the level cannot be met.
    with pytest.raises(ConfigError, match=r"emulator.privacy: high asks"):
        again(built, tmp_path / "f", emulator=EmulatorSettings(privacy="high", plug_in_layers=1))


def test_a_privacy_level_that_cannot_be_met_is_an_error(built: Built, tmp_path: Path) -> None:
    # A random model loses nothing when layers are replaced, so no level can be met on it.
    with pytest.raises(ConfigError, match=r"emulator.privacy: low asks"):
        again(built, tmp_path / "e", emulator=EmulatorSettings(privacy="low", plug_in_layers=2))
    assert not (tmp_path / "e").exists()


def test_a_privacy_level_needs_text_to_be_measured_on(built: Built, tmp_path: Path) -> None:
    lines = Path(built.settings.public.path).read_text().splitlines(keepends=True)
    (tmp_path / "short.jsonl").write_text("".join(lines[:2]))
    public, heard = DataSettings(path=str(tmp_path / "short.jsonl")), list[Progress]()
    with pytest.raises(DataError, match=r"emulator.privacy: low is measured on at least 8 held-out sequences"):
        again(
            built,
            tmp_path / "e",
            public=public,
            emulator=EmulatorSettings(privacy="low", plug_in_layers=2),
            on_progress=heard.append,
        )
    assert not heard  # said before stage 1


def test_held_out_text_is_not_trained_on(built: Built) -> None:
    text = read_public_text(built.settings.public, built.base, built.settings.stage_one)
    held_out = torch.cat([batch["input_ids"] for batch in text.held_out])
    assert 1 <= len(held_out) <= HELD_OUT
    assert len({batch["input_ids"].shape for batch in text.held_out}) == 1
    batches = itertools.islice(text.batches.batches(), 200)
    seen = {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}
    assert not seen & {tuple(row.tolist()) for row in held_out}


def test_text_that_is_too_short_is_refused(built: Built, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="gives one sequence"):
        again(built, tmp_path / "e", public=DataSettings(path=str(tmp_path / "short.jsonl")))


def test_blocks_beyond_the_context_are_refused(built: Built, tmp_path: Path) -> None:
    stage_one = built.settings.stage_one.model_copy(update={"block_size": 65})
    with pytest.raises(ConfigError, match=r"stage_one.block_size: 65 .* context has 64"):
        again(built, tmp_path / "e", stage_one=stage_one)

"""Bad inputs deep in the work end as short errors too, and nothing is left half-written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.cli.evaluate import choose_rows
from scaleot_ray.cli.settings import EvaluateSettings
from scaleot_ray.config import parse
from scaleot_ray.errors import ConfigError
from tests.cli.command import Warm
from tests.cli.conftest import BUILD, TUNE, write_rows


def test_corrupted_artefact(place: Path, tmp_path: Path, warm: Warm) -> None:
    shutil.copytree(place / "emulator", tmp_path / "emulator")
    data = bytearray((tmp_path / "emulator" / "tensors.safetensors").read_bytes())
    data[-5] ^= 255
    (tmp_path / "emulator" / "tensors.safetensors").write_bytes(data)
    shutil.copy(place / "train.jsonl", tmp_path)
    for arguments in (
        ["inspect", "emulator"],
        ["tune", "--emulator", "emulator", "--train", "train.jsonl", "--output", "tuned"],
    ):
        done = warm.scaleot(*arguments, "--format", "json", cwd=tmp_path)
        assert done.code == 3
        assert done.error["type"] == "ArtifactRefused"
        assert "tensor" in done.error["message"]
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["audit.jsonl"]  # which says so


def test_truncated_artefact(place: Path, tmp_path: Path, warm: Warm) -> None:
    shutil.copytree(place / "tuned" / "delta", tmp_path / "delta")
    path = tmp_path / "delta" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    done = warm.scaleot("inspect", "delta", "--format", "json", cwd=tmp_path)
    assert done.code == 3
    assert "tensors.safetensors" in done.error["message"]


def test_artefact_of_another_kind(place: Path, warm: Warm) -> None:
    done = warm.scaleot("tune", "--emulator", "tuned/delta", "--train", "train.jsonl", "--output", "x", cwd=place)
    assert done.code == 3
    assert "emulator" in done.err


def test_missing_data(place: Path, warm: Warm) -> None:
    done = warm.scaleot(
        "tune",
        "--emulator",
        "emulator",
        "--train",
        "none.jsonl",
        "--output",
        "untouched",
        "--format",
        "json",
        cwd=place,
    )
    assert (done.code, done.error["type"]) == (2, "DataError")
    assert done.error["message"].startswith("train.path: none.jsonl does not exist")
    assert not (place / "untouched").exists()


def test_missing_public_text(place: Path, warm: Warm) -> None:
    arguments = ["build", "--model", "model", "--public", "none.jsonl", "--output", "untouched", *BUILD]
    done = warm.scaleot(*arguments, "--format", "json", cwd=place)
    assert (done.code, done.error["type"]) == (2, "DataError")
    assert done.error["message"].startswith("public.path: none.jsonl does not exist")
    assert not (place / "untouched").exists()


def test_missing_public_text_shows_before_the_model_is_loaded(place: Path, warm: Warm) -> None:
    arguments = ["build", "--model", "no-model", "--public", "none.jsonl", "--output", "untouched", *BUILD]
    done = warm.scaleot(*arguments, "--format", "json", cwd=place)
    assert done.error["message"].startswith("public.path: none.jsonl does not exist")
    assert not list(place.glob("untouched*"))  # no audit log or cache either


def test_wrong_column(place: Path, warm: Warm) -> None:
    done = warm.scaleot(
        *("tune", "--emulator", "emulator", "--train", "train.jsonl", "--output", "x", "--column", "text=body"),
        *("--format", "json", *TUNE),
        cwd=place,
    )
    assert (done.code, done.error["type"]) == (2, "DataError")
    assert "'body'" in done.error["message"]
    assert "'text'" in done.error["message"]
    assert done.error["message"].startswith("train: ")
    assert "train.jsonl, line 1: there is no column 'body'" in done.error["message"]
    assert done.error["remedy"] == "Set text_column to one of these (--column text=COLUMN)."


def test_empty_data(place: Path, tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    done = warm.scaleot(
        "tune", "--emulator", "emulator", "--train", tmp_path / "empty.jsonl", "--output", "x", *TUNE, cwd=place
    )
    assert done.code == 2
    assert "empty" in done.err


def test_wrong_label(place: Path, tmp_path: Path, warm: Warm) -> None:
    write_rows(tmp_path / "c.jsonl", [{"prompt": "one", "choices": ["a", "b"], "label": 7}])
    done = warm.scaleot(
        "eval",
        "--model",
        "model",
        "--test",
        tmp_path / "c.jsonl",
        "--task",
        "choice",
        *("--set", "block_size=32"),
        cwd=place,
    )
    assert done.code == 2
    assert "label 7" in done.err


def test_missing_model(place: Path, warm: Warm) -> None:
    done = warm.scaleot("eval", "--model", "./no-model", "--test", "test.jsonl", "--format", "json", cwd=place)
    assert done.code == 2
    assert "no-model" in done.error["message"]


@pytest.mark.parametrize(
    ("given", "name", "others"),
    [
        (["model", "delta"], "delta", "--emulator"),
        (["model", "train"], "train", "--emulator"),
        (["emulator", "delta", "train"], "train", "--model"),
        (["model", "emulator", "validation"], "validation", "--train"),
    ],
)
def test_an_input_that_no_row_uses(given: list[str], name: str, others: str) -> None:
    inputs: dict[str, Any] = {"model": {"path": "m"}, "emulator": "e", "delta": "d"}
    inputs |= {rows: {"path": f"{rows}.jsonl"} for rows in ("train", "validation")}
    values = {"test": {"path": "test.jsonl"}, **{key: inputs[key] for key in given}}
    with pytest.raises(ConfigError) as refused:
        choose_rows(parse(EvaluateSettings, values))
    assert refused.value.problem == f"{name}: no row uses it without {others}."
    assert refused.value.remedy == f"Add {others}, or leave out --{name}."
    # Rows that were named say what is wanted; what is there beside may be for another time.
    first = "full_zero_shot" if "model" in given else "emulator_zero_shot"
    assert choose_rows(parse(EvaluateSettings, {**values, "rows": [first]})) == [first]


def test_too_many_plug_in_layers(place: Path, warm: Warm) -> None:
    done = warm.scaleot(
        *("build", "--model", "model", "--public", "public.jsonl", "--output", "untouched", "--plug-in-layers", 8),
        *(*BUILD, "--format", "json"),
        cwd=place,
    )
    assert done.code == 2
    assert "plug_in_layers" in done.error["message"]
    assert not (place / "untouched").exists()


def test_an_emulator_that_hides_nothing(place: Path, warm: Warm) -> None:
    done = warm.scaleot(
        *("build", "--model", "model", "--public", "public.jsonl", "--output", "x", "--alpha", 0),
        *("--cache", "emulator-cache", *BUILD),
        cwd=place,
    )
    assert done.code == 2
    assert "emulator.alpha" in done.err


def test_blocks_longer_than_the_context(place: Path, warm: Warm) -> None:
    done = warm.scaleot("tune", "--emulator", "emulator", "--train", "train.jsonl", "--output", "x", cwd=place)
    assert done.code == 2
    assert "tune.block_size" in done.err


def test_what_plug_cannot_write_is_refused_before_the_model_is_loaded(place: Path, tmp_path: Path, warm: Warm) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"loading this would fail")
    (tmp_path / "there").mkdir()
    tuned = ["tune", "--emulator", place / "emulator", "--train", place / "train.jsonl", *TUNE]
    for method in ("layers", "bottleneck"):
        assert warm.scaleot(*tuned, "--method", method, "--output", method, cwd=tmp_path).code == 0
    plug = ["plug", "--model", "model", "--emulator", place / "emulator", "--delta"]
    for delta, more, problem in (
        (place / "tuned" / "delta", ["--output", "there"], "exists already"),
        (place / "tuned" / "delta", ["--output", "model", "--overwrite"], "are the same folder"),
        (place / "tuned" / "delta", ["--output", place / "emulator" / "out"], "are the same folder"),
        ("bottleneck/delta", ["--output", "out"], "cannot be merged"),
        ("layers/delta", ["--output", "out", "--adapter"], "the delta's method is 'layers'"),
        (place / "tuned" / "delta", ["--output", "out"], "the weights of"),
    ):
        done = warm.scaleot(*plug, delta, *more, cwd=tmp_path)
        assert (done.code, problem in done.err) == (2, True), done.err
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_folder_whose_name_looks_like_markup(place: Path, tmp_path: Path, warm: Warm) -> None:
    plug = ["plug", "--model", place / "model", "--emulator", place / "emulator", "--delta", place / "tuned" / "delta"]
    done = warm.scaleot(*plug, "--output", "out[/x] [v2]/model", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.endswith("written to out[/x] [v2]/model\n")
    tune = ["tune", "--emulator", place / "emulator", "--train", place / "train.jsonl", *TUNE]
    done = warm.scaleot(*tune, "--output", "tuned[/x] [v2]", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.rstrip().endswith("in tuned[/x] [v2]/delta")

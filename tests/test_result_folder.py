"""Results of a Ray job do not go where Ray deletes them; tests/jobs has a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.cli.settings import BuildSettings, EvaluateSettings, PlugSettings, TuneCommandSettings
from scaleot_ray.config import RunSettings, Settings, parse
from scaleot_ray.errors import ConfigError

DATA = {"path": "x.jsonl"}
MODEL = {"path": "m"}
TENANTS = [{"name": "a", "train": DATA, "test": DATA}]
RUN: dict[str, Any] = {"model": MODEL, "public": DATA, "tenants": TENANTS}

FOLDERS: list[tuple[type[Settings], str, dict[str, Any]]] = [
    (BuildSettings, "output", {"model": MODEL, "public": DATA}),
    (BuildSettings, "cache", {"model": MODEL, "public": DATA, "output": "/shared/emulator"}),
    (TuneCommandSettings, "output", {"emulator": "e", "train": DATA}),
    (PlugSettings, "output", {"model": MODEL, "emulator": "e", "delta": "d"}),
    (EvaluateSettings, "folder", {"model": MODEL, "test": DATA}),
    (RunSettings, "output", RUN),
]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """We are in a job's copy of its working_dir, as Ray lays it out."""
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}}')
    return folder


@pytest.mark.parametrize(("section", "key", "values"), FOLDERS)
def test_a_relative_folder_is_refused_by_its_key(
    section: type[Settings], key: str, values: dict[str, Any], copy: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"^job.yaml: {key}: tuned lies in Ray's copy") as caught:
        parse(section, {**values, key: "tuned"}, "job.yaml")
    assert caught.value.remedy.startswith("Give an absolute path")
    (copy.parents[3] / "link").symlink_to(copy)
    for folder in (str(copy / "tuned"), "../tuned", str(copy.parents[3] / "link" / "tuned")):
        with pytest.raises(ConfigError, match="Ray's copy"):
            parse(section, {**values, key: folder})
    parse(section, {**values, key: "/shared/tuned"})


def test_the_default_folder_of_a_run_is_relative_too(copy: Path) -> None:
    with pytest.raises(ConfigError, match="output: scaleot-runs/run lies in Ray's copy"):
        parse(RunSettings, RUN)


@pytest.mark.parametrize(("section", "key", "values"), FOLDERS)
def test_elsewhere_relative_folders_are_fine(
    section: type[Settings], key: str, values: dict[str, Any], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a job that has gone to a folder of its own,
    monkeypatch.chdir(copy.parents[3])
    assert getattr(parse(section, {**values, key: "tuned"}), key) == "tuned"
    # and outside jobs, whatever the folder's name.
    monkeypatch.chdir(copy)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert getattr(parse(section, {**values, key: "tuned"}), key) == "tuned"


@pytest.mark.parametrize(("section", "key", "values"), FOLDERS)
def test_the_home_folder_may_be_written_as_a_tilde(section: type[Settings], key: str, values: dict[str, Any]) -> None:
    assert getattr(parse(section, {**values, key: "~/tuned"}), key) == str(Path.home() / "tuned")

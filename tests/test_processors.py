"""Threads follow what a container may use, and what the user says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scaleot_ray import processors
from scaleot_ray.cli.build import build_emulator
from scaleot_ray.cli.evaluate import evaluate
from scaleot_ray.cli.output import Output
from scaleot_ray.cli.plug import plug
from scaleot_ray.cli.settings import BuildSettings, EvaluateSettings, PlugSettings, TuneCommandSettings
from scaleot_ray.cli.tune import tune
from scaleot_ray.config import parse
from scaleot_ray.processors import usable_cores, use_usable_cores


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """What torch computes with, put back afterwards."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 64), ("300000 100000", 3), ("350000 100000", 3), ("50000 100000", 1), ("", 64), (None, 64)],
)
def test_a_containers_quota_counts(
    quota: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(processors, "_QUOTA", tmp_path / "cpu.max")
    assert usable_cores() == cores


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(("quota", "cores"), [("300000", 3), ("-1", 64)])
def test_so_does_that_of_control_groups_of_version_1(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "_QUOTA", tmp_path / "cpu.max")
    files = (tmp_path / "cpu.cfs_quota_us", tmp_path / "cpu.cfs_period_us")
    for file, value in zip(files, (quota, "100000"), strict=True):
        file.write_text(value + "\n")
    monkeypatch.setattr(processors, "_QUOTA_V1", files)
    assert usable_cores() == cores


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(("asked", "used"), [(None, 3), ("", 3), ("5", 7)])
def test_threads_are_as_many_as_the_quota_unless_the_user_says(
    asked: str | None, used: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    monkeypatch.setattr(processors, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    torch.set_num_threads(7)  # stands for what torch took from its environment
    use_usable_cores()
    assert torch.get_num_threads() == used


DATA = {"path": "nowhere.jsonl"}
COMMANDS: list[tuple[Callable[[Any, Output], None], type[Any], dict[str, Any]]] = [
    (build_emulator, BuildSettings, {"model": {"path": "nowhere"}, "public": DATA, "output": "out"}),
    (tune, TuneCommandSettings, {"emulator": "nowhere", "train": DATA, "output": "out"}),
    (plug, PlugSettings, {"model": {"path": "nowhere"}, "emulator": "a", "delta": "b", "output": "out"}),
    (evaluate, EvaluateSettings, {"model": {"path": "nowhere"}, "test": DATA}),
]


@pytest.mark.parametrize(("do", "section", "values"), COMMANDS, ids=lambda item: getattr(item, "__name__", ""))
def test_every_command_that_computes_minds_it(
    do: Callable[[Any, Output], None],
    section: type[Any],
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Minded(Exception):
        pass

    def minded() -> None:
        raise Minded

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processors, "use_usable_cores", minded)
    with pytest.raises(Minded):
        do(parse(section, values), Output())

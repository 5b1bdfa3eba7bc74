"""Benchmarks say which code made their numbers, and that cells of different code lie in one table."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environment import code_revision, environment
from benchmarks.utility.document import RUN_FILE, code_line, summarise
from benchmarks.utility.summary import markdown

ROWS = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned")


def _git(checkout: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(checkout), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with code, results and a page."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    folder = tmp_path / "checkout"
    for name in ("scaleot_ray/a.py", "benchmarks/utility/b.py", "benchmarks/results/utility.json", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1\n")
    _git(tmp_path, "init", "--quiet", str(folder))
    _git(folder, "add", ".")
    _git(folder, "commit", "--quiet", "--message", "all")
    return folder


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [
        (None, False),
        ("README.md", False),
        ("benchmarks/results/utility.json", False),
        ("scaleot_ray/a.py", True),
        ("scaleot_ray/new/c.py", True),
        ("benchmarks/utility/b.py", True),
        ("benchmarks/new/d.py", True),
    ],
)
def test_the_revision_and_whether_code_was_changed_beside_it(checkout: Path, changed: str | None, dirty: bool) -> None:
    if changed is not None:
        (checkout / changed).parent.mkdir(exist_ok=True)
        (checkout / changed).write_text("2\n")
    assert code_revision(checkout) == {"revision": _git(checkout, "rev-parse", "HEAD"), "dirty": dirty}


def test_outside_a_checkout_nothing_is_claimed(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"revision": None, "dirty": None}
    assert code_revision(tmp_path) == nothing
    assert code_revision(tmp_path / "not there") == nothing
    assert code_revision(checkout / "scaleot_ray") == nothing  # a package inside another project
    monkeypatch.setenv("PATH", "")
    assert code_revision(checkout) == nothing


def test_the_environment_has_the_revision_and_no_path() -> None:
    found = environment()
    assert {"revision", "dirty"} <= found.keys()
    assert str(Path(__file__).parents[2]) not in json.dumps(found)


def _cell(seed: int, **made: Any) -> dict[str, Any]:
    rows = {row: {"metric": "loss", "counts": [10] * 6, "sums": {"loss": [40.0 + seed] * 6}} for row in ROWS}
    facts = {"task": "wikitext2", "seed": seed, "label": "defaults", "kind": "text"}
    emulator = {"loss_margin": 0.5, "verbatim_share": 0.5}
    record = {"cell": facts, "of": {}, "settings": {}, "emulator": emulator, "rows": rows, "environment": made}
    return {**record, "delta_bytes": 1, "seconds": {}, "date": "2026-01-01T00:00:00Z", "digest": str(seed)}


def test_a_summary_says_that_its_cells_are_of_different_code(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / RUN_FILE).write_text("{}")

    def summary(*made: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        for seed, values in enumerate(made):
            (tmp_path / "cells" / f"{seed}.json").write_text(json.dumps(_cell(seed, **values)))
        document = summarise(tmp_path)
        assert code_line(document["code"]) in markdown(document)
        return document["code"], code_line(document["code"])

    same = {"revision": "a" * 40, "dirty": False}
    code, line = summary(same, same)
    assert code == [{**same, "cells": 2}]
    assert line == "Made by revision aaaaaaaaaaaa (2 cells)."
    code, line = summary(same, {**same, "dirty": True}, {"python": "3.11"})
    assert [entry["cells"] for entry in code] == [1, 1, 1]
    assert line.startswith("Cells were made by different code")
    assert "revision aaaaaaaaaaaa with uncommitted changes (1 cell), code of unknown revision (1 cell)" in line

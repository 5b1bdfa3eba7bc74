"""Killed before any of its steps, a keeper of rounds loses nothing acknowledged and counts nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cli.command import environment
from tests.federation.rounds.tiny_deltas import TinyDeltas

PROJECT = Path(__file__).parents[3]


def crashes(tiny: TinyDeltas, work: Path, scenario: str) -> list[dict[str, Any]]:
    """What came of a kill before each step; the last one came through."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.federation.rounds.crash_points", str(tiny.folder), str(work), scenario],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=PROJECT,
        env={**environment(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["step"] for one in found] == list(range(1, len(found) + 1))
    assert not found[-1]["before"]
    for one in found:
        for look in (one["at_once"], one["later"]):
            assert look["whole"], one
            assert look["unfinished"] == look["broken"] == [], one
    return found


def test_a_round(tiny: TinyDeltas, tmp_path: Path) -> None:
    found = crashes(tiny, tmp_path, "submit")
    # Between the files of a delta, inside of transactions, while the aggregate is made, before an answer is given.
    for step in ("open tensors.safetensors", "INSERT INTO submissions", "os.rename .1.safetensors", "acknowledge ben"):
        assert any(one["before"].startswith(step) for one in found), step
    assert any(one["at_once"]["submitted"] == ["ann"] and not one["acknowledged"] for one in found)
    for one in found:
        acknowledged, at_once, later = one["acknowledged"], one["at_once"], one["later"]
        assert set(acknowledged) - {"end"} <= set(at_once["submitted"]), one
        assert "end" not in acknowledged or at_once["rounds"] == ["finished"], one
        assert sorted(later["submitted"]) == later["of"] == ["ann", "ben"], one
        assert (later["rounds"][0], later["aggregate"], later["kept"]) == ("finished", 1.5, 3), one


def test_a_revocation(tiny: TinyDeltas, tmp_path: Path) -> None:
    found = crashes(tiny, tmp_path, "revoke")
    for step in ("UPDATE tenants", "os.rename .1.safetensors", "INSERT INTO plug_ins", "os.r", "acknowledge revoked"):
        assert any(one["before"].startswith(step) for one in found), step
    cut_short = [one for one in found if one["at_once"]["states"]["ben"] == "revoked" and not one["acknowledged"]]
    assert len(cut_short) > 5
    for one in found:
        at_once = one["at_once"]
        # All of it, or nothing: whoever opens the registry next finishes what was begun. Of one delta alone the
        # aggregate is that delta.
        revoked = at_once["states"]["ben"] == "revoked"
        expected = (["ann"], 1.0, 1) if revoked else (["ann", "ben"], 1.5, 3)
        assert (at_once["of"], at_once["aggregate"], at_once["kept"]) == expected, one
        assert not one["acknowledged"] or revoked, one

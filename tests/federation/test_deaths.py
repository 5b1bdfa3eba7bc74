"""An actor is killed in the middle of its work: the run ends with its name, and nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.artifacts.storage import read_artifact
from tests.cli.command import environment

PROJECT = Path(__file__).parents[2]
SLOW_STAGE_ONE = {"stage_one": {"steps": 400, "checkpoint_every": 5}}
SLOW_TUNING = {"tune": {"steps": 2000, "checkpoint_every": 5}, "evaluator": False}
EVALUATED = {**SLOW_TUNING, "evaluator": True}
ROLES = ["model owner", "data owner", "coordinator", "evaluator"]


def runs(folder: Path, *scenarios: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs one after the other in one process, each on a Ray of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.federation.scenario", str(folder), json.dumps(scenarios)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=PROJECT,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "(raylet)" not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of four runs in a row, each ended by a death."""
    return tmp_path_factory.mktemp("deaths")


@pytest.fixture(scope="module")
def deaths(folder: Path) -> dict[str, dict[str, Any]]:
    """What came of killing each kind of actor."""
    owner, tenant, coordinator, evaluator = runs(
        folder,
        {"kill": "ModelOwner", "stage": "stage 1", "step": 8, "settings": SLOW_STAGE_ONE},
        {"kill": "DataOwner", "stage": "tune alice", "step": 12, "settings": SLOW_TUNING},
        {"kill": "Coordinator", "stage": "tune alice", "step": 12, "settings": SLOW_TUNING},
        # With a single tenant its evaluator works beside it, on the other processor.
        {"kill": "Evaluator", "stage": "tune full alice", "step": 12, "settings": EVALUATED, "tenants": 1},
    )
    return {"model owner": owner, "data owner": tenant, "coordinator": coordinator, "evaluator": evaluator}


@pytest.mark.parametrize("role", ROLES)
def test_the_run_ends_at_once_and_says_who(deaths: dict[str, dict[str, Any]], role: str) -> None:
    death = deaths[role]
    assert death["error"] == "RunFailed"
    assert death["problem"].startswith(role)
    assert "died: its process was killed" in death["problem"]
    assert "Run the same command again" in death["remedy"]
    assert death["seconds_after_blow"] < 30


@pytest.mark.parametrize("role", ROLES)
def test_no_process_is_left(deaths: dict[str, dict[str, Any]], role: str) -> None:
    assert deaths[role]["left"] == []


def test_what_was_written_is_whole(deaths: dict[str, dict[str, Any]], folder: Path) -> None:
    read_artifact(folder / "run" / "emulator")
    hidden = [path for path in (folder / "run").rglob(".*") if path.name != ".lock"]
    assert not [path for path in hidden if path.name.endswith(".partial")]


def test_tuning_goes_on_from_the_checkpoint(deaths: dict[str, dict[str, Any]]) -> None:
    # The third run is the second one again: alice or bob was killed, neither starts over.
    assert "stage 1" not in deaths["coordinator"]["first_seen"]
    assert deaths["coordinator"]["first_seen"]["tune alice"] > 5

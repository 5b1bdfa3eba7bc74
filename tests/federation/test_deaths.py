"""An actor is killed in the middle of its work: the run ends with its name, and nothing is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.resources.session import Session
from tests.cli.command import environment

PROJECT = Path(__file__).parents[2]
SLOW_STAGE_ONE = {"stage_one": {"steps": 400, "checkpoint_every": 5}}
SLOW_TUNING = {"tune": {"steps": 300, "checkpoint_every": 5}, "evaluator": False}
ONE_ATTEMPT = {**SLOW_TUNING, "rounds": {"attempts": 1}}
EVALUATED = {**SLOW_TUNING, "evaluator": True}
AT_ONCE = ["model owner", "data owner"]
FATAL = [*AT_ONCE, "evaluator"]


def runs(folder: Path, *scenarios: dict[str, Any], address: str = "", ends: int = 0) -> list[dict[str, Any]]:
    """Runs one after the other in one process, each on a Ray of its own or on that of an address.

    The process ends as said: with 0, or by a signal.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.federation.scenario", str(folder), json.dumps(scenarios)],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
        cwd=PROJECT,
        env={**environment(), "RAY_ADDRESS": address},
    )
    assert done.returncode == ends, done.stderr
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
        {"kill": "DataOwner", "stage": "tune alice", "step": 12, "settings": ONE_ATTEMPT},
        {"kill": "Coordinator", "stage": "tune alice", "step": 12, "settings": SLOW_TUNING},
        # With a single tenant its evaluator works beside it, on the other processor.
        {
            "kill": "Evaluator",
            "stage": "tune full alice",
            "step": 12,
            "settings": {**EVALUATED, "rounds": {"attempts": 1}},
            "tenants": 1,
        },
    )
    return {"model owner": owner, "data owner": tenant, "coordinator": coordinator, "evaluator": evaluator}


@pytest.mark.parametrize("role", FATAL)
def test_the_run_ends_and_says_who(deaths: dict[str, dict[str, Any]], role: str) -> None:
    death = deaths[role]
    assert death["error"] == "RunFailed"
    assert death["problem"].startswith(role)
    assert "died: its process was killed" in death["problem"]
    assert "Run the same command again" in death["remedy"]


@pytest.mark.parametrize("role", AT_ONCE)
def test_it_ends_at_once(deaths: dict[str, dict[str, Any]], role: str) -> None:
    assert deaths[role]["seconds_after_blow"] < 30


def test_without_an_evaluator_tuning_ends_well_and_the_same_command_only_measures(
    deaths: dict[str, dict[str, Any]], folder: Path
) -> None:
    assert "the same command again only measures" in deaths["evaluator"]["remedy"]
    (before,) = json.loads((folder / "run" / "report.json").read_text())["tenants"]
    assert (before["plug_in"], before["unmeasured"]) == (None, deaths["evaluator"]["problem"])
    # Killed once more, where it may start again.
    scenario = {"kill": "Evaluator", "stage": "tune full alice", "step": 40, "settings": EVALUATED, "tenants": 1}
    (again,) = runs(folder, scenario)
    (alice,) = again["report"]["tenants"]
    assert alice["delta_digest"] == before["delta_digest"] is not None
    assert (alice["plug_in"] is None, alice["unmeasured"]) == (False, None)
    assert "alice measuring: its evaluator died and starts again (2 of 3)" in again["states"]
    assert "tune alice" not in again["first_seen"]


@pytest.mark.parametrize("role", [*FATAL, "coordinator"])
def test_no_process_is_left(deaths: dict[str, dict[str, Any]], role: str) -> None:
    assert deaths[role]["left"] == []


def test_the_coordinator_comes_back(deaths: dict[str, dict[str, Any]], folder: Path) -> None:
    report = deaths["coordinator"]["report"]
    (one,) = report["rounds"]
    assert (one["state"], one["submitted"], one["missing"]) == ("finished", ["alice", "bob"], {})
    for tenant in report["tenants"]:
        delta = read_artifact(folder / "run" / "tenants" / tenant["name"] / "delta")
        assert delta.digest == tenant["delta_digest"]
    assert AuditLog(folder / "run" / "audit.jsonl").broken == []


def test_a_data_owner_starts_again_and_is_left_out_where_the_quorum_holds(tmp_path: Path) -> None:
    again, without = runs(
        tmp_path,
        {"kill": "DataOwner", "stage": "tune alice", "step": 12, "settings": SLOW_TUNING},
        {
            "kill": "DataOwner",
            "stage": "tune alice",
            "step": 12,
            "settings": {**SLOW_TUNING, "tune": {"steps": 301}, "rounds": {"attempts": 1, "quorum": 1}},
        },
    )
    ((dead, said),) = (one.split(" ", 1) for one in again["states"] if "died" in one)
    assert said == "waiting: died and starts again (2 of 3)"
    assert [one for one in again["states"] if one.startswith(dead)] == [
        f"{dead} waiting: ",
        f"{dead} tuning: ",
        f"{dead} {said}",
        f"{dead} tuning: ",
        f"{dead} submitted: ",
    ]
    assert again["report"]["rounds"][0]["submitted"] == ["alice", "bob"]
    (one,) = without["report"]["rounds"]
    assert (one["number"], one["state"]) == (2, "finished")
    ((killed, reason),) = one["missing"].items()
    assert f"data owner {killed} died: its process was killed" in reason
    assert f"{killed} left out: {reason}" in without["states"]
    before = {tenant["name"]: tenant["delta_digest"] for tenant in again["report"]["tenants"]}
    after = {tenant["name"]: tenant["delta_digest"] for tenant in without["report"]["tenants"]}
    assert after[killed] is None
    assert all(digest not in (None, before[name]) for name, digest in after.items() if name != killed)
    assert again["left"] == without["left"] == []


def test_whoever_shares_a_process_starts_again_with_the_others_from_its_checkpoint(tmp_path: Path) -> None:
    tune = {**SLOW_TUNING["tune"], "method": "lora", "lora_rank": 4}
    (shared,) = runs(
        tmp_path,
        {
            "kill": "PackedDataOwners",
            "stage": "tune alice",
            "step": 12,
            "settings": {**SLOW_TUNING, "tune": tune, "tenants_per_process": 2},
        },
    )
    for name in ("alice", "bob"):
        assert [one.removeprefix(f"{name} ") for one in shared["states"] if one.startswith(name)] == [
            "waiting: ",
            "tuning: ",
            "waiting: died and starts again (2 of 3)",
            "tuning: ",
            "submitted: ",
        ]
        assert read_artifact(tmp_path / "run" / "tenants" / name / "delta").digest
    assert shared["report"]["rounds"][0]["submitted"] == ["alice", "bob"]
    log = (tmp_path / "run" / "run.log").read_text()
    assert "data owners alice, bob died: its process was killed" in log
    assert shared["least_seen_after_blow"]["tune alice"] > 5
    assert shared["left"] == []


def test_killed_before_it_begins_and_just_after_it_submitted(tmp_path: Path) -> None:
    blows = {"alice tuning": "DataOwner", "alice submitted": "DataOwner"}
    (one,) = runs(tmp_path, {"settings": {"evaluator": False}, "kill_at": blows, "tenants": 1})
    died = "alice waiting: died and starts again (2 of 3)"
    assert one["states"] == ["alice waiting: ", "alice tuning: ", died, "alice tuning: ", "alice submitted: "]
    assert one["report"]["rounds"][0]["submitted"] == ["alice"]
    (tenant,) = one["report"]["tenants"]
    assert read_artifact(tmp_path / "run" / "tenants" / "alice" / "delta").digest == tenant["delta_digest"]
    assert one["left"] == []


def test_on_a_given_ray_the_next_run_takes_over_what_a_killed_driver_left(
    connected_ray: Session, tmp_path: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    blow = {"kill": "driver", "stage": "tune alice", "step": 12, "settings": SLOW_TUNING}
    assert runs(tmp_path, blow, address=address, ends=-signal.SIGKILL) == []
    assert len(coordinators()) == 1  # detached, it outlives its driver
    (after,) = runs(tmp_path, {"settings": SLOW_TUNING}, address=address)
    assert after["report"]["rounds"][0]["submitted"] == ["alice", "bob"]
    assert after["first_seen"]["tune alice"] > 5
    assert not {"stage 1", "generate text"} & after["first_seen"].keys()
    assert AuditLog(tmp_path / "run" / "audit.jsonl").broken == []
    assert coordinators() == []
    # Without an aggregate a run never goes on with a round: what the first began has failed.
    assert after["report"]["rounds"][0]["number"] == 2


def coordinators() -> list[dict[str, str]]:
    """Those that live on the connected Ray."""
    found: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return found


def test_what_was_written_is_whole(deaths: dict[str, dict[str, Any]], folder: Path) -> None:
    read_artifact(folder / "run" / "emulator")
    hidden = [path for path in (folder / "run").rglob(".*") if path.name != ".lock"]
    assert not [path for path in hidden if path.name.endswith(".partial")]


def test_tuning_goes_on_from_the_checkpoint(deaths: dict[str, dict[str, Any]]) -> None:
    # The third run is the second one again: alice or bob was killed, neither starts over.
    assert "stage 1" not in deaths["coordinator"]["first_seen"]
    assert deaths["coordinator"]["first_seen"]["tune alice"] > 5

"""Evaluators of a whole run: one that fails costs its own data owner's rows, and rows are of what is in force."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.cli.run import unmeasured_lines
from scaleot_ray.config import RunSettings
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.rounds.administration import Request, administer
from scaleot_ray.federation.rounds.status import run_status
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import TenantState
from tests.tiny_run import WORDS, write_text, write_tiny_run

pytestmark = pytest.mark.usefixtures("connected_ray")

FEW = {"steps": 5, "block_size": 32, "learning_rate": 1e-3}


def with_a_bad_row(folder: Path, **changes: Any) -> RunSettings:
    """A run of two, the second of whom has a training row that cannot be read, behind those looked at beforehand."""
    settings = write_tiny_run(folder, tune=FEW, **changes)
    rows = write_text(folder / "long.jsonl", WORDS, 400)
    with rows.open("a") as file:
        file.write(json.dumps({"other": "column"}) + "\n")
    alice, bob = settings.tenants
    bob = bob.model_copy(update={"train": bob.train.model_copy(update={"path": str(rows)})})
    return settings.model_copy(update={"tenants": (alice, bob)})


def test_a_row_that_cannot_be_measured_is_missing_alone(tmp_path: Path) -> None:
    states = list[TenantState]()
    settings = with_a_bad_row(tmp_path, rounds={"quorum": 1})
    report = run_local(settings, on_state=states.append).as_json()
    alice, bob = report["tenants"]
    assert (alice["unmeasured"], None in (alice["full_tuned"], alice["plug_in"])) == (None, False)
    assert bob["unmeasured"].startswith("evaluator bob: full_tuned: train: ")
    assert "no column 'text'" in bob["unmeasured"]
    assert (bob["full_zero_shot"] is None, bob["full_tuned"], bob["delta_digest"]) == (False, None, None)
    assert [told.reason for told in states if told.state == "not measured"] == [bob["unmeasured"]]
    assert {told.tenant for told in states if told.state == "measured"} == {"alice"}
    assert unmeasured_lines(report["tenants"]) == [f"rows of bob are missing: {bob['unmeasured']}"]
    (line,) = (
        line for line in (tmp_path / "run" / "run.log").read_text().splitlines() if "full_tuned could not be" in line
    )
    assert "tenant=bob" in line


def test_rows_of_an_aggregate_that_was_made_anew_are_measured_anew(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, tune=FEW, aggregation={})
    folder, asked = RunFolder(Path(settings.output)), list[threading.Thread]()

    def on_state(told: TenantState) -> None:
        if (told.tenant, told.state) == ("alice", "measured") and not asked and _has(folder, "alice", "aggregate"):
            asked.append(threading.Thread(target=administer, args=(folder, Request("revoke", "bob", "withdrew"))))
            asked[0].start()
            while not list(folder.requests.glob("*.ask.json")):
                time.sleep(0.01)

    report = run_local(settings, on_state=on_state).as_json()
    asked[0].join()
    alice, _ = report["tenants"]
    assert report["aggregate"]["digest"] == run_status(folder)["aggregate"]["digest"]
    assert alice["aggregate"] == pytest.approx(alice["plug_in"], abs=1e-6)  # of alice's delta alone


def test_nothing_of_a_delta_that_was_revoked_is_reported(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, tune=FEW)
    folder, asked = RunFolder(Path(settings.output)), list[threading.Thread]()

    def on_state(told: TenantState) -> None:
        if (told.tenant, told.state) == ("bob", "measured") and not asked and _has(folder, "bob", "plug_in"):
            asked.append(threading.Thread(target=administer, args=(folder, Request("revoke", "bob", "withdrew"))))
            asked[0].start()
            while not list(folder.requests.glob("*.ask.json")):
                time.sleep(0.01)

    alice, bob = run_local(settings, on_state=on_state).as_json()["tenants"]
    asked[0].join()
    assert None not in (alice["plug_in"], alice["emulator_tuned"], bob["full_zero_shot"])
    assert (bob["plug_in"], bob["emulator_tuned"], bob["delta_digest"], bob["unmeasured"]) == (None,) * 4


def _has(folder: RunFolder, tenant: str, row: str) -> bool:
    return row in json.loads(folder.table(tenant).read_text())["rows"]

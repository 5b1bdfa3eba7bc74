"""Ctrl-C and SIGTERM at any stage: processes gone within seconds, checkpoints usable, the rest goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from scaleot_ray.federation.session import Session
from tests.cli.command import environment
from tests.federation.scenario import run_once

PROJECT = Path(__file__).parents[2]
SETTINGS = {
    "stage_one": {"steps": 150, "checkpoint_every": 5},
    "tune": {"steps": 150, "checkpoint_every": 5},
    "evaluator": False,
}


def interrupted(folder: Path, stage: str, step: int, number: int) -> dict[str, Any]:
    """A run in a process group of its own that gets a signal as the terminal or a scheduler would send it."""
    scenario = {"settings": SETTINGS, "announce": True}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.federation.scenario", str(folder), json.dumps([scenario])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
        env=environment(),
        start_new_session=True,
    )
    assert process.stderr is not None
    assert process.stdout is not None
    told = []
    for line in process.stderr:
        told.append(line)
        name, _, done = line.strip().rpartition(" ")
        if name == stage and int(done) >= step:
            break
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 5, "".join(told)
    start = time.monotonic()
    os.killpg(process.pid, number)  # a terminal, and many a scheduler, sends it to the whole group
    time.sleep(0.5)
    os.killpg(process.pid, number)  # and people press it twice
    out, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - start
    _, left = psutil.wait_procs(family, timeout=1)
    assert not left
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**result, "seconds": seconds, "code": process.returncode}


@pytest.mark.timeout(900)
def test_interrupted_twice_a_run_ends_as_if_it_had_not_been(connected_ray: Session, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    first = interrupted(folder, "stage 1", 20, signal.SIGTERM)
    second = interrupted(folder, "tune bob", 20, signal.SIGINT)
    for result, name in ((first, "SIGTERM"), (second, "SIGINT")):
        assert result["error"] == "Interrupted"
        assert name in result["problem"]
        assert "Run the same command again" in result["remedy"]
        assert result["seconds"] < 20
        assert result["left"] == []
    # Each goes on where the one before was stopped.
    assert second["first_seen"]["stage 1"] > 15
    third = run_once(folder, {"settings": SETTINGS})
    assert "stage 1" not in third["first_seen"]
    assert third["first_seen"]["tune bob"] > 15
    whole = run_once(tmp_path / "whole", {"settings": SETTINGS})
    assert third["report"]["emulator"]["digest"] == whole["report"]["emulator"]["digest"]
    digests = [[tenant["delta_digest"] for tenant in run["report"]["tenants"]] for run in (third, whole)]
    assert digests[0] == digests[1]

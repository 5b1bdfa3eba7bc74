"""Twenty kills at random moments: whatever dies, a run finishes or says why, and what was acknowledged stays, once.

The moments and victims follow a seed, so far as processes do. What a kill leads to is looked at from outside:
in the registry, the artefacts and the audit log, and in the list of processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.federation.rounds.registry import AGGREGATE, Registry
from tests.cli.command import environment

PROJECT = Path(__file__).parents[2]
KILLS = 20
ROUNDS = 3
SETTINGS = {
    "stage_one": {"steps": 20, "checkpoint_every": 5},
    "tune": {"steps": 60, "checkpoint_every": 5},
    "rounds": {"count": ROUNDS},
    "aggregation": {"method": "mean", "server": "momentum"},
}
VICTIMS = ("driver", "ModelOwner", "DataOwner", "DataOwner", "Coordinator", "Evaluator", "raylet")
LONGEST = 40.0
"""Seconds into a run; on a machine with nothing else to do it takes about as long."""


@dataclass
class Look:
    """What the registry of a run had when it was looked at: every submission, and every finished round."""

    submissions: set[tuple[str, int, str]] = field(default_factory=set)
    finished: dict[int, set[str]] = field(default_factory=dict)


def look(folder: Path) -> Look:
    """Looks at a run's registry, and checks it in itself."""
    found = Look()
    for path in folder.glob("run/coordinator/*/registry.sqlite"):
        with Registry(path, write=False) as registry:
            for number, state in [(one.number, one.state) for one in registry.rounds.all()]:
                _look_at_round(registry, number, state, found)
    return found


def _look_at_round(registry: Registry, number: int, state: str, found: Look) -> None:
    counted = registry.submissions.of_round(number)
    names = [submission.tenant for submission in counted]
    assert len(names) == len(set(names)), f"round {number} counts someone twice: {names}"
    for submission in counted:
        found.submissions.add((submission.tenant, submission.tuned_round, submission.digest))
        assert read_artifact(submission.folder).digest == submission.digest
    if state == "finished":
        (made,) = registry.plug_ins.of(AGGREGATE, number)
        assert read_artifact(made.folder).digest == made.digest
        found.finished[number] = {part.tenant for part in registry.plug_ins.made_from(made)}
        assert found.finished[number] == set(names)


def one_run(folder: Path, victim: str, after: float) -> tuple[bool, dict[str, Any] | None, list[str]]:
    """A run to which one thing happens.

    Returns:
        Whether someone was killed, the run's last words (None where it could not have any), and what was left of its
        processes half a minute later.
    """
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.federation.scenario", str(folder), json.dumps([{"settings": SETTINGS}])],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=PROJECT,
        env=environment(),
        start_new_session=True,
    )
    assert driver.stdout is not None
    family, killed, begun = dict[int, psutil.Process](), False, time.monotonic()
    while driver.poll() is None and time.monotonic() - begun < 400:
        try:
            there = psutil.Process(driver.pid).children(recursive=True)
        except psutil.Error:
            break
        family |= {process.pid: process for process in there}
        if not killed and time.monotonic() - begun > after:
            pid = driver.pid if victim == "driver" else _process(there, victim)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                killed = True
        time.sleep(0.05)
    assert driver.poll() is not None, f"after {victim} was killed, the run hangs"
    said = driver.stdout.read().splitlines()
    # Ray's own processes notice the end of a driver that was killed, but not at once.
    _, left = psutil.wait_procs(list(family.values()), timeout=30)
    names = [str(process) for process in left]
    for process in left:
        process.kill()
    return killed, json.loads(said[-1]) if said else None, names


def _process(there: list[psutil.Process], kind: str) -> int | None:
    for process in there:
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if command and (command[0].startswith(f"ray::{kind}") or command[0].endswith(f"/{kind}")):
            return process.pid
    return None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(0)
    fresh, folder = tmp_path / "fresh", tmp_path / "work"
    killed, runs, finished = list[str](), 0, 0
    known = Look()
    while len(killed) < int(os.environ.get("SCALEOT_KILLS", KILLS)):
        runs += 1
        assert runs < 5 * KILLS, "hardly anyone is hit"
        victim, after = draw.choice(VICTIMS), draw.uniform(0.0, LONGEST)
        hit, words, left = one_run(folder, victim, after)
        story = f"{victim} after {after:.1f} seconds: {words}"
        killed += [victim] if hit else []
        assert left == [], story
        if words is None:
            assert victim == "driver", story
        else:
            assert "report" in words or (words["error"] in ("RunFailed", "ResourcesMissing") and words["remedy"]), story
        now = look(folder)
        assert known.submissions <= now.submissions, story
        assert all(now.finished.get(number) == who for number, who in known.finished.items()), story
        assert AuditLog(folder / "run" / "audit.jsonl").broken == [], story
        known = now
        if words is not None and "report" in words:
            assert sorted(now.finished) == list(range(1, ROUNDS + 1)), story
            assert all(who == {"alice", "bob"} for who in now.finished.values()), story
            finished += 1
            if not fresh.exists():  # model, data and stage 1, so that later runs begin with what may be killed
                shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("coordinator", "tenants", "evaluator"))
                (fresh / "run" / "audit.jsonl").unlink()
            shutil.rmtree(folder)
            shutil.copytree(fresh, folder)
            known = Look()
    assert finished > 0
    assert {"driver", "DataOwner", "Coordinator"} <= set(killed)

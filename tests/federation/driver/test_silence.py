"""A part that makes no progress is told of, in the progress and in the run's log, and waited for all the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from scaleot_ray.federation.driver import silence
from scaleot_ray.federation.driver.actors import Running
from scaleot_ray.federation.driver.phases import Phases
from scaleot_ray.federation.driver.silence import Silence
from scaleot_ray.federation.roles.role import Role
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress
from tests.tiny_run import write_tiny_run


@ray.remote
class Silent(Role):
    """A data owner that hangs for a while before it reports."""

    def __init__(self, cpus: int, coordinator: Any) -> None:
        super().__init__("data owner alice", cpus, coordinator)

    def tune(self, seconds: float) -> None:
        """Says nothing for so long, then reports once."""
        time.sleep(seconds)
        self.reporter(1)(Progress("tune alice", 1, 2))
        time.sleep(1)


class Ended(Exception):
    """What the test wanted to see has been seen."""


@pytest.mark.usefixtures("connected_ray")
def test_a_data_owner_that_hangs_is_told_of_until_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[Progress]()

    def run(phases: Phases) -> None:
        actors = phases.state.actors
        phases._start_coordinator()
        alice = actors.start("data owner alice", Silent, 1, 0)
        actors.until(lambda: alice.started)
        monkeypatch.setattr(silence, "SILENT_SECONDS", 0.5)
        actors.ask(alice, alice.handle.tune.remote(3.0))
        raise Ended

    monkeypatch.setattr(Phases, "run", run)
    with pytest.raises(Ended):
        run_local(write_tiny_run(tmp_path), on_progress=heard.append)
    first, *_ = told = [one for one in heard if one.stage.startswith("no progress from data owner alice for ")]
    assert (first.tenant, first.step) == ("alice", 0)
    assert "(process " in first.stage
    assert [(one.stage, one.step) for one in told[:2]] == [(first.stage, 0), (first.stage, 1)]
    assert heard.index(told[1]) == [one.stage for one in heard].index("tune alice") - 1
    (line, *_) = (line for line in (tmp_path / "run" / "run.log").read_text().splitlines() if "no progress" in line)
    assert f"tenant=alice {first.stage}" in line


@pytest.mark.parametrize(
    ("role", "report", "its_own"),
    [
        ("data owner alice", Progress("tune alice", 1, 2, tenant="alice", round=1), True),
        ("data owners bob, alice", Progress("tune alice", 1, 2, tenant="alice", round=1), True),
        ("data owner alice", Progress("tune full alice", 1, 2, tenant="alice"), False),
        ("evaluator alice", Progress("tune full alice", 1, 2, tenant="alice"), True),
        ("evaluator alice", Progress("tune alice", 1, 2, tenant="alice", round=1), False),
        ("data owners bob, al", Progress("tune alice", 1, 2, tenant="alice", round=1), False),
        ("model owner", Progress("stage 1", 1, 2), True),
        ("data owner alice", Progress("stage 1", 1, 2), False),
    ],
)
def test_whose_report_it_is(role: str, report: Progress, its_own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "SILENT_SECONDS", 0)
    told = list[bool]()
    actor = Running(role, None, pid=1, started=True)
    listening = Silence(lambda _, __, over: told.append(over))
    listening.look([actor])
    listening.look([actor])
    assert told == [False]
    listening.heard([actor], report)
    assert told == [False, True][: 1 + its_own]


def test_what_has_ended_is_not_told_of_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "SILENT_SECONDS", 0)
    told = list[bool]()
    listening = Silence(lambda _, __, over: told.append(over))
    starting = Running("data owner bob", None)
    listening.look([starting, Running("data owner alice", None, elsewhere="10.0.0.2", started=True)])
    listening.look([starting])
    assert told == [False, True]

"""On a Ray that others use as well: what they hold is said at once, and nobody waits for it in silence or for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from scaleot_ray.errors import ResourcesMissing, RunFailed
from scaleot_ray.federation.driver import starting
from scaleot_ray.federation.driver.actors import Running
from scaleot_ray.federation.driver.packs import Pack
from scaleot_ray.federation.driver.phases import Phases
from scaleot_ray.federation.driver.starting import Starts
from scaleot_ray.federation.driver.tuning_rounds import TuningRounds
from scaleot_ray.federation.roles.role import Role
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress
from scaleot_ray.resources.session import Session
from tests.tiny_run import write_tiny_run


@ray.remote
class Other:
    """An actor that is not ours.

    Args:
        seconds: that its start takes.
    """

    def __init__(self, seconds: float = 0) -> None:
        time.sleep(seconds)

    def answer(self) -> bool:
        """It is there."""
        return True


@ray.remote
class Stuck:
    """A data owner whose start takes for ever.

    Args:
        ignored: what data owners are told.
    """

    def __init__(self, *ignored: Any) -> None:
        time.sleep(600)

    def present(self) -> None:
        """Never answers."""

    def tune(self, number: int, token: str) -> None:
        """Never answers."""


def ask(session: Session, cpus: int, seconds: float = 0) -> Any:
    """An actor on our node, which may have to wait."""
    return Other.options(num_cpus=cpus, scheduling_strategy=session.on_this_node()).remote(seconds)


@contextmanager
def held(session: Session, cpus: int) -> Iterator[None]:
    """Processors of our node that another one holds."""
    other = ask(session, cpus)
    ray.get(other.answer.remote())
    try:
        yield
    finally:
        ray.kill(other)


def test_only_what_is_free_counts(connected_ray: Session) -> None:
    with held(connected_ray, 1):
        machine = connected_ray.machine()
        assert (machine.cpus, machine.cpus_held) == (1, 1)
    machine = connected_ray.machine()
    assert (machine.cpus, machine.cpus_held) == (2, 0)


def test_processors_that_others_hold_are_said_before_anything_starts(connected_ray: Session, tmp_path: Path) -> None:
    heard = list[Progress]()
    problem = r"^owner_cpus: 1 processors are asked for, 0 are free on this node of Ray \(2 are taken\)\."
    with held(connected_ray, 2), pytest.raises(ResourcesMissing, match=problem) as caught:
        run_local(write_tiny_run(tmp_path), on_progress=heard.append)
    assert caught.value.remedy.startswith("Wait until others on this Ray have ended")
    assert not heard
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_processors_that_others_take_later_end_the_run_with_who_waits(
    connected_ray: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = list[str]()

    def run(phases: Phases) -> None:
        actors = phases.state.actors
        phases._start_coordinator()
        actors.until(lambda: actors.coordinator.pid is not None)
        monkeypatch.setattr(starting, "SAY_SECONDS", 0.5)
        monkeypatch.setattr(starting, "START_SECONDS", 1.5)
        with held(connected_ray, 1):
            actors.start("data owner alice", ray.remote(Role), 2, 0)
            actors.until(lambda: False)

    monkeypatch.setattr(Phases, "run", run)
    waits = "waits for 2 processors (1 of 2 are free)"
    with pytest.raises(ResourcesMissing) as caught:
        run_local(write_tiny_run(tmp_path), on_progress=lambda progress: heard.append(progress.stage))
    assert caught.value.problem == f"data owner alice did not start within 1.5 seconds: it {waits}."
    assert "Run the same command again" in caught.value.remedy
    assert heard == [f"data owner alice {waits}"]


def test_a_data_owner_that_does_not_start_is_left_out_alone(
    connected_ray: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_tiny_run(tmp_path, evaluator=False, tune={"steps": 3}, rounds={"quorum": 1})
    monkeypatch.setattr(TuningRounds, "_start", slowly(TuningRounds._start, monkeypatch))
    report = run_local(settings).as_json()
    (one,) = report["rounds"]
    assert one["submitted"] == ["bob"]
    assert one["missing"]["alice"].startswith("data owner alice has a process, which did not answer within")


def slowly(start: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts data owners, alice as one that takes for ever."""

    def changed(self: TuningRounds, pack: Pack, failed: Any) -> Running:
        if pack.role != "data owner alice":
            return start(self, pack, failed)  # type: ignore[no-any-return]
        monkeypatch.setattr(starting, "START_SECONDS", 20)
        return self._state.actors.start(pack.role, Stuck, 1, 0, failed=failed)

    return changed


def test_a_wait_that_ends_is_told_of_once(connected_ray: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[Progress]()
    starts = Starts(replace(connected_ray, private=False), heard.append)
    with held(connected_ray, 2):
        other = ask(connected_ray, 1)
        starts.asked("somebody", other, 1, 0)
        assert starts.look() == {}
        assert not heard  # it has only just been asked for
        monkeypatch.setattr(starting, "SAY_SECONDS", 0)
        starts.look()
        starts.look()
    ray.get(other.answer.remote())
    starts.over("somebody")
    ray.kill(other)
    stage = "somebody waits for 1 processors (0 of 2 are free)"
    assert heard == [Progress(stage, 0, 1), Progress(stage, 1, 1)]


def test_a_process_that_does_not_answer_is_no_lack_of_processors(
    connected_ray: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = list[Progress]()
    starts = Starts(replace(connected_ray, private=False), heard.append)
    slow = ask(connected_ray, 1, seconds=600)
    starts.asked("somebody", slow, 1, 0)
    while not ray._private.state.actors(slow._actor_id.hex()).get("Pid"):
        time.sleep(0.05)
    monkeypatch.setattr(starting, "SAY_SECONDS", 0)
    starts.look()
    monkeypatch.setattr(starting, "START_SECONDS", 0)
    problem = starts.look()["somebody"]
    assert isinstance(problem, RunFailed)
    assert "somebody has a process, which did not answer" in problem.problem
    ray.kill(slow)
    assert not heard

"""The name that a coordinator is found by when its driver was killed; a driver that has nothing to do does nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from scaleot_ray.federation.driver.actors import coordinator_name
from scaleot_ray.federation.driver.phases import Phases
from scaleot_ray.federation.run import run_local
from scaleot_ray.resources.session import Session
from tests.tiny_run import write_tiny_run


def test_the_same_path_on_two_nodes_is_of_two_runs() -> None:
    first = coordinator_name("/scratch/run", "a1")
    assert first == coordinator_name("/scratch/run", "a1")
    assert first not in (coordinator_name("/scratch/run", "b2"), coordinator_name("/scratch/other", "a1"))


class _Seen(Exception):
    """What was to be seen was seen."""


def test_a_driver_that_waits_for_nobody_does_not_spin(
    connected_ray: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = list[float]()

    def run(phases: Phases) -> None:
        actors = phases.state.actors
        phases._start_coordinator()
        actors.until(lambda: actors.coordinator.started)  # from here on nobody owes an answer
        actors.between = lambda: looks.append(time.process_time())
        until = time.monotonic() + 2
        actors.until(lambda: time.monotonic() > until)
        raise _Seen

    monkeypatch.setattr(Phases, "run", run)
    with pytest.raises(_Seen):
        run_local(write_tiny_run(tmp_path, evaluator=False))
    assert 1 <= len(looks) <= 11

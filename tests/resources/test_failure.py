"""Whatever an actor dies of, the error says who and why."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from scaleot_ray.errors import DataError, ResourcesMissing, RunFailed, ScaleOTError
from scaleot_ray.resources.failure import actor_failure
from scaleot_ray.resources.session import Session


@ray.remote(num_cpus=0, max_restarts=0)
class Unlucky:
    """An actor to which things happen."""

    def __init__(self, fail: bool = False) -> None:
        if fail:
            import no_such_library  # noqa: F401  # type: ignore[import-not-found]

    def pid(self) -> int:
        """Its process."""
        return os.getpid()

    def own_error(self) -> None:
        """An error of the package."""
        raise DataError("train: row 3 is empty.", "Remove it.")

    def bug(self) -> None:
        """An error of nobody's."""
        raise KeyError("layer_9")

    def out_of_memory(self) -> None:
        """As Python says it."""
        raise MemoryError("12 GB")

    def fill_the_disk(self) -> None:
        """As the system says it."""
        Path("/dev/full").write_text("x")

    def open_nothing(self) -> None:
        """Another error of the system's."""
        Path("/no/such/file").read_text()

    def die(self, words: str) -> None:
        """Writes to stderr and ends with an exit code."""
        print(words, file=sys.stderr, flush=True)
        os._exit(7)


def failure(session: Session, answer: Any, pid: int | None = None) -> ScaleOTError:
    """What waiting for an answer comes to."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  any of Ray's types
        ray.get(answer, timeout=60)
    return actor_failure(caught.value, "data owner alice", pid, session.logs)


def test_errors_of_the_package_keep_class_and_remedy(connected_ray: Session) -> None:
    found = failure(connected_ray, Unlucky.remote().own_error.remote())
    assert type(found) is DataError
    assert (found.problem, found.remedy) == ("data owner alice: train: row 3 is empty.", "Remove it.")


def test_other_exceptions_are_named(connected_ray: Session) -> None:
    found = failure(connected_ray, Unlucky.remote().bug.remote())
    assert type(found) is RunFailed
    assert "data owner alice failed: KeyError: 'layer_9'" in found.problem


def test_out_of_memory_is_missing_resources(connected_ray: Session) -> None:
    found = failure(connected_ray, Unlucky.remote().out_of_memory.remote())
    assert type(found) is ResourcesMissing
    assert "data owner alice ran out of memory: 12 GB" in found.problem


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is full")
def test_a_full_disk_is_missing_resources(connected_ray: Session) -> None:
    found = failure(connected_ray, Unlucky.remote().fill_the_disk.remote())
    assert type(found) is ResourcesMissing
    assert found.problem == "data owner alice: the disk is full (No space left on device)."
    assert "set output to a folder on another disk" in found.remedy
    assert type(failure(connected_ray, Unlucky.remote().open_nothing.remote())) is RunFailed


def test_an_actor_that_cannot_start_says_why(connected_ray: Session) -> None:
    found = failure(connected_ray, Unlucky.remote(fail=True).pid.remote())
    assert type(found) is RunFailed
    assert "could not start" in found.problem
    assert "no_such_library" in found.problem


def test_a_dead_process_leaves_its_last_words(connected_ray: Session) -> None:
    actor = Unlucky.remote()
    pid = ray.get(actor.pid.remote())
    found = failure(connected_ray, actor.die.remote("the disk sounds odd"), pid)
    assert type(found) is RunFailed
    assert "data owner alice died" in found.problem
    assert "\n  | the disk sounds odd" in found.problem
    assert "Run the same command again" in found.remedy


def test_no_log_is_no_trouble(tmp_path: Path) -> None:
    found = actor_failure(ray.exceptions.ActorDiedError(), "model owner", 1, tmp_path)
    assert found.problem.startswith("model owner died: ")


def test_on_another_node_the_node_is_named(tmp_path: Path) -> None:
    broken = ray.exceptions.ActorUnavailableError("Socket closed", None)
    far = actor_failure(broken, "model owner", None, tmp_path, "10.0.0.3")
    near = actor_failure(broken, "model owner", None, tmp_path)
    assert "model owner died: its process on node 10.0.0.3 was killed, or that node was lost." in far.problem
    assert "node" not in near.problem
    lost = ray.exceptions.RayActorError(None, "The actor died because its node has died. Node Id: 1a")
    assert "died: its node 10.0.0.3 was lost." in actor_failure(lost, "evaluator", None, tmp_path, "10.0.0.3").problem
    taken = ray.exceptions.RayActorError(None, "The actor died because its node has died.", preempted=True)
    assert "died: its node 10.0.0.3 was preempted." in actor_failure(taken, "e", None, tmp_path, "10.0.0.3").problem

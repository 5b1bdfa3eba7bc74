"""The actors of a run as their driver has them: started, asked, watched all at once, and gone at the end.

The driver waits for all of them together, so that none that dies or hangs is overlooked while it waits for
another. What becomes of a failure is said where a call is made; a failure that nobody there sees to ends
the run with an error that names the actor.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from scaleot_ray.artifacts.audit import tenant_of
from scaleot_ray.errors import ScaleOTError
from scaleot_ray.federation.driver.silence import Silence
from scaleot_ray.federation.driver.starting import Starts
from scaleot_ray.federation.roles.coordinator import COORDINATOR, Charge, Coordinator
from scaleot_ray.federation.roles.role import ACTORS, Present, start, stop
from scaleot_ray.progress import OnProgress, Progress
from scaleot_ray.resources.failure import actor_failure
from scaleot_ray.resources.processes import PeakMemory, end, end_marked, wait_for_end
from scaleot_ray.resources.session import Session

_NAMESPACE = "scaleot"
_LOOK_SECONDS = 0.2
_UNWIND_SECONDS = 3.0
_ANSWER_SECONDS = 120.0  # for an answer that is ready, or that the coordinator gives at once


def coordinator_name(folder: str, node: str) -> str:
    """Ray's name for the coordinator of a run: another one only where folder and node are the same.

    A folder is held for one run on one node; the same path on another node may be another folder.

    Args:
        folder: the run's, in full.
        node: Ray's id of the node that it is on.
    """
    return f"coordinator-{hashlib.sha256(f'{node}:{folder}'.encode()).hexdigest()[:16]}"


@dataclass(eq=False)
class Running:
    """An actor of the run that lives.

    Attributes:
        role: who it is.
        handle: Ray's handle.
        pid: its process, once it has started, where that is on our node.
        elsewhere: address of its node, once it has started, where that is another.
        started: it has answered.
    """

    role: str
    handle: Any
    pid: int | None = None
    elsewhere: str | None = None
    started: bool = False


Then = Callable[[Any], None]
Failed = Callable[[Exception], bool]


def _nothing(_: Any) -> None:
    return


def _fatal(_: Exception) -> bool:
    return False


class Actors:
    """The actors of one run; a context manager that leaves none behind.

    Args:
        session: the Ray they start on.
        memory: counts theirs, on this node.
        on_progress: hears what they report.
        place: where the actor of a role goes, as Ray's scheduling strategy; default: on our node.

    Attributes:
        living: those that were started and not stopped.
        coordinator: the one that all others are told of.
        mark: in the environment of every one of their processes.
        between: called each time the driver has looked after them.
    """

    def __init__(
        self,
        session: Session,
        memory: PeakMemory,
        on_progress: OnProgress | None,
        place: Callable[[str], Any] | None = None,
    ) -> None:
        self.session, self.on_progress = session, on_progress
        self._place, self._placed = place or (lambda _: session.on_this_node()), place is not None
        self.living: list[Running] = []
        self.coordinator = Running(COORDINATOR, None)
        self.mark = secrets.token_hex(8)
        self.between: Callable[[], None] = lambda: None
        self._memory = memory
        self._starts = Starts(session, on_progress)
        self._silence = Silence(self._tell_of_silence)
        self._waiting: dict[ray.ObjectRef, tuple[Running, Then, Failed]] = {}

    def __enter__(self) -> Actors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            end({actor.pid for actor in self.living if actor.pid is not None}, _UNWIND_SECONDS)
        for actor in self.living:
            stop(actor.handle)
        for actor in self.living:
            if actor.pid is not None:  # killed by us instead, Ray would print that it died
                wait_for_end(actor.pid, _UNWIND_SECONDS)
        # Told to end, not ended yet; and an actor that was still starting has not told us its process.
        end_marked(ACTORS, self.mark)
        self.living.clear()

    def start_coordinator(self, charge: Charge) -> None:
        """Starts the coordinator under its name; one of that name is of a driver that was killed, and ends."""
        name = coordinator_name(charge.folder, self.session.node)
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, _NAMESPACE), no_restart=True)
        detached: dict[str, Any] = {"name": name, "namespace": _NAMESPACE, "lifetime": "detached"}
        # The registry and the artefacts in the run's folder are on this node.
        detached["scheduling_strategy"] = self.session.on_this_node()
        self._start(self.coordinator, Coordinator, 1, 0, (charge,), _fatal, claim=False, **detached)

    def start(self, role: str, kind: Any, cpus: int, gpus: float, *arguments: Any, failed: Failed = _fatal) -> Running:
        """Starts an actor; the constructor gets ``cpus``, the coordinator's handle and ``arguments``.

        Args:
            role: who it is.
            kind: the actor class.
            cpus: threads it computes with, claimed.
            gpus: GPUs, or a share of one.
            arguments: further ones of its constructor.
            failed: as in :meth:`call`; hears of it if the actor does not come to life.
        """
        actor = Running(role, None)
        arguments = (cpus, self.coordinator.handle, *arguments)
        self._start(actor, kind, cpus, gpus, arguments, failed, scheduling_strategy=self._place(role))
        return actor

    def _start(
        self,
        actor: Running,
        kind: Any,
        cpus: int,
        gpus: float,
        arguments: tuple[Any, ...],
        failed: Failed,
        claim: bool = True,
        **options: Any,
    ) -> None:
        actor.handle = start(kind, cpus, gpus, *arguments, mark=self.mark, claim=claim, **options)
        self.living.append(actor)
        # Where each part has its place before it begins, an actor waits for a process alone.
        waits = claim and not self._placed
        self._starts.asked(actor.role, actor.handle, cpus if waits else 0, gpus if waits else 0)

        def present(answer: Present) -> None:
            self._starts.over(actor.role)
            actor.started = True
            if answer.node == self.session.node:  # elsewhere the number is of another process
                actor.pid = answer.pid
                self._memory.others.add(answer.pid)
            else:
                actor.elsewhere = answer.address

        self.call(actor, actor.handle.present.remote(), present, failed)

    def stop(self, actor: Running) -> None:
        """Ends an actor and waits until its memory is free; nothing that it still answers is seen to."""
        self.living.remove(actor)
        self._starts.over(actor.role)
        self._waiting = {ref: call for ref, call in self._waiting.items() if call[0] is not actor}
        stop(actor.handle)
        if actor.pid is not None:
            wait_for_end(actor.pid, _UNWIND_SECONDS)

    def of(self, role: str) -> list[Running]:
        """Who has this role, if anyone."""
        return [actor for actor in self.living if actor.role == role]

    def call(self, actor: Running, answer: ray.ObjectRef, then: Then = _nothing, failed: Failed = _fatal) -> None:
        """Has an answer seen to when it comes.

        Args:
            actor: who gives it.
            answer: Ray's reference.
            then: what is done with it.
            failed: is given the exception instead, if there is one; true where it has been seen to, else
                the run ends with it.
        """
        self._waiting[answer] = (actor, then, failed)

    def call_coordinator(self, method: str, *arguments: Any, then: Then = _nothing, failed: Failed = _fatal) -> None:
        """Asks the coordinator something, without waiting."""
        self.call(self.coordinator, getattr(self.coordinator.handle, method).remote(*arguments), then, failed)

    def ask(self, actor: Running, answer: ray.ObjectRef) -> Any:
        """Waits for one answer, as attentive to all other actors as ever."""
        found: list[Any] = []
        self.call(actor, answer, found.append)
        self.until(lambda: bool(found))
        return found[0]

    def ask_coordinator(self, method: str, *arguments: Any) -> Any:
        """Waits for an answer of the coordinator."""
        return self.ask(self.coordinator, getattr(self.coordinator.handle, method).remote(*arguments))

    def until(self, finished: Callable[[], bool]) -> None:
        """Sees to answers and reports until ``finished``, which is asked several times a second.

        Raises:
            ScaleOTError: an actor failed, and nobody sees to it.
        """
        while not finished():
            for answer in self._ready():
                self._see_to(answer)
            self._give_up_starts()
            if self.coordinator.started:
                self.between()
                self._pass_on_reports()
                self._silence.look(self._working())

    def _ready(self) -> list[ray.ObjectRef]:
        """An answer that has come, if one does within a moment."""
        if not self._waiting:
            # Nobody was asked anything, as while all wait for a place on a cluster: Ray would not wait at all.
            time.sleep(_LOOK_SECONDS)
            return []
        ready: list[ray.ObjectRef] = ray.wait(list(self._waiting), num_returns=1, timeout=_LOOK_SECONDS)[0]
        return ready

    def failure(self, actor: Running, error: Exception) -> ScaleOTError:
        """An exception that an answer raised, as an error that names the actor."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, RayActorError):
            actor = self.coordinator  # the only actor that others wait for
            error = error.cause
        return actor_failure(error, actor.role, actor.pid, self.session.logs, actor.elsewhere)

    def _give_up_starts(self) -> None:
        """An actor that does not come to life is a failure like any other of it."""
        for role, problem in self._starts.look().items():
            failed = next(failed for actor, _, failed in self._waiting.values() if actor.role == role)
            if not failed(problem):
                raise problem

    def _see_to(self, answer: ray.ObjectRef) -> None:
        actor, then, failed = self._waiting.pop(answer)
        try:
            found = ray.get(answer, timeout=_ANSWER_SECONDS)
        except Exception as error:  # Ray raises many types here, the actors' own among them
            if not failed(error):
                raise self.failure(actor, error) from error
        else:
            then(found)

    def _pass_on_reports(self) -> None:
        # Asked every time, so that the coordinator hears of its driver, and we of everyone.
        try:
            reports = ray.get(self.coordinator.handle.reports.remote(), timeout=_ANSWER_SECONDS)
        except Exception as error:
            raise self.failure(self.coordinator, error) from error
        for report in reports:
            self._silence.heard(self._working(), report)
            if self.on_progress is not None:
                self.on_progress(report)

    def _working(self) -> list[Running]:
        """Those that report what they do."""
        return [actor for actor in self.living if actor is not self.coordinator]

    def _tell_of_silence(self, actor: Running, what: str, over: bool) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(what, int(over), 1, tenant=tenant_of(actor.role)))
        if not over:
            self.call_coordinator("note", what, tenant_of(actor.role))

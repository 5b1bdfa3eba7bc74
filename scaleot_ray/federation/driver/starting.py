"""Actors that were asked for and have not answered yet: nobody waits for them in silence, or for ever.

A run starts only what fits into what was free when it began. On a Ray that others use as well, what was
free then may be taken since, and Ray keeps an actor waiting for as long as that lasts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray._private.state

from scaleot_ray.artifacts.audit import tenant_of
from scaleot_ray.errors import ResourcesMissing, RunFailed, ScaleOTError
from scaleot_ray.progress import OnProgress, Progress
from scaleot_ray.resources.session import Session

SAY_SECONDS = 10.0
"""A wait for processors longer than this is told of; a new process takes a part of it."""

START_SECONDS = 300.0
"""An actor that has not answered after so long is given up; on a busy machine with slow disks one takes a minute."""


@dataclass(eq=False)
class Start:
    """An actor that was asked for.

    Attributes:
        handle: Ray's handle.
        cpus, gpus: what it claims.
        since: when it was asked for.
        said: what was said of its wait; None while nothing was.
    """

    handle: Any
    cpus: float
    gpus: float
    since: float
    said: str | None = None


class Starts:
    """Watches over actors until they have answered.

    Args:
        session: the Ray they start on.
        on_progress: hears who waits for processors, and when that is over.
    """

    def __init__(self, session: Session, on_progress: OnProgress | None) -> None:
        self._session, self._on_progress = session, on_progress
        self._waiting: dict[str, Start] = {}

    def asked(self, role: str, handle: Any, cpus: float, gpus: float) -> None:
        """An actor was asked for; ``role`` is who it is."""
        self._waiting[role] = Start(handle, cpus, gpus, time.monotonic())

    def over(self, role: str) -> None:
        """It has answered, or is not wanted any more."""
        start = self._waiting.pop(role, None)
        if start is not None and start.said is not None:
            self._tell(role, start.said, 1)

    def look(self) -> dict[str, ScaleOTError]:
        """Tells of those that wait for processors, on a Ray where others may have taken them.

        Returns:
            Who has waited too long, and why: :class:`ResourcesMissing` names what it asks for and what is free;
            :class:`RunFailed` where it has its processors and a process, and still does not answer.
        """
        given_up = {}
        for role, start in self._waiting.items():
            waited = time.monotonic() - start.since
            if waited > START_SECONDS:
                given_up[role] = self._given_up(role, start)
                continue
            silent = start.said is None and not self._session.private
            if silent and waited > SAY_SECONDS and not self._has_process(start):
                start.said = f"{role} waits for {self._missing(start)}"
                self._tell(role, start.said, 0)
        return given_up

    def _given_up(self, role: str, start: Start) -> ScaleOTError:
        if self._has_process(start):
            return RunFailed(
                f"{role} has a process, which did not answer within {START_SECONDS:g} seconds.",
                "Look whether the machine is overloaded or its disk hangs, then run the same command again.",
            )
        return ResourcesMissing(
            f"{role} did not start within {START_SECONDS:g} seconds: it waits for {self._missing(start)}.",
            "Run the same command again when others on this Ray have ended (`ray status` shows what is taken), or ask "
            "for less (owner_cpus, tenants.N.cpus, tenants.N.gpus). What is finished is reused.",
        )

    def _missing(self, start: Start) -> str:
        free, session = self._session.free(), self._session
        parts = [f"{start.cpus:g} processors ({free[0]:g} of {session.cpus} are free)"] if start.cpus else []
        if start.gpus:
            parts.append(f"{start.gpus:g} GPUs ({free[1]:g} of {session.gpus} are free)")
        return " and ".join(parts) or "a process"

    def _has_process(self, start: Start) -> bool:
        """Whether Ray has given it processors, and a process on them."""
        return bool(ray._private.state.actors(start.handle._actor_id.hex()).get("Pid"))

    def _tell(self, role: str, stage: str, step: int) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(stage, step, 1, tenant=tenant_of(role)))

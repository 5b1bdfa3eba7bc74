"""Parts of a run that have said nothing for long: whoever watches the run is told, and goes on waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from scaleot_ray.artifacts.audit import MODEL_OWNER, evaluator
from scaleot_ray.progress import Progress

if TYPE_CHECKING:
    from scaleot_ray.federation.driver.actors import Running

SILENT_SECONDS = 600.0
"""What works for longer without a report is told of; loading a model or reading rows may take a part of it."""


class Silence:
    """Listens for parts that make no progress.

    Args:
        tell: takes who it is, what to say, and whether it is over.
    """

    def __init__(self, tell: Callable[[Running, str, bool], None]) -> None:
        self._tell = tell
        self._heard: dict[Running, float] = {}
        self._said: dict[Running, str] = {}

    def heard(self, living: Iterable[Running], report: Progress) -> None:
        """Somebody has reported."""
        for actor in living:
            if _is_of(actor.role, report):
                self._heard[actor] = time.monotonic()
                if (said := self._said.pop(actor, None)) is not None:
                    self._tell(actor, said, True)

    def look(self, living: Iterable[Running]) -> None:
        """Tells of those that have started and been silent for too long; of each once, until it is heard or gone."""
        now = time.monotonic()
        self._heard = {actor: self._heard.get(actor, now) for actor in living if actor.started}
        for actor in self._said.keys() - self._heard.keys():
            self._tell(actor, self._said.pop(actor), True)
        for actor, since in self._heard.items():
            if now - since >= SILENT_SECONDS and actor not in self._said:
                where = f"process {actor.pid}" if actor.pid is not None else f"on node {actor.elsewhere}"
                self._said[actor] = f"no progress from {actor.role} for {now - since:.0f} seconds ({where})"
                self._tell(actor, self._said[actor], False)


def _is_of(role: str, report: Progress) -> bool:
    """Whether a report is about what the actor of a role does; one may tune for several data owners."""
    if report.tenant is None:
        return role == MODEL_OWNER
    if report.round is None:
        return role == evaluator(report.tenant)
    return report.tenant in role.removeprefix("data owners ").removeprefix("data owner ").split(", ")

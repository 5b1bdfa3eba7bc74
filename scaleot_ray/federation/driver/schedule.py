"""Which part of a run starts next, so that processors are busy and memory does not run short."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from scaleot_ray.errors import ScaleOTError
from scaleot_ray.federation.driver.gpus import Gpus


@dataclass(frozen=True)
class Work:
    """A part of the run that waits for its turn.

    Attributes:
        role: whose it is, e.g. ``data owner alice``.
        cpus, gpus: what its actor claims.
        memory: bytes it needs, estimated or as the settings say.
        begin: starts it.
        labels: of the nodes that it may be on.
        no_place: is told why nothing has come of it, where it waited in vain; without it that ends the run.
    """

    role: str
    cpus: float
    gpus: float
    memory: int
    begin: Callable[[], None] = field(compare=False, repr=False)
    labels: Mapping[str, str] = field(default_factory=dict)
    no_place: Callable[[ScaleOTError], None] | None = field(default=None, compare=False, repr=False)


def next_work(waiting: Sequence[Work], running: Sequence[Work], cpus: float, gpus: Gpus, memory: int) -> Work | None:
    """The first that fits beside what runs; later ones may overtake one that does not fit.

    Tuning comes first in ``waiting``: the rows of the full model do not need a delta, so they fill
    processors that tuning leaves idle, and nothing waits for them. Memory is reserved by estimate, and
    when nothing runs the first one starts whatever its estimate says: the preflight has let it pass.

    Args:
        waiting: in order of preference.
        running: what runs now.
        cpus: what there is for all together.
        gpus: those that there are; what runs has its share of them.
        memory: bytes there are for all together.
    """
    for work in waiting:
        fits = work.cpus + sum(item.cpus for item in running) <= cpus and gpus.have(work.gpus)
        if fits and (not running or work.memory + sum(item.memory for item in running) <= memory):
            return work
    return None


class Schedule(Protocol):
    """Starts what is possible as soon as there is room for it."""

    def start(self, possible: Callable[[], Sequence[Work]]) -> None:
        """Starts what fits; ``possible`` gives what waits, in order of preference."""

    def fits(self, work: Work) -> bool:
        """Whether there would be room for it, did nothing else of the run work."""

    def has(self, role: str) -> bool:
        """Whether the work of this role runs, or waits for its place."""

    def over(self, role: str) -> None:
        """The work of this role has ended, if there was any: what it claimed is free again."""


class MachineSchedule:
    """The schedule of one machine: what runs now, and what there is for all together.

    Args:
        cpus, gpus: how many; of a GPU that others have a share of, the rest.
        memory: bytes there are for all together.
    """

    def __init__(self, cpus: float, gpus: float, memory: int) -> None:
        self._cpus, self._gpus, self._memory = cpus, Gpus(gpus), memory
        self._running: list[Work] = []

    def start(self, possible: Callable[[], Sequence[Work]]) -> None:
        """Starts what fits; ``possible`` is asked anew after each, since one that has begun may rule out others."""
        while (work := next_work(possible(), self._running, self._cpus, self._gpus, self._memory)) is not None:
            self._running.append(work)
            self._gpus.take(work.role, work.gpus)
            work.begin()

    def fits(self, work: Work) -> bool:
        """Whether there is memory for it; processors and GPUs are what its data owners claim, and the same for all."""
        return work.memory <= self._memory

    def has(self, role: str) -> bool:
        """Whether the work of this role runs."""
        return any(work.role == role for work in self._running)

    def over(self, role: str) -> None:
        """The work of this role has ended, if there was any: what it claimed is free again."""
        self._running = [work for work in self._running if work.role != role]
        self._gpus.give_back(role)

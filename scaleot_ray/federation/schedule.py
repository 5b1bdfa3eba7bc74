"""Which part of a run starts next, so that processors are busy and memory does not run short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """A part of the run that waits for its turn.

    Attributes:
        role: whose it is, e.g. ``data owner alice``.
        cpus, gpus: what its actor claims.
        memory: bytes it needs, estimated.
        begin: starts it.
    """

    role: str
    cpus: float
    gpus: float
    memory: int
    begin: Callable[[], None] = field(compare=False, repr=False)


def next_work(waiting: Sequence[Work], running: Sequence[Work], cpus: float, gpus: float, memory: int) -> Work | None:
    """The first that fits beside what runs; later ones may overtake one that does not fit.

    Tuning comes first in ``waiting``: the rows of the full model do not need a delta, so they fill
    processors that tuning leaves idle, and nothing waits for them. Memory is reserved by estimate, and
    when nothing runs the first one starts whatever its estimate says: the preflight has let it pass.

    Args:
        waiting: in order of preference.
        running: what runs now.
        cpus, gpus: what there is for all together.
        memory: bytes there are for all together.
    """
    for work in waiting:
        fits = (
            work.cpus + sum(item.cpus for item in running) <= cpus
            and work.gpus + sum(item.gpus for item in running) <= gpus
        )
        if fits and (not running or work.memory + sum(item.memory for item in running) <= memory):
            return work
    return None

"""The processes of a run under way, as seen from its driver: who they are, and what the coordinator takes."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil

COORDINATOR, DATA_OWNER = "ray::Coordinator", "ray::DataOwner"
"""What Ray calls the process of an actor, with or without the method that runs just now."""

FIGURES = ("uss", "pss", "anonymous")
"""What is seen of the coordinator's memory, in bytes."""

_FIND_SECONDS = 0.1  # between two looks for the process; each goes through all processes of the machine
_LOOK_SECONDS = 0.02  # between two looks at it: an aggregate of small deltas is made in a tenth
_FULL_EVERY = 10  # looks; the kernel sums the exact figures over every page
_STARTING = ".__init__"


def actor_processes(kind: str) -> list[psutil.Process]:
    """Our living descendants that are actors of a kind, once their constructors have begun."""
    return [process for process in psutil.Process().children(recursive=True) if _title(process).startswith(kind)]


class CoordinatorWatch:
    """Looks at the coordinator fifty times a second, in a thread, for the time of a run.

    Attributes:
        peak: the largest of each of :data:`FIGURES`, which may be reached at different times. ``uss``: pages that no
            other process maps; ``pss``: these and its part of the shared ones, both looked at five times a second and
            whenever the third has a new high; ``anonymous``: pages that belong to no file and to no shared memory, so
            nothing of the object store.
        looks: how often.
        ready: ``time.monotonic()`` when the first process was there, its constructor done; None before.
    """

    def __init__(self) -> None:
        self.peak = dict.fromkeys(FIGURES, 0)
        self.looks = 0
        self.ready: float | None = None
        self._process: psutil.Process | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="coordinator-watch", daemon=True)

    def __enter__(self) -> CoordinatorWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_FIND_SECONDS if self._process is None else _LOOK_SECONDS):
            if self._process is None or not self._look(self._process):
                self._process = next(iter(actor_processes(COORDINATOR)), None)

    def _look(self, process: psutil.Process) -> bool:
        """Takes one sample; false where the process has ended."""
        try:
            if self.ready is None and not _title(process).endswith(_STARTING):
                self.ready = time.monotonic()
            cheap = process.memory_info()
            # Linux counts pages of files and of shared memory as shared here, however many map them.
            seen = {"anonymous": cheap.rss - cheap.shared}
            if self.looks % _FULL_EVERY == 0 or seen["anonymous"] > self.peak["anonymous"]:
                full = process.memory_full_info()
                seen |= {"uss": full.uss, "pss": full.pss}
        except psutil.Error:
            return False
        self.peak |= {name: max(self.peak[name], int(value)) for name, value in seen.items()}
        self.looks += 1
        return True


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""  # it has just ended

"""The processes of a run: their memory together, and that none of them is left behind."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import psutil

_SECONDS = 0.5  # between two looks
_KILL_SECONDS = 5.0  # the kernel needs a moment to take back gigabytes
_RAYS = tuple(f"{place}{os.sep}" for place in (find_spec("ray").submodule_search_locations or ()))  # type: ignore[union-attr]


class PeakMemory:
    """Peak memory of this process and all its descendants together, shared pages counted once.

    A thread looks twice a second. The exact figure (proportional set size, which the kernel sums over
    every page) is taken only when a cheap one reaches a new high, so that watching costs the run
    next to nothing. Where the system has no such figures, resident sizes are summed, which counts
    shared memory once per process.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.others: set[int] = set()  # processes of the run that are no descendants (actors of a given Ray)
        self._cheap_peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.look()
            if self._stop.wait(_SECONDS):
                return

    def look(self) -> None:
        """Takes one sample now."""
        processes = list(self._processes())
        cheap = _cheap_sum(processes)
        if cheap > self._cheap_peak:
            self._cheap_peak = cheap
            self.bytes = max(self.bytes, _proportional_sum(processes))

    def _processes(self) -> Iterable[psutil.Process]:
        this = psutil.Process()
        found = {process.pid: process for process in (this, *this.children(recursive=True))}
        for pid in self.others - found.keys():
            process = _process(pid)
            if process is None:
                self.others.discard(pid)
            else:
                found[pid] = process
        return found.values()


def _cheap_sum(processes: list[psutil.Process]) -> int:
    """Own pages of all processes, and the largest shared part once: close below the exact figure."""
    own = shared = 0
    for process in processes:
        try:
            if Path("/proc").is_dir():
                figures = _resident(process.pid)
                own += figures["RssAnon"]
                shared = max(shared, figures["RssFile"] + figures["RssShmem"])
            else:
                own += process.memory_info().rss
        except (psutil.Error, OSError, KeyError):
            continue  # it ended while we looked
    return own + shared


def _resident(pid: int) -> dict[str, int]:
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Rss"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}


def _proportional_sum(processes: list[psutil.Process]) -> int:
    total = 0
    for process in processes:
        try:
            # Proportional set size exists on Linux alone; for another user's process it may not be read.
            total += getattr(process.memory_full_info(), "pss", None) or process.memory_info().rss
        except psutil.Error:
            continue
    return total


def end(pids: set[int], unwind_seconds: float) -> None:
    """Ends processes: SIGTERM, upon which actors unwind and remove what is half-written, then SIGKILL.

    Args:
        pids: of processes, some of which may be gone.
        unwind_seconds: time to unwind.
    """
    processes = [process for process in map(_process, pids) if process is not None]
    for act, seconds in ((psutil.Process.terminate, unwind_seconds), (psutil.Process.kill, _KILL_SECONDS)):
        for process in processes:
            with contextlib.suppress(psutil.Error):  # gone already
                act(process)
        _, processes = psutil.wait_procs(processes, timeout=seconds)


def wait_for_end(pid: int, seconds: float) -> None:
    """Waits until a process that has been told to end is gone."""
    process = _process(pid)
    if process is not None:
        psutil.wait_procs([process], timeout=seconds)


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def end_marked(name: str, value: str, seconds: float = _KILL_SECONDS) -> None:
    """Kills every process that has ``name=value`` in its environment, and waits until they are gone."""
    _end_all(lambda: marked(name, value), seconds)


def end_users_of(folder: Path, seconds: float = _KILL_SECONDS) -> None:
    """Kills every process of Ray's that has a file open in a folder, and waits until they are gone.

    A process that shows a title of its own, as Ray's agents do, writes it over its environment, marks included.
    Whoever else looks into the folder goes on.
    """
    _end_all(lambda: users_of(folder), seconds)


def _end_all(find: Callable[[], list[psutil.Process]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := find():
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=0.5)
        if time.monotonic() > deadline:
            return


def users_of(folder: Path) -> list[psutil.Process]:
    """Living processes of Ray's, other than this one, that have a file open in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and _is_rays(process)
                and any(Path(file.path).is_relative_to(folder) for file in process.open_files())
            ):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # not ours to look at, or gone
    return found


def _is_rays(process: psutil.Process) -> bool:
    """Whether it has a title that Ray gives, or runs a program out of Ray's package."""
    words = process.cmdline()
    return bool(words) and (words[0].startswith("ray::") or any(word.startswith(_RAYS) for word in words[:3]))


def marked(name: str, value: str) -> list[psutil.Process]:
    """Living processes, other than this one, that have ``name=value`` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and process.environ().get(name) == value
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # not ours to look at, or gone
    return found

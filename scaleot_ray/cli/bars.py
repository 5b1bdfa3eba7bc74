"""Progress of one command on the screen: bars on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import IO, TYPE_CHECKING

from scaleot_ray.plain_text import plain_text
from scaleot_ray.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LINE_SECONDS = 15.0  # without a terminal: at most one line per stage in so many seconds


class ProgressBars:
    """Shows :class:`~scaleot_ray.progress.Progress` reports of several stages at once, on stderr.

    A context manager and a callback: pass it as ``on_progress``. Reports may come from any thread.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._bars: Bars | None = None
        self._loading: TaskID | None = None  # shown from the start to the first report
        self._tasks: dict[str, TaskID] = {}
        self._lines = ProgressLines(self._stream)

    def __enter__(self) -> ProgressBars:
        if self._stream.isatty():
            self._bars = _bars(self._stream)
            self._bars.start()
            self._loading = self._bars.add_task("loading", total=None, figures="", left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            if self._loading is not None:
                self._bars.remove_task(self._loading)
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Shows one report."""
        with self._lock:
            if self._bars is None:
                self._lines.show(progress)
            else:
                self._bar(self._bars, progress)

    def _bar(self, bars: Bars, progress: Progress) -> None:
        if self._loading is not None:
            bars.remove_task(self._loading)
            self._loading = None
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = bars.add_task(progress.stage, total=progress.steps, figures="", left="")
        bars.update(
            self._tasks[progress.stage],
            total=progress.steps,
            completed=progress.step,
            figures=figures(progress),
            left=time_left(progress),
        )


class ProgressLines:
    """Shows reports as lines: the first and the last of each stage, and one now and then.

    Args:
        stream: where to.
        rounds: name the round of a report that has one.
    """

    def __init__(self, stream: IO[str], rounds: bool = False) -> None:
        self._stream, self._rounds = stream, rounds
        self._last: dict[tuple[str, int | None], float] = {}

    def show(self, progress: Progress) -> None:
        """Shows one report, unless there was a line of its stage just now."""
        now, key = time.monotonic(), (progress.stage, progress.round)
        last = self._last.get(key)
        if last is not None and progress.step < progress.steps and now - last < LINE_SECONDS:
            return
        self._last[key] = now
        parts = [f"{progress.stage}: {progress.step}/{progress.steps}", figures(progress), time_left(progress)]
        self.say("  ".join(part for part in parts if part), progress.round)

    def say(self, text: str, number: int | None = None) -> None:
        """Shows a line, of the round of that number."""
        prefix = f"round {number}, " if self._rounds and number is not None else ""
        print(plain_text(prefix + text), file=self._stream, flush=True)


def figures(progress: Progress) -> str:
    """Loss and speed of a report, as far as it has them."""
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    return "  ".join(parts)


def time_left(progress: Progress) -> str:
    """Time left of a report as ``1:05 left``; nothing when it is done or unknown."""
    if progress.seconds_left is None or progress.step >= progress.steps:
        return ""
    return f"{clock(progress.seconds_left)} left"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bars(stream: IO[str]) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.fields[left]}"),
        console=Console(file=stream),
        refresh_per_second=4,  # the cores have better things to do
    )

"""A whole run on the screen: a table with a row for each data owner on a terminal, lines anywhere else."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, TYPE_CHECKING

from scaleot_ray.cli.bars import ProgressLines, clock
from scaleot_ray.cli.run_rows import CONDITIONS, LEFT_OUT, OwnStages, TenantRow
from scaleot_ray.plain_text import plain_line
from scaleot_ray.progress import Progress, TenantState

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

REFRESH_PER_SECOND = 2  # a long table takes 12 ms of a core that tunes
OWN_STAGES = 3  # at most so many of the run's own stages are shown at once
LEFT_OUT_SHARE = 4  # a fourth of the rows is kept for those that are left out, however many are at work
FIGURES = {"loss": 6, "tokens/s": 8, "left": 7}
ROUND = ("round", 5)
"""Columns and how wide they are."""


class RunTable:
    """Shows how far the data owners of a run are, on stderr, within the height of the terminal.

    A context manager; pass it as ``on_progress`` and its :meth:`change` as ``on_state``. Those at work come first,
    then those that are left out with the reason, then the others while there is room; the last line counts all.

    Args:
        tenants: names of the data owners.
        rounds: how many there are; where more than one, the round of each is shown.
        stream: where to.
    """

    def __init__(self, tenants: Sequence[str], rounds: int = 1, stream: IO[str] | None = None) -> None:
        self._stream, self._several = stream or sys.stderr, rounds > 1
        self._lock = threading.Lock()
        self._own, self._rows = OwnStages(), {name: TenantRow(name) for name in tenants}
        self._lines = ProgressLines(self._stream, self._several)
        self._heard = False  # before, all that is to be seen is that something is loading
        self._live: Live | None = None

    def __enter__(self) -> RunTable:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self, console=Console(file=self._stream), refresh_per_second=REFRESH_PER_SECOND)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Shows one report."""
        with self._lock:
            self._heard = True
            row = self._rows.get(progress.tenant or "")
            (self._own if row is None else row).report(progress)
            if self._live is None:
                self._lines.show(progress)

    def change(self, told: TenantState) -> None:
        """Shows what a data owner is about."""
        with self._lock:
            self._heard = True
            self._rows[told.tenant].change(told)
            if self._live is None and told.reason:
                self._lines.say(f"{told.tenant}: {told.state}: {told.reason}", told.round)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = _Widths.of(options.max_width, self._rows, self._several)
        with self._lock:
            # The terminal's last line stays free: where it is written to, some scroll.
            room = options.size.height - 1
            own = self._own_stages(widths, min(OWN_STAGES, max(room - 1, 1)))
            # Titles and the last line take one each.
            shown = [own, *self._tenants(widths, room - own.row_count - 2), self._summary()]
        yield from shown

    def _own_stages(self, widths: _Widths, most: int) -> Table:
        from rich.text import Text

        table = _table(("", widths.own), bar=widths.bar, titles=False)
        for progress in self._own.shown(most):
            others = self._own.finished - (progress.step >= progress.steps)
            after = f"  after {others} other{'s' if others > 1 else ''}" if others else ""
            table.add_row(
                Text.assemble(plain_line(progress.stage), (after, "dim")),
                *_figures(progress, progress.loss, widths.bar),
            )
        if not self._heard:
            table.add_row("loading", _bar(None, widths.bar))
        return table

    def _tenants(self, widths: _Widths, room: int) -> Iterator[RenderableType]:
        """The rows there is room for."""
        rows = list(self._rows.values())
        work, failed = [row for row in rows if row.busy], [row for row in rows if row.condition == LEFT_OUT]
        room = max(room, 0)
        kept = min(len(failed), max(room // LEFT_OUT_SHARE, 1))
        work = work[: max(room - kept, 0)]
        failed = failed[: room - len(work)]
        others = [row for row in rows if not row.busy and row.condition != LEFT_OUT]
        others = others[: room - len(work) - len(failed)]
        if room:
            yield self._table(widths, work, titles=True)
        for row in failed:
            yield self._why(widths, row)
        yield self._table(widths, others, titles=False)

    def _table(self, widths: _Widths, rows: Sequence[TenantRow], titles: bool) -> Table:
        number = [ROUND] if self._several else []
        table = _table(("data owner", widths.name), *number, ("now", widths.doing), bar=widths.bar, titles=titles)
        for row in rows:
            cells = [row.name, *([str(row.round or "")] if self._several else []), row.doing]
            style = None if row.busy else "dim"
            table.add_row(*map(_text, cells), *_figures(row.shown, row.loss, widths.bar), style=style)
        return table

    def _why(self, widths: _Widths, row: TenantRow) -> Text:
        """A data owner that is left out: the reason takes what room a row has."""
        from rich.text import Text

        number = f" of round {row.round}" if self._several and row.round is not None else ""
        name = _text(row.name)
        name.truncate(widths.name, overflow="ellipsis", pad=True)
        reason = plain_line(next(iter(row.reason.splitlines()), "")).removeprefix(f"{row.name} ")
        return Text.assemble(name, " ", (f"left out{number}", "red"), f": {reason}", no_wrap=True, overflow="ellipsis")

    def _summary(self) -> Text:
        """How many data owners there are of each condition."""
        counts = Counter(row.condition for row in self._rows.values())
        latest = max((row.round for row in self._rows.values() if row.round is not None), default=None)
        number = f"round {latest}: " if self._several and latest is not None else ""
        return _text(number + ", ".join(f"{counts[what]} {what}" for what in CONDITIONS if counts[what]))


@dataclass(frozen=True)
class _Widths:
    """Widths of the columns that depend on the terminal's; ``own``: of all before the bar."""

    name: int
    doing: int
    bar: int
    own: int

    @classmethod
    def of(cls, width: int, names: Iterable[str], rounds: bool) -> _Widths:
        """What suits a terminal of ``width`` columns; on one below 60 rich shortens all."""
        taken = sum(size + 1 for size in FIGURES.values()) + (ROUND[1] + 1 if rounds else 0)
        name, doing, bar = min(max(len("data owner"), *map(len, names)), 24), 20, 10
        spare = width - taken - (name + 1 + doing + 1 + bar)
        if spare < 0:
            name = max(name + spare, len("data owner"))
        else:
            doing += min(spare, 14)
            bar += min(max(spare - 14, 0), 14)
        own = name + 1 + doing + (ROUND[1] + 1 if rounds else 0)
        return cls(name, doing, bar, own)


def _table(*columns: tuple[str, int], bar: int, titles: bool) -> Table:
    """A table without rules: the given columns, then bar and figures, with one space between them."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, show_header=titles)
    for title, width in (*columns, ("", bar)):
        table.add_column(title, width=width, no_wrap=True, overflow="ellipsis")
    for title, width in FIGURES.items():
        table.add_column(title, width=width, no_wrap=True, justify="right")
    return table


def _figures(progress: Progress | None, loss: float | None, bar: int) -> list[RenderableType]:
    """Bar, loss, speed and time left, each as far as it is known."""
    speed = progress.tokens_per_second if progress is not None else None
    left = progress.seconds_left if progress is not None and progress.step < progress.steps else None
    return [
        _bar(progress, bar) if progress is not None else "",
        f"{loss:.3f}" if loss is not None else "",
        f"{speed:,.0f}" if speed is not None else "",
        clock(left) if left is not None else "",
    ]


def _bar(progress: Progress | None, width: int) -> ProgressBar:
    """How much of a stage is done; None: nobody knows."""
    from rich.progress_bar import ProgressBar

    if progress is None:
        return ProgressBar(total=None, width=width)
    return ProgressBar(total=max(progress.steps, 1), completed=progress.step, width=width)


def _text(value: str) -> Text:
    """Text as it is: a name or a reason may look like markup."""
    from rich.text import Text

    return Text(plain_line(value), no_wrap=True, overflow="ellipsis")

"""A part of the training rows kept out of training: what tuning is judged on while it runs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from scaleot_ray.data.rows import Row, Rows
from scaleot_ray.errors import DataError


@dataclass(frozen=True)
class HoldOut:
    """Which rows of a dataset are held out; the same for the same fraction and seed, however long it is.

    Of every 1 / fraction neighbouring rows one is drawn. So the part is spread over a sorted dataset, and
    a stream can be split without knowing its length. A document that comes in several rows (a large
    text file) is one row here.

    Attributes:
        fraction: share of the rows, between 0 and 1.
        seed: of the draw.
    """

    fraction: float
    seed: int

    def marks(self) -> Iterator[bool]:
        """For each row in order, whether it is held out; endless."""
        draw = random.Random(f"held out {self.seed}")
        window, start = 0, 0
        while True:
            window += 1
            end = math.ceil(window / self.fraction)
            chosen = draw.randrange(start, end)
            yield from (index == chosen for index in range(start, end))
            start = end

    def training(self, rows: Rows) -> Part:
        """The rows to train on."""
        return Part(rows, self, held_out=False)

    def validation(self, rows: Rows) -> Part:
        """The rows that are held out."""
        return Part(rows, self, held_out=True)


class Part(Rows):
    """The rows of a dataset that are held out, or the others; may be iterated any number of times.

    Raises:
        DataError: while iterating: as :class:`Rows`, or when this part has no row.
    """

    def __init__(self, rows: Rows, hold_out: HoldOut, held_out: bool) -> None:
        self.path = rows.path
        self._rows, self._hold_out, self._held_out = rows, hold_out, held_out

    def __iter__(self) -> Iterator[Row]:
        marks = self._hold_out.marks()
        held_out, documents, any_row = next(marks), 0, False
        for row in self._rows:
            if held_out == self._held_out:
                any_row = True
                yield row
            if not row.unfinished:
                documents += 1
                held_out = next(marks)
        if not any_row:
            what = "to evaluate on" if self._held_out else "to train on"
            raise DataError(
                f"tune.validation_fraction: {self._hold_out.fraction:g} of {self.path} "
                f"({documents} {'row or document' if documents == 1 else 'rows or documents'}) leaves none {what}.",
                "Give validation rows of their own (--validation FILE, or validation in YAML), more training rows "
                "(a text file is one document), another tune.validation_fraction, or leave tune.evaluate_every out.",
            )

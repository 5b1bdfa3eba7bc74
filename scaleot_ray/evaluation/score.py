"""What every score has: a metric, a value, and the per-block numbers that intervals come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Blocks:
    """One measure, block by block (a block of text, or one multiple-choice row).

    Attributes:
        sums: (n,) float64, the measure summed over each block.
        counts: (n,) what it was summed over: tokens, or 1 for a multiple-choice row.
        higher_is_better: direction of the measure.
    """

    sums: np.ndarray
    counts: np.ndarray
    higher_is_better: bool

    @property
    def mean(self) -> float:
        """Over everything counted, not over blocks."""
        return float(self.sums.sum() / self.counts.sum())


class Score(Protocol):
    """One row of the standard table for one data owner."""

    @property
    def metric(self) -> str:
        """``loss`` or ``accuracy``."""

    @property
    def value(self) -> float:
        """The metric's value."""

    def blocks(self, measure: str) -> Blocks | None:
        """The named measure block by block; None where only the value is known."""


@dataclass(frozen=True)
class ReportedScore:
    """A value that another party measured on rows of its own: no blocks, therefore no interval."""

    metric: str
    value: float

    def blocks(self, measure: str) -> Blocks | None:
        """Always None."""
        return None

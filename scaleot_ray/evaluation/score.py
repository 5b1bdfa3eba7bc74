"""What every score has: a metric, a value, and the per-block numbers that intervals come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """What another party measured on rows of its own: numbers without blocks, therefore without intervals.

    Attributes:
        metric: ``loss`` or ``accuracy``.
        value: the metric's value.
        further: other measures by name, e.g. ``normalised``.
    """

    metric: str
    value: float
    further: Mapping[str, float] = field(default_factory=dict)

    def blocks(self, measure: str) -> Blocks | None:
        """Always None."""
        return None

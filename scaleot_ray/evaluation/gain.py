"""Recovered gain G and paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaleot_ray.errors import DataError
from scaleot_ray.evaluation.score import Blocks

MINIMUM_BLOCKS = 5  # with fewer, resampling says nothing about the spread
_NUMBERS_AT_A_TIME = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """Recovered gain G = (plug-in − full zero-shot) / (full tuned − full zero-shot).

    Attributes:
        value: 1 is as good as tuning the full model, 0 is as if nothing had been tuned; None when not usable.
        low: lower end of the 95 % interval; None when not usable.
        high: upper end.
        usable: False where the denominator does not exceed two of its standard errors.
        reason: why it is not usable; None when it is.
    """

    value: float | None
    low: float | None
    high: float | None
    usable: bool
    reason: str | None = None


def unusable(reason: str) -> Gain:
    """A G that cannot be said, and why."""
    return Gain(None, None, None, False, reason)


def bootstrap_means(rows: Sequence[Blocks], seed: int = 0, samples: int = 2000) -> np.ndarray:
    """Means of every row under the same resampled blocks: (rows, samples) float64.

    The blocks are drawn with replacement, the same draw for all rows (paired), so what a hard block adds to
    every row drops out of their differences.

    Raises:
        DataError: the rows were not measured on the same blocks.
    """
    first = rows[0]
    if not all(np.array_equal(row.counts, first.counts) for row in rows):
        raise DataError(
            f"Rows of one table were measured on different test rows ({', '.join(str(len(row.sums)) for row in rows)} "
            "blocks).",
            "Measure all rows with the same test set, block_size and number of examples.",
        )
    n = len(first.counts)
    totals = np.stack([*(row.sums for row in rows), first.counts.astype(np.float64)], axis=1)
    generator = np.random.default_rng(seed)
    at_a_time = max(1, _NUMBERS_AT_A_TIME // n)
    parts = []
    for start in range(0, samples, at_a_time):
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=min(at_a_time, samples - start))
        resampled = drawn @ totals
        # A draw of blocks without any labelled token has no mean; it cannot happen unless most are empty.
        parts.append(resampled[:, :-1] / np.maximum(resampled[:, -1:], 1))
    return np.concatenate(parts).T


def difference(row: Blocks, other: Blocks, seed: int = 0, samples: int = 2000) -> Interval:
    """row − other in the measure's own units, with its paired interval."""
    means, others = bootstrap_means((row, other), seed, samples)
    low, high = np.percentile(means - others, (2.5, 97.5))
    return Interval(row.mean - other.mean, float(low), float(high))


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval of a resampled ratio; draws whose denominator is 0, which have none, do not count."""
    whole = denominators != 0
    low, high = np.percentile(numerators[whole] / denominators[whole], (2.5, 97.5))
    return float(low), float(high)


def gain_between(
    full_zero_shot: Blocks, plug_in: Blocks, full_tuned: Blocks, seed: int = 0, samples: int = 2000
) -> Gain:
    """G with its paired bootstrap interval (percentiles of the resampled ratio).

    Raises:
        DataError: the three were not measured on the same blocks.
    """
    sign = 1.0 if plug_in.higher_is_better else -1.0
    rows = (full_zero_shot, plug_in, full_tuned)
    zero_shot, plugged, tuned = sign * bootstrap_means(rows, seed, samples)
    blocks = len(plug_in.counts)
    if blocks < MINIMUM_BLOCKS:
        return unusable(f"only {blocks} test blocks; an interval needs at least {MINIMUM_BLOCKS}.")
    improvement = sign * (full_tuned.mean - full_zero_shot.mean)
    error = float(np.std(tuned - zero_shot, ddof=1))
    if not improvement > 2 * error:
        return unusable(
            f"full tuned improves on full zero-shot by {improvement:.4f}, "
            f"no more than two standard errors ({2 * error:.4f})."
        )
    low, high = ratio_interval(plugged - zero_shot, tuned - zero_shot)
    return Gain(sign * (plug_in.mean - full_zero_shot.mean) / improvement, low, high, True)

"""A few repeated measurements as JSON: the median and how far they are apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float | list[float]]:
    """``median``, ``low``, ``high`` (smallest and largest) and all ``values`` in order."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": list(values)}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float | list[float]]:
    """:func:`spread` of the ratios, pair by pair."""
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])

"""Uniform LayerDrop, the emulator of Offsite-Tuning (arXiv 2302.04870)."""

from __future__ import annotations

from collections.abc import Sequence


def uniformly_dropped(middle: Sequence[int], count: int) -> tuple[int, ...]:
    """Middle layers to drop so that the kept ones are evenly spaced, first and last included.

    Of m middle layers k = m − count are kept, at round(i·(m − 1)/(k − 1)). Training and evaluation
    both go through here: the original drops over all layers in one place and over the middle ones
    in the other.
    """
    kept_count = len(middle) - count
    if kept_count <= 0:
        return tuple(middle)
    spacing = (len(middle) - 1) / max(kept_count - 1, 1)
    kept = {middle[round(index * spacing)] for index in range(kept_count)}
    return tuple(index for index in middle if index not in kept)

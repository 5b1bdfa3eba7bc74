"""Deltas combined value by value, in memory that does not grow with their number.

Means go through one delta after the other. An order statistic needs the same value of all deltas at
once, so it goes through pieces of a tensor that are the smaller the more deltas there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from scaleot_ray.errors import ConfigError
from scaleot_ray.plugin.aggregation.contribution import PIECE, Contribution

ACROSS_BYTES = 64 << 20
"""Memory for the same values of all deltas at once, in bytes."""

_LEAST_PIECE = 1024  # values; below, opening files takes longer than reading them


def weighted_mean(parts: Sequence[Contribution], name: str) -> torch.Tensor:
    """Σ weight · delta of one tensor (FedAvg, McMahan et al., arXiv 1602.05629), summed in float64."""
    entry = parts[0].stored.manifest.tensors[name]
    total = torch.zeros(entry.parameters, dtype=torch.float64)
    for part in parts:
        place = 0
        for piece in part.pieces(name):
            total[place : place + len(piece)].add_(piece, alpha=part.weight)
            place += len(piece)
    return total.reshape(entry.shape)


def median(parts: Sequence[Contribution], name: str) -> torch.Tensor:
    """The median of every value, the mean of the middle two of an even number (Yin et al., arXiv 1803.01498).

    Weights do not count, unless one is 0: whoever may name a weight could otherwise be a majority.
    """
    middle = (len(parts) - 1) // 2, len(parts) // 2

    def of(values: torch.Tensor) -> torch.Tensor:
        ordered = values.sort(dim=0).values
        return (ordered[middle[0]] + ordered[middle[1]]) / 2

    return _across(parts, name, of)


def trimmed_mean(parts: Sequence[Contribution], name: str, trim: float) -> torch.Tensor:
    """The mean of every value without its ``trim`` largest and smallest share (Yin et al., arXiv 1803.01498).

    Weights do not count, as for :func:`median`.
    """
    left_out = trimmed_at_each_end(len(parts), trim)
    return _across(parts, name, lambda values: values.sort(dim=0).values[left_out : len(parts) - left_out].mean(dim=0))


def trimmed_at_each_end(count: int, trim: float) -> int:
    """How many of ``count`` deltas a trimmed mean leaves out at either end.

    Raises:
        ConfigError: ``trim`` is above 0 but leaves none out, so that it would protect from nobody.
    """
    left_out = math.floor(trim * count + 1e-9)
    if trim > 0 and left_out == 0:
        enough = math.ceil(1000 / count) / 1000
        # Of one or two deltas no share below one half is a whole delta.
        higher = f"Set it to {enough:g} or more (below 0.5), use" if enough < 0.5 else "Use"
        raise ConfigError(
            f"aggregation.trim: {trim:g} of {count} deltas is less than one, so none would be left out.",
            f"{higher} method median, or wait for more data owners.",
        )
    return left_out


def _across(parts: Sequence[Contribution], name: str, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``of`` a (deltas, values) float64 matrix for each piece of one tensor; it gives (values,)."""
    entry = parts[0].stored.manifest.tensors[name]
    # Sorting takes a second matrix and an index of the same size.
    values = min(max(ACROSS_BYTES // (3 * 8 * len(parts)), _LEAST_PIECE), PIECE)
    pieces = zip(*(part.pieces(name, values) for part in parts), strict=True)
    found = [of(torch.stack([piece.double() for piece in same])) for same in pieces]
    return torch.cat(found).reshape(entry.shape)

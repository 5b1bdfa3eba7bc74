"""Low-rank updates of several data owners as one low-rank update.

The mean of the products B·A is not the product of the means of B and of A. What is exact is to stack the
pairs (FLoRA, arXiv 2409.05976): the rank is then the sum of theirs. Of a fixed rank, the best
approximation follows from the stacked pair without ever forming a matrix as large as the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from scaleot_ray.artifacts.manifest import DeltaContent
from scaleot_ray.artifacts.piecewise import StoredArtifact
from scaleot_ray.plugin.aggregation.contribution import Contribution, pair
from scaleot_ray.tuning.delta import MethodSettings
from scaleot_ray.tuning.lora import rank_of


def stacked_rank(parts: Sequence[Contribution], base: StoredArtifact | None) -> int:
    """Rank of the exact sum: that of all deltas together, and those of the starts that do not cancel out."""
    return sum(rank_of(_settings(stored)) for stored, _ in _terms(parts, base))


def stacked(
    parts: Sequence[Contribution], module: str, base: StoredArtifact | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair (A, B) whose product is base + Σ weight · factor · (delta − its start), in float64.

    Args:
        parts: the deltas.
        module: which pair.
        base: the delta that the round began with.

    Returns:
        A (ranks of all, in) and B (out, ranks of all), which holds the weights and alpha / rank.
    """
    pairs = [(pair(stored, module), weight) for stored, weight in _terms(parts, base)]
    return torch.cat([down for (down, _), _ in pairs]), torch.cat([weight * up for (_, up), weight in pairs], dim=1)


def _terms(parts: Sequence[Contribution], base: StoredArtifact | None) -> list[tuple[StoredArtifact, float]]:
    """Deltas and starts with what each counts in the sum; a start that cancels out is left out."""
    terms = [(part.stored, part.weight * part.factor) for part in parts]
    starts = {stored.directory: stored for stored in (base, *(part.start for part in parts)) if stored is not None}
    for place, stored in starts.items():
        began = [part for part in parts if part.start is not None and part.start.directory == place]
        left = float(base is not None and base.directory == place) - sum(part.weight * part.factor for part in began)
        # Weights add up to 1 but for rounding: where nobody was shortened or late, nothing of the base is left.
        cancels = base is not None and base.directory == place and len(began) == len(parts)
        if not (cancels and all(part.factor == 1 for part in parts)):
            terms.append((stored, left))
    return terms


def _settings(stored: StoredArtifact) -> MethodSettings:
    assert isinstance(stored.manifest.content, DeltaContent)
    return stored.manifest.content.settings


def truncated(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The pair of rank ``rank`` whose product is nearest to ``up @ down`` in the Frobenius norm.

    By QR of both and the SVD of the small core between them; both results carry the root of the
    singular values, so neither is much longer than the other.

    Args:
        down: (R, in).
        up: (out, R).
        rank: of the result; beyond the rank that is there, zeros.

    Returns:
        A (rank, in), B (out, rank), and the squared share of the norm that is lost, 0 to 1.
    """
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.t())
    core_left, values, core_right = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    keep = min(rank, len(values))
    root = values[:keep].sqrt()
    new_up, new_down = (left @ core_left[:, :keep]) * root, root[:, None] * (core_right[:keep] @ right.t())
    total, lost = float(values.square().sum()), float(values[keep:].square().sum())
    if keep < rank:
        new_up = torch.nn.functional.pad(new_up, (0, rank - keep))
        new_down = torch.nn.functional.pad(new_down, (0, 0, 0, rank - keep))
    return new_down, new_up, lost / total if total else 0.0


def bytes_needed(parts: Sequence[Contribution], base: StoredArtifact | None) -> int:
    """Memory for the largest stacked pair in float64 and its QR, in bytes; it grows with the number of deltas."""
    rank, largest = stacked_rank(parts, base), 0
    for module in parts[0].modules():
        tensors = parts[0].stored.manifest.tensors
        width = tensors[f"{module}.lora_A"].shape[1] + tensors[f"{module}.lora_B"].shape[0]
        largest = max(largest, math.prod((rank, width)))
    return 3 * 8 * largest

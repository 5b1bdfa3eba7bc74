"""Whole-layer deltas thinned out before they are combined, by PEFT's own merging.

For ``layers`` only. Applied to the two factors of a low-rank update one by one, as adapters are often
merged, these methods thin out something that is not the update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from scaleot_ray.plugin.aggregation.contribution import Contribution


def ties(parts: Sequence[Contribution], name: str, density: float) -> torch.Tensor:
    """Of every delta the largest values, of those the ones with the majority's sign, averaged (TIES, arXiv 2306.01708).

    Weights are relative to an equal share, since the average is over those that kept a value. Holds
    the tensor of all deltas at once, several times.
    """
    from peft.utils import merge_utils  # loads slowly; only these two methods need it

    weights = torch.tensor([part.weight * len(parts) for part in parts])
    return merge_utils.ties(_all(parts, name), weights, density)


def dare(parts: Sequence[Contribution], name: str, density: float, seed: str) -> torch.Tensor:
    """Of every delta a random share of the values, scaled up to make good for the others, summed by weight.

    DARE, arXiv 2311.03099. The same seed gives the same values, so each round needs one of its own: what all
    rounds dropped would never change. Holds the tensor of all deltas at once, several times.
    """
    from peft.utils import merge_utils

    weights = torch.tensor([part.weight for part in parts])
    with torch.random.fork_rng(devices=[]):
        # One stream a tensor, so that it does not matter in which order tensors come.
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little"))
        return merge_utils.dare_linear(_all(parts, name), weights, density)


def bytes_needed(parts: Sequence[Contribution]) -> int:
    """Memory for the largest tensor of all deltas at once, in bytes; it grows with their number."""
    largest = max(entry.nbytes for entry in parts[0].stored.manifest.tensors.values())
    return 5 * len(parts) * largest  # the values, thinned, stacked, weighted, signs


def _all(parts: Sequence[Contribution], name: str) -> list[torch.Tensor]:
    shape = parts[0].stored.manifest.tensors[name].shape
    return [torch.cat(list(part.pieces(name))).reshape(shape) for part in parts]

"""Selective rank compression: attention weights of kept layers as two thin factors (ScaleOT §3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional


def kept_rank(shape: tuple[int, int], beta: float) -> int:
    """Rank that a rank reduction β leaves of an (out, in) matrix: (1 − β)·min(out, in), at least 1."""
    return max(1, round((1 - beta) * min(shape)))


def truncate(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best rank-r approximation of a matrix as two factors of equal weight.

    Args:
        weight: (out, in).
        rank: r.

    Returns:
        up (out, r) and down (r, in), in the weight's dtype; their product is the truncated SVD.
    """
    u, s, vh = torch.linalg.svd(
        weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
    )
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    return up.to(weight.dtype).contiguous(), down.to(weight.dtype).contiguous()


class LowRankLinear(nn.Module):
    """y = U V x + b, in place of a projection; fused projections have one U for each part.

    Parameters are named ``down`` (Σ ranks, in), ``up.0``, ``up.1`` … (rows of the part, its rank) and
    ``bias`` (out,).

    Args:
        in_features: width of x.
        sizes: output rows of each part (one entry for a plain projection).
        ranks: rank of each part.
        bias: whether there is a bias.
        rows: which output rows each part makes, where parts interleave; by default one after the other.
    """

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        ranks: Sequence[int],
        bias: bool = False,
        rows: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.ranks = list(ranks)
        self.down = nn.Parameter(torch.empty(sum(ranks), in_features))
        self.up = nn.ParameterList(
            [nn.Parameter(torch.empty(size, rank)) for size, rank in zip(sizes, ranks, strict=True)]
        )
        self.bias = nn.Parameter(torch.empty(sum(sizes))) if bias else None
        # Where the parts interleave (head by head), their outputs go back to the rows they came from.
        order = None if rows is None else torch.cat(list(rows)).argsort()
        self.order = None if order is None or order.equal(torch.arange(len(order))) else order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        inner = functional.linear(x, self.down).split(self.ranks, dim=-1)
        output = torch.cat([functional.linear(z, up) for z, up in zip(inner, self.up, strict=True)], dim=-1)
        if self.order is not None:
            output = output[..., self.order.to(output.device)]
        return output if self.bias is None else output + self.bias


def compress(
    weight: torch.Tensor, beta: float, rows: Sequence[torch.Tensor] | None = None
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
    """Factors of a projection at rank reduction β, each part of a fused one on its own.

    Args:
        weight: (out, in).
        beta: rank reduction, 0 < β < 1.
        rows: output rows of each part; None for a plain projection.

    Returns:
        ``(up, down)`` of each part, and how many numbers the factors hold.
    """
    parts = [weight] if rows is None else [weight[index.to(weight.device)] for index in rows]
    factors = []
    for part in parts:
        factors.append(truncate(part, kept_rank((part.shape[0], part.shape[1]), beta)))
    return factors, sum(up.numel() + down.numel() for up, down in factors)

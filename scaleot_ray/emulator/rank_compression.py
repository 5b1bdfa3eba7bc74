"""Selective rank compression: attention weights of kept layers as two thin factors (ScaleOT §3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional


def kept_rank(shape: tuple[int, int], beta: float) -> int:
    """Rank that a rank reduction β leaves of an (out, in) matrix: (1 − β)·min(out, in), at least 1.

    Any β above 0 takes at least one direction, so that what counts as compressed is not the matrix itself.
    """
    full = min(shape)
    return full if beta == 0 else max(1, min(full - 1, round((1 - beta) * full)))


def truncate(weight: torch.Tensor, rank: int, moment: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank-r approximation of a matrix as two factors of equal weight.

    Without a moment, the truncated SVD: least error of the weights, as in the paper. With the input's
    second moment C = L Lᵀ, least mean error of the output, E‖(W − UV)x‖² = ‖(W − UV)L‖²: the truncated
    SVD of W L with L taken off again. (Ours; it is how SVD-LLM, arXiv 2403.07378, compresses models.)

    Args:
        weight: W (out, in).
        rank: r.
        moment: C = E[x xᵀ] (in, in).

    Returns:
        up (out, r) and down (r, in), in the weight's dtype.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if moment is None:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        root = _root(moment.to(wide))
        u, s, vh = torch.linalg.svd(wide @ root, full_matrices=False)
        vh = torch.linalg.solve_triangular(root, vh, upper=False, left=False)
    spread = s[:rank].sqrt()
    up, down = u[:, :rank] * spread, spread[:, None] * vh[:rank]
    return up.to(weight.dtype).contiguous(), down.to(weight.dtype).contiguous()


def _root(moment: torch.Tensor) -> torch.Tensor:
    """L of C = L Lᵀ; a little of the mean is added to every direction, so that none counts for nothing."""
    wide = moment.double()
    floor = 1e-3 * wide.diagonal().mean().clamp_min(1e-30)
    return torch.linalg.cholesky(wide + floor * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).to(moment)


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


def factor_shapes(
    shape: tuple[int, ...], beta: float, rows: Sequence[torch.Tensor] | None = None
) -> list[tuple[tuple[int, int], tuple[int, int]]] | None:
    """Shapes of ``(up, down)`` of each part of an (out, in) projection at rank reduction β.

    None where they would hold more numbers than their product, which is then stored instead: they say no more.

    Args:
        rows: output rows of each part; None for a plain projection.
    """
    width = shape[1]
    sizes = [shape[0]] if rows is None else [len(part) for part in rows]
    ranks = [kept_rank((size, width), beta) for size in sizes]
    if sum(rank * (size + width) for size, rank in zip(sizes, ranks, strict=True)) > shape[0] * width:
        return None
    return [((size, rank), (rank, width)) for size, rank in zip(sizes, ranks, strict=True)]


def compress(
    weight: torch.Tensor,
    beta: float,
    rows: Sequence[torch.Tensor] | None = None,
    moment: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Factors of a projection at rank reduction β, each part of a fused one on its own.

    Args:
        weight: (out, in).
        beta: rank reduction, 0 < β < 1.
        rows: output rows of each part; None for a plain projection.
        moment: second moment of the input, for :func:`truncate`.

    Returns:
        ``(up, down)`` of each part.
    """
    parts = [weight] if rows is None else [weight[index.to(weight.device)] for index in rows]
    factors = []
    for part in parts:
        factors.append(truncate(part, kept_rank((part.shape[0], part.shape[1]), beta), moment))
    return factors

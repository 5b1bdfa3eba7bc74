"""Reduced-rank ridge regression from sums that stream over any amount of text.

The best linear map of rank r from x to y needs no more of the data than Σx, Σy, XᵀX and XᵀY (Izenman,
Journal of Multivariate Analysis 5, 1975): fit with full rank, then keep the top directions of the fitted values.
"""

from __future__ import annotations

import torch


class RegressionSums:
    """Running sums over tokens of an input x (in,) and of what should be made of it, y (out,).

    Args:
        inputs, outputs: widths of x and y.
        device: where the sums are kept, in float64.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.tokens = 0
        self.sum_x, self.sum_y = zeros(inputs), zeros(outputs)
        self.xx, self.xy, self.yy = zeros(inputs, inputs), zeros(inputs, outputs), zeros(outputs)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds tokens (n, in) and (n, out)."""
        x, y = x.detach().float(), y.detach().float()
        self.tokens += len(x)
        self.sum_x += x.sum(0)
        self.sum_y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum(0)

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x] (in,) and E[y] (out,)."""
        n = max(self.tokens, 1)
        return self.sum_x / n, self.sum_y / n

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x xᵀ] (in, in) and E[x yᵀ] (in, out)."""
        n = max(self.tokens, 1)
        return self.xx / n, self.xy / n

    def covariances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cov(x) (in, in) and Cov(x, y) (in, out)."""
        mean_x, mean_y = self.means()
        xx, xy = self.moments()
        return xx - torch.outer(mean_x, mean_x), xy - torch.outer(mean_x, mean_y)


def ridge_regression(xx: torch.Tensor, xy: torch.Tensor, ridge: float) -> torch.Tensor:
    """The matrix B (in, out) of least ridge-penalised error, y ≈ Bᵀ x.

    Args:
        xx, xy: second moments or covariances.
        ridge: λ relative to the mean of xx's diagonal.
    """
    floor = ridge * xx.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.solve(xx + floor * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy)


def reduced_rank_regression(
    xx: torch.Tensor, xy: torch.Tensor, rank: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The map of a given rank with the least squared error of its output.

    Args:
        xx, xy: second moments or covariances.
        rank: at most min(in, out).
        ridge: as for :func:`ridge_regression`.

    Returns:
        up (out, rank) with orthonormal columns, and down (rank, in): y ≈ up (down x).
    """
    best = ridge_regression(xx, xy, ridge)
    fitted = best.T @ xx @ best
    _, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
    up = vectors[:, -rank:]
    return up, (best @ up).T

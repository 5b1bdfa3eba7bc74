"""Reduced-rank ridge regression from sums that stream over any amount of text.

The best linear map of rank r from x to y needs no more of the data than Σx, Σy, XᵀX and XᵀY (Izenman,
Journal of Multivariate Analysis 5, 1975): fit with full rank, then keep the top directions of the fitted values.
"""

from __future__ import annotations

import torch

from scaleot_ray.errors import RunFailed

# Up to which width a matrix is decomposed whole; directions to spare and rounds of the iteration for larger ones.
_WHOLE, _SPARE, _ROUNDS = 1024, 32, 4


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

    Raises:
        RunFailed: they are not finite.
    """
    _check_finite(xx, xy)
    return torch.cholesky_solve(xy, _root(xx, ridge))


def reduced_rank_regression(
    xx: torch.Tensor, xy: torch.Tensor, rank: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The map of a given rank with the least ridge-penalised squared error of its output.

    With xx + λI = L Lᵀ, the penalised error of a map B is that of the best one plus ‖Lᵀ(B − best)‖²; so of the fitted
    values Lᵀ best = L⁻¹ xy the leading right singular vectors are kept (Mukherjee and Zhu, Statistical Analysis and
    Data Mining 4, 2011).

    Args:
        xx, xy: second moments or covariances.
        rank: at most min(in, out).
        ridge: as for :func:`ridge_regression`.

    Returns:
        up (out, rank) with orthonormal columns, and down (rank, in): y ≈ up (down x).

    Raises:
        RunFailed: the moments are not finite.
    """
    _check_finite(xx, xy)
    root = _root(xx, ridge)
    fitted = torch.linalg.solve_triangular(root, xy, upper=False)
    up = leading_directions(fitted, rank)
    return up, torch.linalg.solve_triangular(root.T, fitted @ up, upper=True).T


def leading_directions(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The right singular vectors (columns, rank) of a matrix (rows, columns) with the largest singular values.

    Small matrices are decomposed whole. Of large ones a subspace with some directions to spare is multiplied by the
    matrix a few times (Halko, Martinsson and Tropp, SIAM Review 53, 2011, algorithm 4.4): what is left out of
    ``matrix`` is then larger than it needs to be by less than a hundredth, at a tenth of the time.
    """
    width = matrix.shape[1]
    block = _block(rank)
    if _is_whole(width, block):
        return torch.linalg.eigh(matrix.T @ matrix)[1][:, -rank:].flip(1)
    narrow = matrix.float()
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(width, block, generator=generator).to(narrow)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(narrow.T @ (narrow @ basis))[0]
    within = torch.linalg.eigh((image := (narrow @ basis).to(matrix)).T @ image)[1][:, -rank:].flip(1)
    return basis.to(matrix) @ within


def sums_bytes(inputs: int, outputs: int) -> int:
    """Memory of :class:`RegressionSums`."""
    return 8 * (inputs * inputs + inputs * outputs + inputs + 2 * outputs)


def regression_bytes(inputs: int, outputs: int, rank: int) -> int:
    """What :func:`reduced_rank_regression` has in memory at its fullest moment, with the moments that it is given."""
    xx, xy, block = inputs * inputs, inputs * outputs, _block(rank)
    root = 4 * xx + xy  # beside the moments: xx + λI, I and L
    solve = 2 * xx + 3 * xy
    if _is_whole(outputs, block):
        keep = 2 * xx + 2 * xy + 2 * outputs * outputs
    else:
        keep = 2 * xx + 5 * xy // 2 + block * (inputs + 2 * outputs)
    return 8 * max(root, solve, keep)


def _block(rank: int) -> int:
    return rank + max(_SPARE, rank // 4)


def _is_whole(width: int, block: int) -> bool:
    return width <= _WHOLE or 2 * block > width


def _check_finite(xx: torch.Tensor, xy: torch.Tensor) -> None:
    if not (xx.isfinite().all() and xy.isfinite().all()):
        raise RunFailed(
            "The activations that a layer is fitted on are not finite.",
            "Check the model's weights (model.path), or load it in float32 or bfloat16 (model.dtype).",
        )


def _root(xx: torch.Tensor, ridge: float) -> torch.Tensor:
    """L of xx + λI = L Lᵀ."""
    floor = ridge * xx.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    while True:
        root, failed = torch.linalg.cholesky_ex(xx + floor * identity)
        if not failed:
            return root
        floor = floor * 10  # rounding has left xx with directions of less than no variance

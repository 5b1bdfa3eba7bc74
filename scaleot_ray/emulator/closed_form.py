"""A working harmonizer without a gradient step: reduced-rank ridge regression on one forward pass.

The residual update of a decoder layer, y − x, is partly linear in x. From Σx, Σ(y−x), XᵀX and Xᵀ(Y−X),
which stream over any amount of public text, follows the best linear map of a given rank. This start
is ours; the paper starts from W_up = 0.
"""

from __future__ import annotations

import torch

from scaleot_ray.emulator.harmonizer import Harmonizer

MASSIVE = 5.0
"""Tokens whose norm exceeds this multiple of the batch's median carry massive activations."""


class ResidualStatistics:
    """Running sums over tokens of a layer's input x (d,) and its residual update r = y − x (d,).

    A handful of tokens (usually the first) carries activations hundreds of times larger than the
    rest; they would own a least-squares fit, so they are left out.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.tokens = 0
        self.sum_x, self.sum_r = zeros(width), zeros(width)
        self.xx, self.xr, self.rr = zeros(width, width), zeros(width, width), zeros(1)

    def update(self, hidden_in: torch.Tensor, hidden_out: torch.Tensor) -> None:
        """Adds a batch of hidden states (batch, time, d) before and after the layer."""
        x = hidden_in.detach().flatten(0, -2).float()
        r = hidden_out.detach().flatten(0, -2).float() - x
        norm = torch.maximum(x.norm(dim=-1), (x + r).norm(dim=-1))
        usual = norm <= MASSIVE * norm.median()
        x, r = x[usual], r[usual]
        self.tokens += x.shape[0]
        self.sum_x += x.sum(0)
        self.sum_r += r.sum(0)
        self.xx += x.T @ x
        self.xr += x.T @ r
        self.rr += r.square().sum()


def fit_harmonizer(harmonizer: Harmonizer, statistics: ResidualStatistics, ridge: float) -> float:
    """Sets a harmonizer to the best linear map of rank r/2 for the layer's residual update.

    A linear map is not of the form W_up·act(W_down x), but two units make one linear direction:
    act(z) − act(−z) = z for ReLU, GELU and SiLU alike. So r units carry rank ⌊r/2⌋ exactly, and
    training bends them from there.

    Args:
        harmonizer: is changed in place.
        statistics: of the layer it replaces.
        ridge: λ relative to the mean variance of x.

    Returns:
        R² of the fit on the tokens it was made from.
    """
    n = max(statistics.tokens, 1)
    mean_x, mean_r = statistics.sum_x / n, statistics.sum_r / n
    cov = statistics.xx / n - torch.outer(mean_x, mean_x)
    cross = statistics.xr / n - torch.outer(mean_x, mean_r)
    width = cov.shape[0]
    eye = torch.eye(width, dtype=cov.dtype, device=cov.device)
    full_rank = torch.linalg.solve(cov + ridge * cov.diagonal().mean().clamp_min(1e-12) * eye, cross)

    # The best rank-k map keeps the top directions of the fitted values (reduced-rank regression).
    fitted = full_rank.T @ cov @ full_rank
    _, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
    units = harmonizer.down.out_features
    rank = min(units // 2, width)
    out_directions = vectors[:, -rank:]
    in_directions = full_rank @ out_directions
    # Unit variance in front of the activation puts it where it bends, which training can use.
    scale = (in_directions.T @ cov @ in_directions).diagonal().clamp_min(1e-12).sqrt()
    in_directions, out_directions = in_directions / scale, out_directions * scale

    with torch.no_grad():
        harmonizer.down.bias.zero_()
        harmonizer.up.weight.zero_()
        harmonizer.down.weight[:rank] = in_directions.T.to(harmonizer.down.weight)
        harmonizer.down.weight[rank : 2 * rank] = -in_directions.T.to(harmonizer.down.weight)
        harmonizer.up.weight[:, :rank] = out_directions.to(harmonizer.up.weight)
        harmonizer.up.weight[:, rank : 2 * rank] = -out_directions.to(harmonizer.up.weight)
        harmonizer.up.bias.copy_(mean_r - mean_x @ in_directions @ out_directions.T)

    low_rank = in_directions @ out_directions.T
    variance = statistics.rr.item() / n - mean_r.square().sum().item()
    explained = 2 * (low_rank * cross).sum() - ((cov @ low_rank) * low_rank).sum()
    return float(explained / max(variance, 1e-12))

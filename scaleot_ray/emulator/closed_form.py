"""A working harmonizer without a gradient step: reduced-rank ridge regression on one forward pass.

The residual update of a decoder layer, y − x, is partly linear in x: a linear map of low rank is a start that
training can bend from there. It is ours; the paper starts from W_up = 0.
"""

from __future__ import annotations

import torch

from scaleot_ray.emulator.harmonizer import Harmonizer
from scaleot_ray.emulator.reduced_rank import RegressionSums, reduced_rank_regression, ridge_regression

MASSIVE = 5.0
"""Tokens whose norm exceeds this multiple of the batch's median carry massive activations."""


def usual_tokens(*hidden: torch.Tensor) -> torch.Tensor:
    """Which tokens (…,) carry massive activations in none of some hidden states (…, d).

    A handful of tokens (usually the first) carries activations hundreds of times larger than the
    rest; they would own a least-squares fit, so it leaves them out.
    """
    norm = torch.stack([states.detach().float().norm(dim=-1) for states in hidden]).amax(0)
    return norm <= MASSIVE * norm.median()


class ResidualStatistics(RegressionSums):
    """Running sums over tokens of a layer's input x (d,) and the residual update r = y − x (d,) it makes of it."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        super().__init__(width, width, device)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds hidden states (…, d) before and after the layer; tokens with massive activations do not count."""
        x, y = x.detach().flatten(0, -2).float(), y.detach().flatten(0, -2).float()
        usual = usual_tokens(x, y)
        super().update(x[usual], (y - x)[usual])


def fit_harmonizer(harmonizer: Harmonizer, statistics: ResidualStatistics, ridge: float) -> float:
    """Sets a harmonizer to the best linear map for the layer's residual update.

    Without an activation function r units carry rank r. With one, a linear map is not of the form
    W_up·act(W_down x), but two units make one linear direction: act(z) − act(−z) = z for ReLU, GELU and SiLU alike,
    so r units carry rank ⌊r/2⌋ exactly.

    Args:
        harmonizer: is changed in place.
        statistics: of the layer it replaces.
        ridge: λ relative to the mean variance of x.

    Returns:
        R² of the fit on the tokens it was made from.
    """
    cov, cross = statistics.covariances()
    mean_x, mean_r = statistics.means()
    units, width = harmonizer.down.out_features, len(cov)
    rank = min(units if harmonizer.linear else units // 2, width)
    up, down = reduced_rank_regression(cov, cross, rank, ridge)
    # Unit variance in front of the activation puts it where it bends, which training can use.
    scale = (down @ cov @ down.T).diagonal().clamp_min(1e-12).sqrt()
    down, up = down / scale[:, None], up * scale

    with torch.no_grad():
        harmonizer.down.bias.zero_()
        harmonizer.up.weight.zero_()
        harmonizer.down.weight[:rank] = down.to(harmonizer.down.weight)
        harmonizer.up.weight[:, :rank] = up.to(harmonizer.up.weight)
        if not harmonizer.linear:
            harmonizer.down.weight[rank : 2 * rank] = -down.to(harmonizer.down.weight)
            harmonizer.up.weight[:, rank : 2 * rank] = -up.to(harmonizer.up.weight)
        harmonizer.up.bias.copy_(mean_r - up @ (down @ mean_x))

    low_rank = (up @ down).T
    variance = statistics.yy.sum().item() / max(statistics.tokens, 1) - mean_r.square().sum().item()
    explained = 2 * (low_rank * cross).sum() - ((cov @ low_rank) * low_rank).sum()
    return float(explained / max(variance, 1e-12))


def fit_read_out(harmonizer: Harmonizer, inner: RegressionSums, ridge: float) -> None:
    """Fits a harmonizer's second matrix to a residual update, with its hidden units as they are.

    Args:
        harmonizer: is changed in place.
        inner: sums over tokens of its hidden units act(W_down x + b_d) (r,) and the residual update (d,).
        ridge: λ relative to the units' mean variance, towards the second matrix it has.
    """
    cov, cross = inner.covariances()
    mean_z, mean_r = inner.means()
    before = harmonizer.up.weight.T.to(cov)
    after = before + ridge_regression(cov, cross - cov @ before, ridge)
    with torch.no_grad():
        harmonizer.up.weight.copy_(after.T)
        harmonizer.up.bias.copy_(mean_r - mean_z @ after)

"""Linear maps of a given rank from sums, and the directions they keep."""

from __future__ import annotations

import pytest
import torch

from scaleot_ray.emulator import reduced_rank
from scaleot_ray.emulator.reduced_rank import (
    RegressionSums,
    leading_directions,
    reduced_rank_regression,
    ridge_regression,
)
from scaleot_ray.errors import RunFailed


def _sums(tokens: int = 400, inputs: int = 12, outputs: int = 8) -> tuple[RegressionSums, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    y = y + 0.3 * torch.randn(tokens, outputs, generator=generator, dtype=torch.float64)
    sums = RegressionSums(inputs, outputs)
    for part in range(0, tokens, 100):
        sums.update(x[part : part + 100], y[part : part + 100])
    return sums, x, y


def _penalised(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, ridge: float) -> float:
    floor = ridge * (x.square().sum(0) / len(x)).mean()
    return float((y - x @ weights).square().sum() / len(x) + floor * weights.square().sum())


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_ridge_regression_has_no_gradient_left(ridge: float) -> None:
    sums, x, y = _sums()
    weights = ridge_regression(*sums.moments(), ridge).requires_grad_(True)
    floor = ridge * (x.square().sum(0) / len(x)).mean()
    loss = (y - x @ weights).square().sum() / len(x) + floor * weights.square().sum()
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-5


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_no_gradient_step_improves_the_map_of_reduced_rank(rank: int, ridge: float) -> None:
    sums, x, y = _sums()
    up, down = reduced_rank_regression(*sums.moments(), rank, ridge)
    assert torch.allclose(up.T @ up, torch.eye(rank, dtype=up.dtype), atol=1e-8)
    found = _penalised(x, y, down.T @ up.T, ridge)
    left, right = (factor.clone(memory_format=torch.contiguous_format).requires_grad_(True) for factor in (up, down))
    optimizer = torch.optim.LBFGS([left, right], max_iter=300, line_search_fn="strong_wolfe")
    floor = ridge * (x.square().sum(0) / len(x)).mean()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        weights = right.T @ left.T
        loss = (y - x @ weights).square().sum() / len(x) + floor * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert found <= _penalised(x, y, (right.T @ left.T).detach(), ridge) * (1 + 1e-6)
    # Another subspace of the same rank does worse: the check above can fail.
    other = torch.linalg.qr(up + torch.randn(up.shape, generator=torch.Generator().manual_seed(1)).to(up))[0]
    if rank < 8:
        best = ridge_regression(*sums.moments(), ridge)
        assert _penalised(x, y, best @ other @ other.T, ridge) > found * 1.01


def test_moments_that_rounding_has_spoilt() -> None:
    xx = torch.diag(torch.tensor([1.0, 1.0, -1e-4], dtype=torch.float64))
    found = ridge_regression(xx, torch.eye(3, dtype=torch.float64), 1e-9)
    assert found.isfinite().all()


def _decaying(rows: int, columns: int, power: float) -> torch.Tensor:
    """Singular values that fall as slowly as those of real fitted values do."""
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(torch.arange(1, columns + 1, dtype=torch.float64) ** -power) @ right


def _left_out(matrix: torch.Tensor, directions: torch.Tensor) -> float:
    return float((matrix - matrix @ directions @ directions.T).square().sum())


@pytest.mark.parametrize("power", [0.3, 1.0])
@pytest.mark.parametrize("rank", [4, 40])
def test_iterated_directions_leave_out_hardly_more_than_the_best(
    rank: int, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = _decaying(320, 300, power)
    best = leading_directions(matrix, rank)
    monkeypatch.setattr(reduced_rank, "_WHOLE", 64)
    found = leading_directions(matrix, rank)
    assert torch.allclose(found.T @ found, torch.eye(rank, dtype=found.dtype), atol=1e-5)
    assert not torch.equal(found, best), "the iteration has run"
    assert _left_out(matrix, found) < 1.01 * _left_out(matrix, best)
    monkeypatch.setattr(reduced_rank, "_ROUNDS", 0)
    assert _left_out(matrix, leading_directions(matrix, rank)) > 1.01 * _left_out(matrix, best)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_refused(value: float, which: int) -> None:
    moments = _sums()[0].moments()
    moments[which][2, 3] = value
    with pytest.raises(RunFailed, match="not finite"):
        ridge_regression(*moments, 1e-3)
    with pytest.raises(RunFailed, match="not finite"):
        reduced_rank_regression(*moments, 2, 1e-3)

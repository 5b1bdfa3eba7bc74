import pytest
import torch

from scaleot_ray.emulator.closed_form import ResidualStatistics, fit_harmonizer
from scaleot_ray.emulator.harmonizer import ACTIVATIONS, Harmonizer

WIDTH = 24


def _layer(rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(WIDTH, rank, generator=generator)
    right = torch.randn(rank, WIDTH, generator=generator)
    return left @ right / WIDTH, torch.randn(WIDTH, generator=generator)


def _statistics(x: torch.Tensor, y: torch.Tensor, chunks: int = 4) -> ResidualStatistics:
    statistics = ResidualStatistics(WIDTH)
    for x_part, y_part in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        statistics.update(x_part, y_part)
    return statistics


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_linear_layer_of_fitting_rank_is_reproduced(activation):
    matrix, bias = _layer(rank=4)
    x = torch.randn(32, 20, WIDTH)
    y = x + x @ matrix + bias
    harmonizer = Harmonizer(WIDTH, 8, activation)
    fit = fit_harmonizer(harmonizer, _statistics(x, y), ridge=1e-9)
    assert fit == pytest.approx(1, abs=1e-4)
    assert torch.allclose(harmonizer(x), y, atol=1e-3)


def test_too_small_a_rank_reproduces_less():
    matrix, bias = _layer(rank=12)
    x = torch.randn(32, 20, WIDTH)
    statistics = _statistics(x, x + x @ matrix + bias)
    fits = [fit_harmonizer(Harmonizer(WIDTH, rank), statistics, 1e-9) for rank in (4, 12, 24)]
    assert fits[0] < fits[1] < fits[2]
    assert fits[0] < 0.9
    assert fits[2] == pytest.approx(1, abs=1e-4)


def test_noise_explains_nothing():
    x = torch.randn(64, 40, WIDTH)
    fit = fit_harmonizer(Harmonizer(WIDTH, 8), _statistics(x, x + torch.randn_like(x)), ridge=1e-3)
    assert abs(fit) < 0.05


def test_massive_tokens_do_not_own_the_fit():
    matrix, bias = _layer(rank=4)
    x = torch.randn(32, 20, WIDTH)
    y = x + x @ matrix + bias
    x_massive, y_massive = x.clone(), y.clone()
    x_massive[:, 0] = 500 * torch.randn(32, WIDTH)
    y_massive[:, 0] = 500 * torch.randn(32, WIDTH)
    harmonizer = Harmonizer(WIDTH, 8)
    fit_harmonizer(harmonizer, _statistics(x_massive, y_massive), ridge=1e-9)
    assert torch.allclose(harmonizer(x), y, atol=1e-3)


def test_statistics_stream():
    matrix, bias = _layer(rank=4)
    x = torch.randn(32, 20, WIDTH)
    y = x + x @ matrix + bias
    whole, parts = Harmonizer(WIDTH, 8), Harmonizer(WIDTH, 8)
    fit_harmonizer(whole, _statistics(x, y, chunks=1), 1e-3)
    fit_harmonizer(parts, _statistics(x, y, chunks=8), 1e-3)
    assert torch.allclose(whole(x), parts(x), atol=1e-4)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scaleot_ray.emulator.rank_compression import LowRankLinear, compress, kept_rank, truncate
from scaleot_ray.families import dense_weight, family_of
from tests.tiny_models import TINY, tiny_model


@pytest.mark.parametrize(
    ("shape", "beta", "rank"),
    [((576, 576), 0.8, 115), ((192, 576), 0.8, 38), ((8, 8), 0.99, 1), ((10, 20), 0, 10), ((192, 576), 0.001, 191)],
)
def test_beta_is_a_rank_reduction(shape, beta, rank):
    assert kept_rank(shape, beta) == rank


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 20))
def test_truncation_is_the_best_approximation_of_its_rank(rows, columns, rank):
    rank = min(rank, rows, columns)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    up, down = truncate(weight, rank)
    assert up.shape == (rows, rank)
    assert down.shape == (rank, columns)
    # Eckart-Young: the error is the norm of the singular values that were left out.
    expected = torch.linalg.svdvals(weight)[rank:].norm()
    assert torch.allclose((weight - up @ down).norm(), expected, atol=1e-4)


def _module(weight, bias, beta, rows):
    factors = compress(weight, beta, rows)
    module = LowRankLinear(
        weight.shape[1], [up.shape[0] for up, _ in factors], [up.shape[1] for up, _ in factors], bias is not None, rows
    )
    with torch.no_grad():
        module.down.copy_(torch.cat([down for _, down in factors]))
        for parameter, (up, _) in zip(module.up, factors, strict=True):
            parameter.copy_(up)
        if bias is not None:
            module.bias.copy_(bias)
    return module


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.8])
def test_factored_equals_dense_in_every_family(name, beta):
    model = tiny_model(name)
    family = family_of(model.config)
    layer = family.layers(model)[3]
    for projection in family.attention:
        raw = layer.get_submodule(projection.path)
        weight = dense_weight(raw).detach()
        bias = getattr(raw, "bias", None)
        rows = projection.parts(model.config) if projection.parts else None
        factors = compress(weight, beta, rows)
        product = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for (up, down), index in zip(factors, rows or [torch.arange(len(weight))], strict=True):
            product[index] = up @ down
        x = torch.randn(2, 5, weight.shape[1])
        dense = nn.functional.linear(x, product, bias)
        with torch.no_grad():
            assert torch.allclose(_module(weight, bias, beta, rows)(x), dense, atol=1e-5)
            if beta == 0:
                assert torch.allclose(product, weight, atol=1e-5)
                assert torch.allclose(dense, raw(x), atol=1e-5)
            else:
                assert not torch.allclose(product, weight, atol=1e-2)


def test_parts_of_a_fused_projection_are_compressed_apart():
    # A strong query must not crowd out the key and the value: each part keeps its own rank.
    torch.manual_seed(0)
    query, key = 100 * torch.randn(16, 16), torch.randn(16, 16)
    fused = torch.cat([query, key])
    apart = compress(fused, 0.5, (torch.arange(16), torch.arange(16, 32)))
    alone = compress(key, 0.5)
    assert torch.allclose(apart[1][0] @ apart[1][1], alone[0][0] @ alone[0][1], atol=1e-4)
    up, down = truncate(fused, 8)
    assert (fused - up @ down)[16:].norm() > 1.2 * (key - alone[0][0] @ alone[0][1]).norm()

"""A harmonizer that is masked out stays as it is, whoever fills up its gradients."""

import copy

import pytest
import torch

from scaleot_ray.emulator.harmonizer import Harmonizer
from scaleot_ray.emulator.masked_adam import MaskedAdamW

MASKS = [{1, 2}, {2, 3}, {1, 3}, {1}, {2, 3}]


def _modules():
    torch.manual_seed(0)
    return {index: Harmonizer(6, 3, "silu") for index in (1, 2, 3)}


def _gradients(modules, mask, step, filled):
    generator = torch.Generator().manual_seed(step)
    for index, module in modules.items():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad = drawn if index in mask else torch.zeros_like(parameter) if filled else None


@pytest.mark.parametrize("filled", [False, True])
def test_it_is_adamw_that_skips_what_has_no_gradient(filled):
    masked, plain = _modules(), _modules()
    optimizer = MaskedAdamW(masked, 0.1, weight_decay=0.05)
    reference = torch.optim.AdamW(
        [parameter for module in plain.values() for parameter in module.parameters()],
        lr=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.05,
    )
    for step, mask in enumerate(MASKS):
        rate = 0.1 / (step + 1)
        _gradients(masked, mask, step, filled)
        _gradients(plain, mask, step, filled=False)
        optimizer.prepare(mask, rate)
        reference.param_groups[0]["lr"] = rate
        optimizer.step()
        reference.step()
    for index in masked:
        pairs = zip(masked[index].parameters(), plain[index].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_zeros_for_gradients_would_move_it():
    # What the mask is for: with its momentum running on, a harmonizer that nobody used changes.
    modules = _modules()
    optimizer = torch.optim.AdamW([{"params": list(module.parameters())} for module in modules.values()], lr=0.1)
    for step, mask in enumerate([{1, 2, 3}, {1}]):
        before = copy.deepcopy(modules[2].state_dict())
        _gradients(modules, mask, step, filled=True)
        optimizer.step()
    assert not torch.equal(before["down.weight"], modules[2].down.weight)


def test_moments_begin_at_zero_for_all_and_change_nothing():
    with_beginning, without = _modules(), _modules()
    optimizers = [MaskedAdamW(modules, 0.1, 0.0) for modules in (with_beginning, without)]
    optimizers[0].begin_moments()
    for modules, optimizer in zip((with_beginning, without), optimizers, strict=True):
        _gradients(modules, {1}, 0, filled=True)
        optimizer.prepare({1}, 0.1)
        optimizer.step()
    assert all(
        torch.equal(one, other)
        for index in with_beginning
        for one, other in zip(with_beginning[index].parameters(), without[index].parameters(), strict=True)
    )
    assert all(state["step"] == 0 for state in list(optimizers[1].state.values())[4:])

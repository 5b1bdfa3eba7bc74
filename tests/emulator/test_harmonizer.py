import pytest
import torch
from torch import nn

from scaleot_ray.emulator.harmonizer import ACTIVATIONS, Harmonizer, switchable
from scaleot_ray.families import family_of
from tests.tiny_models import TINY, tiny_model, tiny_tokens


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_new_harmonizer_is_the_identity_and_yet_learns(activation):
    harmonizer = Harmonizer(16, 4, activation)
    x = torch.randn(2, 5, 16)
    output = harmonizer(x)
    assert torch.equal(output, x)
    (output - torch.randn_like(x)).square().mean().backward()
    assert harmonizer.up.weight.grad is not None
    assert harmonizer.up.weight.grad.abs().max() > 0


def test_with_both_matrices_at_zero_only_the_bias_would_learn():
    # Why W_down starts random: the control for the test above.
    harmonizer = Harmonizer(16, 4)
    nn.init.zeros_(harmonizer.down.weight)
    (harmonizer(torch.randn(2, 5, 16)) - 1).square().mean().backward()
    assert harmonizer.up.weight.grad.abs().max() == 0
    assert harmonizer.down.weight.grad.abs().max() == 0
    assert harmonizer.up.bias.grad.abs().max() > 0


@pytest.mark.parametrize("name", list(TINY))
def test_switching_replaces_layers_and_leaves_the_model_as_it_was(name):
    model = tiny_model(name)
    family = family_of(model.config)
    tokens = tiny_tokens()
    before = model(input_ids=tokens).logits
    names = list(model.state_dict())
    harmonizers = {index: Harmonizer(32, 4, returns_tuple=family.returns_tuple) for index in (2, 4)}
    with switchable(model, family, harmonizers) as switchboard:
        assert torch.equal(model(input_ids=tokens).logits, before)
        switchboard.set({2, 4})
        replaced = model(input_ids=tokens).logits
        assert not torch.allclose(replaced, before)
        switchboard.set(set())
        assert torch.equal(model(input_ids=tokens).logits, before)
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_raw_layers_come_back_when_a_step_fails():
    model = tiny_model("llama")
    family = family_of(model.config)
    raw = list(family.layers(model))
    with pytest.raises(ZeroDivisionError), switchable(model, family, {3: Harmonizer(32, 4)}):
        raise ZeroDivisionError
    assert list(family.layers(model)) == raw

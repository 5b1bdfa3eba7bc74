import pytest
import torch

from scaleot_ray.emulator.calibration import calibrate
from scaleot_ray.emulator.closed_form import fit_harmonizer
from scaleot_ray.emulator.harmonizer import Harmonizer
from scaleot_ray.emulator.rank_compression import truncate
from scaleot_ray.families import dense_weight, family_of
from tests.emulator.token_stream import RandomTokens
from tests.tiny_models import TINY, tiny_model

STREAM = RandomTokens()


def _calibrate(name, steps=6, stream=None):
    model = tiny_model(name).requires_grad_(False)
    family = family_of(model.config)
    return model, family, calibrate(model, family, (2, 5), stream or STREAM.batches(), steps)


@pytest.mark.parametrize("name", list(TINY))
def test_every_family_is_watched_without_a_trace(name):
    model, family, found = _calibrate(name)
    assert set(found.residuals) == set(found.moments) == {2, 5}
    assert found.residuals[2].tokens > 0.8 * 6 * 4 * 16
    assert fit_harmonizer(Harmonizer(32, 32), found.residuals[2], 1e-3) > 0.2
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for projection in family.attention:
        moment = found.moments[2][found.leader[projection.path]]
        width = dense_weight(family.layers(model)[2].get_submodule(projection.path)).shape[1]
        assert moment.shape == (width, width)
        assert torch.linalg.eigvalsh(moment.double()).min() > -1e-4


def test_query_key_and_value_share_one_moment():
    _, _, found = _calibrate("llama")
    assert set(found.moments[2]) == {"self_attn.q_proj", "self_attn.o_proj"}
    assert found.leader["self_attn.v_proj"] == "self_attn.q_proj"


def test_moments_are_means_over_real_tokens():
    model = tiny_model("llama").requires_grad_(False)
    layer = model.model.layers[2]
    seen = []
    handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = next(STREAM.batches())
    batch["attention_mask"][:, 10:] = 0
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    found = calibrate(model, family_of(model.config), (2,), [batch, batch], 2)
    rows = seen[0][:, :10].flatten(0, 1)
    assert torch.allclose(found.moments[2]["self_attn.o_proj"], rows.T @ rows / len(rows), atol=1e-5)
    assert found.residuals[2].tokens <= 2 * 4 * 10


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "phi3"])
def test_activation_aware_truncation_keeps_more_of_the_output(name):
    model, family, found = _calibrate(name, steps=20)
    layer = family.layers(model)[2]
    inputs = []
    path = family.attention[-1].path
    layer.get_submodule(path).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(input_ids=next(STREAM.batches(50))["input_ids"])
    x = inputs[0].flatten(0, -2)
    weight = dense_weight(layer.get_submodule(path)).detach()

    def error(moment):
        up, down = truncate(weight, 8, moment)
        return (x @ (weight - up @ down).T).square().mean()

    aware, plain = error(found.moments[2][found.leader[path]]), error(None)
    assert aware < plain
    up, down = truncate(weight, min(weight.shape), found.moments[2][found.leader[path]])
    assert torch.allclose(up @ down, weight, atol=1e-4)

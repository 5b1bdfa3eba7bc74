from __future__ import annotations

import pytest
import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.artifacts.manifest import EmulatorContent, MetricsContent
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families import family_of
from scaleot_ray.tuning import METHODS, Delta, from_artifact, method_named, tune
from scaleot_ray.tuning.delta import check_tensors
from tests.tiny_models import TINY, tiny_model
from tests.tuning.tiny_batches import POSITIONS, tiny_batches, tiny_settings


def emulator_artifact(architecture: str) -> Artifact:
    """Every tensor of a tiny model as an emulator artefact (it hides nothing; only names and shapes matter)."""
    model = tiny_model(architecture)
    roles = ["plug_in" if index in POSITIONS else "kept" for index in range(8)]
    size = sum(parameter.numel() for parameter in model.parameters())
    content = EmulatorContent(
        plug_in_layers=4, alpha=0.0, beta=0.0, layout="ends", layer_map=roles, builder="scaleot",
        full_parameters=size, verbatim_parameters=size, full_bytes=4 * size, base_digest="0" * 64, protected=False,
    )  # fmt: skip
    return Artifact.create(
        "emulator",
        content,
        dict(model.named_parameters()),
        family=family_of(model.config).name,
        model_config=model.config.to_dict(),
    )


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("method", METHODS)
def test_a_delta_crosses_as_an_artefact(method: str, architecture: str) -> None:
    parent = emulator_artifact(architecture).manifest
    model = tiny_model(architecture)
    delta = tune(model, family_of(model.config), POSITIONS, tiny_batches(), tiny_settings(method, steps=1)).delta
    artifact = delta.to_artifact(parent)
    check_crossing(artifact, parent=parent)
    assert artifact.manifest.kind == "delta"
    assert artifact.manifest.family == parent.family
    assert artifact.manifest.parent_digest == parent.digest()
    back = from_artifact(artifact)
    assert (back.method, back.positions, back.settings) == (delta.method, delta.positions, delta.settings)
    assert back.tensors.keys() == delta.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in delta.tensors.items())
    if method == "layers":
        assert all(parent.tensors[name].shape == list(tensor.shape) for name, tensor in back.tensors.items())


def test_other_kinds_are_no_delta() -> None:
    with pytest.raises(ArtifactRefused, match="Expected a delta, found an artefact of kind 'metrics'"):
        from_artifact(Artifact.create("metrics", MetricsContent(values={"loss": 1.0}), {}))


def test_a_change_that_is_not_finite_does_not_become_an_artefact() -> None:
    delta = Delta("layers", (0,), {}, {"model.layers.0.x": torch.tensor([float("nan")])})
    with pytest.raises(ArtifactRefused, match="not finite"):
        delta.to_artifact(emulator_artifact("llama").manifest)


@pytest.mark.parametrize(
    ("method", "tensors", "nothing"),
    [
        ("layers", {"a": 0.0, "b": -0.0}, True),
        ("layers", {"a": 0.0, "b": 1e-30}, False),
        ("lora", {"q.lora_A": 1.0, "q.lora_B": 0.0}, True),
        ("lora", {"q.lora_A": 0.0, "q.lora_B": 1.0}, False),
        ("bottleneck", {"down.weight": 1.0, "bottleneck.up.weight": 0.0, "bottleneck.up.bias": 0.0}, True),
        ("bottleneck", {"down.weight": 1.0, "bottleneck.up.weight": 0.0, "bottleneck.up.bias": 1.0}, False),
    ],
)
def test_whether_it_changes_anything(method: str, tensors: dict[str, float], nothing: bool) -> None:
    delta = Delta(method, (0,), {}, {name: torch.full((2,), value) for name, value in tensors.items()})
    assert delta.changes_nothing is nothing


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "'a' is missing"),
        ({"a": (2,), "b": (2,)}, "'b' is none of the plug-in layers'"),
        ({"a": (2, 1)}, r"'a' has shape \(2, 1\), the model needs \(2,\)"),
    ],
)
def test_tensors_are_checked_by_name(found: dict[str, tuple[int, ...]], message: str) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in found.items()}
    with pytest.raises(ArtifactRefused, match=message):
        check_tensors(tensors, {"a": torch.Size((2,))}, "layers")


def test_unknown_methods() -> None:
    with pytest.raises(ConfigError, match="no method 'prefix'") as refused:
        method_named("prefix")
    assert "layers, lora, bottleneck" in refused.value.remedy

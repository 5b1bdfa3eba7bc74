"""What tuning changed in the plug-in layers: the only weights that go back to the model owner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.card import with_card
from scaleot_ray.artifacts.manifest import DeltaContent, Manifest
from scaleot_ray.errors import ArtifactRefused

MethodSettings = dict[str, int | float | str | list[str]]


@dataclass
class Delta:
    """A tuned change of the plug-in layers.

    Attributes:
        method: ``layers``, ``lora`` or ``bottleneck``.
        positions: depths of the plug-in layers; the same in the emulator and in the full model.
        settings: what the method needs to be rebuilt (lora: rank, alpha, targets; bottleneck: width, activation).
        tensors: by name, fp32 (fp64 for an fp64 model); the names are full names in the model:

            - ``layers``: the plug-in layers' parameter names, tuned − received;
            - ``lora``: ``<layer prefix><projection>.lora_A`` (r, in) and ``.lora_B`` (out, r);
            - ``bottleneck``: ``<layer prefix>bottleneck.{down,up}.{weight,bias}``.
    """

    method: str
    positions: tuple[int, ...]
    settings: MethodSettings
    tensors: dict[str, torch.Tensor]

    @property
    def changes_nothing(self) -> bool:
        """Whether the delta leaves the model's function as it is.

        A low-rank pair or a bottleneck changes nothing while its second map (B, up) is zero, whatever
        the first one holds.
        """
        second = {"lora": (".lora_B",), "bottleneck": (".up.weight", ".up.bias")}.get(self.method, ("",))
        return not any(tensor.any() for name, tensor in self.tensors.items() if name.endswith(second))

    def to_artifact(self, parent: Manifest, start: str | None = None) -> Artifact:
        """The delta as what crosses, with its card.

        Args:
            parent: the emulator it was tuned on.
            start: digest of the delta that tuning began with; None for the emulator as it was received.
        """
        content = DeltaContent(
            method=self.method, positions=list(self.positions), settings=dict(self.settings), start=start
        )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return with_card(Artifact.made_from(parent, "delta", content, tensors))


def from_artifact(artifact: Artifact) -> Delta:
    """The delta that an artefact holds.

    Raises:
        ArtifactRefused: the artefact is of another kind.
    """
    content = artifact.manifest.content
    if not isinstance(content, DeltaContent):
        raise ArtifactRefused(
            f"Expected a delta, found an artefact of kind {artifact.manifest.kind!r}.",
            "Give the folder that `scaleot tune` wrote its delta to.",
        )
    return Delta(content.method, tuple(content.positions), dict(content.settings), dict(artifact.tensors))


def check_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], method: str) -> None:
    """Refuses a delta whose tensors are not exactly those that its method has in this model.

    Raises:
        ArtifactRefused: a tensor is missing, unknown, or of another shape; the message names it.
    """
    remedy = "Use the delta with the model whose emulator it was tuned on."
    for name in sorted(expected.keys() - found.keys()):
        raise ArtifactRefused(f"Delta ({method}): tensor {name!r} is missing.", remedy)
    for name in sorted(found.keys() - expected.keys()):
        raise ArtifactRefused(f"Delta ({method}): tensor {name!r} is none of the plug-in layers'.", remedy)
    for name, shape in expected.items():
        shape_found = tuple(found[name].shape)
        if shape_found != tuple(shape):
            problem = f"Delta ({method}): tensor {name!r} has shape {shape_found}, the model needs {tuple(shape)}."
            raise ArtifactRefused(problem, remedy)

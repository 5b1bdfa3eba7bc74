"""Whether a delta was tuned as the run's settings say: what is aggregated must be of one kind, and of sane size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.manifest import DeltaContent, Manifest
from scaleot_ray.artifacts.tensor_roles import family_named
from scaleot_ray.artifacts.untrusted import quoted
from scaleot_ray.config import TuneSettings
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.tuning.methods import method_named

LARGEST_VALUE = 1e30
"""Largest value of a delta that is let in: what aggregating makes of such values is still finite in float32."""

_KEYS = {"rank": "tune.lora_rank", "alpha": "tune.lora_alpha", "width": "tune.bottleneck_width"}
REMEDY = "Tune again with the settings of this run, its section tune and that of tenants.N."


class Fit:
    """What deltas on one emulator must be like.

    Args:
        emulator: its manifest.
        tunes: how each data owner of the run tunes, by name; for no data owner at all, as by default.
    """

    def __init__(self, emulator: Manifest, tunes: Mapping[str, TuneSettings]) -> None:
        self._family, self._tunes = family_named(emulator), dict(tunes)

    def problem(self, tenant: str, content: DeltaContent) -> str | None:
        """What a delta was tuned with that the run's settings do not say; None where it fits.

        Of a data owner that is not in the run any more: of what the run says of nobody.
        """
        first: str | None = None
        for tune in [self._tunes[tenant]] if tenant in self._tunes else list(self._tunes.values()) or [TuneSettings()]:
            found = self._difference(tune, content)
            if found is None:
                return None
            first = first or found
        return first

    def tuned_with(self, tenant: str, content: DeltaContent) -> dict[str, Any]:
        """What a delta was tuned with, for the registry."""
        tune = self._tunes.get(tenant)
        told = {"tune": tune.decisive()} if tune is not None else {}
        return {"method": content.method, **content.settings, **told}

    def _difference(self, tune: TuneSettings, content: DeltaContent) -> str | None:
        if content.method != tune.method:
            return f"it was tuned with method {content.method}, and this run has tune.method={tune.method}"
        for key, value in method_named(tune.method).settings(tune, self._family).items():
            if content.settings.get(key) != value:
                wanted = f"{_KEYS[key]}={value}" if key in _KEYS else repr(value)
                return f"it was tuned with {key} {quoted(content.settings.get(key))}, and this run has {wanted}"
        return None


def check_size(delta: Artifact) -> None:
    """Refuses a delta with a value of which an aggregate might become infinite.

    Raises:
        ArtifactRefused: names the tensor.
    """
    for name, tensor in delta.tensors.items():
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)
        largest = max(-low.item(), high.item())
        if not largest <= LARGEST_VALUE:
            raise ArtifactRefused(
                f"tensor {name!r} has a value of size {largest:.3g}; a delta has none above {LARGEST_VALUE:g}.",
                "Such a model is broken: lower tune.learning_rate, and tune again.",
            )

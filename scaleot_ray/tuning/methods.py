"""The plug-in methods by name."""

from __future__ import annotations

from scaleot_ray.errors import ConfigError
from scaleot_ray.tuning.bottleneck import ResidualBottleneck
from scaleot_ray.tuning.layers import WholeLayers
from scaleot_ray.tuning.lora import LowRank
from scaleot_ray.tuning.method import PlugInMethod

METHODS: dict[str, type[PlugInMethod]] = {kind.name: kind for kind in (WholeLayers, LowRank, ResidualBottleneck)}


def method_named(name: str) -> type[PlugInMethod]:
    """The class of a plug-in method.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"tune.method: there is no method {name!r}.", f"Take one of {', '.join(METHODS)}.")
    return METHODS[name]

"""Which decoder layer plays which role: tuned by the data owner, kept raw, replaced, or dropped.

ScaleOT (arXiv 2412.09812) calls the layers that the data owner tunes "adapter"; here they are the
*plug-in layers*, so that nobody thinks of Houlsby adapters. All others are *middle layers*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import Enum

from scaleot_ray.errors import ConfigError


class LayerRole(str, Enum):
    """Role of one decoder layer in an emulator; the values are what manifests carry."""

    PLUG_IN = "plug_in"
    KEPT = "kept"
    REPLACED = "replaced"
    DROPPED = "dropped"


def plug_in_positions(layers: int, count: int, layout: str = "ends", alpha: float = 0.0) -> tuple[int, ...]:
    """Positions of the plug-in layers.

    Args:
        layers: number of decoder layers n.
        count: number of plug-in layers N_a.
        layout: ``ends`` for the first ⌈N_a/2⌉ and last ⌊N_a/2⌋ layers (Offsite-Tuning, arXiv
            2302.04870), ``spread`` for an even spacing from the first to the last layer (CRaSh, arXiv
            2310.15477), ``last`` for the last N_a layers (ours: what they learn hardly depends on how gradients
            pass through the emulator's middle), ``block`` for N_a layers in a row in the middle of the depth,
            or as much further in front as leaves room for all replaced layers behind them (ours: in front of
            all replaced layers, plug-in layers see nearly what they will see in the full model).
        alpha: fraction of the middle layers that is replaced; ``block`` makes room for them, and for the last
            layer, which is never replaced there.

    Raises:
        ConfigError: there are not at least two middle layers left.
    """
    if count > layers - 2:
        remedy = f"Use at most {layers - 2} plug-in layers with this model."
        raise ConfigError(
            f"emulator.plug_in_layers: {count} of {layers} decoder layers leave no middle layers to hide.",
            remedy if layers > 2 else "Take a model of three layers or more.",
        )
    if layout == "ends":
        first = (count + 1) // 2
        return (*range(first), *range(layers - (count - first), layers))
    if layout == "last":
        return tuple(range(layers - count, layers))
    if layout == "block":
        room = layers - 1 - replaced_count(layers - count, alpha) - count
        first = max(min((layers - count) // 2, room), 0)
        return tuple(range(first, first + count))
    if count == 1:
        return (0,)
    return tuple(round(index * (layers - 1) / (count - 1)) for index in range(count))


def middle_layers(layers: int, plug_in: Iterable[int]) -> tuple[int, ...]:
    """Positions of the middle layers M, in order."""
    taken = set(plug_in)
    return tuple(index for index in range(layers) if index not in taken)


def replaced_count(middle: int, alpha: float) -> int:
    """How many of ``middle`` layers a fraction α replaces: rounded up, so that no less than α is hidden."""
    return math.ceil(alpha * middle - 1e-9)


def layer_map(
    layers: int,
    plug_in: Sequence[int],
    gone: Iterable[int],
    role: LayerRole = LayerRole.REPLACED,
) -> list[LayerRole]:
    """Roles of all layers when the middle layers ``gone`` are replaced (or dropped) and the rest kept."""
    roles = [LayerRole.KEPT] * layers
    for index in plug_in:
        roles[index] = LayerRole.PLUG_IN
    for index in gone:
        if roles[index] is LayerRole.PLUG_IN:
            raise ValueError(f"layer {index} is a plug-in layer and cannot be {role.value}")
        roles[index] = role
    return roles


def positions(roles: Sequence[LayerRole | str], role: LayerRole) -> tuple[int, ...]:
    """Positions at which ``roles`` has ``role``."""
    return tuple(index for index, found in enumerate(roles) if LayerRole(found) is role)

"""Model families: where decoder layers and their projections live, and how base models are loaded.

To add an architecture, describe it as a :class:`~scaleot_ray.families.family.Family` in a file of its
own (or add its ``model_type`` to one that has the same module names), list it in ``FAMILIES`` and add
a tiny config of it to ``tests/tiny_models.py``; the parity tests then run on it.
"""

from __future__ import annotations

from typing import Any

from scaleot_ray.errors import UnsupportedArchitectureError
from scaleot_ray.families.bloom import BLOOM
from scaleot_ray.families.family import Family, Projection, as_stored, dense_weight, hidden_size, layer_count
from scaleot_ray.families.gpt2 import GPT2
from scaleot_ray.families.llama import LLAMA
from scaleot_ray.families.neox import NEOX
from scaleot_ray.families.opt import OPT
from scaleot_ray.families.phi3 import PHI3

FAMILIES = (LLAMA, PHI3, GPT2, OPT, NEOX, BLOOM)

__all__ = ["FAMILIES", "Family", "Projection", "as_stored", "dense_weight", "family_of", "hidden_size", "layer_count"]


def family_of(config: Any) -> Family:
    """The family of a Hugging Face model config.

    Raises:
        UnsupportedArchitectureError: no family knows the config's ``model_type``.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    raise UnsupportedArchitectureError(
        f"model_type {config.model_type!r} belongs to no known family (known: {known}).",
        "Use a model of a known type, or describe the new one as a Family: scaleot_ray/families/__init__.py says how.",
    )

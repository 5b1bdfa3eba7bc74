"""Plug-in: a delta into the full model, merged into it, or written for other programs."""

from scaleot_ray.plugin.export import check_form, check_place, export_checkpoint, export_peft
from scaleot_ray.plugin.merge import merge, merged_weights
from scaleot_ray.plugin.plug import Plugged, check_fits, plug

__all__ = [
    "Plugged",
    "check_fits",
    "check_form",
    "check_place",
    "export_checkpoint",
    "export_peft",
    "merge",
    "merged_weights",
    "plug",
]

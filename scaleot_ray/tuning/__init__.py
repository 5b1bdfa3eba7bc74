"""Tuning: an emulator (or full model) and a data owner's batches → the delta of the plug-in layers."""

from scaleot_ray.tuning.delta import Delta, from_artifact
from scaleot_ray.tuning.method import PlugInMethod
from scaleot_ray.tuning.methods import METHODS, method_named
from scaleot_ray.tuning.run import History
from scaleot_ray.tuning.trainer import Tuned, tune

__all__ = ["METHODS", "Delta", "History", "PlugInMethod", "Tuned", "from_artifact", "method_named", "tune"]

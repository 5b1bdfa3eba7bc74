"""Typed settings of every stage and of a whole run.

One YAML file describes a run; each section is one of the classes here and may be used alone from
Python. An unknown key is an error that names the nearest known one. Overrides of the form
``tune.learning_rate=5e-5`` reach any key.
"""

from scaleot_ray.config.aggregation import AggregationSettings
from scaleot_ray.config.inputs import DataSettings, ModelSettings
from scaleot_ray.config.owner import PAPER, EmulatorSettings, OwnerSettings, StageOneSettings
from scaleot_ray.config.parallel import ParallelSettings
from scaleot_ray.config.placement import PlacementSettings
from scaleot_ray.config.reading import load_yaml, override, parse
from scaleot_ray.config.rounds import RoundSettings
from scaleot_ray.config.run import RunSettings, TenantSettings
from scaleot_ray.config.settings import Number, Settings
from scaleot_ray.config.tune import TuneSettings

__all__ = [
    "PAPER",
    "AggregationSettings",
    "DataSettings",
    "EmulatorSettings",
    "ModelSettings",
    "Number",
    "OwnerSettings",
    "ParallelSettings",
    "PlacementSettings",
    "RoundSettings",
    "RunSettings",
    "Settings",
    "StageOneSettings",
    "TenantSettings",
    "TuneSettings",
    "load_yaml",
    "override",
    "parse",
]

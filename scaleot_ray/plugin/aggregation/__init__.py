"""Many data owners' deltas as one: streamed from disk, robust or weighted, exact for low-rank updates."""

from scaleot_ray.plugin.aggregation.aggregate import Aggregate, aggregate, check_fits_tuning, working_bytes
from scaleot_ray.plugin.aggregation.contribution import Contribution, clipped, contributions
from scaleot_ray.plugin.aggregation.server import ServerState

__all__ = [
    "Aggregate",
    "Contribution",
    "ServerState",
    "aggregate",
    "check_fits_tuning",
    "clipped",
    "contributions",
    "working_bytes",
]

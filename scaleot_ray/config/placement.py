"""Where the parts of a run go on a cluster."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from scaleot_ray.config.settings import Number, Settings

# What Ray takes as a label of a node; its selectors' operators (!a, in(a, b)) are no values.
_Key = Annotated[str, StringConstraints(pattern=r"^([a-zA-Z0-9.-]+/)?[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?$")]
_Value = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?$")]

Labels = dict[_Key, _Value]


class PlacementSettings(Settings):
    """Where the parts of a run go on a cluster (``environment: cluster``), and how long they wait for room."""

    owner_labels: Labels = Field(
        {},
        description="labels (ray start --labels key=value) of the nodes that may hold the full model: the model owner "
        "and evaluators work there; default: any node",
    )
    timeout: Number = Field(
        300.0,
        gt=0,
        description="seconds in which no part of the run is at work, after which a part that waits for a node is given "
        "up; if that is a data owner's tuning, the round goes on without it as long as rounds.quorum holds",
    )
    autoscaling: bool = Field(
        False,
        description="the cluster adds nodes on demand: wait for a node instead of refusing at once what no present "
        "node has",
    )

"""Rounds of a run: how often data owners tune, and how long they are waited for."""

from __future__ import annotations

from pydantic import Field

from scaleot_ray.config.settings import Number, Settings


class RoundSettings(Settings):
    """Rounds: each begins with what all data owners learned in the round before."""

    count: int = Field(
        1,
        ge=1,
        description="rounds; more than one needs aggregation, since each begins with the aggregate so far. Each goes "
        "on in a data owner's rows where the one before ended",
    )
    quorum: int | None = Field(
        None, ge=1, description="fewest deltas with which a round succeeds; default: one of every admitted data owner"
    )
    deadline: Number | None = Field(
        None, gt=0, description="seconds after which a round is closed; late data owners are recorded, not waited for"
    )
    staleness: int = Field(
        0, ge=0, description="by how many rounds a delta may be late and still count, in the round that is then open"
    )
    attempts: int = Field(
        3,
        ge=1,
        description="how often a data owner's tuning is started in a round if its process dies; the same for its "
        "evaluator",
    )
    max_norm: Number | None = Field(
        None, gt=0, description="longest norm of a delta that is accepted (aggregation.clip_norm shortens instead)"
    )

"""Rounds of a run: how often data owners tune, and who is waited for."""

from __future__ import annotations

from pydantic import Field

from scaleot_ray.config.settings import Number, Settings


class RoundSettings(Settings):
    """Rounds: each begins with what all data owners learned in the round before."""

    count: int = Field(
        1, ge=1, description="rounds; more than one need aggregation, since each begins with the aggregate so far"
    )
    quorum: int | None = Field(
        None, ge=1, description="data owners without whose delta a round fails; default: all that are admitted"
    )
    deadline: Number | None = Field(
        None, gt=0, description="seconds after which a round is closed; who is late is recorded, not waited for"
    )
    staleness: int = Field(
        0, ge=0, description="rounds that a delta may be late by and still count, in the round that is open then"
    )
    attempts: int = Field(
        3, ge=1, description="how often a data owner's tuning is started in a round whose process dies"
    )
    max_norm: Number | None = Field(
        None, gt=0, description="longest norm of a delta that is let in (aggregation.clip_norm shortens instead)"
    )

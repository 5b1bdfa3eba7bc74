"""How the deltas of several data owners become one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from scaleot_ray.config.settings import Number, Settings

VALUE_BY_VALUE = ("mean", "median", "trimmed_mean")
"""Methods that work value by value, so that a server optimizer may follow them."""


class AggregationSettings(Settings):
    """One delta out of many."""

    method: Literal["mean", "median", "trimmed_mean", "concat", "svd", "ties", "dare"] = Field(
        "mean",
        description="mean: weighted (FedAvg); for tune.method=lora of the factors A and of the factors B, which is "
        "not the mean of the updates B·A; median, trimmed_mean: value by value, whatever a minority sends, without "
        "weights; concat, svd: for tune.method=lora, the exact weighted mean of the updates, of the rank of all "
        "together, and its best approximation of rank; ties, dare: for tune.method=layers, deltas thinned out before "
        "they are combined. Memory: docs/administration.md",
    )
    trim: Number = Field(
        0.1, ge=0, lt=0.5, description="trimmed_mean: share of the data owners left out at either end of every value"
    )
    rank: int | None = Field(None, ge=1, description="svd: rank of the result; default: the largest that was sent")
    density: Number = Field(0.2, gt=0, le=1, description="ties, dare: share of every delta's values that counts")
    clip_norm: Number | None = Field(
        None,
        gt=0,
        description="longest norm a delta may count with; a longer one is shortened to it. Not for a mean of low-rank "
        "factors, and not for tune.method=bottleneck",
    )
    seed: int = Field(0, description="dare: which values are dropped, in each round others")
    server: Literal["none", "momentum", "adam"] = Field(
        "none",
        description="what becomes of a round's result: taken as it is, or as the gradient of FedAvgM or FedAdam",
    )
    server_learning_rate: Number = Field(1.0, gt=0, description="adam wants about 1e-3")
    server_momentum: Number = Field(0.9, ge=0, lt=1, description="β of FedAvgM, β₁ of FedAdam")
    server_beta2: Number = Field(0.99, ge=0, lt=1, description="β₂ of FedAdam")
    server_epsilon: Number = Field(1e-3, gt=0, description="τ of FedAdam")

    @model_validator(mode="after")
    def _server_follows_a_linear_method(self) -> AggregationSettings:
        if self.server != "none" and self.method not in VALUE_BY_VALUE:
            raise ValueError(
                f"server={self.server} keeps a running value for every value of a delta, which {self.method} does not "
                f"have; set method to one of {', '.join(VALUE_BY_VALUE)}, or server to none"
            )
        return self

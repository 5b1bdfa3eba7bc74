"""How a data owner tunes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from scaleot_ray.config.settings import Number, Settings


class TuneSettings(Settings):
    """A data owner's tuning of the plug-in layers."""

    method: Literal["layers", "lora", "bottleneck"] = Field(
        "layers",
        description="what is trained. layers: all weights of the plug-in layers; lora: low-rank updates of their "
        "projections; bottleneck: a small residual network after each of them",
    )
    lora_rank: int = Field(16, ge=1, description="lora: rank of each update")
    lora_alpha: Number = Field(32.0, gt=0, description="lora: each update counts lora_alpha / lora_rank times")
    bottleneck_width: int = Field(64, ge=1, description="bottleneck: hidden units of each network")
    steps: int = Field(100, ge=1, description="optimizer steps; each reads batch_size × accumulate sequences")
    batch_size: int = Field(4, ge=1, description="sequences per forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes per optimizer step")
    block_size: int = Field(128, ge=8, description="tokens per sequence; longer ones are split (text) or refused")
    too_long: Literal["error", "truncate"] = Field(
        "error",
        description="prompt + completion rows longer than block_size: stop, or cut the prompt's start",
    )
    learning_rate: Number | None = Field(None, gt=0, description="default: 2e-4 for layers, 1e-3 for lora, bottleneck")
    weight_decay: Number = Field(0.0, ge=0, description="of AdamW")
    warmup_fraction: Number = Field(
        0.1, ge=0, le=1, description="share of the steps in which the learning rate rises; then it falls as a cosine"
    )
    max_grad_norm: Number = Field(1.0, gt=0, description="longest norm of a step's gradient; a longer one is shortened")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="type that the forward pass computes in, where it is narrower than the weights; they keep theirs",
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them: less memory, slower"
    )
    evaluate_every: int | None = Field(None, ge=1, description="steps between two evaluations on validation rows")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many evaluations without improvement, and take the weights of the best one",
    )
    validation_fraction: Number = Field(
        0.1,
        gt=0,
        lt=1,
        description="with evaluate_every and without validation rows of their own: share of the training rows "
        "(whole rows or documents, drawn by seed) that is kept out of training for them",
    )
    checkpoint_every: int = Field(
        50, ge=1, description="steps between two checkpoints; one is also written after every minute"
    )
    seed: int = Field(0, description="of batches, dropout, new parameters and rows kept out for validation")

    def decisive(self) -> dict[str, Any]:
        """The keys that a result depends on, as plain values: equal ones give the same delta."""
        unused = {"checkpoint_every"}  # changes when something is written, not what
        if self.evaluate_every is None:
            unused.add("validation_fraction")
        return self.model_dump(mode="json", exclude=unused)

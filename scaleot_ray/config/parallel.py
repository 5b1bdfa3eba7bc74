"""Several workers that share the steps of stage 1."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scaleot_ray.config.settings import Number, Settings


class ParallelSettings(Settings):
    """A group of workers on Ray that makes the steps of stage 1 under DeepSpeed; without it one process does."""

    workers: int = Field(
        ge=1,
        description="processes; each takes its share of every batch: stage_one.batch_size has to be a multiple",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        3,
        description="ZeRO stage: 3 spreads the model's layers over the workers; below that each worker holds the whole "
        "model; 1 and 2 spread the harmonizers' optimizer alone, 0 spreads nothing and does without DeepSpeed",
    )
    cpus: int = Field(1, ge=1, description="processors of each worker")
    gpus: Literal[0, 1] = Field(0, description="GPUs of each worker; with 0 it computes on processors")
    memory_gb: Number | None = Field(
        None, gt=0, description="memory that each worker claims of Ray, in 10^9 bytes; default: none"
    )
    deepspeed: str | None = Field(
        None,
        description="a DeepSpeed configuration (JSON) that is passed on, e.g. for offloading to memory or NVMe; what "
        "it says of batches, precision and the ZeRO stage has to agree with these settings",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass instead of keeping them"
    )
    attempts: int = Field(
        3, ge=1, description="starts of the group without progress in between, after which a run is given up"
    )
    timeout: Number = Field(
        300.0, gt=0, description="seconds to wait for workers' places on Ray, and for their first answer"
    )

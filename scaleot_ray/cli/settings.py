"""Settings of one command each: what its options, its ``--set`` and a job's YAML file fill in.

The sections are those of :mod:`scaleot_ray.config`; a whole run has its own class there.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scaleot_ray.config import (
    DataSettings,
    EmulatorSettings,
    ModelSettings,
    Number,
    OwnerSettings,
    ParallelSettings,
    Settings,
    StageOneSettings,
    TuneSettings,
)
from scaleot_ray.result_folder import ResultFolder

RowName = Literal["full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned"]


class BuildSettings(OwnerSettings):
    """``scaleot build`` and ``jobs/build_emulator.py``: a base model and public text → an emulator."""

    output: ResultFolder = Field(description="folder the emulator artefact is written to; what a data owner receives")
    cache: ResultFolder | None = Field(
        None, description="folder of stage-1 results and checkpoints; stays with the model owner; default: OUTPUT-cache"
    )
    overwrite: bool = Field(False, description="replace an earlier emulator in output")
    stream: bool = Field(
        False,
        description="leave the model on disk and work on one decoder layer at a time, in float32: memory for one layer "
        "instead of the model. Harmonizers and scores come in closed form, without generated text and, unless workers "
        "make them (parallel), without steps; model.dtype must be the type that the weights are stored in",
    )
    parallel: ParallelSettings | None = Field(
        None, description="a group of workers on Ray makes the steps of stage 1; without it the building process does"
    )


class PlanSettings(Settings):
    """``scaleot doctor --model``: what building an emulator of a model and tuning it would need."""

    model: ModelSettings
    stage_one: StageOneSettings = StageOneSettings()
    emulator: EmulatorSettings = EmulatorSettings()
    stream: bool = Field(False, description="as of scaleot build")
    parallel: ParallelSettings | None = Field(None, description="as of scaleot build")
    tune: TuneSettings = Field(TuneSettings(), description="of a data owner")


class TuneCommandSettings(Settings):
    """``scaleot tune`` and ``jobs/tune.py``: an emulator and private data → a delta."""

    emulator: str = Field(min_length=1, description="folder of an emulator artefact")
    name: str = Field("data owner", description="name of the data owner, for progress and records")
    train: DataSettings = Field(description="private rows to tune on")
    test: DataSettings | None = Field(
        None, description="held-out rows for the metrics; nothing about tuning depends on them"
    )
    validation: DataSettings | None = Field(
        None, description="rows for tune.evaluate_every; default: tune.validation_fraction of train"
    )
    tune: TuneSettings = Field(TuneSettings(), description="how the plug-in layers are tuned")
    output: ResultFolder = Field(description="folder; output/delta and output/metrics are what may be sent back")
    device: str = Field("auto", description="cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    evaluate_examples: int | None = Field(
        None, ge=1, description="at most so many test rows or blocks, and so many for validation"
    )
    overwrite: bool = Field(False, description="replace an earlier result in output")


class PlugSettings(Settings):
    """``scaleot plug`` and ``jobs/plug_in.py``: a base model and a delta → a checkpoint."""

    model: ModelSettings
    emulator: str = Field(min_length=1, description="folder of the emulator the delta was tuned on")
    delta: str = Field(min_length=1, description="folder of a delta artefact")
    name: str = Field("data owner", description="name of the data owner who sent the delta, for the audit log")
    output: ResultFolder = Field(description="folder the Hugging Face checkpoint (or PEFT adapter) is written to")
    scale: Number = Field(1.0, description="λ, factor on the delta; 1 takes it as it is")
    adapter: bool = Field(False, description="write a PEFT adapter instead of a merged checkpoint (lora only)")
    overwrite: bool = Field(False, description="replace an earlier result in output")


class EvaluateSettings(Settings):
    """``scaleot eval`` and ``jobs/evaluate.py``: models, artefacts and test rows → the standard table."""

    name: str = Field("test", description="name of the table")
    model: ModelSettings | None = Field(None, description="the full model; for three of the five rows")
    emulator: str | None = Field(None, min_length=1, description="folder of an emulator artefact")
    delta: str | None = Field(None, min_length=1, description="folder of a delta artefact")
    test: DataSettings = Field(description="rows to measure on")
    train: DataSettings | None = Field(None, description="training rows; for full_tuned only")
    validation: DataSettings | None = Field(
        None, description="rows for tune.evaluate_every; default: tune.validation_fraction of train"
    )
    tune: TuneSettings = Field(TuneSettings(), description="how full_tuned is tuned")
    rows: tuple[RowName, ...] | None = Field(None, description="rows of the table; default: all that the inputs allow")
    evaluate_examples: int | None = Field(
        None, ge=1, description="at most so many test rows or blocks, and so many for validation"
    )
    batch_size: int = Field(8, ge=1, description="sequences per forward pass")
    block_size: int = Field(128, ge=8, description="tokens per sequence")
    device: str = Field("auto", description="cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    folder: ResultFolder | None = Field(
        "scaleot-runs/eval",
        validate_default=True,
        description="keeps finished rows and the checkpoint of full_tuned, so that an interrupted evaluation goes on; "
        "it depends on the test rows, so keep it where they are; null keeps nothing",
    )

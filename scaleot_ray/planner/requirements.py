"""Whether a build fits, and the cheapest settings that do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from scaleot_ray.config import (
    EmulatorSettings,
    ModelSettings,
    ParallelSettings,
    StageOneSettings,
    TuneSettings,
)
from scaleot_ray.emulator.layer_map import LayerRole, positions
from scaleot_ray.errors import ConfigError, ResourcesMissing
from scaleot_ray.planner.build import plan_build
from scaleot_ray.planner.emulator import EmulatorShape
from scaleot_ray.planner.plan import Plan, Process, Room, shortages
from scaleot_ray.planner.tuning import tuning_process
from scaleot_ray.stages.streamed import check_streamable, streamed_settings


@dataclass(frozen=True)
class Build:
    """A build that is to be planned; see :func:`~scaleot_ray.planner.build.plan_build`.

    Attributes:
        config: of the full model.
        stored: type of its weights on disk.
        model, stage_one, emulator, stream, parallel: settings of the build.
        deepspeed: the group's DeepSpeed configuration.
        gpu: whether the building process computes on a GPU.
    """

    config: Any
    stored: str | None
    model: ModelSettings
    stage_one: StageOneSettings
    emulator: EmulatorSettings
    stream: bool = False
    parallel: ParallelSettings | None = None
    deepspeed: dict[str, Any] | None = None
    gpu: bool = False

    def plan(self) -> Plan:
        """What it needs.

        Raises:
            ConfigError: no such emulator can be built.
        """
        steps = self.parallel is not None
        if self.stream:
            check_streamable(self.stage_one, self.emulator, steps)
        return plan_build(
            self.config,
            self.model,
            streamed_settings(self.stage_one, steps) if self.stream else self.stage_one,
            self.emulator,
            stream=self.stream,
            parallel=self.parallel,
            deepspeed=self.deepspeed,
            gpu=self.gpu,
            stored=self.stored,
        )

    def tuning(self, tune: TuneSettings, gpu: bool = False) -> Process:
        """What a data owner of its emulator needs."""
        shape = EmulatorShape(self.config, getattr(torch, self.model.dtype), self.stage_one, self.emulator)
        return tuning_process(shape.model(), positions(shape.roles, LayerRole.PLUG_IN), tune, gpu=gpu)


def cheapest(build: Build, room: Room) -> tuple[str, Plan] | None:
    """What to change for a build to fit, as options of ``scaleot build``, and its plan; None where nothing helps.

    Changes are tried from the one that costs least time and quality to the one that costs most.
    """
    for options, changed in _wider(build):
        batches = list(_smaller_batches(options, changed))
        # What does not fit with the smallest batch hardly fits with a larger one (masks of more batches are less than
        # a percent): one plan instead of all.
        if _plan_that_fits(batches[-1][1], room) is None:
            continue
        for named, smaller in batches:
            if plan := _plan_that_fits(smaller, room):
                return named, plan
    return None


def _plan_that_fits(build: Build, room: Room) -> Plan | None:
    try:
        plan = build.plan()
    except ConfigError:
        return None
    return None if shortages(plan, room) else plan


def check_build(build: Build, room: Room, cluster: bool = False) -> None:
    """Refuses a build that cannot fit.

    Args:
        room: of this machine.
        cluster: workers have other machines, whose room is not known.

    Raises:
        ResourcesMissing: says what is needed, what there is, and the cheapest setting that fits.
        ConfigError: no such emulator can be built.
    """
    here = _HereOnly(**vars(build)) if cluster else build
    missing = shortages(here.plan(), room)
    if not missing:
        return
    lacking = "; ".join(
        f"{needed / 1e9:.3g} GB of {name}, there are {there / 1e9:.3g} GB" for name, (needed, there) in missing.items()
    )
    found = cheapest(here, room)
    remedy = (
        f"With {found[0]} it would fit; `scaleot doctor --model {build.model.path}` shows what takes how much."
        if found is not None
        else "No setting makes it fit: take a machine with more, or a smaller model "
        f"(`scaleot doctor --model {build.model.path}` shows what takes how much)."
    )
    raise ResourcesMissing(f"This build needs about {lacking}.", remedy)


class _HereOnly(Build):
    """The same, without workers that are elsewhere."""

    def plan(self) -> Plan:
        plan = super().plan()
        return replace(plan, processes=plan.processes[:1], object_store=0)


def _smaller_batches(options: str, build: Build) -> Iterator[tuple[str, Build]]:
    """A build as it is, and with smaller and smaller batches of stage 1."""
    yield options, build
    for size in _halves(build.stage_one.batch_size, build.parallel.workers if build.parallel else 1):
        smaller = _set(build, "stage_one", batch_size=size)
        yield f"{options} --set stage_one.batch_size={size}".strip(), smaller


def _wider(build: Build) -> Iterator[tuple[str, Build]]:
    """Larger changes, from the least to the largest; each is to be tried with smaller batches too."""
    group = build.parallel
    if group is not None:
        for zero in (0, 1, 2, 3):
            if zero > group.zero:
                yield f"--zero {zero}", _set(build, "parallel", zero=zero)
        wide = _set(build, "parallel", zero=3, gradient_checkpointing=True)
        yield "--zero 3 --set parallel.gradient_checkpointing=true", wide
        if not build.stream and build.stored is not None:
            text = f"--zero 3 --set parallel.gradient_checkpointing=true {_stream(build)}"
            yield text, replace(wide, stream=True, model=_typed(build))
        return
    yield "", build
    if build.stream:
        for tokens in _halves(build.emulator.fit_tokens, 4096):
            yield f"--set emulator.fit_tokens={tokens}", _set(build, "emulator", fit_tokens=tokens)
        return
    if build.gpu:
        yield "--device cpu", replace(build, gpu=False)
    if build.model.dtype == "float32":
        yield "--dtype bfloat16", _set(build, "model", dtype="bfloat16")
    if build.stored is not None:
        streamed = replace(build, stream=True, model=_typed(build))
        yield _stream(build), streamed
        for tokens in _halves(build.emulator.fit_tokens, 4096):
            text = f"{_stream(build)} --set emulator.fit_tokens={tokens}"
            yield text, _set(streamed, "emulator", fit_tokens=tokens)


def _typed(build: Build) -> ModelSettings:
    return build.model.model_copy(update={"dtype": build.stored})


def _stream(build: Build) -> str:
    return "--stream" if build.stored == build.model.dtype else f"--stream --dtype {build.stored}"


def _halves(value: int, least: int) -> Iterator[int]:
    """Half of a number, and so on, as long as it is a multiple of the least one."""
    while value % 2 == 0 and (value := value // 2) >= least and value % least == 0:
        yield value


def _set(build: Build, section: str, **values: Any) -> Build:
    changed: dict[str, Any] = {section: getattr(build, section).model_copy(update=values)}
    return replace(build, **changed)

"""A build whose steps are made by a group of workers, on the Ray that was given or one of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from scaleot_ray.config import DataSettings, ModelSettings, ParallelSettings, StageOneSettings
from scaleot_ray.emulator.layer_replace_steps import Keep
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import ResourcesMissing
from scaleot_ray.parallel.deepspeed_config import deepspeed_config
from scaleot_ray.parallel.group import take_steps
from scaleot_ray.parallel.stage_one import Assignment
from scaleot_ray.planner.build import group_store
from scaleot_ray.processors import usable_cores
from scaleot_ray.progress import OnProgress
from scaleot_ray.resources.session import local_ray, ray_is_given
from scaleot_ray.stages.build import Begun, TakeSteps


def steps_by_group(
    parallel: ParallelSettings,
    model: ModelSettings,
    public: DataSettings,
    stage_one: StageOneSettings,
    debug: bool = False,
    listen: Callable[[], None] | None = None,
) -> TakeSteps:
    """What :func:`~scaleot_ray.stages.build.build` takes for its steps, after a look at what could not work.

    Args:
        parallel: of the group.
        model, public: where every worker finds them.
        stage_one: settings of stage 1.
        debug: print what workers print.
        listen: called when Ray is there, which puts signal handlers of its own in place.

    Raises:
        ConfigError: DeepSpeed is needed and not installed, or its configuration does not agree with the settings.
        ResourcesMissing: this machine, where it is to be the whole cluster, has too few processors or GPUs.
    """
    config = deepspeed_config(parallel, stage_one, model)
    if not ray_is_given():
        _check_machine(parallel)

    def take(begun: Begun, keep: Keep, on_progress: OnProgress | None) -> StageOne:
        settings = begun.state.settings
        # A worker's working folder is not ours.
        assignment = Assignment(model.absolute(), public.absolute(), settings, parallel, config, begun)
        harmonizers = sum(value.nbytes for values in begun.state.harmonizers.values() for value in values.values())
        workers = parallel.workers
        with local_ray(workers * parallel.cpus, workers * parallel.gpus, group_store(harmonizers), debug) as session:
            if listen is not None:
                listen()
            return take_steps(assignment, session, keep, on_progress)

    return take


def _check_machine(parallel: ParallelSettings) -> None:
    there = {"cpus": usable_cores(), "gpus": torch.cuda.device_count()}
    for key, what in (("cpus", "processors"), ("gpus", "GPUs")):
        asked = parallel.workers * getattr(parallel, key)
        if asked > there[key]:
            raise ResourcesMissing(
                f"parallel.{key}: {parallel.workers} workers ask for {asked} {what} together, this machine has "
                f"{there[key]}.",
                f"Set parallel.workers or parallel.{key} lower, or submit the build to a Ray cluster "
                "(jobs/build_emulator.py).",
            )

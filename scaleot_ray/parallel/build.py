"""A build whose steps are made by a group of workers, on the Ray that was given or one of its own."""

from __future__ import annotations

import torch

from scaleot_ray.config import DataSettings, ModelSettings, ParallelSettings, StageOneSettings
from scaleot_ray.emulator.layer_replace_steps import Keep
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import ResourcesMissing
from scaleot_ray.parallel.deepspeed_config import deepspeed_config
from scaleot_ray.parallel.group import take_steps
from scaleot_ray.parallel.stage_one import Assignment
from scaleot_ray.parallel.zero import check_installed
from scaleot_ray.processors import usable_cores
from scaleot_ray.progress import OnProgress
from scaleot_ray.resources.session import local_ray, ray_is_given
from scaleot_ray.stages.build import TakeSteps

_STORE_ROOM = 256 << 20
_STATES = 4
"""States that may be on their way between workers and us at once, each harmonizers with two moments."""


def steps_by_group(
    parallel: ParallelSettings, model: ModelSettings, public: DataSettings, stage_one: StageOneSettings, debug: bool
) -> TakeSteps:
    """What :func:`~scaleot_ray.stages.build.build` takes for its steps, after a look at what could not work.

    Args:
        parallel: of the group.
        model, public: where every worker finds them.
        stage_one: settings of stage 1.
        debug: print what workers print.

    Raises:
        ConfigError: DeepSpeed is not installed, or its configuration does not agree with the settings.
        ResourcesMissing: this machine, where it is to be the whole cluster, has too few processors or GPUs.
    """
    check_installed()
    deepspeed_config(parallel, stage_one, model)
    given = ray_is_given()
    if not given:
        _check_machine(parallel)

    def take(
        state: StageOne,
        extra: dict[str, torch.Tensor],
        generated: list[list[int]] | None,
        keep: Keep,
        on_progress: OnProgress | None,
    ) -> StageOne:
        assignment = Assignment(model, public, state.settings, parallel, generated, state, extra)
        harmonizers = sum(value.nbytes for values in state.harmonizers.values() for value in values.values())
        store = _STORE_ROOM + _STATES * 3 * harmonizers
        workers = parallel.workers
        with local_ray(workers * parallel.cpus, workers * parallel.gpus, store, debug) as session:
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

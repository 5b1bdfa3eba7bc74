"""What a worker of a group does for stage 1: the model, its share of the text, and all steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from scaleot_ray.config import DataSettings, ModelSettings, ParallelSettings, StageOneSettings
from scaleot_ray.data.dataset_key import dataset_key
from scaleot_ray.emulator.layer_replace_steps import Keep, Steps
from scaleot_ray.errors import RunFailed
from scaleot_ray.families.loading import load_base_model
from scaleot_ray.parallel.data_parallel import averaging
from scaleot_ray.parallel.zero import spread_over_group, under_zero, use_group
from scaleot_ray.progress import OnProgress
from scaleot_ray.ranks import Ranks
from scaleot_ray.stages.build import Begun
from scaleot_ray.stages.identity import sampled_fingerprint
from scaleot_ray.stages.public_text import mixed_with, read_public_text


@dataclass(frozen=True)
class Assignment:
    """Steps that a group is to make.

    Attributes:
        model: where every worker finds the full model.
        public: where every worker finds the public text.
        stage_one: settings of stage 1.
        parallel: of the group.
        deepspeed: DeepSpeed's configuration.
        begun: what is gone on from.
    """

    model: ModelSettings
    public: DataSettings
    stage_one: StageOneSettings
    parallel: ParallelSettings
    deepspeed: dict[str, Any]
    begun: Begun


def take_part(
    assignment: Assignment,
    ranks: Ranks,
    device: torch.device,
    keep: Keep,
    on_progress: OnProgress | None = None,
) -> None:
    """Makes all steps together with the other workers of the group, which this process has joined.

    Args:
        assignment: the same for all.
        ranks: this worker among them.
        device: what it computes on.
        keep: gets the states that are worth keeping, the last one among them, on the first worker.
        on_progress: hears of ``stage 1``.

    Raises:
        ConfigError, DataError: model or text are not where this worker runs, or not what the settings say.
        RunFailed: model or text are not those that the build began with; or see
            :meth:`~scaleot_ray.emulator.layer_replace_steps.Steps.run`.
    """
    settings, parallel, config, begun = (
        assignment.stage_one,
        assignment.parallel,
        assignment.deepspeed,
        assignment.begun,
    )
    if parallel.zero:
        use_group()
    training = under_zero(config) if parallel.zero else averaging(ranks, device)
    # On the CPU the weights of a directory stay in their files until they are asked for.
    base = load_base_model(assignment.model.model_copy(update={"device": "cpu"}))
    base.model.requires_grad_(False).eval()
    with dataset_key("public"):
        text = read_public_text(assignment.public, base, settings)
    if sampled_fingerprint(base.model, text.held_out) != begun.fingerprint:
        raise RunFailed(
            f"model.path, public.path: {assignment.model.path} and {assignment.public.path} are not on this node what "
            "they are where the build began.",
            "Give all nodes the same files, and the same version of everything installed.",
        )
    if begun.generated is not None:
        text = mixed_with(text, begun.generated, base, settings)
    if parallel.zero == 3:
        spread_over_group(base.model, config, device)
    recompute = parallel.gradient_checkpointing
    steps = Steps(base.model, base.family, text.batches, text.held_out, ranks, training, recompute)
    steps.run(begun.state, begun.extra, keep, on_progress)

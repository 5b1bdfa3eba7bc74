"""What a worker of a group does for stage 1: the model, its share of the text, and all steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scaleot_ray.config import DataSettings, ModelSettings, ParallelSettings, StageOneSettings
from scaleot_ray.emulator.layer_replace_steps import Keep, Steps
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.families.loading import load_base_model
from scaleot_ray.parallel.data_parallel import averaging
from scaleot_ray.parallel.deepspeed_config import deepspeed_config
from scaleot_ray.parallel.zero import spread_over_group, under_zero, use_group
from scaleot_ray.progress import OnProgress
from scaleot_ray.ranks import Ranks
from scaleot_ray.stages.public_text import mixed_with, read_public_text


@dataclass(frozen=True)
class Assignment:
    """Steps that a group is to make.

    Attributes:
        model: where every worker finds the full model.
        public: where every worker finds the public text.
        stage_one: settings of stage 1.
        parallel: of the group.
        generated: text that the model has generated itself, as token ids; None for none.
        state: what is gone on from, scored.
        extra: the further tensors that were kept with it.
    """

    model: ModelSettings
    public: DataSettings
    stage_one: StageOneSettings
    parallel: ParallelSettings
    generated: Sequence[Sequence[int]] | None
    state: StageOne
    extra: dict[str, torch.Tensor]


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
        RunFailed: see :meth:`~scaleot_ray.emulator.layer_replace_steps.Steps.run`.
    """
    settings, parallel = assignment.stage_one, assignment.parallel
    config = deepspeed_config(parallel, settings, assignment.model)
    if parallel.zero:
        use_group()
    training = under_zero(config) if parallel.zero else averaging(ranks, device)
    # On the CPU the weights of a directory stay in their files until they are asked for.
    base = load_base_model(assignment.model.model_copy(update={"device": "cpu"}))
    base.model.requires_grad_(False).eval()
    text = read_public_text(assignment.public, base, settings)
    if assignment.generated is not None:
        text = mixed_with(text, assignment.generated, base, settings)
    if parallel.zero == 3:
        spread_over_group(base.model, config, device)
    recompute = parallel.gradient_checkpointing
    steps = Steps(base.model, base.family, text.batches, text.held_out, ranks, training, recompute)
    steps.run(assignment.state, assignment.extra, keep, on_progress)

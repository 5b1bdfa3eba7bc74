"""Dynamic LayerReplace: harmonizers and layer scores learnt together (ScaleOT §3.2, stage 1).

Two kinds of steps alternate. A harmonizer step (DL) samples a mask, puts the harmonizers of the
replaced layers into the network and trains them on public text. A score step (RL) samples several
masks, measures each on held-out public text without gradients, and moves the scores of the layers
that the better masks kept.

Before the first step the model runs once over public text: that gives harmonizers a start in closed form, and scores
one from the damage of replacing each layer alone. The steps are in :mod:`~.layer_replace_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from scaleot_ray.config import StageOneSettings
from scaleot_ray.data.batches import Batch, Batches
from scaleot_ray.emulator.calibration import Calibration, calibrate
from scaleot_ray.emulator.closed_form import fit_harmonizer
from scaleot_ray.emulator.distillation import distillation_loss
from scaleot_ray.emulator.harmonizer import Switchboard, switchable
from scaleot_ray.emulator.importance import LayerScores
from scaleot_ray.emulator.layer_replace_steps import Steps, harmonizer_modules, model_logits
from scaleot_ray.emulator.stage_one import StageOne, load_moments
from scaleot_ray.errors import ConfigError, RunFailed
from scaleot_ray.families import Family, layer_count
from scaleot_ray.progress import OnProgress, ProgressMeter


def candidate_layers(layers: int) -> tuple[int, ...]:
    """Layers that stage 1 trains harmonizers for: all but the first and the last.

    So one stage-1 result serves any number of plug-in layers in any layout; where a layout has these two
    layers among the middle ones, they are kept.

    Raises:
        ConfigError: the model has no others.
    """
    if layers < 3:
        raise ConfigError(
            f"model: {layers} decoder layer{'s' if layers > 1 else ''}; between the first and the last there is none "
            "that an emulator could hide.",
            "Take a model of three layers or more.",
        )
    return tuple(range(1, layers - 1))


def train_stage_one(
    model: nn.Module,
    family: Family,
    batches: Batches,
    held_out: Sequence[Batch],
    settings: StageOneSettings,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
    to_the_end: bool = True,
) -> StageOne:
    """Harmonizers and scores for every layer but the first and the last.

    Args:
        model: the full model; its weights are not changed and need no gradients.
        batches: public text to train on.
        held_out: batches of other public text; score steps go through them in turn.
        settings: steps, rates, ranks, seed.
        checkpoint: file that holds the state from the end of calibration on, renewed after layer damage,
            every ``checkpoint_every`` steps and every minute. If it exists, training goes on from there and
            ends where an uninterrupted run would have ended.
        on_progress: receives the stages ``calibrate``, ``layer damage`` and ``stage 1``; and ``calibrate
            again`` where the moments of a saved state are damaged.
        to_the_end: with the steps; else only what precedes the first one is made, or found.

    Raises:
        ConfigError: the model has fewer than three layers.
        RunFailed: the loss became NaN or infinite, or the checkpoint is damaged, belongs to other settings or
            cannot be written.
        ResourcesMissing: the disk is full.
    """
    whole = _StageOne(model, family, batches, held_out, settings, checkpoint, on_progress)
    return whole.run(to_the_end)


class _StageOne:
    """Everything before the first step, and the file that all is kept in."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        batches: Batches,
        held_out: Sequence[Batch],
        settings: StageOneSettings,
        checkpoint: Path | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.model, self.family, self.batches, self.held_out = model, family, batches, held_out
        self.settings, self.checkpoint, self.on_progress = settings, checkpoint, on_progress
        self.positions = candidate_layers(layer_count(model.config))
        self.extra: dict[str, torch.Tensor] = {}

    def run(self, to_the_end: bool) -> StageOne:
        if self.checkpoint is not None and self.checkpoint.exists():
            state = self._restored(self.checkpoint)
        else:
            state = self._calibrated()
            self._keep(state, {}, with_moments=True)  # on a large model this was an hour's work already
        if not state.scored:
            state = self._scored(state)
            self._keep(state, {})
        if state.step >= self.settings.steps or not to_the_end:
            return state
        steps = Steps(self.model, self.family, self.batches, self.held_out)
        return steps.run(state, self.extra, self._keep, self.on_progress)

    def _calibrated(self) -> StageOne:
        settings, calibration = self.settings, self._calibrate("calibrate")
        harmonizers = harmonizer_modules(self.model, self.family, settings, self.positions)
        fit: dict[int, float] = {}
        if settings.start == "closed_form":
            fit = {
                index: fit_harmonizer(module, calibration.residuals[index], settings.ridge)
                for index, module in harmonizers.items()
            }
        return StageOne(
            settings,
            dict.fromkeys(self.positions, 0.0),
            {
                index: {name: value.detach().cpu() for name, value in module.state_dict().items()}
                for index, module in harmonizers.items()
            },
            fit,
            scored=settings.score_start == "zero",
            moments=calibration.moments,
            leader=calibration.leader,
        )

    def _scored(self, state: StageOne) -> StageOne:
        harmonizers = harmonizer_modules(self.model, self.family, self.settings, self.positions)
        for index, module in harmonizers.items():
            module.load_state_dict(state.harmonizers[index])
        scores = LayerScores(self.positions, self.settings.group_size)
        with switchable(self.model, self.family, harmonizers) as switchboard:
            scores.start_from(self._damage(switchboard))
        return replace(state, scores=scores.by_position(), scored=True)

    def _calibrate(self, stage: str) -> Calibration:
        settings = self.settings
        steps = max(1, math.ceil(settings.start_tokens / (settings.batch_size * settings.block_size)))
        public = self.batches.batches(0)
        return calibrate(self.model, self.family, self.positions, public, steps, self.on_progress, stage)

    @torch.no_grad()
    def _damage(self, switchboard: Switchboard) -> list[float]:
        """KL to the full model on a held-out batch when each layer alone is replaced."""
        device = next(self.model.parameters()).device
        batch = {name: value.to(device) for name, value in self.held_out[0].items()}
        switchboard.set(frozenset())
        teacher, real = model_logits(self.model, batch), batch["attention_mask"].bool()
        meter = ProgressMeter("layer damage", len(self.positions), self.on_progress)
        damage = []
        for index in self.positions:
            switchboard.set({index})
            damage.append(distillation_loss(model_logits(self.model, batch)[real], teacher[real]).item())
            if not math.isfinite(damage[-1]):
                cause = f"the output is {damage[-1]} with layer {index} replaced"
                if not teacher.isfinite().all():
                    cause = "the model's own output is not finite"
                raise RunFailed(
                    f"stage 1: {cause}, before anything was trained.",
                    "Load the model in float32 or bfloat16 (model.dtype), or raise stage_one.ridge.",
                )
            meter.advance(tokens=batch["input_ids"].numel())
        return damage

    def _keep(self, state: StageOne, extra: dict[str, torch.Tensor], with_moments: bool = False) -> None:
        if self.checkpoint is not None:
            state.save(self.checkpoint, extra, with_moments)

    def _restored(self, path: Path) -> StageOne:
        state, self.extra = StageOne.load(path, with_moments=False)
        if state.settings.decisive() != self.settings.decisive() or tuple(sorted(state.harmonizers)) != self.positions:
            raise RunFailed(
                f"{path}: this stage-1 checkpoint was made with other settings or another model.",
                "Delete it, or name another cache folder.",
            )
        # What changes nothing of the result may have changed since.
        state = replace(state, settings=self.settings)
        try:
            moments, leader = load_moments(path)
        except RunFailed:
            # They follow from the model and the text: no reason to give up what stage 1 has learnt since.
            again = self._calibrate("calibrate again")
            state = replace(state, moments=again.moments, leader=again.leader)
            self._keep(state, self.extra, with_moments=True)
            return state
        return replace(state, moments=moments, leader=leader)

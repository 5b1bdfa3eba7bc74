"""Dynamic LayerReplace: harmonizers and layer scores learnt together (ScaleOT §3.2, stage 1).

Two kinds of steps alternate. A harmonizer step (DL) samples a mask, puts the harmonizers of the
replaced layers into the network and trains them on public text. A score step (RL) samples several
masks, measures each on held-out public text without gradients, and moves the scores of the layers
that the better masks kept.

A harmonizer that is masked out in a step gets no update: its weights and Adam moments stay as they
are, weight decay included. (An optimizer that fills missing gradients with zeros would let its
momentum run on; here gradients are None and Adam skips it.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from scaleot_ray.checkpoints import CheckpointPace
from scaleot_ray.config import StageOneSettings
from scaleot_ray.data.batches import Batch, Batches
from scaleot_ray.emulator.calibration import Calibration, calibrate
from scaleot_ray.emulator.closed_form import fit_harmonizer
from scaleot_ray.emulator.distillation import distillation_loss
from scaleot_ray.emulator.harmonizer import Harmonizer, Switchboard, switchable
from scaleot_ray.emulator.importance import LayerScores
from scaleot_ray.emulator.stage_one import StageOne, load_moments
from scaleot_ray.errors import ConfigError, RunFailed
from scaleot_ray.families import Family, hidden_size, layer_count
from scaleot_ray.progress import OnProgress, ProgressMeter

_FLOAT16_SCALE = 2.0**10


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

    Raises:
        ConfigError: the model has fewer than three layers.
        RunFailed: the loss became NaN or infinite, or the checkpoint is damaged, belongs to other settings or
            cannot be written.
        ResourcesMissing: the disk is full.
    """
    trainer = _Trainer(model, family, batches, held_out, settings, checkpoint, on_progress)
    return trainer.run()


def language_model_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the next token, nats: logits (b, t, v), labels (b, t), −100 ignored."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


class _Trainer:
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
        self.parameter = next(model.parameters())
        self.positions = candidate_layers(layer_count(model.config))
        # In float16 most gradients of a mean over many tokens would be zero; those of harmonizers are float32.
        self.loss_scale = _FLOAT16_SCALE if self.parameter.dtype == torch.float16 else 1.0
        self.scores = LayerScores(self.positions, settings.group_size, settings.masked_fraction, settings.seed)
        self.step, self.scored = 0, settings.score_start == "zero"
        self.history: list[dict[str, Any]] = []
        self.fit: dict[int, float] = {}
        self.calibration = Calibration({}, {}, {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.harmonizers = {
                index: Harmonizer(
                    hidden_size(model.config),
                    settings.harmonizer_rank,
                    settings.activation,
                    family.returns_tuple,
                ).to(self.parameter.device, torch.float32)
                for index in self.positions
            }
        self.optimizer = torch.optim.AdamW(
            [parameter for harmonizer in self.harmonizers.values() for parameter in harmonizer.parameters()],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )

    def run(self) -> StageOne:
        if self.checkpoint is not None and self.checkpoint.exists():
            self._restore(self.checkpoint)
        else:
            self._start()
            self._save(with_moments=True)  # on a large model this was an hour's work already
        if not self.scored:
            self._start_scores()
            self._save()
        if self.step >= self.settings.steps:
            return self._result()
        pace = CheckpointPace(self.settings.checkpoint_every)
        meter = ProgressMeter("stage 1", self.settings.steps, self.on_progress, self.step)
        with switchable(self.model, self.family, self.harmonizers) as switchboard:
            stream = self.batches.batches(self.step)
            while self.step < self.settings.steps:
                batch = self._to_device(next(stream))
                loss = self._harmonizer_step(switchboard, batch)
                self.step += 1
                meter.advance(tokens=batch["input_ids"].numel(), loss=loss)
                if self.step % self.settings.score_every == 0:
                    self._score_step(switchboard)
                if self.step < self.settings.steps and pace.due(self.step):
                    pace.write(self._save)
        self._save()
        return self._result()

    def _start(self) -> None:
        settings = self.settings
        self.calibration = self._calibrate("calibrate")
        if settings.start == "closed_form":
            self.fit = {
                index: fit_harmonizer(self.harmonizers[index], self.calibration.residuals[index], settings.ridge)
                for index in self.positions
            }

    def _start_scores(self) -> None:
        with switchable(self.model, self.family, self.harmonizers) as switchboard:
            self.scores.start_from(self._damage(switchboard))
        self.scored = True

    def _calibrate(self, stage: str) -> Calibration:
        settings = self.settings
        steps = max(1, math.ceil(settings.start_tokens / (settings.batch_size * settings.block_size)))
        public = self.batches.batches(0)
        return calibrate(self.model, self.family, self.positions, public, steps, self.on_progress, stage)

    @torch.no_grad()
    def _damage(self, switchboard: Switchboard) -> list[float]:
        """KL to the full model on a held-out batch when each layer alone is replaced."""
        batch = self._to_device(self.held_out[0])
        switchboard.set(frozenset())
        teacher, real = self._logits(batch), batch["attention_mask"].bool()
        meter = ProgressMeter("layer damage", len(self.positions), self.on_progress)
        damage = []
        for index in self.positions:
            switchboard.set({index})
            damage.append(distillation_loss(self._logits(batch)[real], teacher[real]).item())
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

    def _harmonizer_step(self, switchboard: Switchboard, batch: Batch) -> float:
        teacher = None
        if self.settings.objective == "distill":
            switchboard.set(frozenset())
            with torch.no_grad():
                teacher = self._logits(batch)
        mask = self.scores.sample()
        switchboard.set(mask)
        logits = self._logits(batch)
        if teacher is None:
            loss = language_model_loss(logits, batch["labels"])
        else:
            real = batch["attention_mask"].bool()  # padding has nothing to teach
            loss = distillation_loss(logits[real], teacher[real])
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.loss_scale).backward()
        for parameter in self.optimizer.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(self.loss_scale)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self._schedule()
        self.optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise RunFailed(
                f"stage 1: the loss is {value} at step {self.step + 1}.",
                "Lower stage_one.learning_rate, or load the model in float32 (model.dtype).",
            )
        self.history.append({"step": self.step + 1, "loss": value, "replaced": sorted(mask)})
        return value

    def _schedule(self) -> float:
        """Factor of the learning rate: 5 % warm-up, then half a cosine down to a tenth."""
        warm = max(1, self.settings.steps // 20)
        if self.step < warm:
            return (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.settings.steps - warm)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))

    @torch.no_grad()
    def _score_step(self, switchboard: Switchboard) -> None:
        turn = self.step // self.settings.score_every
        batch = self._to_device(self.held_out[turn % len(self.held_out)])
        masks = [self.scores.sample() for _ in range(self.settings.candidates)]
        losses = []
        for mask in masks:
            switchboard.set(mask)
            losses.append(language_model_loss(self._logits(batch), batch["labels"]).item())
        credited = list(losses)
        if self.settings.shuffle_rewards:
            order = torch.randperm(len(losses), generator=self.scores.generator).tolist()
            credited = [losses[index] for index in order]
        self.scores.update(masks, credited, self.settings.score_learning_rate)
        self.history.append({"step": self.step, "candidate_losses": losses})

    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.parameter.device) for name, value in batch.items()}

    def _result(self) -> StageOne:
        return StageOne(
            settings=self.settings,
            scores=self.scores.by_position(),
            harmonizers={
                index: {name: value.detach().cpu() for name, value in harmonizer.state_dict().items()}
                for index, harmonizer in self.harmonizers.items()
            },
            fit=self.fit,
            history=self.history,
            step=self.step,
            scored=self.scored,
            moments=self.calibration.moments,
            leader=self.calibration.leader,
        )

    def _save(self, with_moments: bool = False) -> None:
        if self.checkpoint is None:
            return
        extra = {"generator": self.scores.generator.get_state()}
        for position, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                extra[f"optimizer.{position}.{name}"] = torch.as_tensor(value)
        self._result().save(self.checkpoint, extra, with_moments)

    def _restore(self, path: Path) -> None:
        state, extra = StageOne.load(path, with_moments=False)
        if state.settings.decisive() != self.settings.decisive() or tuple(sorted(state.harmonizers)) != self.positions:
            raise RunFailed(
                f"{path}: this stage-1 checkpoint was made with other settings or another model.",
                "Delete it, or name another cache folder.",
            )
        for index, harmonizer in self.harmonizers.items():
            harmonizer.load_state_dict(state.harmonizers[index])
        self.scores.values = torch.tensor([state.scores[index] for index in self.positions], dtype=torch.float64)
        self.scores.generator.set_state(extra["generator"])
        self.step, self.scored, self.history, self.fit = state.step, state.scored, state.history, state.fit
        for position, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
            prefix = f"optimizer.{position}."
            found = {name[len(prefix) :]: value for name, value in extra.items() if name.startswith(prefix)}
            if found:
                self.optimizer.state[parameter] = {
                    name: value if name == "step" else value.to(parameter) for name, value in found.items()
                }
        try:
            self.calibration = Calibration({}, *load_moments(path))
        except RunFailed:
            # They follow from the model and the text: no reason to give up what stage 1 has learnt since.
            self.calibration = self._calibrate("calibrate again")
            self._save(with_moments=True)

"""The steps of Dynamic LayerReplace (ScaleOT §3.2), in one process or as one of several that share each batch.

Harmonizer (DL) steps train the harmonizers of a sampled mask; score (RL) steps measure several masks and move the
scores. All processes draw the same masks from the same generator. Before a mask is used they make sure of it: where
layers are spread over the processes, two masks would have each wait for ever for what the other does not send.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from scaleot_ray.checkpoints import CheckpointPace
from scaleot_ray.config import StageOneSettings
from scaleot_ray.data.batches import Batch, Batches
from scaleot_ray.data.examples import IGNORED
from scaleot_ray.emulator.distillation import distillation_loss
from scaleot_ray.emulator.harmonizer import Harmonizer, Switchboard, switchable
from scaleot_ray.emulator.importance import LayerScores
from scaleot_ray.emulator.masked_adam import MOMENTS, STEP, MaskedAdamW
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import RunFailed
from scaleot_ray.families import Family, hidden_size
from scaleot_ray.progress import OnProgress, ProgressMeter
from scaleot_ray.ranks import ALONE, Ranks

_FLOAT16_SCALE = 2.0**10
_OPTIMIZER = "optimizer."
_GENERATOR = "generator"


class Training(Protocol):
    """Backward passes and updates of harmonizers, wherever their parameters and moments lie."""

    spread: bool
    """Whether layers are gathered from all processes, so that all must run the same ones at the same time."""

    def step(self, loss: torch.Tensor) -> None:
        """Backward pass of this process's loss, mean of the gradients over processes, update of the prepared layers."""
        ...

    def harmonizers(self) -> dict[int, dict[str, torch.Tensor]]:
        """All weights, whole, by layer and name; every process must ask at once."""
        ...

    def moments(self) -> dict[str, torch.Tensor]:
        """Adam's state by ``LAYER.PARAMETER.NAME``, whole; every process must ask at once."""
        ...

    def restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Puts back what :meth:`moments` gave; where that is nothing, all begin at zero."""
        ...


MakeTraining = Callable[[nn.Module, Mapping[int, Harmonizer], MaskedAdamW], Training]
"""From the model with its switches in place, the harmonizers in it, and their optimizer."""

Keep = Callable[[StageOne, dict[str, torch.Tensor]], None]
"""Stores a state and the further tensors that training goes on with."""


class OneProcess:
    """All of the model in this process: PyTorch as it is."""

    spread = False

    def __init__(self, model: nn.Module, harmonizers: Mapping[int, Harmonizer], adam: MaskedAdamW) -> None:
        self._harmonizers, self._adam = harmonizers, adam

    def step(self, loss: torch.Tensor) -> None:
        """Backward pass and update."""
        self._adam.zero_grad(set_to_none=True)
        (loss * self._adam.gradient_scale).backward()
        used = [
            parameter for index in sorted(self._adam.replaced) for parameter in self._harmonizers[index].parameters()
        ]
        self.average([parameter.grad for parameter in used if parameter.grad is not None])
        self._adam.step()

    def average(self, gradients: list[torch.Tensor]) -> None:
        """Makes gradients the mean over processes; there is only this one."""

    def harmonizers(self) -> dict[int, dict[str, torch.Tensor]]:
        """Copies on the CPU."""
        return {
            index: {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
            for index, module in self._harmonizers.items()
        }

    def moments(self) -> dict[str, torch.Tensor]:
        """Of every parameter that was updated before."""
        return {
            f"{index}.{name}.{key}": torch.as_tensor(value).detach().cpu().clone()
            for index, module in self._harmonizers.items()
            for name, parameter in module.named_parameters()
            for key, value in self._adam.state.get(parameter, {}).items()
        }

    def restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Puts them back."""
        self._adam.begin_moments()
        for index, module in self._harmonizers.items():
            for name, parameter in module.named_parameters():
                for key, value in self._adam.state[parameter].items():
                    if (saved := moments.get(f"{index}.{name}.{key}")) is not None:
                        value.copy_(saved)
                self._adam.updates[index] = int(self._adam.state[parameter][STEP])


@dataclass(frozen=True)
class Steps:
    """What the steps are made with.

    Attributes:
        model: the full model in evaluation mode, its weights frozen.
        family: of the model.
        batches: public text to train on; the same on every process.
        held_out: batches of other public text; score steps go through them in turn.
        ranks: this process among those that work together.
        training: where the parameters lie.
        recompute: activations of raw layers in the backward pass, instead of keeping them.
    """

    model: nn.Module
    family: Family
    batches: Batches
    held_out: Sequence[Batch]
    ranks: Ranks = ALONE
    training: MakeTraining = OneProcess
    recompute: bool = False

    def run(
        self,
        state: StageOne,
        extra: Mapping[str, torch.Tensor],
        keep: Keep | None = None,
        on_progress: OnProgress | None = None,
    ) -> StageOne:
        """Goes on from a state to the last step, and ends where one run without a break would.

        Args:
            state: scored; harmonizers as they are at its step.
            extra: the further tensors that were kept with it; of a state without steps there are none.
            keep: called as often as ``checkpoint_every`` and the clock say, and at the end. Given on every process,
                since all take part in gathering what is kept, but called on the first one alone.
            on_progress: hears of ``stage 1``.

        Raises:
            RunFailed: a loss or what was trained is not finite, or the processes do not work on the same thing.
        """
        harmonizers = harmonizer_modules(self.model, self.family, state.settings, state.harmonizers)
        for index, values in state.harmonizers.items():
            harmonizers[index].load_state_dict(values)
        with switchable(self.model, self.family, harmonizers, self.recompute) as switchboard:
            return _Run(self, state, extra, harmonizers, switchboard).run(keep, on_progress)


def harmonizer_modules(
    model: nn.Module, family: Family, settings: StageOneSettings, layers: Sequence[int] | Mapping[int, Any]
) -> dict[int, Harmonizer]:
    """New harmonizers with random values of the settings' seed, in at least float32, where the model is."""
    parameter = next(model.parameters())
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return {
            index: Harmonizer(
                hidden_size(model.config), settings.harmonizer_rank, settings.activation, family.returns_tuple
            ).to(parameter.device, dtype)
            for index in layers
        }


def language_model_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the next token, nats: logits (b, t, v), labels (b, t), −100 ignored."""
    wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, labels[:, 1:].flatten(), ignore_index=IGNORED)


def model_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (b, t, v) of a batch that is on the model's device."""
    logits: torch.Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return logits


class _Run:
    def __init__(
        self,
        steps: Steps,
        state: StageOne,
        extra: Mapping[str, torch.Tensor],
        harmonizers: Mapping[int, Harmonizer],
        switchboard: Switchboard,
    ) -> None:
        self.model, self.ranks, self.switchboard = steps.model, steps.ranks, switchboard
        self.batches, self.held_out = steps.batches, steps.held_out
        self.state, self.settings, settings = state, state.settings, state.settings
        self.step, self.history = state.step, list(state.history)
        positions = tuple(sorted(harmonizers))
        self.scores = LayerScores(positions, settings.group_size, settings.masked_fraction, settings.seed)
        self.scores.values = torch.tensor([state.scores[index] for index in positions], dtype=torch.float64)
        if _GENERATOR in extra:
            self.scores.generator.set_state(extra[_GENERATOR])
        # In float16 most gradients of a mean over many tokens would be zero; those of harmonizers are float32.
        scale = _FLOAT16_SCALE if next(steps.model.parameters()).dtype == torch.float16 else 1.0
        self.adam = MaskedAdamW(harmonizers, settings.learning_rate, settings.weight_decay, scale)
        self.training = steps.training(steps.model, harmonizers, self.adam)
        self.device = next(steps.model.parameters()).device
        moments = {name[len(_OPTIMIZER) :]: value for name, value in extra.items() if name.startswith(_OPTIMIZER)}
        known = {
            f"{index}.{name}.{key}"
            for index, module in harmonizers.items()
            for name, _ in module.named_parameters()
            for key in (STEP, *MOMENTS)
        }
        if moments and moments.keys() != known:
            raise RunFailed(
                "stage 1: what was kept of its optimizer is of another version.",
                "Delete the cache folder, or give another one; stage 1 then starts afresh.",
            )
        self.training.restore(moments)

    def run(self, keep: Keep | None, on_progress: OnProgress | None) -> StageOne:
        settings, pace = self.settings, CheckpointPace(self.settings.checkpoint_every)
        meter = ProgressMeter("stage 1", settings.steps, on_progress, self.step)
        stream = self.batches.batches(self.step)
        while self.step < settings.steps:
            batch = next(stream)
            loss = self._harmonizer_step(batch)
            self.step += 1
            meter.advance(tokens=batch["input_ids"].numel(), loss=loss)
            if self.step % settings.score_every == 0:
                self._score_step()
            last = self.step == settings.steps
            if keep is not None and (last or self.ranks.agreed(pace.due(self.step))):
                pace.write(lambda: self._save(keep))
        return self._result()

    def _harmonizer_step(self, whole: Batch) -> float:
        mask, batch = self.scores.sample(), self._to_device(self.ranks.rows(whole))
        self._check_same([mask], whole)
        teacher = None
        if self.settings.objective == "distill":
            self.switchboard.set(frozenset())
            with torch.no_grad():
                teacher = model_logits(self.model, batch)
        self.switchboard.set(mask)
        logits = model_logits(self.model, batch)
        if teacher is None:
            loss, counted = language_model_loss(logits, batch["labels"]), _labelled
        else:
            real = batch["attention_mask"].bool()  # padding has nothing to teach
            loss, counted = distillation_loss(logits[real], teacher[real]), _real
        # Gradients are averaged over processes, whose shares of the batch may differ in tokens.
        weight = counted(batch) * self.ranks.size / counted(whole)
        done = self.step
        self.adam.prepare(mask, self.settings.learning_rate * rate_factor(done, self.settings.steps))
        self.training.step(loss * weight)
        value = self.ranks.total([loss.item() * weight / self.ranks.size])[0]
        if not math.isfinite(value):
            raise RunFailed(
                f"stage 1: the loss is {value} at step {done + 1}.",
                "Lower stage_one.learning_rate, or load the model in float32 (model.dtype).",
            )
        self.history.append({"step": done + 1, "loss": value, "replaced": sorted(mask)})
        return value

    @torch.no_grad()
    def _score_step(self) -> None:
        turn = self.step // self.settings.score_every
        whole = self.held_out[turn % len(self.held_out)]
        masks = [self.scores.sample() for _ in range(self.settings.candidates)]
        self._check_same(masks, whole)
        losses = self._shared_losses(masks, whole) if self.training.spread else self._own_losses(masks, whole)
        credited = list(losses)
        if self.settings.shuffle_rewards:
            order = torch.randperm(len(losses), generator=self.scores.generator).tolist()
            credited = [losses[index] for index in order]
        self.scores.update(masks, credited, self.settings.score_learning_rate)
        self.history.append({"step": self.step, "candidate_losses": losses})

    def _own_losses(self, masks: Sequence[frozenset[int]], whole: Batch) -> list[float]:
        """Each process measures other masks, all of the batch each."""
        losses, batch = [0.0] * len(masks), self._to_device(whole)
        for index in range(self.ranks.rank, len(masks), self.ranks.size):
            losses[index] = self._loss(masks[index], batch)
        return self.ranks.total(losses)

    def _shared_losses(self, masks: Sequence[frozenset[int]], whole: Batch) -> list[float]:
        """All processes measure the same mask at a time, each its rows; one without rows keeps the others company."""
        batch = self.ranks.rows(whole)
        weight = _labelled(batch) / _labelled(whole)
        if not weight:
            batch = {name: value[:1] for name, value in whole.items()}
        batch = self._to_device(batch)
        losses = [self._loss(mask, batch) for mask in masks]
        return self.ranks.total([weight * loss if weight else 0.0 for loss in losses])

    def _loss(self, mask: frozenset[int], batch: Batch) -> float:
        self.switchboard.set(mask)
        return language_model_loss(model_logits(self.model, batch), batch["labels"]).item()

    def _check_same(self, masks: Sequence[frozenset[int]], batch: Batch) -> None:
        text = hashlib.sha256(batch["input_ids"].numpy().tobytes()).digest()
        self.ranks.check_same(
            f"stage 1, step {self.step + 1}: the text",
            [int.from_bytes(text[:7], "big")],
            "Give all nodes the same files of public text (public.path), and the same version of everything installed.",
        )
        self.ranks.check_same(
            f"stage 1, step {self.step + 1}: the mask",
            [int(index in mask) for mask in masks for index in self.scores.middle],
            "All workers draw from one seed: give all nodes the same version of everything installed.",
        )

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device) for name, value in batch.items()}

    def _result(self) -> StageOne:
        trained = self.training.harmonizers()
        for index, values in trained.items():
            for name, value in values.items():
                # Weights that were never gathered have been saved as nothing elsewhere, and in silence.
                if value.shape != self.state.harmonizers[index][name].shape or not value.isfinite().all():
                    raise RunFailed(
                        f"stage 1: harmonizer {index} has a {name} of shape {tuple(value.shape)} with values that "
                        f"are not finite, or not {tuple(self.state.harmonizers[index][name].shape)}, at step "
                        f"{self.step}.",
                        "Lower stage_one.learning_rate, or load the model in float32 (model.dtype).",
                    )
        return replace(
            self.state,
            scores=self.scores.by_position(),
            harmonizers=trained,
            history=list(self.history),
            step=self.step,
        )

    def _save(self, keep: Keep) -> None:
        result, moments = self._result(), self.training.moments()
        extra = {_OPTIMIZER + name: value for name, value in moments.items()}
        if self.ranks.first:
            keep(result, extra | {_GENERATOR: self.scores.generator.get_state()})


def rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate: 5 % warm-up, then half a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def _labelled(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _real(batch: Batch) -> int:
    return int(batch["attention_mask"].sum())

"""Stage 1 without gradient steps, for models that stay on disk: one pass, one decoder layer in memory at a time.

It gives what :func:`~scaleot_ray.emulator.layer_replace.train_stage_one` gives with ``stage_one.steps=0``: harmonizers
in closed form, and as scores the damage that replacing each layer alone does to the model's output. For the damage one
held-out batch is carried along once as the model has it, and once for every layer that has been replaced so far: with
n layers about n/2 further forward passes of that batch, each layer still being read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from scaleot_ray.config import StageOneSettings
from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator.closed_form import ResidualStatistics, fit_harmonizer
from scaleot_ray.emulator.distillation import distillation_loss
from scaleot_ray.emulator.harmonizer import Harmonizer
from scaleot_ray.emulator.importance import LayerScores
from scaleot_ray.emulator.layer_by_layer import layer_calls, layers_gave
from scaleot_ray.emulator.layer_replace import candidate_layers
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.emulator.streaming.at_work import at_work, front_at_work, head_at_work
from scaleot_ray.emulator.streaming.position import Position
from scaleot_ray.errors import RunFailed
from scaleot_ray.families import hidden_size, layer_count
from scaleot_ray.families.loading import BaseModel
from scaleot_ray.progress import OnProgress, ProgressMeter


def streamed_stage_one(
    base: BaseModel,
    batches: Sequence[Batch],
    held_out: Batch,
    settings: StageOneSettings,
    device: torch.device,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> StageOne:
    """Harmonizers and scores for every layer but the first and the last.

    Args:
        base: the full model; its weights may lie in files (:func:`~scaleot_ray.families.mapped.map_base_model`).
        batches: public text that harmonizers are fitted on.
        held_out: other public text, on which the damage is measured.
        settings: rank, activation, ridge; those of steps and generated text do not count.
        device: where layers are computed, in float32.
        checkpoint: file of the state between two layers; renewed at most every minute, and behind the last layer. To be
            removed when the result is kept.
        on_progress: hears of ``layer damage``, layer by layer.

    Returns:
        A stage-1 state before its first step, without moments.

    Raises:
        ConfigError: the model has fewer than three layers.
        RunFailed: an output is not finite; or the checkpoint is damaged or cannot be written.
        ResourcesMissing: the disk is full.
    """
    return _Pass(base, batches, held_out, settings, device).run(Position(checkpoint), on_progress)


class _Pass:
    def __init__(
        self,
        base: BaseModel,
        batches: Sequence[Batch],
        held_out: Batch,
        settings: StageOneSettings,
        device: torch.device,
    ) -> None:
        self.base, self.settings, self.device = base, settings, device
        self.layers = base.family.layers(base.model)
        self.positions = candidate_layers(layer_count(base.model.config))
        with front_at_work(base.model, base.family, device):
            self.calls = [layer_calls(base.model, base.family, batch, device) for batch in batches]
            self.held_out = layer_calls(base.model, base.family, held_out, device)
        self.batch = held_out
        self.streams = [call.begin() for call in self.calls]
        # The held-out batch as the model has it, and with one layer replaced each.
        self.variants: dict[str, torch.Tensor] = {"model": self.held_out.begin()}
        self.harmonizers: dict[int, dict[str, torch.Tensor]] = {}
        self.fit: dict[int, float] = {}

    @torch.no_grad()
    def run(self, position: Position, on_progress: OnProgress | None) -> StageOne:
        first = self._restore(position)
        meter = ProgressMeter("layer damage", len(self.layers), on_progress, first)
        for index in range(first, len(self.layers)):
            self._step(index)
            meter.advance(tokens=sum(call.real.numel() for call in self.calls))
            position.passed(index + 1, self._state, {"fit": self.fit}, due=index + 1 == len(self.layers))
        scores = LayerScores(self.positions, self.settings.group_size)
        scores.start_from(self._damage())
        return StageOne(self.settings, scores.by_position(), self.harmonizers, self.fit)

    def _step(self, index: int) -> None:
        """Takes all streams through a layer, one after the other: of none there are two at once."""
        layer, family, statistics = self.layers[index], self.base.family, None
        if index in self.positions:
            statistics = ResidualStatistics(hidden_size(self.base.model.config), self.device)
        before = self.variants["model"]
        with at_work(layer.modules(), self.device):
            for number, (call, x) in enumerate(zip(self.calls, self.streams, strict=False)):
                self.streams[number] = y = call.run(layer, index, x, family)
                if statistics is not None:
                    statistics.update(x[call.real], y[call.real])
            for name, hidden in self.variants.items():
                self.variants[name] = self.held_out.run(layer, index, hidden, family)
        if statistics is not None:
            harmonizer = self._harmonizer(index, statistics)
            self.variants[f"{index}"] = family.layer_output(harmonizer(before))
            self.harmonizers[index] = {name: value.cpu() for name, value in harmonizer.state_dict().items()}
        if index >= self.positions[-1]:
            self.streams = []  # nothing is fitted behind

    def _harmonizer(self, index: int, statistics: ResidualStatistics) -> Harmonizer:
        settings, width = self.settings, hidden_size(self.base.model.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + index)
            harmonizer = Harmonizer(
                width, settings.harmonizer_rank, settings.activation, self.base.family.returns_tuple
            ).to(self.device, torch.float32)
        self.fit[index] = fit_harmonizer(harmonizer, statistics, settings.ridge)
        return harmonizer

    def _damage(self) -> list[float]:
        """KL to the model's output on the held-out batch when each layer alone is replaced."""
        real = self.batch["attention_mask"].bool()
        with head_at_work(self.base.model, self.base.family):
            teacher = self._logits(self.variants["model"])[real]
            damage = [
                distillation_loss(self._logits(self.variants[f"{index}"])[real], teacher).item()
                for index in self.positions
            ]
        if not teacher.isfinite().all():
            raise RunFailed("stage 1: the model's own output is not finite.", "Check the model's weights (model.path).")
        for index, value in zip(self.positions, damage, strict=True):
            if not math.isfinite(value):
                raise RunFailed(
                    f"stage 1: the output is {value} with layer {index} replaced.",
                    "Give more public text (stage_one.start_tokens), or raise stage_one.ridge.",
                )
        return damage

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
        with layers_gave(self.base.model, self.base.family, hidden.cpu()):
            logits: torch.Tensor = self.base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            **{f"stream.{number}": stream for number, stream in enumerate(self.streams)},
            **{f"variant.{name}": hidden for name, hidden in self.variants.items()},
            **{f"{index}.{name}": value for index, own in self.harmonizers.items() for name, value in own.items()},
        }

    def _restore(self, position: Position) -> int:
        found = position.restore()
        if found is None:
            return 0
        index, tensors, record = found
        names = [name for number in range(len(self.calls)) if (name := f"stream.{number}") in tensors]
        self.streams = [tensors.pop(name).to(self.device) for name in names]
        self.variants, self.fit = {}, {int(layer): value for layer, value in record["fit"].items()}
        for name, value in tensors.items():
            head, _, rest = name.partition(".")
            if head == "variant":
                self.variants[rest] = value.to(self.device)
            else:
                self.harmonizers.setdefault(int(head), {})[rest] = value
        return index

"""Optimizer steps: accumulation, mixed precision, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scaleot_ray.config import TuneSettings
from scaleot_ray.data.batches import Batch
from scaleot_ray.errors import DataError, RunFailed
from scaleot_ray.tuning.loss import labelled_tokens
from scaleot_ray.tuning.master_weights import MasterWeights

BETAS = (0.9, 0.95)  # as language models are trained (GPT-3, Llama): runs are short, so forget early


class Optimization:
    """Steps the trainable parameters of a model; everything a step needs and leaves behind.

    A step is :meth:`begin`, for each batch :meth:`part` and its backward pass, and :meth:`finish`. Who drives
    it computes the losses: of one data owner's batch, or of several data owners' at once, each with an
    optimization of its own.

    Args:
        model: the model in training mode, with ``parameters`` attached.
        parameters: trainable parameters by name.
        settings: of the run.
        peak: learning rate where ``settings.learning_rate`` is None.
        device: where the model is.
    """

    def __init__(
        self,
        model: Any,
        parameters: Mapping[str, nn.Parameter],
        settings: TuneSettings,
        peak: float,
        device: torch.device,
    ) -> None:
        self.settings, self.device = settings, device
        self.peak = settings.learning_rate or peak
        self.weights = MasterWeights(parameters)
        self._autocast = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.precision]
        half = self._autocast is torch.float16 or any(p.dtype is torch.float16 for p in model.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.optimizer = torch.optim.AdamW(
            _groups(list(self.weights.values.values()), settings.weight_decay),
            lr=self.peak,
            betas=BETAS,
            fused=device.type in ("cpu", "cuda"),
        )
        self._step, self._labelled = 0, 0
        self._total = torch.zeros((), device=device)

    def begin(self, step: int, batches: Sequence[Batch]) -> list[Batch]:
        """Begins optimizer step number ``step`` (from 1); gives those of its batches that have a label.

        Raises:
            DataError: no token of ``batches`` has a label.
        """
        counts = [labelled_tokens(batch) for batch in batches]
        if not sum(counts):
            raise DataError(
                f"Step {step}: no token of its batches has a label, so there is nothing to learn from.",
                "Raise tune.block_size so that completions are not cut off, or leave such rows out.",
            )
        self._step, self._labelled = step, sum(counts)
        self._total = torch.zeros((), device=self.device)
        return [batch for batch, count in zip(batches, counts, strict=True) if count]

    def autocast(self) -> torch.autocast:
        """The arithmetic of the forward pass, as a context."""
        return torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None)

    def part(self, loss: torch.Tensor) -> torch.Tensor:
        """What is to be differentiated for one of the step's batches.

        The step's loss is the sum over all labelled tokens of its batches divided by their number, so that
        accumulated batches equal one large one whatever their padding.

        Args:
            loss: summed over the batch's labelled tokens, 0-d.
        """
        loss = loss / self._labelled
        self._total = self._total + loss.detach()
        return self.scaler.scale(loss)

    def finish(self) -> float:
        """Steps the parameters; gives the step's loss in nats per labelled token.

        Raises:
            RunFailed: the loss or the gradient is not finite; the weights are as before the step.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(list(self.weights.values.values()), self.settings.max_grad_norm)
        # The step's one wait for the device.
        value, norm_value = torch.stack((self._total, norm.to(self._total))).tolist()
        self._check(value, norm_value)
        rate = learning_rate(self._step, self.settings.steps, self.settings.warmup_fraction, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.weights.round_off()
        return float(value)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that the next step depends on, as tensors by name and JSON-able values."""
        tensors = {f"value.{name}": value for name, value in self.weights.values.items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in entries.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, self.scaler.state_dict()

    def load_state(self, tensors: Mapping[str, torch.Tensor], scaler: dict[str, Any]) -> None:
        """Puts back what :meth:`state` gave."""
        self.weights.load({name: tensors[f"value.{name}"] for name in self.weights.values})
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.scaler.load_state_dict(scaler)
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)

    def close(self) -> None:
        """Takes all hooks off the parameters."""
        self.weights.close()

    def _check(self, loss: float, norm: float) -> None:
        # With loss scaling an infinite gradient is how a too large scale shows: that step is left out.
        scaled = self.scaler.is_enabled()
        if math.isfinite(loss) and (math.isfinite(norm) or (scaled and self.scaler.get_scale() >= 1)):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        raise RunFailed(
            f"Step {self._step}: {what}.",
            f"Lower tune.learning_rate (now {self.peak:g}) or tune.max_grad_norm"
            + (", or set tune.precision to bfloat16 or float32" if scaled else "")
            + "; if step 1 fails, the data or the emulator is at fault. An earlier checkpoint stays usable.",
        )


def learning_rate(step: int, steps: int, warmup_fraction: float, peak: float) -> float:
    """Learning rate of optimizer step ``step`` (1 … steps): linear warm-up to ``peak``, then cosine towards 0."""
    warmup = round(warmup_fraction * steps)
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / (steps - warmup)))


def _groups(values: list[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norm weights, whose natural value is not zero, do not."""
    matrices = [value for value in values if value.ndim > 1]
    others = [value for value in values if value.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

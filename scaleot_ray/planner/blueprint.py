"""Models that have shapes and no weights: what runs on them allocates nothing, and can be counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator.distillation import distillation_loss
from scaleot_ray.emulator.harmonizer import Switchboard
from scaleot_ray.emulator.layer_by_layer import LayerCalls, layer_calls
from scaleot_ray.emulator.layer_replace_steps import model_logits
from scaleot_ray.emulator.sequential_fit import watching
from scaleot_ray.families import family_of
from scaleot_ray.families.head import HeadPositions
from scaleot_ray.planner.live_bytes import peak_bytes


class Blueprint:
    """A model whose tensors are fake ones on the CPU, for PyTorch to choose the operations that it would run there.

    On a GPU the same operations take about as much: attention is fused on both.

    Args:
        model: on the meta device, with everything in place that is to run; it is changed.
        dtype: of its frozen parameters. Those that require a gradient keep their type.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.family = model, family_of(model.config)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, torch.Tensor] = {}  # tied parameters stay one
        with self._mode:
            for module in model.modules():
                tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for slots in tables:
                    for name, value in slots.items():
                        if value is not None:
                            slots[name] = self._fake(value, dtype)

    def forward(self, batch: int, time: int, *, logits: bool = False) -> int:
        """Bytes of a forward pass without gradients over (batch, time) tokens, at its fullest moment."""

        def run() -> None:
            with torch.no_grad():
                (self.model if logits else self.model.base_model)(**_inputs(batch, time), use_cache=False)

        return self._peak(run)

    def layer(self, index: int, batch: int, time: int) -> int:
        """Bytes of one decoder layer's run over hidden states (batch, time, d), its output included."""
        with self._mode:
            calls, hidden = self._calls(batch, time)

        def run() -> None:
            with torch.no_grad():
                calls.run(self.family.layers(self.model)[index], index, hidden, self.family)

        return self._peak(run)

    def arguments(self, batch: int, time: int) -> int:
        """Bytes of what all layers are given beside the hidden states of (batch, time) tokens, masks above all."""
        kept: list[LayerCalls] = []

        def run() -> None:
            calls, _ = self._calls(batch, time)
            kept.append(calls)

        self._peak(run)
        storages = {
            id(storage := value.untyped_storage()): storage.nbytes()
            for value in torch.utils._pytree.tree_leaves(kept[0].arguments)
            if isinstance(value, torch.Tensor)
        }
        return sum(storages.values())

    def distillation_step(self, batch: int, time: int, switchboard: Switchboard, replaced: frozenset[int]) -> int:
        """Bytes of a harmonizer step of stage 1: activations, logits of both models and gradients."""

        def run() -> None:
            inputs: Batch = _inputs(batch, time)
            switchboard.set(frozenset())
            with torch.no_grad():
                teacher = model_logits(self.model, inputs)
            switchboard.set(replaced)
            logits = model_logits(self.model, inputs)
            # Copies, as those of the positions that are no padding.
            loss = distillation_loss(logits.flatten(0, 1).clone(), teacher.flatten(0, 1).clone())
            loss.backward()

        return self._peak(run)

    def attention_step(self, index: int, batch: int, time: int) -> int:
        """Bytes of a gradient step for one layer's attention projections, over hidden states (batch, time, d)."""
        layer, attention = self.family.layers(self.model)[index], self.family.attention
        own = [parameter for item in attention for parameter in layer.get_submodule(item.path).parameters()]
        with self._mode:
            calls, hidden = self._calls(batch, time)

        def run() -> None:
            with watching(layer, attention[-1:], stop=True) as seen:
                calls.run(layer, index, hidden, self.family)
            output = seen[attention[-1].path].output.float()
            (output - output.detach()).square().sum().backward()

        for parameter in own:
            parameter.requires_grad_(True)
        try:
            return self._peak(run)
        finally:
            for parameter in own:
                parameter.requires_grad_(False)
                parameter.grad = None

    def damage(self, batch: int, time: int) -> int:
        """Bytes of comparing the outputs of a changed model and of the model itself, without gradients."""

        def run() -> None:
            inputs: Batch = _inputs(batch, time)
            with torch.no_grad():
                teacher = model_logits(self.model, inputs)
                changed = model_logits(self.model, inputs).flatten(0, 1).clone()
                distillation_loss(changed, teacher.flatten(0, 1).clone())

        return self._peak(run)

    def tuning_step(self, batch: int, time: int, autocast: torch.dtype | None = None) -> int:
        """Bytes of a training step with every token labelled: activations, logits and gradients."""
        head, tokens = HeadPositions(self.model), batch * (time - 1)

        def loss() -> torch.Tensor:
            with torch.autocast("cpu", autocast, enabled=autocast is not None), head.at(torch.arange(tokens)):
                logits = model_logits(self.model, _inputs(batch, time)).flatten(0, 1)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return functional.cross_entropy(wide, torch.zeros(tokens, dtype=torch.int64), reduction="sum")

        try:
            return self._peak(lambda: loss().backward())
        finally:
            head.close()

    def _calls(self, batch: int, time: int) -> tuple[LayerCalls, torch.Tensor]:
        calls = layer_calls(self.model, self.family, _inputs(batch, time), torch.device("cpu"))
        return calls, calls.begin()

    def _peak(self, work: Callable[[], object]) -> int:
        with self._mode:
            return peak_bytes(work)

    def _fake(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if id(value) not in self._made:
            kind = dtype if value.is_floating_point() and not value.requires_grad else value.dtype
            made = torch.empty(value.shape, dtype=kind, device="cpu")
            if isinstance(value, nn.Parameter):
                made = nn.Parameter(made, requires_grad=value.requires_grad)
            self._made[id(value)] = made
            self._made[id(made)] = made  # a tied one that is met again
        return self._made[id(value)]


def _inputs(batch: int, time: int) -> Batch:
    return {
        "input_ids": torch.zeros(batch, time, dtype=torch.int64),
        "attention_mask": torch.ones(batch, time, dtype=torch.int64),
    }

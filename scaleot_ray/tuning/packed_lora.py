"""Several data owners' low-rank pairs on one frozen model: every row goes through its owner's own.

For inference this is what Punica (arXiv 2310.18547) and S-LoRA (2311.03285) do, for training mLoRA
(2312.02515): the frozen projection is multiplied once with all rows, and each owner's thin factors
with that owner's rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from scaleot_ray.config import TuneSettings
from scaleot_ray.families import Family
from scaleot_ray.tuning.delta import Delta, MethodSettings
from scaleot_ray.tuning.lora import LowRank, alpha_of, rank_of, target_modules
from scaleot_ray.tuning.method import claim, release
from scaleot_ray.tuning.trainer import check_start


class Pairs:
    """One data owner's factors A (rank, in) and B (out, rank) of every target, with its own rank and alpha.

    Args:
        settings: of the method, as the delta carries them.
        parameters: by delta name, ``MODULE.lora_A`` and ``MODULE.lora_B``.
    """

    def __init__(self, settings: MethodSettings, parameters: Mapping[str, nn.Parameter]) -> None:
        self.settings, self.parameters = settings, dict(parameters)
        self._scale = alpha_of(settings) / rank_of(settings)

    def update(self, target: str, inputs: torch.Tensor) -> torch.Tensor:
        """(alpha / rank) · B·A·x of the module ``target`` for ``inputs`` (tokens, in): (tokens, out)."""
        down, up = self.parameters[target + ".lora_A"], self.parameters[target + ".lora_B"]
        inputs = inputs.to(down.dtype)
        return nn.functional.linear(nn.functional.linear(inputs, down), up) * self._scale

    def delta(self, positions: tuple[int, ...], values: Mapping[str, torch.Tensor]) -> Delta:
        """The delta that trained ``values`` make."""
        return Delta(LowRank.name, positions, self.settings, LowRank().changes(values))


Segments = Sequence[tuple[Pairs, int]]
"""Whose rows a batch has, and in what proportion, from the first row to the last."""


class PackedLowRank:
    """A model's projections with a place for any number of pairs.

    Args:
        model: emulator or full model.
        family: of the model.
        positions: depths of the plug-in layers.
    """

    def __init__(self, model: nn.Module, family: Family, positions: tuple[int, ...]) -> None:
        self.model, self.family, self.positions = model, family, positions
        self._targets: list[str] = []
        self._segments: list[Segments] = []  # at most one, shared by all projections
        self._required_grad: list[tuple[nn.Parameter, bool]] = []

    def pairs(self, settings: TuneSettings, start: Delta | None = None) -> Pairs:
        """Pairs as :func:`~scaleot_ray.tuning.trainer.tune` begins with; the model must be bare.

        The factors are drawn by the method itself, on the model, from torch's generator as it stands.

        Raises:
            ConfigError: the model has no layer at one of the positions, or ``start`` was tuned in another way.
        """
        carried = LowRank.settings(settings, self.family)
        if start is not None:
            check_start(start, LowRank.name, self.positions, carried)
        method = LowRank()
        parameters = dict(method.attach(self.model, self.family, self.positions, carried))
        try:
            if start is not None:
                method.load(start.tensors)
        finally:
            method.detach()
        self._targets = target_modules(self.family, self.positions, carried)
        return Pairs(carried, parameters)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, all of the model is frozen and its projections take pairs; afterwards it is as it was.

        Raises:
            ConfigError: the model carries a plug-in.
        """
        self._place()
        try:
            yield
        finally:
            self._take_off()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The other way round: inside :meth:`on`, the model as it was before."""
        self._take_off()
        try:
            yield
        finally:
            self._place()

    @contextmanager
    def rows(self, segments: Segments) -> Iterator[None]:
        """Inside, batches have these rows, in the backward pass too; without it the pairs count nowhere."""
        self._segments.append(segments)
        try:
            yield
        finally:
            self._segments.clear()

    def everywhere(self, pairs: Pairs) -> AbstractContextManager[None]:
        """Inside, all rows of any batch are of one data owner."""
        return self.rows([(pairs, 1)])

    def _place(self) -> None:
        claim(self.model)
        self._required_grad = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.model.requires_grad_(False)
        for target in self._targets:
            self._set(target, PackedProjection(self.model.get_submodule(target), target, self._segments))

    def _take_off(self) -> None:
        for target in self._targets:
            module = self.model.get_submodule(target)
            assert isinstance(module, PackedProjection)
            self._set(target, module.base)
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        release(self.model)

    def _set(self, target: str, module: nn.Module) -> None:
        parent, _, child = target.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


class PackedProjection(nn.Module):
    """A frozen projection, and for each segment of the rows the update of its own pair.

    The pairs' parameters are not the module's: each belongs to its data owner's optimizer.

    Args:
        base: maps (…, in) to (…, out).
        target: its name in the model.
        segments: holds the segments of the batch at hand, or nothing.
    """

    def __init__(self, base: nn.Module, target: str, segments: list[Segments]) -> None:
        super().__init__()
        self.base = base
        self._target, self._at_hand = target, segments

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The projection of ``inputs``, in its own type, with the updates."""
        result: torch.Tensor = self.base(inputs)
        if not self._at_hand:
            return result
        (segments,) = self._at_hand
        # OPT hands its MLP (batch · time, in), all others (batch, time, in): count tokens.
        tokens = inputs.flatten(0, -2)
        time = len(tokens) // sum(count for _, count in segments)
        parts = zip(segments, tokens.split([count * time for _, count in segments]), strict=True)
        update = torch.cat([pairs.update(self._target, part) for (pairs, _), part in parts])
        return (result + update.view(*result.shape)).to(result.dtype)

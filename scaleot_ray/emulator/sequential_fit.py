"""Fits a finished emulator in order of depth, each part on what the emulator itself passes on.

Harmonizers and factors that were fitted one layer at a time, on the full model's activations, meet other
inputs in the emulator: the errors of all layers before them. Here two residual streams are carried through
the depth side by side, the full model's and the emulator's, and each part is fitted in closed form from the
emulator's stream towards the full model's, so that later layers undo what they can of earlier errors: about three
forward passes of the middle layers in all. (Ours. Calibrating on the compressed model's own activations is
what GPTQ, arXiv 2210.17323, and SVD-LLM, arXiv 2403.07378, do for weights.)

A product of queries and keys has no closed form of least error, so the factors of a layer's attention then
take a few gradient steps together, towards what that layer's attention adds in the full model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator.closed_form import ResidualStatistics, fit_harmonizer, fit_read_out, usual_tokens
from scaleot_ray.emulator.harmonizer import Harmonizer
from scaleot_ray.emulator.layer_by_layer import LayerCalls, layer_calls
from scaleot_ray.emulator.layer_map import LayerRole
from scaleot_ray.emulator.rank_compression import LowRankLinear, kept_rank
from scaleot_ray.emulator.reduced_rank import RegressionSums, reduced_rank_regression
from scaleot_ray.families import Family, Projection, as_stored, dense_weight
from scaleot_ray.progress import OnProgress, ProgressMeter

BATCHES_AT_ONCE = 4
"""Batches of public text that the fit runs as one."""

# Of the gradient steps: peak rate relative to a factor's root mean square, steps of warm-up, and the least deviation of
# a dimension that counts, relative to the mean one.
_RATE, _WARMUP, _LEAST_DEVIATION = 0.03, 10, 0.01

_Factors = list[tuple[torch.Tensor, torch.Tensor]]
"""``up`` (rows of the part, rank) and ``down`` (rank, in) of each part of a projection."""


@dataclass
class Streams:
    """Both residual streams of one batch at some depth, (batch, time, d).

    Attributes:
        calls: how the model calls its layers for this batch.
        full: the full model's stream.
        emulated: the emulator's; the same tensor as ``full`` as long as nothing before has been changed.
    """

    calls: LayerCalls
    full: torch.Tensor
    emulated: torch.Tensor

    def usual(self) -> torch.Tensor:
        """Positions (batch, time) that count: no padding, no massive activations."""
        real = self.calls.real
        usual = torch.zeros_like(real)
        usual[real] = usual_tokens(self.full[real], self.emulated[real])
        return usual


class SequentialFit:
    """Refits an emulator of a model in place, layer by layer.

    Parts get new parameters; tensors that the emulator shares with others stay as they are.

    Args:
        model: the full model.
        emulator: assembled; its harmonizers and compressed projections are fitted, all else stays.
        family: of both.
        roles: of the layers.
        beta: rank reduction of the kept layers' attention weights; 0 where they are as they were.
        ridge: λ relative to the mean squared input.
        steps: gradient steps for the attention of each kept layer, about 2,000 tokens each.
    """

    def __init__(
        self,
        model: Any,
        emulator: Any,
        family: Family,
        roles: Sequence[LayerRole],
        beta: float,
        ridge: float,
        steps: int = 0,
    ) -> None:
        self.model, self.family = model, family
        self.full_layers, self.layers = family.layers(model), family.layers(emulator)
        self.beta, self.ridge, self.steps = beta, ridge, steps
        fitted = {LayerRole.REPLACED} | ({LayerRole.KEPT} if beta > 0 else set())
        self.positions = [index for index, role in enumerate(roles) if role in fitted]
        self.corrects = family.adds_attention_output(model.config)
        self.dtype = next(model.parameters()).dtype  # of what is stored; layers may be computed in another one

    @torch.no_grad()
    def run(self, batches: Iterable[Batch], on_progress: OnProgress | None = None) -> dict[int, float]:
        """Fits on public text.

        Both streams of all of the text are held at once: 2 · tokens · d numbers of the model's type.

        Args:
            batches: ``input_ids`` and ``attention_mask`` (batch, time).
            on_progress: hears of ``fit in order``, layer by layer.

        Returns:
            For each layer that was fitted: squared error of the emulator's stream behind it, relative to the
            variance of the full model's.
        """
        if not self.positions:
            return {}
        streams = self.begin(batches)
        errors: dict[int, float] = {}
        meter = ProgressMeter("fit in order", self.positions[-1] + 1, on_progress)
        for index in range(self.positions[-1] + 1):
            error = self.step(index, streams)
            if error is not None:
                errors[index] = error
            meter.advance()
        return errors

    @torch.no_grad()
    def begin(self, batches: Iterable[Batch], device: torch.device | None = None, merge: bool = True) -> list[Streams]:
        """Both streams in front of the first layer, for batches as :meth:`run` takes them.

        Args:
            device: of the layers; None for the model's own.
            merge: make larger batches of them.
        """
        text = _merged(batches) if merge else batches
        calls = [layer_calls(self.model, self.family, batch, device) for batch in text]
        return [Streams(call, hidden, hidden) for call in calls for hidden in (call.begin(),)]

    @torch.no_grad()
    def step(self, index: int, streams: Sequence[Streams], carried: Sequence[Streams] = ()) -> float | None:
        """Takes all streams through the layer ``index``, after fitting the emulator's if that is to be fitted.

        Args:
            streams: in front of the layer; what is fitted on.
            carried: further streams, that are not fitted on.

        Returns:
            The error behind the layer, as :meth:`run` gives it; None where it is not fitted.
        """
        error = None
        if index not in self.positions:
            self._carry(index, streams)
        else:
            if isinstance(self.layers[index], Harmonizer):
                self._fit_harmonizer(index, streams)
            else:
                self._fit_attention(index, streams)
            error = _relative_error(streams)
        self._carry(index, carried, changed=error is not None)
        return error

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters of all layers that were fitted, by their full name in the emulator."""
        return {name: value for index in self.positions for name, value in self.layer_tensors(index).items()}

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The same of one layer, in the model's type."""
        prefix = self.family.layer_prefix(index)
        return {
            prefix + name: parameter.detach().to(self.dtype)
            for name, parameter in self.layers[index].named_parameters()
        }

    def _full(self, index: int, stream: Streams) -> torch.Tensor:
        return stream.calls.run(self.full_layers[index], index, stream.full, self.family)

    def _emulated(self, index: int, stream: Streams) -> torch.Tensor:
        return stream.calls.run(self.layers[index], index, stream.emulated, self.family)

    def _carry(self, index: int, streams: Sequence[Streams], changed: bool = False) -> None:
        """Through a layer that both have, unless it is ``changed`` in the emulator."""
        for stream in streams:
            same = stream.emulated is stream.full and not changed  # nor has anything before been
            stream.full = self._full(index, stream)
            stream.emulated = stream.full if same else self._emulated(index, stream)

    def _fit_harmonizer(self, index: int, streams: Sequence[Streams]) -> None:
        harmonizer = _with_own_parameters(self.layers[index])
        width = streams[0].full.shape[-1]
        device = streams[0].full.device
        if harmonizer.linear:
            statistics = ResidualStatistics(width, device)
            for stream in streams:
                stream.full, real = self._full(index, stream), stream.calls.real
                statistics.update(stream.emulated[real], stream.full[real])
            fit_harmonizer(harmonizer, statistics, self.ridge)
        else:  # its hidden units are a start, or were trained: only what is made of them is fitted anew
            inner = RegressionSums(harmonizer.down.out_features, width, device)
            for stream in streams:
                stream.full = self._full(index, stream)
                usual = stream.usual()
                before, after = stream.emulated[usual].float(), stream.full[usual].float()
                inner.update(harmonizer.inner(before), after - before)
            fit_read_out(harmonizer, inner, self.ridge)
        for parameter in harmonizer.parameters():
            parameter.data = parameter.to(self.dtype).to(streams[0].emulated.dtype)
        for stream in streams:
            stream.emulated = self._emulated(index, stream)

    def _fit_attention(self, index: int, streams: Sequence[Streams]) -> None:
        """First the projections that read a layer's input, then, on what attention makes of them, the one behind."""
        *inner, output = self.family.attention
        sums = {projection.path: self._sums(index, projection) for projection in inner}
        behind = _Spread()  # of the full model's stream behind its attention
        targets = [self._observe(index, stream, sums, behind) for stream in streams]
        factors = {}
        for projection in inner:
            # Of a wide model they are the largest things there are.
            factors[projection.path] = self._least_error(projection, sums.pop(projection.path))
            self._install(index, projection, factors[projection.path])
        sums[output.path] = self._sums(index, output)
        for stream, (usual, target) in zip(streams, targets, strict=True):
            read = self._inputs(index, [output], stream)[output.path].input
            sums[output.path].update(_rows(read, stream)[usual], target)
            del read  # it is as large as the stream that is next
        factors[output.path] = self._least_error(output, sums.pop(output.path))
        self._install(index, output, factors[output.path])
        if self.steps:
            self._descend(index, factors, streams, targets, behind)
        for stream in streams:
            stream.emulated = self._emulated(index, stream)

    def _observe(
        self, index: int, stream: Streams, sums: dict[str, RegressionSums], behind: _Spread
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the full model's stream through the layer, and counts what its inner projections make of their inputs.

        Returns:
            Positions (batch, time) that count, and what the output projection is to give there (tokens, d).
        """
        *inner, output = self.family.attention
        usual = stream.usual()
        with watching(self.full_layers[index], self.family.attention) as wanted:
            after = self._full(index, stream)
        got = self._inputs(index, inner, stream)
        for projection in inner:
            sums[projection.path].update(
                _rows(got[projection.path].input, stream)[usual],
                _rows(wanted[projection.path].output, stream)[usual],
            )
        target = _rows(wanted[output.path].output, stream)
        if self.corrects:
            target = target + stream.full - stream.emulated
        behind.update((target + (stream.emulated if self.corrects else stream.full))[usual])
        stream.full = after
        return usual, target[usual]

    def _sums(self, index: int, projection: Projection) -> RegressionSums:
        module = self.full_layers[index].get_submodule(projection.path)
        outputs, inputs = dense_weight(module).shape
        return RegressionSums(inputs, outputs, next(module.parameters()).device)

    def _inputs(self, index: int, projections: Sequence[Projection], stream: Streams) -> dict[str, _Call]:
        """What reaches some projections of the emulator's layer."""
        with watching(self.layers[index], projections, stop=True) as seen:
            self._emulated(index, stream)
        return seen

    def _least_error(self, projection: Projection, sums: RegressionSums) -> _Factors:
        """Factors of a compressed projection, part by part, with the least error of its output."""
        xx, xy = sums.moments()
        parts = projection.parts(self.model.config) if projection.parts else [torch.arange(xy.shape[1])]
        factors = []
        for rows in parts:
            rank = kept_rank((len(rows), len(xx)), self.beta)
            up, down = reduced_rank_regression(xx, xy[:, rows.to(xy.device)], rank, self.ridge)
            balance = (down.norm(dim=1) / up.norm(dim=0)).clamp_min(1e-12).sqrt()
            factors.append((up * balance, down / balance[:, None]))
        return factors

    def _stored(self, index: int, projection: Projection, factors: _Factors) -> dict[str, torch.Tensor]:
        """What the emulator's layer holds of factors: themselves, or their product where it keeps that."""
        module = self.layers[index].get_submodule(projection.path)
        if isinstance(module, LowRankLinear):
            parts = {f"up.{part}": up for part, (up, _) in enumerate(factors)}
            values = {"down": torch.cat([down for _, down in factors]), **parts}
        else:
            product = torch.cat([up @ down for up, down in factors])
            if projection.parts:
                product = product[torch.cat(list(projection.parts(self.model.config))).argsort().to(product.device)]
            values = {"weight": as_stored(module, product)}
        return {name: value.to(module.get_parameter(name)) for name, value in values.items()}

    def _install(self, index: int, projection: Projection, factors: _Factors) -> None:
        """Gives a compressed projection new parameters."""
        module = self.layers[index].get_submodule(projection.path)
        for name, value in self._stored(index, projection, factors).items():
            parent, _, attribute = name.rpartition(".")
            rounded = value.detach().to(self.dtype).to(value.dtype)  # what will be stored
            setattr(module.get_submodule(parent), attribute, nn.Parameter(rounded.contiguous(), requires_grad=False))

    @torch.enable_grad()
    def _descend(
        self,
        index: int,
        factors: dict[str, _Factors],
        streams: Sequence[Streams],
        targets: Sequence[tuple[torch.Tensor, torch.Tensor]],
        behind: _Spread,
    ) -> None:
        """Trains all factors of a layer's attention towards the target of its output projection.

        Every dimension counts relative to how much the stream behind the attention varies in it.
        """
        layer, attention = self.layers[index], self.family.attention
        trained = {path: [(_leaf(up), _leaf(down)) for up, down in own] for path, own in factors.items()}
        leaves = [leaf for own in trained.values() for pair in own for leaf in pair]
        rates = [_RATE * leaf.detach().square().mean().sqrt().item() for leaf in leaves]
        optimizer = torch.optim.AdamW(
            [{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves, rates, strict=True)],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        # A dimension that hardly varies (a pruned model's) would own the loss.
        scale = behind.deviation()
        scale = scale.clamp_min(_LEAST_DEVIATION * scale.mean()).clamp_min(1e-12)
        for step in range(self.steps):
            stream, (usual, target) = streams[step % len(streams)], targets[step % len(streams)]
            values = {
                f"{projection.path}.{name}": value
                for projection in attention
                for name, value in self._stored(index, projection, trained[projection.path]).items()
            }
            with watching(layer, attention[-1:], stop=True) as seen:
                arguments, named = stream.calls.arguments[index]
                torch.func.functional_call(layer, values, (stream.emulated, *arguments), named)
            got = _rows(seen[attention[-1].path].output, stream)[usual]
            # The sum over tokens, not their mean: of that, float16 gradients would be zero. To Adam both are the same.
            loss = ((got.float() - target.float()) / scale).square().mean(-1).sum()
            optimizer.zero_grad()
            loss.backward()
            share = min(1.0, (step + 1) / _WARMUP) * (1 - step / self.steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate
            optimizer.step()
        for projection in attention:
            self._install(index, projection, trained[projection.path])


class _Spread:
    """Standard deviation of each dimension over tokens that come in parts."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def update(self, values: torch.Tensor) -> None:
        """Counts tokens (tokens, d)."""
        wide = values.double()
        self._count += len(wide)
        self._sum = self._sum.to(wide) + wide.sum(0)
        self._squares = self._squares.to(wide) + wide.square().sum(0)

    def deviation(self) -> torch.Tensor:
        """(d,), float32."""
        mean = self._sum / max(self._count, 1)
        return (self._squares / max(self._count, 1) - mean.square()).clamp_min(0).sqrt().float()


def _leaf(value: torch.Tensor) -> torch.Tensor:
    return value.detach().float().clone().requires_grad_(True)


def _merged(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same sequences in larger batches: a small matrix product costs little less than a large one."""
    for _, several in itertools.groupby(zip(itertools.count(), batches), lambda pair: pair[0] // BATCHES_AT_ONCE):
        group = [batch for _, batch in several]
        time = max(batch["input_ids"].shape[1] for batch in group)
        yield {
            name: torch.cat([functional.pad(batch[name], (0, time - batch[name].shape[1])) for batch in group])
            for name in ("input_ids", "attention_mask")
        }


@dataclass
class _Call:
    """Input and output without bias of a projection, (batch, time, ·) or (batch · time, ·)."""

    input: torch.Tensor
    output: torch.Tensor


class _AllSeen(Exception):
    """Ends a layer's run once everything that was watched has been called."""


@contextmanager
def watching(layer: nn.Module, projections: Sequence[Projection], stop: bool = False) -> Iterator[dict[str, _Call]]:
    """Calls of some projections of a layer, by path, while it runs.

    Args:
        stop: end the run when all of them have been called.
    """
    seen: dict[str, _Call] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            bias = getattr(module, "bias", None)
            seen[path] = _Call(arguments[0], output if bias is None else output - bias)
            if stop and len(seen) == len(projections):
                raise _AllSeen

        return hook

    handles = [layer.get_submodule(item.path).register_forward_hook(watch(item.path)) for item in projections]
    try:
        yield seen
    except _AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _rows(values: torch.Tensor, stream: Streams) -> torch.Tensor:
    """(batch, time, ·), also where a family flattens (batch, time) before its projections."""
    return values.reshape(*stream.calls.real.shape, -1)


def _with_own_parameters(harmonizer: nn.Module) -> Harmonizer:
    """The same module in float32, whose parameters nobody else holds."""
    assert isinstance(harmonizer, Harmonizer)
    for name, parameter in list(harmonizer.named_parameters()):
        parent, _, attribute = name.rpartition(".")
        copy = nn.Parameter(parameter.detach().float().clone(), requires_grad=False)
        setattr(harmonizer.get_submodule(parent), attribute, copy)
    return harmonizer


def _relative_error(streams: Sequence[Streams]) -> float:
    """Squared error of the emulator's streams, relative to the variance of the full model's."""
    error = squares = 0.0
    total, tokens = torch.zeros(()), 0
    for stream in streams:
        usual = stream.usual()
        full = stream.full[usual].float()
        error += (stream.emulated[usual].float() - full).square().sum().item()
        squares += full.square().sum().item()
        total, tokens = total.to(full) + full.sum(0), tokens + len(full)
    return error / max(squares - total.square().sum().item() / max(tokens, 1), 1e-12)

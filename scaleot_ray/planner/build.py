"""What ``scaleot build`` needs: its stages one by one, in memory, streamed or with a group of workers.

Sums and matrices are counted where they are kept; activations are what the model's own operations would allocate
(:mod:`~scaleot_ray.planner.blueprint`). An overview of what is kept through which stage is in docs/architecture.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from scaleot_ray.config import EmulatorSettings, ModelSettings, ParallelSettings, StageOneSettings
from scaleot_ray.emulator.harmonizer import switchable
from scaleot_ray.emulator.importance import LayerScores
from scaleot_ray.emulator.layer_map import LayerRole, positions
from scaleot_ray.emulator.layer_replace import candidate_layers
from scaleot_ray.emulator.layer_replace_steps import harmonizer_modules
from scaleot_ray.emulator.rank_compression import kept_rank
from scaleot_ray.emulator.reduced_rank import regression_bytes, sums_bytes
from scaleot_ray.emulator.sequential_fit import BATCHES_AT_ONCE
from scaleot_ray.families import dense_weight, family_of, hidden_size, layer_count
from scaleot_ray.planner.blueprint import Blueprint
from scaleot_ray.planner.emulator import EmulatorShape, full_model, parameters
from scaleot_ray.planner.plan import Parts, Phase, Plan, Process
from scaleot_ray.stages.public_text import HELD_OUT

STORE_ROOM = 256 << 20
"""Bytes of a group's object store for everything that is no state."""

_STATES = 4
"""States that may be on their way between workers and the build at once, each harmonizers with two moments."""


def group_store(harmonizers: int) -> int:
    """Bytes of the object store of a group of workers, for harmonizers of so many bytes."""
    return STORE_ROOM + _STATES * 3 * harmonizers


def plan_build(
    config: Any,
    model: ModelSettings,
    stage_one: StageOneSettings,
    emulator: EmulatorSettings,
    *,
    stream: bool = False,
    parallel: ParallelSettings | None = None,
    deepspeed: dict[str, Any] | None = None,
    gpu: bool = False,
    stored: str | None = None,
) -> Plan:
    """What a build needs.

    Args:
        config: of the full model.
        model: its type and device.
        stage_one, emulator: settings, as the build takes them.
        stream: the model's weights stay on disk.
        parallel: of the group that makes the steps; None where the building process does.
        deepspeed: the group's DeepSpeed configuration; None for none.
        gpu: whether the building process computes on a GPU.
        stored: type of the weights on disk; None where they are unpacked in any case (GGUF).

    Raises:
        ConfigError: no such emulator can be built.
    """
    return _Build(config, model, stage_one, emulator, stream, parallel, deepspeed or {}, gpu, stored).plan()


@dataclass(frozen=True)
class _Projection:
    outputs: int
    inputs: int
    rank: int


@dataclass(frozen=True)
class _Build:
    config: Any
    model: ModelSettings
    stage_one: StageOneSettings
    emulator: EmulatorSettings
    stream: bool
    parallel: ParallelSettings | None
    deepspeed: dict[str, Any]
    gpu: bool
    stored: str | None

    def plan(self) -> Plan:
        own = Process(
            "build",
            1,
            self.gpu,
            tuple(self._streamed() if self.stream else self._in_memory()),
            0 if self._copied else self._weights,
        )
        processes: tuple[Process, ...] = (own,)
        store = 0
        if self.parallel is not None and self._steps:
            processes, store = (own, self._worker(self.parallel)), group_store(self._harmonizers)
        return Plan(processes, store, self._disk(), self.shape.bytes)

    @cached_property
    def shape(self) -> EmulatorShape:
        return EmulatorShape(self.config, getattr(torch, self.model.dtype), self.stage_one, self.emulator)

    # What the parts take.

    @property
    def _dtype(self) -> torch.dtype:
        return self.shape.dtype

    @cached_property
    def _width(self) -> int:
        return hidden_size(self.config)

    @cached_property
    def _candidates(self) -> int:
        return len(candidate_layers(layer_count(self.config)))

    @cached_property
    def _weights(self) -> int:
        return self._dtype.itemsize * parameters(self.shape.base.model)

    @property
    def _copied(self) -> bool:
        """Whether the weights are in memory, and not pages of their files."""
        return self.gpu or self.stored != self.model.dtype

    @property
    def _harmonizers(self) -> int:
        """All harmonizers, in float32."""
        return self._candidates * self.shape.harmonizer_parameters * max(4, self._dtype.itemsize)

    @cached_property
    def _projections(self) -> list[_Projection]:
        """A layer's attention."""
        family, layer = self.shape.base.family, self.shape.base.family.layers(self.shape.base.model)[0]
        found = []
        for item in family.attention:
            outputs, inputs = dense_weight(layer.get_submodule(item.path)).shape
            parts = len(item.parts(self.config)) if item.parts else 1
            rank = kept_rank((outputs // parts, inputs), self.shape.beta) if self.shape.beta else inputs
            found.append(_Projection(outputs, inputs, rank))
        return found

    @property
    def _moments(self) -> int:
        """Of attention's inputs, of which query, key and value have one in common."""
        inputs = {"before": self._projections[0].inputs, "output": self._projections[-1].inputs}
        return self._candidates * 4 * sum(width * width for width in inputs.values())

    @cached_property
    def _blueprint(self) -> Blueprint:
        """The full model as layers are computed: in float32 where they are streamed."""
        dtype = torch.float32 if self.stream else self._dtype
        return Blueprint(full_model(self.config, self._dtype), dtype)

    @property
    def _fits(self) -> bool:
        return self.emulator.builder == "scaleot" and self.emulator.fit_tokens > 0

    @property
    def _steps(self) -> int:
        return 0 if self.stream and self.parallel is None else self.stage_one.steps

    @property
    def _held_out(self) -> int:
        return HELD_OUT * self.stage_one.block_size

    def _update(self, tokens: int, size: int) -> int:
        """While tokens are added to the sums of a layer: inputs and outputs as they are, in float32, and those that
        count; then a product."""
        copies = (2 * size if size != 4 else 0) + 3 * 4
        return tokens * self._width * copies + 4 * self._width**2

    # In memory.

    def _in_memory(self) -> list[Phase]:
        weights = {"weights": self._weights} if self._copied else {}
        state = {"harmonizers": self._harmonizers, "moments of inputs": self._moments}
        phases = []
        if self.emulator.builder == "scaleot":
            phases += [self._calibrate(weights), self._damage(weights, state)]
            if self.parallel is None and self._steps:
                phases.append(self._descend(weights, state))
        phases += self._emulate(weights, state)
        return phases

    def _calibrate(self, weights: Parts) -> Phase:
        batch, time = self.stage_one.batch_size, self.stage_one.block_size
        sums = {"sums over layers": self._candidates * sums_bytes(self._width, self._width)}
        widest = max(item.inputs for item in self._projections)
        passing = max(
            self._blueprint.forward(batch, time), self._update(batch * time, self._dtype.itemsize) + 8 * widest**2
        )
        moments = {"moments of inputs": self._moments}
        fit = regression_bytes(self._width, self._width, min(self.stage_one.harmonizer_rank, self._width))
        return _fullest(
            "calibrate",
            weights | sums | moments | {"activations": passing},
            weights | sums | moments | {"harmonizers": self._harmonizers, "regression": fit},
        )

    def _damage(self, weights: Parts, state: Parts) -> Phase:
        batch, time = self.stage_one.batch_size, self.stage_one.block_size
        work = {"modules": self._harmonizers, "activations and logits": self._blueprint.damage(batch, time)}
        return Phase("layer damage", weights | work, state)

    def _descend(self, weights: Parts, state: Parts) -> Phase:
        settings = self.stage_one
        step = self._step(settings.batch_size, recompute=False)
        trained = {"modules": self._harmonizers, "optimizer": 2 * self._harmonizers}
        device = weights | trained | {"activations and gradients": step}
        if not self.gpu and step < 3 * self._harmonizers:
            device = weights | trained  # what a step needs is gone when its outcome is kept
        elif not self.gpu:
            return Phase("stage 1", device, state)
        return Phase("stage 1", device, state | {"checkpoint": 3 * self._harmonizers})

    def _step(self, batch: int, recompute: bool) -> int:
        """A harmonizer step with the mask that leaves most to be kept: few layers, the first one among them."""
        model, settings = full_model(self.config, self._dtype), self.stage_one
        candidates, family = candidate_layers(layer_count(self.config)), family_of(self.config)
        groups = LayerScores(candidates, settings.group_size).groups
        replaced = [index for group in groups for index in group[: int(settings.masked_fraction * len(group))]] or [0]
        harmonizers = harmonizer_modules(model, family, settings, candidates)
        with switchable(model, family, harmonizers, recompute) as switchboard:
            blueprint = Blueprint(model, self._dtype)
            mask = frozenset(candidates[index] for index in replaced)
            return blueprint.distillation_step(batch, settings.block_size, switchboard, mask)

    def _emulate(self, weights: Parts, state: Parts) -> list[Phase]:
        made = {"emulator's own parts": self.shape.own_bytes}
        batch, time = self.stage_one.batch_size, self.stage_one.block_size
        if self.emulator.builder != "scaleot":
            state = {}
        phases = []
        if self.shape.beta and positions(self.shape.roles, LayerRole.KEPT):
            largest = max(regression_bytes(item.inputs, item.outputs, item.rank) for item in self._projections)
            phases.append(Phase("compress", weights | made | {"decomposition": largest}, state))
        logits = {"activations and logits": self._blueprint.forward(batch, time, logits=True)}
        phases.append(Phase("measure emulator", weights | made | logits, state))
        if self._fits:
            made = {"emulator's own parts": 2 * self.shape.own_bytes}
            streams = {"two residual streams": 2 * self._fit_tokens * self._width * self._dtype.itemsize}
            phases.append(Phase("fit in order", weights | made | streams | self._fit_layer(0), state))
        return phases

    @property
    def _fit_tokens(self) -> int:
        step = self.stage_one.batch_size * self.stage_one.block_size
        return math.ceil(self.emulator.fit_tokens / step) * step

    def _fit_layer(self, weights: int) -> Parts:
        """The fullest moment of fitting a layer.

        Args:
            weights: bytes of a kept layer at work, in both models, beyond those of a replaced one.
        """
        moments: list[Parts] = []
        if positions(self.shape.roles, LayerRole.REPLACED):
            moments += self._fit_harmonizer()
        if self.shape.beta and positions(self.shape.roles, LayerRole.KEPT):
            beside = {"layer's weights": weights} if weights else {}
            moments += [beside | moment for moment in self._fit_attention()]
        return max(moments, key=lambda parts: sum(parts.values()), default={})

    @property
    def _fit_size(self) -> int:
        """Bytes of a number of the residual streams."""
        return 4 if self.stream else self._dtype.itemsize

    def _fit_harmonizer(self) -> list[Parts]:
        batch, time = BATCHES_AT_ONCE * self.stage_one.batch_size, self.stage_one.block_size
        run = max(self._blueprint.layer(0, batch, time), self._update(batch * time, self._fit_size))
        fit = regression_bytes(self._width, self._width, min(self.stage_one.harmonizer_rank, self._width))
        sums = {"sums": sums_bytes(self._width, self._width)}
        return [sums | {"work": run}, sums | {"regression": fit}]

    def _fit_attention(self) -> list[Parts]:
        batch, time, size = BATCHES_AT_ONCE * self.stage_one.batch_size, self.stage_one.block_size, self._fit_size
        *inner, output = self._projections
        targets = {"targets": self._fit_tokens * self._width * size}
        sums = {"sums": sum(sums_bytes(item.inputs, item.outputs) for item in inner)}
        last = {"sums": sums_bytes(output.inputs, output.outputs)}
        # In numbers a token: what is watched, while the layer runs; while inputs and outputs are added; while the
        # spread is, in float64.
        made = sum(item.outputs for item in inner)
        watched = self._width + inner[0].inputs + made + output.inputs + output.outputs
        adding = max(2 * item.inputs + item.outputs for item in inner) * (1 if size == 4 else 3)
        numbers = max(watched + adding, watched + (3 + 16 // size) * self._width)
        running = self._blueprint.layer(0, batch, time) + batch * time * size * (made + output.inputs)
        work = max(running, batch * time * size * numbers)
        moments = [
            targets | sums | {"work": work},
            targets | sums | {"regression": max(regression_bytes(one.inputs, one.outputs, one.rank) for one in inner)},
            targets | last | {"regression": regression_bytes(output.inputs, output.outputs, output.rank)},
        ]
        if self.emulator.fit_steps:
            factors = sum(item.rank * (item.inputs + item.outputs) for item in self._projections)
            step = self._blueprint.attention_step(0, batch, time)
            # As they were fitted, in float64; as they are trained, with two moments and a gradient.
            moments.append(targets | {"factors": factors * (8 + 4 * 4), "gradient step": step})
        return moments

    # Streamed.

    def _streamed(self) -> list[Phase]:
        layers, family = layer_count(self.config), self.shape.base.family
        base, width, settings = self.shape.base.model, self._width, self.stage_one
        layer = max(parameters(one) for one in family.layers(base))
        wide = 0 if self._dtype == torch.float32 and not self.gpu else 4 * layer
        batch, time = settings.batch_size, settings.block_size
        step, tokens = batch * time, math.ceil(settings.start_tokens / (batch * time)) * batch * time
        arguments = self._blueprint.arguments(batch, time)
        harmonizers = {"harmonizers": self._harmonizers}
        variants = {"held-out batch, each layer replaced": (layers - 1) * step * width * 4}
        passing = {
            "layer's weights": wide,
            "residual stream": tokens * width * 4,
            "masks and positions": math.ceil(tokens / step) * arguments,
            **variants,
        }
        sums = {"sums": sums_bytes(width, width)}
        run = max(self._blueprint.layer(0, batch, time), self._update(step, 4))
        fit = regression_bytes(width, width, min(settings.harmonizer_rank, width))
        head = 0 if self._dtype == torch.float32 else 4 * base.get_output_embeddings().weight.numel()
        logits = self._blueprint.forward(batch, time, logits=True)
        damage = _fullest(
            "layer damage",
            passing | sums | {"work": run},
            {name: value for name, value in passing.items() if name != "layer's weights"} | sums | {"regression": fit},
        )
        heads = {"head's weights": head, "logits": self._blueprint.damage(batch, time)}
        phases = [
            Phase("layer damage", damage.device, harmonizers),
            Phase("layer damage, the head", variants, harmonizers | heads),
        ]
        attention = sum(item.outputs * item.inputs for item in self._projections)
        beside = max(0, 2 * wide - 4 * attention)
        streams = {"residual streams": 2 * (self._fit_tokens + self._held_out) * width * 4}
        batches = math.ceil(self._fit_tokens / (BATCHES_AT_ONCE * step))
        masks = batches * self._blueprint.arguments(BATCHES_AT_ONCE * batch, time) + HELD_OUT // batch * arguments
        fitting = streams | {"masks and positions": masks}
        own = self.shape.own_bytes // max(1, layers)  # the layer at hand; finished ones are pages of files
        work = self._fit_layer(beside)
        both = {"layer's weights": 2 * wide, "work": self._blueprint.layer(0, BATCHES_AT_ONCE * batch, time)}
        fit_phase = _fullest("fit in order", fitting | work, fitting | both)
        phases.append(Phase("fit in order", fit_phase.device | {"emulator's own parts": own}, harmonizers))
        carried = {"residual streams": 2 * self._held_out * width * 4}
        phases.append(Phase("measure fit", carried, harmonizers | {"head's weights": head, "logits": logits}))
        return phases

    # Workers.

    def _worker(self, parallel: ParallelSettings) -> Process:
        section = self.deepspeed.get("zero_optimization", {})
        param, optimizer = (
            (section.get(f"offload_{name}") or {}).get("device", "none") for name in ("param", "optimizer")
        )
        device: Parts = {}
        disk: Parts = {}
        host: Parts = {"state": 4 * self._harmonizers}  # as it came, and gathered with two moments to be kept
        places = {"none": device, "cpu": host, "nvme": disk}
        mapped = self.stored == self.model.dtype  # pages of the files, from which each worker takes its part
        if parallel.zero == 3:
            places[param]["weights, this worker's part"] = math.ceil(self._weights / parallel.workers)
            # Nothing is fetched ahead: one module's weights are there, and the next one's when it begins.
            largest = max(value.numel() for value in self.shape.base.model.parameters())
            device["weights, gathered"] = 2 * largest * self._dtype.itemsize
        elif parallel.gpus or not mapped:
            device["weights"] = self._weights
        if not mapped and (parallel.gpus or parallel.zero == 3):
            host["weights as they are read"] = self._weights
        spread = parallel.workers if parallel.zero else 1
        places[optimizer]["optimizer"] = math.ceil(3 * self._harmonizers / spread)
        device["harmonizers"] = math.ceil(self._harmonizers / (spread if parallel.zero == 3 else 1))
        if parallel.zero:
            device["buckets"] = 4 * sum(section.get(f"{name}_bucket_size", 1 << 24) for name in ("reduce", "allgather"))
        rows = math.ceil(self.stage_one.batch_size / parallel.workers)
        device["activations and gradients"] = self._step(rows, parallel.gradient_checkpointing)
        phase = Phase("stage 1", device, host)
        return Process("worker", parallel.workers, bool(parallel.gpus), (phase,), self._weights if mapped else 0)

    # Disk.

    def _disk(self) -> int:
        emulator = 2 * self.shape.bytes  # an artefact is written beside the one that it replaces
        state = 2 * 3 * self._harmonizers  # and so is a checkpoint
        if not self.stream:
            return emulator + state + self._moments
        width, settings = self._width, self.stage_one
        step = settings.batch_size * settings.block_size
        stage_one = 2 * 4 * width * (settings.start_tokens + layer_count(self.config) * step)
        fit = 2 * 2 * 4 * width * (self._fit_tokens + self._held_out)
        return emulator + state + self.shape.own_bytes + max(stage_one, fit)


def _fullest(name: str, *moments: Parts) -> Phase:
    return Phase(name, max(moments, key=lambda parts: sum(parts.values())))

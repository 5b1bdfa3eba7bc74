"""Stage 2 for models that stay on disk: the fit in order of depth, one decoder layer in memory at a time.

The emulator is the one that :func:`~scaleot_ray.emulator.build.build_emulator` makes of the same stage-1 result with
a fit, up to rounding: layers are computed in float32 whatever type they are stored in. Its parts are written down as
they are made and mapped again, so that it never is in memory whole; tensors that leave unchanged are pages of the
model's own files. Both models' losses on held-out text come out of the same pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from scaleot_ray.artifacts import Artifact
from scaleot_ray.config import EmulatorSettings
from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator.assemble import assemble_tensors
from scaleot_ray.emulator.build import (
    FullModelFacts,
    as_artifact,
    at_least,
    check_triplet,
    choose_layers,
    describe_build,
    fit_facts,
    harmonizer_tensors,
    verbatim_tensors,
)
from scaleot_ray.emulator.layer_by_layer import layers_gave
from scaleot_ray.emulator.layer_map import LayerRole, positions
from scaleot_ray.emulator.rank_compression import factor_shapes
from scaleot_ray.emulator.sequential_fit import SequentialFit, Streams
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.emulator.streaming.at_work import at_work, front_at_work, head_at_work
from scaleot_ray.emulator.streaming.position import Position
from scaleot_ray.emulator.streaming.saved_layers import SavedLayers
from scaleot_ray.evaluation.loss import LossScore, evaluate_loss
from scaleot_ray.families import dense_weight, layer_count
from scaleot_ray.families.loading import BaseModel
from scaleot_ray.progress import OnProgress, ProgressMeter


def build_streamed(
    base: BaseModel,
    stage_one: StageOne,
    settings: EmulatorSettings,
    public: Iterable[Batch],
    held_out: Sequence[Batch],
    device: torch.device,
    folder: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Artifact, LossScore]:
    """An emulator artefact for the triplet (N_a, α, β) of ``settings``, and its loss on held-out text.

    Args:
        base: the full model; its weights may lie in files (:func:`~scaleot_ray.families.mapped.map_base_model`).
        stage_one: its harmonizers and scores.
        settings: the triplet, the layout, tokens and steps of the fit.
        public: batches to fit on, as many as ``settings.fit_tokens`` asks for.
        held_out: batches that both models' losses are measured on.
        device: where layers are computed, in float32.
        folder: of this emulator's own. What is finished is kept there, and a pass that was stopped goes on from it;
            the artefact's tensors are pages of its files, so it is to be removed after the artefact is written.
        on_progress: hears of ``fit in order`` and ``measure fit``.

    Raises:
        ConfigError: :func:`~scaleot_ray.emulator.build.check_triplet` refuses the settings.
        RunFailed: a loss is not finite; or the folder's files are damaged or cannot be written.
        ResourcesMissing: the disk is full.
    """
    check_triplet(layer_count(base.model.config), settings)
    roles = choose_layers(layer_count(base.model.config), stage_one, settings)
    content = describe_build(base, stage_one, roles, settings, FullModelFacts(base.digest))
    tensors = verbatim_tensors(base, roles, settings.beta) | harmonizer_tensors(base, stage_one, roles)
    blank = blank_attention(base, roles, settings.beta)
    emulator = assemble_tensors(base.model.config, content, tensors | blank, base.model.dtype)
    fit = SequentialFit(
        base.model, emulator, base.family, roles, settings.beta, stage_one.settings.ridge, settings.fit_steps
    )
    with front_at_work(base.model, base.family, device):
        fitting = _Fitting(
            fit,
            fit.begin(at_least(settings.fit_tokens, public), device),
            fit.begin(held_out, device, merge=False),
            device,
            SavedLayers(folder),
            {"roles": [role.value for role in roles]},
        )
    fitting.run(Position(None if folder is None else folder / "position.safetensors"), on_progress)
    full, emulated = fitting.losses(base, held_out, on_progress)
    update = {"full_loss": full.value, "emulator_loss": emulated.value, **fit_facts(settings)}
    return as_artifact(base, content.model_copy(update=update), tensors | fitting.saved.tensors), emulated


@dataclass
class _Fitting:
    fit: SequentialFit
    streams: list[Streams]
    carried: list[Streams]
    device: torch.device
    saved: SavedLayers
    record: dict[str, Any]  # what a pass must have in common with the one it goes on from

    def run(self, position: Position, on_progress: OnProgress | None) -> None:
        first, layers = self._restore(position), len(self.fit.layers)
        meter = ProgressMeter("fit in order", layers, on_progress, first)
        for index in range(first, layers):
            self._step(index)
            meter.advance()
            # Behind the last layer in any case: an emulator that cannot be written must not cost the fit.
            position.passed(index + 1, self._state, self.record, due=index + 1 == layers)

    def _step(self, index: int) -> None:
        full, emulated, fitted = self.fit.full_layers[index], self.fit.layers[index], index in self.fit.positions
        with at_work([*full.modules(), *emulated.modules()], self.device):
            self.fit.step(index, self.streams, self.carried)
            own = self.fit.layer_tensors(index) if fitted else {}
        if fitted:
            kept = self.saved.keep(index, {name: value.cpu() for name, value in own.items()})
            self._put_back(index, kept)
        self._let_go(index + 1)

    def _let_go(self, index: int) -> None:
        """Behind the last layer that is fitted nobody asks for the text that was fitted on."""
        if index > max(self.fit.positions, default=-1):
            self.streams = []

    def _named(self) -> dict[str, Streams]:
        """All streams that are still of use."""
        streams = {"fit": self.streams, "held_out": self.carried}
        return {f"{kind}.{number}": one for kind, several in streams.items() for number, one in enumerate(several)}

    def _put_back(self, index: int, kept: dict[str, torch.Tensor]) -> None:
        """Gives a finished layer parameters that take no memory."""
        prefix = self.fit.family.layer_prefix(index)
        for name, value in kept.items():
            parent, _, attribute = name.removeprefix(prefix).rpartition(".")
            setattr(self.fit.layers[index].get_submodule(parent), attribute, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def losses(
        self, base: BaseModel, held_out: Sequence[Batch], on_progress: OnProgress | None
    ) -> tuple[LossScore, LossScore]:
        """Of the full model and of the emulator; both have the same norm and head behind their layers."""
        meter = ProgressMeter("measure fit", 2 * len(held_out), on_progress)
        scores = []
        with head_at_work(base.model, base.family):
            for which in ("full", "emulated"):
                parts = []
                for stream, batch in zip(self.carried, held_out, strict=True):
                    with layers_gave(base.model, base.family, getattr(stream, which).cpu()):
                        parts.append(evaluate_loss(base.model, [batch]))
                    meter.advance()
                scores.append(
                    LossScore(
                        np.concatenate([part.sums for part in parts]), np.concatenate([part.counts for part in parts])
                    )
                )
        return scores[0], scores[1]

    def _state(self) -> dict[str, torch.Tensor]:
        state = {}
        for name, stream in self._named().items():
            state[f"{name}.full"] = stream.full
            if stream.emulated is not stream.full:
                state[f"{name}.emulated"] = stream.emulated
        return state

    def _restore(self, position: Position) -> int:
        found = position.restore()
        if found is None or found[2] != self.record:
            self._let_go(0)
            return 0
        index, tensors, _ = found
        for fitted in self.fit.positions:
            if fitted < index:
                self._put_back(fitted, self.saved.restore(fitted))
        self._let_go(index)
        for name, stream in self._named().items():
            stream.full = tensors[f"{name}.full"].to(self.device)
            other = tensors.get(f"{name}.emulated")
            stream.emulated = stream.full if other is None else other.to(self.device)
        return index


def blank_attention(base: BaseModel, roles: Sequence[LayerRole], beta: float) -> dict[str, torch.Tensor]:
    """In the place of compressed attention that is still to be fitted: zeros that share one number's memory."""
    if beta == 0:
        return {}
    zero = torch.zeros((), dtype=base.model.dtype)
    tensors = {}
    for index in positions(roles, LayerRole.KEPT):
        for projection in base.family.attention:
            name = base.family.layer_prefix(index) + projection.path
            module = base.family.layers(base.model)[index].get_submodule(projection.path)
            rows = projection.parts(base.model.config) if projection.parts else None
            shapes = factor_shapes(dense_weight(module).shape, beta, rows)
            if shapes is None:
                tensors[name + ".weight"] = zero.expand(module.get_parameter("weight").shape)
                continue
            tensors[name + ".down"] = zero.expand(sum(down[0] for _, down in shapes), shapes[0][1][1])
            for part, (up, _) in enumerate(shapes):
                tensors[f"{name}.up.{part}"] = zero.expand(up)
    return tensors

"""What a run needs, estimated from its settings and the size of its model, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scaleot_ray.config import AggregationSettings, RunSettings, StageOneSettings, TuneSettings
from scaleot_ray.families.size import ModelSize
from scaleot_ray.planner.plan import PROCESS
from scaleot_ray.plugin.aggregation.combine import ACROSS_BYTES
from scaleot_ray.result_folder import is_uri

RAY = 600 << 20
"""Bytes of Ray's own processes and of the coordinator."""

STORE_ROOM = 96 << 20
"""Bytes of the object store for everything that is no artefact; Ray refuses stores below 75 MiB."""

_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Memory:
    """Memory of one actor.

    Attributes:
        weights: bytes of the process, the weights it holds and its optimizer's state: these are known.
        work: bytes of activations and logits: an estimate.
    """

    weights: int
    work: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.work


@dataclass(frozen=True)
class Needs:
    """What the parts of a run need, in bytes.

    Attributes:
        emulator: size of the emulator artefact, at most.
        object_store: shared memory that holds the emulator once and every delta twice.
        disk: everything that is written to output, with room to replace an artefact by its successor.
        kept: accepted deltas and aggregates of all rounds, where ``artifacts`` names a folder or a URI; else 0.
        owner: the model owner's build.
        data_owners: tuning, by tenant.
        evaluators: measuring and tuning the full model, by tenant; empty without an evaluator.
        aggregation: what the coordinator holds while it makes one delta of all; 0 without aggregation.
    """

    emulator: int
    object_store: int
    disk: int
    kept: int
    owner: Memory
    data_owners: dict[str, Memory]
    evaluators: dict[str, Memory]
    aggregation: int = 0


def run_needs(settings: RunSettings, size: ModelSize) -> Needs:
    """Estimates what a run needs; sizes of artefacts are upper bounds, activations a rule of thumb."""
    weight, stage_one = _WEIGHT_BYTES[settings.model.dtype], settings.stage_one
    full = size.parameters * weight
    harmonizers = size.layers * (2 * size.width * stage_one.harmonizer_rank + size.width + stage_one.harmonizer_rank)
    emulator = full + harmonizers * weight
    tunes = {tenant.name: settings.tune_of(tenant) for tenant in settings.tenants}
    trained = {name: trained_parameters(tune, settings.emulator.plug_in_layers, size) for name, tune in tunes.items()}
    deltas = sum(4 * count for count in trained.values())
    # The coordinator keeps what was submitted in every round, and every aggregate with its optimizer's state.
    round_of = deltas + (6 * max(trained.values()) * 4 if settings.aggregation else 0)
    kept, apart = settings.rounds.count * round_of, settings.artifacts
    if apart is not None and is_uri(apart):
        here = min(settings.rounds.count, 2) * round_of  # fetched: the round under way, and the one before
    else:
        here = kept if apart is None else 0
    return Needs(
        emulator=emulator,
        object_store=emulator + emulator // 16 + 2 * deltas + STORE_ROOM,
        # An artefact is written beside the one it replaces; checkpoints are values and two moments; stage 1
        # keeps second moments of attention's inputs.
        disk=2 * emulator
        + 2 * 12 * harmonizers
        + size.layers * 2 * size.width * size.width * 4
        + sum(4 * 12 * count for count in trained.values())
        + here,
        kept=kept if apart is not None else 0,
        owner=Memory(PROCESS + 2 * full, _stage_one_work(stage_one, harmonizers, size)),
        data_owners={
            name: Memory(PROCESS + _training(trained[name], weight), activations(tune, size))
            for name, tune in tunes.items()
        },
        evaluators={
            name: Memory(PROCESS + 2 * full + _training(trained[name], weight), activations(tune, size))
            for name, tune in tunes.items()
        }
        if settings.evaluator
        else {},
        aggregation=_aggregation(settings.aggregation, tunes, trained, size) if settings.aggregation else 0,
    )


def trained_parameters(tune: TuneSettings, plug_in_layers: int, size: ModelSize) -> int:
    """Parameters of a delta, about."""
    if tune.method == "layers":
        return plug_in_layers * size.layer_parameters
    if tune.method == "lora":
        # A pair per projection costs rank · (in + out); all projections of a layer together are about
        # as wide as its parameters divided by the width.
        return plug_in_layers * tune.lora_rank * 2 * (size.layer_parameters // size.width + size.width)
    return plug_in_layers * 2 * size.width * tune.bottleneck_width


def activations(tune: TuneSettings, size: ModelSize) -> int:
    """Bytes of a training step's activations and logits in fp32."""
    tokens = tune.batch_size * tune.block_size
    return _step(tokens, 2 if tune.gradient_checkpointing else size.layers, size)


def _aggregation(
    how: AggregationSettings, tunes: Mapping[str, TuneSettings], trained: Mapping[str, int], size: ModelSize
) -> int:
    # As :func:`~scaleot_ray.plugin.aggregation.working_bytes` has it of deltas that are there.
    largest, ranks = max(trained.values()), [tune.lora_rank for tune in tunes.values()]
    projection = size.layer_parameters // 3  # the largest one of a layer: of its MLP, about
    result, working = largest, ACROSS_BYTES
    if how.method in ("concat", "svd"):
        stacked = sum(ranks)
        working = 3 * 8 * stacked * (size.width + projection // size.width)
        result = largest * (stacked if how.method == "concat" else how.rank or max(ranks)) // max(ranks)
    elif how.method in ("ties", "dare"):
        working = 5 * len(tunes) * 4 * projection
    # Steps, and the running values before and after one.
    server = {"none": 0, "momentum": 3, "adam": 5}[how.server]
    return working + (8 + 4) * result + 8 * server * largest


def _training(count: int, weight: int) -> int:
    # Received and trained values, gradient, two Adam moments, and the delta in fp32.
    return count * (weight + 4 + 4 + 8 + 4)


def _stage_one_work(settings: StageOneSettings, harmonizers: int, size: ModelSize) -> int:
    # Sums over hidden states and over the inputs of attention: about four d × d matrices a layer, in fp64.
    statistics = size.layers * 4 * size.width * size.width * 8
    logits_of_teacher = settings.batch_size * settings.block_size * size.vocabulary * 4
    step = _step(settings.batch_size * settings.block_size, size.layers, size) + logits_of_teacher
    return max(statistics, 16 * harmonizers + step)


def _step(tokens: int, layers: int, size: ModelSize) -> int:
    # What a layer keeps for its backward pass is about the inputs and outputs of its projections.
    kept = 2 * size.layer_parameters // size.width
    return 4 * tokens * (layers * kept + 3 * size.vocabulary)

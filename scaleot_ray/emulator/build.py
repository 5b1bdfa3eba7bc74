"""Stage 2: from the full model and one stage-1 result to an emulator artefact, without training (ScaleOT §3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from scaleot_ray.artifacts import Artifact
from scaleot_ray.artifacts.card import with_card
from scaleot_ray.artifacts.manifest import EmulatorContent, HarmonizerSpec, StageOneSpec
from scaleot_ray.artifacts.provenance import licence_files, licence_notice, model_name
from scaleot_ray.config import EmulatorSettings
from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator.assemble import assemble_tensors
from scaleot_ray.emulator.baselines.uniform_drop import uniformly_dropped
from scaleot_ray.emulator.layer_map import (
    LayerRole,
    layer_map,
    middle_layers,
    plug_in_positions,
    positions,
    replaced_count,
)
from scaleot_ray.emulator.layer_replace import candidate_layers
from scaleot_ray.emulator.rank_compression import compress, factor_shapes
from scaleot_ray.emulator.sequential_fit import SequentialFit
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import ConfigError
from scaleot_ray.evaluation.loss import LossScore, evaluate_loss
from scaleot_ray.families import as_stored, dense_weight, layer_count
from scaleot_ray.families.config_fields import architecture_fields
from scaleot_ray.families.loading import BaseModel, tokenizer_files
from scaleot_ray.progress import OnProgress, ProgressMeter


@dataclass(frozen=True)
class FullModelFacts:
    """What every emulator of one model shares, so that it is measured once.

    Attributes:
        digest: of the full model's weights and config.
        score: its loss on public held-out text; None where there is no such text.
    """

    digest: str
    score: LossScore | None = None


def build_emulator(
    base: BaseModel,
    stage_one: StageOne | None,
    settings: EmulatorSettings,
    facts: FullModelFacts,
    held_out: Sequence[Batch] = (),
    public: Iterable[Batch] | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Artifact, LossScore | None]:
    """An emulator artefact for the triplet (N_a, α, β) of ``settings``, and its loss on held-out text.

    The artefact's raw tensors are the model's own, not copies.

    Args:
        base: the full model with its tokenizer.
        stage_one: harmonizers and scores; None for builders that need none.
        settings: the triplet, the layout, the builder.
        facts: digest and held-out loss of the full model.
        held_out: public batches on which the emulator's loss is measured.
        public: public batches that the finished emulator is fitted on, as many as ``settings.fit_tokens`` asks for;
            None leaves it unfitted.
        on_progress: hears of ``compress``, ``measure emulator``, ``fit in order`` and ``measure fit``.

    Returns:
        The artefact, and its loss block by block; None where no text is held out.

    Raises:
        ConfigError: :func:`check_triplet` refuses the settings.
    """
    check_triplet(layer_count(base.model.config), settings)
    roles = choose_layers(layer_count(base.model.config), stage_one, settings)
    tensors = _tensors(base, stage_one, roles, settings, on_progress)
    content = describe_build(base, stage_one, roles, settings, facts)
    score = None
    dtype, device = base.model.dtype, next(base.model.parameters()).device
    if held_out:
        emulator = assemble_tensors(base.model.config, content, tensors, dtype, device)
        score = evaluate_loss(emulator, held_out, on_progress, "measure emulator")
    if stage_one is not None and settings.fit_tokens and public is not None:
        emulator = assemble_tensors(base.model.config, content, tensors, dtype, device)
        fit = SequentialFit(
            base.model, emulator, base.family, roles, settings.beta, stage_one.settings.ridge, settings.fit_steps
        )
        fit.run(at_least(settings.fit_tokens, public), on_progress)
        fitted = evaluate_loss(emulator, held_out, on_progress, "measure fit") if held_out else None
        # Little or monotonous text can make a fit that is worse on all other text.
        if score is None or fitted is None or fitted.value < score.value:
            score = fitted
            tensors |= fit.tensors()
            content = content.model_copy(update=fit_facts(settings))
    if score is not None:
        content = content.model_copy(update={"emulator_loss": score.value})
    return as_artifact(base, content, tensors), score


def describe_build(
    base: BaseModel,
    stage_one: StageOne | None,
    roles: Sequence[LayerRole],
    settings: EmulatorSettings,
    facts: FullModelFacts,
) -> EmulatorContent:
    """What an emulator's manifest says about how it is built, before anything is fitted in it or measured of it."""
    hidden = len(positions(roles, LayerRole.REPLACED)) + len(positions(roles, LayerRole.DROPPED))
    return EmulatorContent(
        plug_in_layers=settings.plug_in_layers,
        alpha=settings.alpha,
        beta=settings.beta,
        layout=settings.layout,
        layer_map=[role.value for role in roles],
        builder=settings.builder,
        harmonizer=_harmonizer_spec(stage_one, roles),
        full_parameters=sum(parameter.numel() for parameter in base.model.parameters()),
        verbatim_parameters=verbatim_parameters(base, roles, settings.beta),
        full_bytes=sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters()),
        base_digest=facts.digest,
        full_loss=facts.score.value if facts.score is not None else None,
        emulator_loss=None,
        protected=bool(hidden),
        compression=_compression(stage_one, roles, settings),
        stage_one=_stage_one_spec(stage_one),
    )


def fit_facts(settings: EmulatorSettings) -> dict[str, int]:
    """What a manifest says of an emulator that was fitted in order of depth."""
    return {"fit_tokens": settings.fit_tokens, "fit_steps": settings.fit_steps if settings.beta > 0 else 0}


def as_artifact(base: BaseModel, content: EmulatorContent, tensors: dict[str, torch.Tensor]) -> Artifact:
    """The emulator of ``base`` as what crosses: with its tokenizer, its licence and its card."""
    artifact = Artifact.create(
        "emulator",
        content,
        tensors,
        files={**tokenizer_files(base.tokenizer), **licence_files(base.licence)},
        family=base.family.name,
        model_config=architecture_fields(base.model.config.to_dict()),
        base_model=model_name(base.name),
        licence=licence_notice(base.licence),
    )
    return with_card(artifact)


def check_triplet(layers: int, settings: EmulatorSettings) -> None:
    """Refuses a triplet (N_a, α, β) that no emulator can be built for; stage 1 need not be done for that.

    Args:
        layers: of the full model.

    Raises:
        ConfigError: the settings hide nothing and ``allow_unprotected`` is off, leave no middle layers,
            or replace more layers than stage 1 has harmonizers for.
    """
    middle, possible = replaceable_layers(layers, settings)
    count = replaced_count(middle, settings.alpha)
    if not count and not settings.allow_unprotected:
        raise ConfigError(
            f"emulator.alpha: {settings.alpha} replaces none of the {middle} middle layers, "
            "so the emulator would hand over the model.",
            "Raise emulator.alpha (0.25 or more), or set emulator.allow_unprotected for an experiment; "
            "such an emulator is never sent.",
        )
    if count > len(possible):
        # One harmonizer more would change what all others learn, for a layer that hardly anyone hides.
        raise ConfigError(
            f"emulator.alpha: {settings.alpha} replaces {count} of the {middle} middle layers, but with "
            f"emulator.plug_in_layers {settings.plug_in_layers} and emulator.layout {settings.layout} only "
            f"{len(possible)} can be: the model's first and last layer have no harmonizer.",
            f"Set emulator.alpha to at most {math.floor(100 * len(possible) / middle) / 100}, or choose another layout "
            "or number of plug-in layers.",
        )


def replaceable_layers(layers: int, settings: EmulatorSettings) -> tuple[int, tuple[int, ...]]:
    """How many middle layers there are, and which of them the builder can do without.

    Stage 1 covers all layers but the first and the last. With ``block``, only layers behind the plug-in
    layers are replaced.

    Raises:
        ConfigError: ``plug_in_layers`` leaves no middle layers.
    """
    plug_in = _plug_in(layers, settings)
    middle = middle_layers(layers, plug_in)
    front = plug_in[-1] if settings.layout == "block" else -1
    possible = tuple(index for index in middle if index > front)
    if settings.builder == "uniform_drop":
        return len(middle), possible
    return len(middle), tuple(index for index in possible if index in candidate_layers(layers))


def choose_layers(layers: int, stage_one: StageOne | None, settings: EmulatorSettings) -> list[LayerRole]:
    """Role of every layer under the settings: plug-in, kept, replaced or dropped."""
    middle, possible = replaceable_layers(layers, settings)
    plug_in, count = _plug_in(layers, settings), replaced_count(middle, settings.alpha)
    if settings.builder == "uniform_drop":
        return layer_map(layers, plug_in, uniformly_dropped(possible, count), LayerRole.DROPPED)
    if stage_one is None:
        if count:
            raise ConfigError("emulator.builder: scaleot needs a stage-1 result.", "Run stage 1 first.")
        return layer_map(layers, plug_in, ())
    return layer_map(layers, plug_in, stage_one.least_important(possible, count))


def _plug_in(layers: int, settings: EmulatorSettings) -> tuple[int, ...]:
    return plug_in_positions(layers, settings.plug_in_layers, settings.layout, settings.alpha)


def _harmonizer_spec(stage_one: StageOne | None, roles: Iterable[LayerRole]) -> HarmonizerSpec | None:
    if stage_one is None or LayerRole.REPLACED not in set(roles):
        return None
    return HarmonizerSpec(rank=stage_one.settings.harmonizer_rank, activation=stage_one.settings.activation)


def _stage_one_spec(stage_one: StageOne | None) -> StageOneSpec | None:
    if stage_one is None:
        return None
    settings = stage_one.settings
    return StageOneSpec(
        start=settings.start,
        objective=settings.objective,
        steps=stage_one.step,
        generated_tokens=settings.generated_tokens,
    )


def at_least(tokens: int, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The first batches that together have so many tokens."""
    for batch in batches:
        if tokens <= 0:
            return
        yield batch
        tokens -= int(batch["attention_mask"].sum())


def _compression(stage_one: StageOne | None, roles: Iterable[LayerRole], settings: EmulatorSettings) -> str | None:
    if settings.beta == 0 or LayerRole.KEPT not in set(roles):
        return None
    return settings.compression if stage_one is not None else "svd"  # who has seen no text has no moments


def verbatim_parameters(base: BaseModel, roles: Sequence[LayerRole], beta: float) -> int:
    """How many of the full model's numbers an emulator has unchanged."""
    return sum(tensor.numel() for tensor in verbatim_tensors(base, roles, beta).values())


def verbatim_tensors(base: BaseModel, roles: Sequence[LayerRole], beta: float) -> dict[str, torch.Tensor]:
    """The model's own tensors that leave as they are."""
    model, family = base.model, base.family
    prefixes = {family.layer_prefix(index): role for index, role in enumerate(roles)}
    attention = {projection.path + ".weight" for projection in family.attention}
    tensors: dict[str, torch.Tensor] = {}
    # Tied parameters come once under their first name; tying again at the other end restores the rest.
    for name, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        role = prefixes.get(prefix)
        compressed = role is LayerRole.KEPT and beta > 0 and name.removeprefix(prefix) in attention
        if role not in (LayerRole.REPLACED, LayerRole.DROPPED) and not compressed:
            tensors[name] = tensor.detach()
    return tensors


def _tensors(
    base: BaseModel,
    stage_one: StageOne | None,
    roles: Sequence[LayerRole],
    settings: EmulatorSettings,
    on_progress: OnProgress | None,
) -> dict[str, torch.Tensor]:
    """Everything that leaves."""
    tensors = verbatim_tensors(base, roles, settings.beta)
    if settings.beta > 0:
        kept = positions(roles, LayerRole.KEPT)
        moments = stage_one if settings.compression == "activation_aware" else None
        meter = ProgressMeter("compress", len(kept), on_progress)
        for index in kept:
            tensors |= _compressed_attention(base, index, settings.beta, moments)
            meter.advance()
    return tensors | harmonizer_tensors(base, stage_one, roles)


def harmonizer_tensors(
    base: BaseModel, stage_one: StageOne | None, roles: Sequence[LayerRole]
) -> dict[str, torch.Tensor]:
    """The harmonizers of all replaced layers, as stage 1 left them, by their names in the emulator."""
    tensors = {}
    for index in positions(roles, LayerRole.REPLACED):
        assert stage_one is not None
        for name, value in stage_one.harmonizers[index].items():
            tensors[base.family.layer_prefix(index) + name] = value.to(base.model.dtype)
    return tensors


def _persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def _compressed_attention(
    base: BaseModel, index: int, beta: float, moments: StageOne | None
) -> dict[str, torch.Tensor]:
    """A kept layer's attention weights as factors, or as the product of these where that is smaller."""
    layer, prefix = base.family.layers(base.model)[index], base.family.layer_prefix(index)
    tensors: dict[str, torch.Tensor] = {}
    for projection in base.family.attention:
        name = prefix + projection.path
        module = layer.get_submodule(projection.path)
        weight = dense_weight(module).detach()
        rows = projection.parts(base.model.config) if projection.parts else None
        moment = moments.moment(index, projection.path) if moments is not None else None
        factors = compress(weight, beta, rows, moment)
        if factor_shapes(weight.shape, beta, rows) is not None:
            tensors[name + ".down"] = torch.cat([down for _, down in factors])
            for part, (up, _) in enumerate(factors):
                tensors[f"{name}.up.{part}"] = up
        else:
            product = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            for (up, down), part_rows in zip(factors, rows or [torch.arange(len(weight))], strict=True):
                product[part_rows] = up @ down
            tensors[name + ".weight"] = as_stored(module, product)
    return tensors

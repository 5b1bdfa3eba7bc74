"""Deltas of many data owners on one emulator as one delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from scaleot_ray.artifacts.piecewise import StoredArtifact
from scaleot_ray.artifacts.raw_bytes import DTYPES
from scaleot_ray.config import AggregationSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.plugin.aggregation import low_rank, thinned
from scaleot_ray.plugin.aggregation.combine import ACROSS_BYTES, median, trimmed_mean, weighted_mean
from scaleot_ray.plugin.aggregation.contribution import PIECE, Contribution, clipped, contributions
from scaleot_ray.plugin.aggregation.server import ServerState, server_step
from scaleot_ray.tuning.delta import Delta, MethodSettings
from scaleot_ray.tuning.lora import alpha_of, rank_of

FITS = {
    "layers": ("mean", "median", "trimmed_mean", "ties", "dare"),
    "lora": ("mean", "concat", "svd"),
    "bottleneck": ("mean", "median", "trimmed_mean"),
}
"""Which ways of aggregating are right for which way of tuning."""

LOW_RANK = ("concat", "svd")


@dataclass
class Aggregate:
    """One delta out of many.

    Attributes:
        delta: what the data owners changed together; what a server optimizer made of it where one is set.
        clipped: data owners whose delta was shortened to ``clip_norm``.
        lost: of ``svd``: the largest squared share of any update's norm that its rank does not hold; else 0.
        state: the server optimizer's; None without one.
    """

    delta: Delta
    clipped: list[str]
    lost: float
    state: ServerState | None


def aggregate(
    deltas: Sequence[tuple[str, str | Path, float]],
    settings: AggregationSettings,
    start: str | Path | None = None,
    state: ServerState | None = None,
    late: Mapping[str, str | Path | None] | None = None,
) -> Aggregate:
    """Combines deltas on disk, tensor by tensor.

    The same deltas give the same bits in whatever order they come. Memory is that of the result and of
    :func:`working_bytes`; of ``mean``, ``median`` and ``trimmed_mean`` it does not grow with the number of
    deltas. ``mean`` of low-rank deltas averages the factors, so the update is not the mean of the updates:
    it is near to it only where all data owners began with the same factors and moved little.

    Args:
        deltas: name of the data owner, folder of its delta, weight (its rows, or 1; 0: left out).
        settings: how.
        start: folder of the delta that their tuning began with; how far each has come since then is what
            is combined, clipped and handed to the server optimizer, and the result includes it.
        state: the server optimizer's after the round before.
        late: data owners that began with another delta, see :func:`contributions`; how far each of them has come
            counts like that of the others.

    Raises:
        ConfigError: the method does not fit how the deltas were tuned, or they do not fit one another; or what it
            makes of them is not finite.
        ArtifactRefused: a delta is damaged, or has changed on disk; names the folder and the tensor.
    """
    parts = contributions(deltas, start, late)
    base = StoredArtifact(start) if start is not None else None
    method = parts[0].content.method
    check_fits_tuning(settings, method)
    if settings.clip_norm is not None:
        parts = clipped(parts, settings.clip_norm)
    tensors, made, lost = _combined(parts, settings, base)
    if settings.server != "none":
        tensors, state = server_step(settings, tensors, state)
    if base is not None and settings.method not in LOW_RANK:
        _add(tensors, base)
    found = {name: tensors[name].to(_dtype(parts, name)) for name in parts[0].stored.manifest.tensors}
    _check_finite(found)
    delta = Delta(method, tuple(parts[0].content.positions), made, found)
    return Aggregate(delta, [part.name for part in parts if part.factor < 1], lost, state)


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises where values became too large: nothing that came in was not finite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(
                f"aggregation: what was made of the deltas has values in {name!r} that {tensor.dtype} cannot hold.",
                "Lower aggregation.server_learning_rate, or leave aggregation.server out, and run again: what was "
                "submitted counts.",
            )


def _dtype(parts: Sequence[Contribution], name: str) -> torch.dtype:
    """The most precise type that one of the deltas has a tensor in."""
    return reduce(torch.promote_types, (DTYPES[part.stored.manifest.tensors[name].dtype] for part in parts))


def check_fits_tuning(settings: AggregationSettings, method: str) -> None:
    """Whether deltas of a method may be aggregated so; a run asks before anyone tunes.

    Raises:
        ConfigError: names a way that is right.
    """
    if method == "lora" and settings.method == "mean" and settings.clip_norm is not None:
        raise ConfigError(
            "aggregation.clip_norm: a mean of low-rank factors cannot be clipped, since shorter factors are not a "
            "shorter update.",
            "Set aggregation.method to svd or concat, or leave clip_norm out.",
        )
    if method == "bottleneck" and settings.clip_norm is not None:
        raise ConfigError(
            "aggregation.clip_norm: bottleneck modules cannot be clipped, since what they do is no multiple of their "
            "weights.",
            "Set rounds.max_norm, which refuses what is too long, or tune.method to layers or lora.",
        )
    if settings.method not in FITS[method]:
        raise ConfigError(
            f"aggregation.method: {settings.method} is not right for deltas of tune.method={method}.",
            f"Set it to one of {', '.join(FITS[method])}.",
        )


def working_bytes(parts: Sequence[Contribution], settings: AggregationSettings, start: str | Path | None = None) -> int:
    """Memory that aggregating takes beside its result, in bytes, about."""
    if settings.method in LOW_RANK:
        return low_rank.bytes_needed(parts, StoredArtifact(start) if start is not None else None)
    if settings.method in ("ties", "dare"):
        return thinned.bytes_needed(parts)
    return ACROSS_BYTES


def _combined(
    parts: Sequence[Contribution], settings: AggregationSettings, base: StoredArtifact | None
) -> tuple[dict[str, torch.Tensor], MethodSettings, float]:
    """Tensors of the result, the settings it has as a delta, and what :class:`Aggregate` calls ``lost``."""
    own = dict(parts[0].content.settings)
    if settings.method in LOW_RANK:
        return _low_rank(parts, settings, own, base)
    for part in parts[1:]:
        if part.content.settings != own:
            raise ConfigError(
                f"{parts[0].name} and {part.name} tuned with different settings of {part.content.method}, so their "
                "values do not correspond.",
                "Set the same rank, alpha or width for all, or aggregate low-rank deltas by concat or svd.",
            )
    seed = f"{settings.seed} {base.manifest.digest()}" if base is not None else str(settings.seed)
    combine = {
        "mean": lambda name: weighted_mean(parts, name),
        "median": lambda name: median(parts, name),
        "trimmed_mean": lambda name: trimmed_mean(parts, name, settings.trim),
        "ties": lambda name: thinned.ties(parts, name, settings.density),
        "dare": lambda name: thinned.dare(parts, name, settings.density, seed),
    }[settings.method]
    return {name: combine(name) for name in parts[0].stored.manifest.tensors}, own, 0.0


def _add(tensors: dict[str, torch.Tensor], start: StoredArtifact) -> None:
    for name, tensor in tensors.items():
        flat, place = tensor.view(-1), 0
        for piece in start.pieces(name, PIECE):
            flat[place : place + len(piece)] += piece
            place += len(piece)


def _low_rank(
    parts: Sequence[Contribution], settings: AggregationSettings, own: MethodSettings, base: StoredArtifact | None
) -> tuple[dict[str, torch.Tensor], MethodSettings, float]:
    largest = max(rank_of(part.content.settings) for part in parts)
    rank = low_rank.stacked_rank(parts, base) if settings.method == "concat" else settings.rank or largest
    tensors, most = {}, 0.0
    for module in parts[0].modules():
        down, up = low_rank.stacked(parts, module, base)
        if settings.method == "svd":
            down, up, lost = low_rank.truncated(down, up, rank)
            most = max(most, lost)
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = down, up * (rank / alpha_of(own))
    return tensors, {**own, "rank": rank}, most

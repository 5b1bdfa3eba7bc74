"""A data owner's delta on disk as a part of an aggregate: its weight, its norm, how far it is shortened.

Where a round began with the aggregate of the one before, what counts is by how much each delta differs from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from scaleot_ray.artifacts.manifest import DeltaContent
from scaleot_ray.artifacts.piecewise import StoredArtifact
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.tuning.lora import alpha_of, rank_of

PIECE = 1 << 20
"""Values read at a time from one delta, where one is read after the other."""

# Tensors whose multiple is that multiple of the whole change: of two matrices in a row, the second. Of two maps with
# a bend between them none is, and clipping is refused (check_fits_tuning).
_SCALED = {"layers": ("",), "lora": (".lora_B",)}


@dataclass(frozen=True)
class Contribution:
    """One delta that takes part.

    Attributes:
        name: whose it is, for messages.
        stored: the delta's artefact.
        weight: its share of the whole, ≥ 0; shares of all contributions sum to 1.
        start: the delta that its tuning began with; None for the emulator as it is.
        factor: what its change since then is multiplied with, below 1 where its norm was clipped.
    """

    name: str
    stored: StoredArtifact
    weight: float
    start: StoredArtifact | None = None
    factor: float = 1.0

    @property
    def content(self) -> DeltaContent:
        """How it was tuned."""
        content = self.stored.manifest.content
        assert isinstance(content, DeltaContent)  # see contributions
        return content

    def pieces(self, name: str, values: int = PIECE) -> Iterator[torch.Tensor]:
        """Changes of one tensor's values since the start, shortened; see :meth:`StoredArtifact.pieces`."""
        shorter = self.factor != 1 and name.endswith(_SCALED.get(self.content.method, ()))
        before = self.start.pieces(name, values) if self.start is not None else None
        for piece in self.stored.pieces(name, values):
            if before is not None:
                piece = piece.sub_(next(before))
            yield piece.mul_(self.factor) if shorter else piece

    def product(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a ``lora`` delta: float64 (A, B) whose product is the change of one module since the start, shortened.

        A is (ranks, in) and B is (out, ranks), which holds alpha / rank; with a start, ranks are those of both.
        """
        down, up = pair(self.stored, module)
        if self.start is not None:
            first_down, first_up = pair(self.start, module)
            down, up = torch.cat([down, first_down]), torch.cat([up, -first_up], dim=1)
        return down, up * self.factor

    def norm(self) -> float:
        """Length of the change since the start: the square root of the sum of all its values' squares.

        ``lora``: of the products (alpha / rank) · B·A, which is what changes; ``bottleneck``: of both maps, since a
        huge first one would carry a mean of maps however small its second one is.
        """
        if self.content.method == "lora":
            return math.sqrt(sum(self._squared_product(module) for module in self.modules()))
        total = 0.0
        for name in self.stored.manifest.tensors:
            for piece in self.pieces(name):
                total += float(torch.linalg.vector_norm(piece, dtype=torch.float64)) ** 2
        return math.sqrt(total)

    def modules(self) -> list[str]:
        """Of a ``lora`` delta: the modules that carry a pair."""
        return [name.removesuffix(".lora_A") for name in self.stored.manifest.tensors if name.endswith(".lora_A")]

    def _squared_product(self, module: str) -> float:
        down, up = self.product(module)
        # ‖B·A‖² = tr(BᵀB · AAᵀ): two small Gram matrices instead of a matrix as large as the weight.
        return max(float(((up.t() @ up) * (down @ down.t())).sum()), 0.0)


def pair(stored: StoredArtifact, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 (A, B) of one module of a ``lora`` delta; B holds alpha / rank."""
    content = stored.manifest.content
    assert isinstance(content, DeltaContent)  # see contributions
    scale = alpha_of(content.settings) / rank_of(content.settings)
    return _matrix(stored, f"{module}.lora_A"), scale * _matrix(stored, f"{module}.lora_B")


def _matrix(stored: StoredArtifact, name: str) -> torch.Tensor:
    shape = stored.manifest.tensors[name].shape
    (values,) = stored.pieces(name, max(math.prod(shape), 1))
    return values.double().reshape(shape)


def contributions(
    deltas: Sequence[tuple[str, str | Path, float]],
    start: str | Path | None = None,
    late: Mapping[str, str | Path | None] | None = None,
) -> list[Contribution]:
    """Deltas on disk as the parts of one aggregate, in an order that does not depend on who came first.

    Args:
        deltas: name of the data owner, folder of its delta, weight ≥ 0; one of weight 0 is left out, also of what
            weights do not count in.
        start: folder of the delta that their tuning began with.
        late: of data owners whose tuning began with another one, in an earlier round: which, by name; None for
            the emulator as it is.

    Raises:
        ConfigError: there is none, two have one name, a weight is no number ≥ 0, all are 0, or they were
            tuned on different emulators or in different ways; names the data owners.
        ArtifactRefused: one is no delta, or is damaged.
    """
    names = [name for name, _, _ in deltas]
    if not names:
        raise ConfigError("There is no delta to aggregate.", "Give at least one.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{twice[0]} has two deltas in one aggregate.", "Give each data owner's delta once.")
    for name, _, weight in deltas:
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"{name}: the weight {weight} is no number from 0 on.", "Give its number of rows, or 1.")
    total = math.fsum(weight for _, _, weight in deltas)  # exact, so that their order does not matter
    if total <= 0:
        raise ConfigError("All weights are 0, so no delta counts.", "Give one of them a weight above 0.")
    late, deltas = late or {}, [one for one in deltas if one[2] > 0]
    opened = {path: _delta(path) for path in {start, *late.values()} if path is not None}
    found = []
    for name, directory, weight in deltas:
        own = late.get(name, start)
        found.append(Contribution(name, _delta(directory), weight / total, opened[own] if own is not None else None))
    for other in found[1:]:
        _check_alike(found[0], other)
    for began in opened.values():
        _check_alike(Contribution("the start", began, 0.0), found[0])
    # Sums of floats depend on their order; sorted, the same deltas give the same bits.
    return sorted(found, key=lambda one: (one.stored.manifest.digest(), one.name))


def clipped(parts: Sequence[Contribution], longest: float) -> list[Contribution]:
    """The same, each change longer than ``longest`` shortened to it; reads all of them.

    Raises:
        ArtifactRefused: a delta is damaged.
    """
    norms = [part.norm() for part in parts]
    return [
        replace(part, factor=longest / norm if norm > longest else 1.0) for part, norm in zip(parts, norms, strict=True)
    ]


def _delta(directory: str | Path) -> StoredArtifact:
    stored = StoredArtifact(directory)
    if stored.manifest.kind != "delta":
        raise ArtifactRefused(
            f"{directory}: is an artefact of kind {stored.manifest.kind!r}, expected 'delta'.",
            "Give the folder that `scaleot tune` wrote its delta to.",
        )
    return stored


def _check_alike(first: Contribution, other: Contribution) -> None:
    """Raises where two deltas do not change the same things in the same way."""
    one, two = first.content, other.content
    both = f"{first.name} and {other.name}"
    if first.stored.manifest.parent_digest != other.stored.manifest.parent_digest:
        raise ConfigError(f"{both} tuned on different emulators.", "Aggregate deltas of one emulator.")
    if one.method != two.method:
        raise ConfigError(
            f"{both} tuned with different methods, {one.method} and {two.method}.",
            "Set one tune.method for all data owners that take part in the aggregate.",
        )
    if one.positions != two.positions or first.stored.manifest.tensors.keys() != other.stored.manifest.tensors.keys():
        raise ConfigError(f"{both} changed different layers or projections.", "Aggregate deltas of one kind.")

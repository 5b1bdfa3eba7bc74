"""The model owner's one dial: a privacy level instead of the triplet.

A level is two measured bounds: how much worse than the model the emulator is on public held-out text
(its loss margin), and how much of the model leaves verbatim. The weakest emulator of a short ladder
that meets both is built, because everything beyond costs the data owners quality. A margin measured on a few
thousand tokens has an error, so it counts only as far as it is ``ERRORS`` standard errors on the safe side.
The bounds are ours; nobody has published any. A margin alone is weak evidence: docs/privacy.md says what it
does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaleot_ray.artifacts import Artifact
from scaleot_ray.config import EmulatorSettings
from scaleot_ray.data.batches import Batch, Batches
from scaleot_ray.emulator.build import (
    FullModelFacts,
    build_emulator,
    choose_layers,
    replaceable_layers,
    verbatim_parameters,
)
from scaleot_ray.emulator.layer_map import replaced_count
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import ConfigError, DataError
from scaleot_ray.evaluation.loss import LossScore
from scaleot_ray.families import layer_count
from scaleot_ray.families.loading import BaseModel
from scaleot_ray.progress import OnProgress, ProgressMeter


@dataclass(frozen=True)
class PrivacyLevel:
    """Bounds of one level.

    Attributes:
        minimum_margin: emulator loss − full loss on public held-out text, nats per token.
        maximum_verbatim: share of the full model's parameters that leave unchanged.
    """

    minimum_margin: float
    maximum_verbatim: float


LEVELS = {
    "low": PrivacyLevel(minimum_margin=0.1, maximum_verbatim=0.8),
    "medium": PrivacyLevel(minimum_margin=0.3, maximum_verbatim=0.65),
    "high": PrivacyLevel(minimum_margin=0.6, maximum_verbatim=0.5),
}

LADDER = ((0.25, 0.2), (0.25, 0.5), (0.25, 0.8), (0.5, 0.5), (0.5, 0.8), (0.75, 0.5), (0.75, 0.8), (1.0, 0.0))
"""(α, β) from the weakest to the strongest protection."""

ERRORS = 2.0
"""Standard errors that the margin must be above its bound; with ``SEQUENCES`` or more about 95 % one-sided."""

SEQUENCES = 8
"""Held-out sequences at least; fewer say too little of the margin's error."""


@dataclass(frozen=True)
class Rung:
    """One emulator of the ladder: its settings and what is known of it.

    Attributes:
        alpha, beta: fraction of replaced layers, rank reduction.
        verbatim_share: share of the full model's parameters that leave unchanged; known before it is built.
        loss_margin: emulator loss − full loss on public held-out text, nats per token. None where the verbatim
            share alone ruled it out, so that it was not built.
        standard_error: of the margin, paired over the held-out sequences.
    """

    alpha: float
    beta: float
    verbatim_share: float
    loss_margin: float | None = None
    standard_error: float | None = None

    @property
    def safe_margin(self) -> float | None:
        """What is compared with the bound: the margin less ``ERRORS`` standard errors."""
        if self.loss_margin is None or self.standard_error is None:
            return None
        return self.loss_margin - ERRORS * self.standard_error

    def meets(self, bounds: PrivacyLevel) -> bool:
        """Whether both bounds of a level are met."""
        safe = self.safe_margin
        return safe is not None and safe >= bounds.minimum_margin and self.verbatim_share <= bounds.maximum_verbatim


@dataclass(frozen=True)
class PrivacyResult:
    """The emulator that meets a level, and all that were tried before it."""

    artifact: Artifact
    level: str
    bounds: PrivacyLevel
    tried: tuple[Rung, ...]

    def as_json(self) -> dict[str, object]:
        """Level, bounds and what was reached, as plain values."""
        return {
            "level": self.level,
            "minimum_margin": self.bounds.minimum_margin,
            "maximum_verbatim": self.bounds.maximum_verbatim,
            "tried": [{**vars(rung), "safe_margin": rung.safe_margin} for rung in self.tried],
        }


def build_for_privacy(
    base: BaseModel,
    stage_one: StageOne | None,
    settings: EmulatorSettings,
    facts: FullModelFacts,
    held_out: Sequence[Batch],
    public: Batches | None = None,
    on_progress: OnProgress | None = None,
) -> PrivacyResult:
    """The weakest emulator of the ladder that meets ``settings.privacy``; α and β of the settings are not used.

    Args:
        held_out: public batches on which ``facts.score`` was measured.
        public: other public batches, on which each emulator is fitted; None leaves them unfitted.

    Raises:
        ConfigError: no emulator of the ladder meets the level; the message has the best reached.
        DataError: :func:`check_held_out` finds too little text.
    """
    assert settings.privacy is not None
    assert facts.score is not None
    check_held_out(held_out, settings)
    bounds = LEVELS[settings.privacy]
    tried: list[Rung] = []
    layers = layer_count(base.model.config)
    ladder = [(alpha, beta) for alpha, beta in LADDER if _possible(layers, settings, alpha)]
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    meter = ProgressMeter(f"privacy {settings.privacy}", len(ladder), on_progress)
    for alpha, beta in ladder:
        changed = settings.model_copy(update={"alpha": alpha, "beta": beta})
        share = verbatim_parameters(base, choose_layers(layers, stage_one, changed), beta) / parameters
        if share > bounds.maximum_verbatim:
            tried.append(Rung(alpha, beta, share))
            meter.advance()
            continue
        artifact, score = build_emulator(
            base, stage_one, changed, facts, held_out, public.batches() if public else None, on_progress
        )
        assert score is not None
        margin, error = loss_margin(score, facts.score)
        tried.append(Rung(alpha, beta, share, margin, error))
        meter.advance(loss=score.value)
        if tried[-1].meets(bounds):
            return PrivacyResult(artifact, settings.privacy, bounds, tuple(tried))
    best = max((rung for rung in tried if rung.safe_margin is not None), key=_safe_margin, default=None)
    reached = (
        "no emulator has so little"
        if best is None
        else f"at most {best.loss_margin:.2f} nats (standard error {best.standard_error:.2f})"
    )
    raise ConfigError(
        f"emulator.privacy: {settings.privacy} asks for a loss margin of at least {bounds.minimum_margin} nats, "
        f"{ERRORS:g} standard errors on the safe side, and at most {bounds.maximum_verbatim:.0%} verbatim; reached "
        f"are {reached} and {min(rung.verbatim_share for rung in tried):.0%}.",
        "Use fewer plug-in layers (emulator.plug_in_layers), a lower level, or name emulator.alpha and emulator.beta.",
    )


def _possible(layers: int, settings: EmulatorSettings, alpha: float) -> bool:
    middle, possible = replaceable_layers(layers, settings.model_copy(update={"alpha": alpha}))
    return replaced_count(middle, alpha) <= len(possible)


def _safe_margin(rung: Rung) -> float:
    assert rung.safe_margin is not None
    return rung.safe_margin


def check_held_out(held_out: Sequence[Batch], settings: EmulatorSettings) -> None:
    """Refuses public text that is too short to say whether a level is met; stage 1 need not be done for that.

    Raises:
        DataError: fewer than ``SEQUENCES`` sequences are held out.
    """
    count = sum(len(batch["input_ids"]) for batch in held_out)
    if count < SEQUENCES:
        raise DataError(
            f"emulator.privacy: {settings.privacy} is measured on at least {SEQUENCES} held-out sequences; "
            f"public gives {count}.",
            f"Give public text of {4 * SEQUENCES} sequences or more (stage_one.block_size tokens each), or name "
            "emulator.alpha and emulator.beta.",
        )


def loss_margin(emulator: LossScore, full: LossScore) -> tuple[float, float]:
    """Emulator loss − full loss, nats per token, and its standard error.

    Paired: what a hard sequence adds to both losses drops out. The margin is a ratio of sums over sequences,
    and the error that of such a ratio, with sequences taken as drawn independently.

    Args:
        emulator, full: on the same blocks, two or more.
    """
    differences, counts = emulator.sums - full.sums, emulator.counts
    margin = float(differences.sum() / counts.sum())
    residuals, n = differences - margin * counts, len(counts)
    return margin, float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / counts.sum())

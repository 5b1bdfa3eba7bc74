"""The model owner's one dial: a privacy level instead of the triplet.

A level is two measured bounds: how much worse than the model the emulator is on public held-out text
(its loss margin), and how much of the model leaves verbatim. The weakest emulator of a short ladder
that meets both is built, because everything beyond costs the data owners quality. The bounds are ours;
nobody has published any. A margin alone is weak evidence: docs/privacy.md says what it does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaleot_ray.artifacts import Artifact
from scaleot_ray.artifacts.manifest import EmulatorContent
from scaleot_ray.config import EmulatorSettings
from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator.build import FullModelFacts, build_emulator, replaceable_layers
from scaleot_ray.emulator.layer_map import replaced_count
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import ConfigError
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


@dataclass(frozen=True)
class Rung:
    """One emulator that was tried: its settings and what was measured on it."""

    alpha: float
    beta: float
    loss_margin: float
    verbatim_share: float


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
            "tried": [vars(rung) for rung in self.tried],
        }


def build_for_privacy(
    base: BaseModel,
    stage_one: StageOne | None,
    settings: EmulatorSettings,
    facts: FullModelFacts,
    held_out: Sequence[Batch],
    on_progress: OnProgress | None = None,
) -> PrivacyResult:
    """The weakest emulator of the ladder that meets ``settings.privacy``; α and β of the settings are not used.

    Args:
        held_out: public batches; must not be empty, and ``facts.loss`` must be known.

    Raises:
        ConfigError: no emulator of the ladder meets the level; the message has the best reached.
    """
    assert settings.privacy is not None
    bounds = LEVELS[settings.privacy]
    tried: list[Rung] = []
    middle, possible = replaceable_layers(layer_count(base.model.config), settings)
    ladder = [(alpha, beta) for alpha, beta in LADDER if replaced_count(middle, alpha) <= possible]
    meter = ProgressMeter(f"privacy {settings.privacy}", len(ladder), on_progress)
    for alpha, beta in ladder:
        changed = settings.model_copy(update={"alpha": alpha, "beta": beta})
        artifact = build_emulator(base, stage_one, changed, facts, held_out, on_progress)
        content = artifact.manifest.content
        assert isinstance(content, EmulatorContent)
        assert content.loss_margin is not None
        tried.append(Rung(alpha, beta, content.loss_margin, content.verbatim_share))
        meter.advance(loss=content.emulator_loss)
        if content.loss_margin >= bounds.minimum_margin and content.verbatim_share <= bounds.maximum_verbatim:
            return PrivacyResult(artifact, settings.privacy, bounds, tuple(tried))
    margin = max(rung.loss_margin for rung in tried)
    share = min(rung.verbatim_share for rung in tried)
    raise ConfigError(
        f"emulator.privacy: {settings.privacy} asks for a loss margin of at least {bounds.minimum_margin} nats and at "
        f"most {bounds.maximum_verbatim:.0%} verbatim; reached are at most {margin:.2f} nats and {share:.0%}.",
        "Use fewer plug-in layers (emulator.plug_in_layers), a lower level, or name emulator.alpha and emulator.beta.",
    )

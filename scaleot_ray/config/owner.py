"""What a model owner decides: stage 1, the emulator, and the paper's own choices for both."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from scaleot_ray.config.inputs import DataSettings, ModelSettings
from scaleot_ray.config.settings import Number, Settings


class StageOneSettings(Settings):
    """Stage 1: harmonizers and layer scores by Dynamic LayerReplace (ScaleOT §3.2)."""

    harmonizer_rank: int = Field(128, ge=2, description="hidden units of a harmonizer, r in W_down ∈ R^{r×d}")
    activation: Literal["silu", "gelu", "relu", "identity"] = Field(
        "identity",
        description="identity: harmonizers are linear maps of rank harmonizer_rank, which the fit on "
        "emulator.fit_tokens makes anew; for the others that fit keeps the hidden units that stage 1 trained, which "
        "pays with many steps. silu: the paper's kind",
    )
    start: Literal["closed_form", "random"] = Field(
        "closed_form", description="closed_form: reduced-rank ridge regression; random: the paper's start"
    )
    start_tokens: int = Field(
        16384, ge=1, description="tokens of the closed-form start and of activation-aware compression"
    )
    generated_tokens: int = Field(
        32768,
        ge=0,
        description="tokens of text that the model generates itself; every second batch of stage 1 and of the "
        "emulator's fit comes from it, since nobody knows the data owners' domains; 0: public text alone",
    )
    score_start: Literal["single_layer", "zero"] = Field(
        "single_layer",
        description="single_layer: from the damage of replacing each layer alone; zero: the paper's start",
    )
    ridge: Number = Field(1e-3, gt=0, description="ridge relative to the mean squared activation")
    objective: Literal["distill", "lm"] = Field(
        "distill", description="distill: KL to the full model's logits; lm: the paper's language-model loss"
    )
    steps: int = Field(20, ge=0, description="harmonizer (DL) steps")
    batch_size: int = Field(4, ge=1, description="sequences per step")
    block_size: int = Field(128, ge=8, description="tokens per sequence")
    learning_rate: Number = Field(1e-3, gt=0, description="of the harmonizers, with AdamW")
    weight_decay: Number = Field(0.0, ge=0, description="of the harmonizers, with AdamW")
    group_size: int = Field(4, ge=2, description="neighbouring middle layers per group")
    masked_fraction: Number = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of every group that a sampled mask replaces; the paper's half prepares for any alpha, "
        "a share near the alpha to be built spends the steps on that",
    )
    score_every: int = Field(5, ge=1, description="harmonizer steps between two score (RL) steps")
    candidates: int = Field(4, ge=2, description="masks scored in one RL step, N_c")
    score_learning_rate: Number = Field(1.0, gt=0, description="η of the score update, on standardised rewards")
    shuffle_rewards: bool = Field(False, description="negative control: breaks the link from mask to reward")
    checkpoint_every: int = Field(
        20, ge=1, description="steps between two checkpoints; one is also written after every minute"
    )
    seed: int = Field(0, description="of batches, masks, random starts and generated text")

    def decisive(self) -> dict[str, Any]:
        """The keys that a result depends on, as plain values: equal ones give the same harmonizers and scores."""
        return self.model_dump(mode="json", exclude={"checkpoint_every"})  # changes when something is written, not what


class EmulatorSettings(Settings):
    """Stage 2: which emulator to build. Triplet (N_a, α, β) of ScaleOT, or one privacy level."""

    plug_in_layers: int = Field(
        4, ge=1, description="N_a, layers the data owner tunes; with 1 the model's last layer is never replaced"
    )
    layout: Literal["ends", "spread", "last", "block"] = Field(
        "ends",
        description="where the plug-in layers are. ends: the first and last N_a/2 layers; spread: evenly over the "
        "depth (CRaSh); last: the last N_a layers; block: N_a layers in a row around the middle of the depth, and "
        "replaced layers behind them only",
    )
    alpha: Number = Field(0.5, ge=0, le=1, description="fraction of the middle layers that is replaced, rounded up")
    beta: Number = Field(
        0.8, ge=0, lt=1, description="rank reduction of the kept layers' attention weights; 0 or at least 0.05"
    )
    privacy: Literal["low", "medium", "high"] | None = Field(
        None, description="choose α and β from a minimum loss margin and a maximum verbatim share instead"
    )
    compression: Literal["activation_aware", "svd"] = Field(
        "activation_aware",
        description="activation_aware: least error on the inputs that public text causes; svd: the paper's "
        "(and what uniform_drop uses, which has seen no text)",
    )
    fit_tokens: int = Field(
        65536,
        ge=0,
        description="tokens on which harmonizers and compressed attention are fitted once more, in order of "
        "depth, each on what the emulator itself passes on; 0: not at all, as in the paper",
    )
    fit_steps: int = Field(
        40,
        ge=0,
        description="of that fit: gradient steps for each kept layer's compressed attention, which then follows the "
        "full model's more closely; 0: closed form only",
    )
    builder: Literal["scaleot", "uniform_drop"] = Field(
        "scaleot",
        description="scaleot: harmonizers in place of the least important layers; uniform_drop: for comparison, layers "
        "are dropped so that those kept are evenly spaced (Offsite-Tuning)",
    )
    allow_unprotected: bool = Field(
        False, description="build what hides nothing, for experiments; such an artefact is never sent"
    )

    @field_validator("beta")
    @classmethod
    def _takes_something_away(cls, beta: float) -> float:
        if 0 < beta < 0.05:
            raise ValueError(
                f"a rank reduction of {beta} leaves the weights as good as they are, but they would count as hidden; "
                "set 0, or 0.05 or more"
            )
        return beta

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> EmulatorSettings:
        beside = [name for name in ("alpha", "beta") if name in self.model_fields_set]
        if self.privacy is not None and beside:
            raise ValueError(
                f"privacy={self.privacy} chooses alpha and beta, but {' and '.join(beside)} "
                f"{'is' if len(beside) == 1 else 'are'} given too; leave out privacy, or alpha and beta"
            )
        return self


PAPER: dict[str, dict[str, Any]] = {
    "stage_one": {
        "activation": "silu",
        "start": "random",
        "score_start": "zero",
        "objective": "lm",
        "masked_fraction": 0.5,
        "generated_tokens": 0,
    },
    "emulator": {"layout": "ends", "compression": "svd", "fit_tokens": 0},
}
"""ScaleOT as its paper (arXiv 2412.09812) describes it; what it does not say (steps, rates, ranks) stays ours."""


class OwnerSettings(Settings):
    """What a model owner decides, whichever command builds the emulator."""

    model: ModelSettings
    public: DataSettings = Field(description="the model owner's public text: stage 1 and the loss margin")
    stage_one: StageOneSettings = StageOneSettings()
    emulator: EmulatorSettings = EmulatorSettings()
    recipe: Literal["default", "paper"] = Field(
        "default",
        description="paper: what stage_one and emulator do not say follows the ScaleOT paper instead of what was found "
        "to work best",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("recipe") != "paper":
            return values
        given = {name: values.get(name) or {} for name in PAPER}
        sections = {
            name: section.model_dump(exclude_unset=True) if isinstance(section, Settings) else section
            for name, section in given.items()
        }
        return {
            **values,
            **{name: {**PAPER[name], **found} for name, found in sections.items() if isinstance(found, dict)},
        }

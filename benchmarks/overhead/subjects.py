"""What is measured: an emulator, the full model, and random tokens; values do not matter to speed."""

from __future__ import annotations

import random

from scaleot_ray.artifacts import Artifact
from scaleot_ray.config import EmulatorSettings, StageOneSettings, parse
from scaleot_ray.data import TokenBatches, TokenExample
from scaleot_ray.emulator.build import FullModelFacts, build_emulator
from scaleot_ray.emulator.layer_replace import train_stage_one
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import BaseModel, model_digest
from scaleot_ray.stages.limits import vocabulary_size

_EXAMPLES = 64


def random_batches(vocabulary: int, batch_size: int, block_size: int, seed: int = 0) -> TokenBatches:
    """Endless batches (batch_size, block_size) of random tokens, every one of them labelled."""
    order = random.Random(seed)
    blocks = [[order.randrange(vocabulary) for _ in range(block_size)] for _ in range(_EXAMPLES)]
    return TokenBatches([TokenExample(block, list(block)) for block in blocks], batch_size, 0, seed)


def triplet(text: str) -> EmulatorSettings:
    """``4,0.5,0.8``, a triplet (N_a, α, β), as settings.

    Raises:
        ConfigError: it is not three numbers of the right kind, or they are out of range.
    """
    try:
        count, alpha, beta = text.split(",")
        values = {"plug_in_layers": int(count), "alpha": float(alpha), "beta": float(beta)}
    except ValueError:
        raise ConfigError(
            f"--settings: {text!r} is no triplet.", "Write plug-in layers, alpha and beta, such as 4,0.5,0.8."
        ) from None
    return parse(EmulatorSettings, values, "--settings")


def untrained_emulator(base: BaseModel, settings: EmulatorSettings, block_size: int) -> Artifact:
    """An emulator of the given triplet with untrained harmonizers, which are as large and as fast as trained ones."""
    stage_one = StageOneSettings(
        start="random", score_start="zero", steps=0, batch_size=1, start_tokens=block_size, block_size=block_size
    )
    public = random_batches(vocabulary_size(base.model), 1, block_size)
    result = train_stage_one(base.model, base.family, public, [], stage_one)
    return build_emulator(base, result, settings, FullModelFacts(model_digest(base.model)))[0]


def whole_model(base: BaseModel, plug_in_layers: int) -> Artifact:
    """The full model in an artefact's clothes, so that a process loads it just as it loads an emulator."""
    settings = EmulatorSettings(plug_in_layers=plug_in_layers, alpha=0, beta=0, allow_unprotected=True)
    return build_emulator(base, None, settings, FullModelFacts(model_digest(base.model)))[0]

"""The parts of a build whose model stays on disk (``scaleot build --stream``)."""

from __future__ import annotations

from pathlib import Path

import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.config import PAPER, EmulatorSettings, StageOneSettings
from scaleot_ray.emulator.build import at_least
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.emulator.streaming.build import build_streamed
from scaleot_ray.emulator.streaming.stage_one import streamed_stage_one
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import BaseModel
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.public_text import PublicText


def check_streamable(stage_one: StageOneSettings, emulator: EmulatorSettings, steps: bool = False) -> None:
    """Refuses settings that need the whole model in memory. Defaults that do so count as not given.

    Args:
        steps: others make them.

    Raises:
        ConfigError: one of them was given.
    """
    for name in ("generated_tokens",) if steps else ("steps", "generated_tokens"):
        value = getattr(stage_one, name)
        if value and name in stage_one.model_fields_set:
            raise _refused(f"stage_one.{name}", value, "0")
    wanted = {"start": "closed_form", "score_start": "single_layer"}
    for name, only in wanted.items():
        if (value := getattr(stage_one, name)) != only:
            raise _refused(f"stage_one.{name}", value, only)
    if emulator.builder != "scaleot":
        raise _refused("emulator.builder", emulator.builder, "scaleot")
    if emulator.compression != "activation_aware":
        raise _refused("emulator.compression", emulator.compression, "activation_aware")
    if emulator.privacy is not None:
        raise ConfigError(
            f"emulator.privacy: {emulator.privacy} builds several emulators until one is private enough, which a "
            "streamed build does not.",
            "Give alpha and beta, look at the loss margin of what was built, and build again where it is too small.",
        )
    if not emulator.fit_tokens:
        raise ConfigError(
            "emulator.fit_tokens: 0 fits nothing, but a streamed build makes all of its parts in that fit.",
            "Give 4096 or more.",
        )


def _refused(key: str, value: object, only: str) -> ConfigError:
    return ConfigError(
        f"{key}: {value} needs the whole model in memory; a streamed build knows {only} only.",
        f"Leave out {key}{_from_recipe(key, value)}, or build without --stream.",
    )


def _from_recipe(key: str, value: object) -> str:
    section, _, name = key.partition(".")
    return " (and recipe: paper, which sets it)" if PAPER[section].get(name) == value else ""


def streamed_settings(settings: StageOneSettings, steps: bool) -> StageOneSettings:
    """What of stage 1's settings counts where the model stays on disk; ``steps``: others make them."""
    return settings.model_copy(update={"generated_tokens": 0, **({} if steps else {"steps": 0})})


def streamed_start(
    base: BaseModel,
    text: PublicText,
    settings: StageOneSettings,
    device: torch.device,
    folder: Path | None,
    on_progress: OnProgress | None,
) -> tuple[StageOne, dict[str, torch.Tensor]]:
    """A stage-1 state before its first step, or a later one that ``folder`` has, with its further tensors."""
    if folder is None:
        return _pass(base, text, settings, device, None, on_progress), {}
    path, checkpoint = folder / "stage_one.safetensors", folder / "stage_one.position.safetensors"
    extra: dict[str, torch.Tensor] = {}
    if path.exists():
        result, extra = StageOne.load(path, with_moments=False)
    else:
        result = _pass(base, text, settings, device, checkpoint, on_progress)
        result.save(path, with_moments=False)
    checkpoint.unlink(missing_ok=True)
    return result, extra


def _pass(
    base: BaseModel,
    text: PublicText,
    settings: StageOneSettings,
    device: torch.device,
    checkpoint: Path | None,
    on_progress: OnProgress | None,
) -> StageOne:
    batches = list(at_least(settings.start_tokens, text.batches.batches()))
    return streamed_stage_one(base, batches, text.held_out[0], settings, device, checkpoint, on_progress)


def streamed_emulator(
    base: BaseModel,
    text: PublicText,
    stage_one: StageOne,
    settings: EmulatorSettings,
    device: torch.device,
    folder: Path | None,
    on_progress: OnProgress | None,
) -> Artifact:
    """The emulator; where there is a ``folder``, its tensors are pages of files in there."""
    artifact, _ = build_streamed(
        base, stage_one, settings, text.batches.batches(), text.held_out, device, folder, on_progress
    )
    return artifact

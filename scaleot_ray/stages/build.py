"""Build: full model and public text → an emulator artefact on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scaleot_ray import __version__
from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.atomic import check_replaceable
from scaleot_ray.artifacts.audit import DATA_OWNERS, MODEL_OWNER, AuditLog
from scaleot_ray.artifacts.crossing import cross
from scaleot_ray.artifacts.manifest import MANIFEST_FILE, EmulatorContent, Manifest
from scaleot_ray.artifacts.provenance import licence_notice, model_name
from scaleot_ray.artifacts.storage import read_artifact, write_artifact
from scaleot_ray.config import DataSettings, EmulatorSettings, ModelSettings, StageOneSettings
from scaleot_ray.data.dataset_key import dataset_key
from scaleot_ray.emulator.build import FullModelFacts, build_emulator, check_triplet, replaceable_layers
from scaleot_ray.emulator.layer_replace import train_stage_one
from scaleot_ray.emulator.layer_replace_steps import Keep
from scaleot_ray.emulator.privacy import build_for_privacy, check_held_out
from scaleot_ray.emulator.stage_one import StageOne, steps_done
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.evaluation.loss import LossScore, evaluate_loss
from scaleot_ray.families import layer_count
from scaleot_ray.families.loading import BaseModel, load_base_model, resolve_device
from scaleot_ray.families.mapped import map_base_model
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.identity import data_digest, identity, sampled_fingerprint
from scaleot_ray.stages.public_text import PublicText, generated_sequences, mixed_with, read_public_text
from scaleot_ray.stages.record import read_record, write_record
from scaleot_ray.stages.score import score_from_record, score_record
from scaleot_ray.stages.streamed import check_streamable, streamed_emulator, streamed_settings, streamed_start


@dataclass(frozen=True)
class Begun:
    """Stage 1 so far, for whoever makes its steps.

    Attributes:
        state: scored, without moments.
        extra: the further tensors that were kept with it.
        generated: text that the model has generated itself, as token ids; None for none.
        fingerprint: of the model and the held-out text, as
            :func:`~scaleot_ray.stages.identity.sampled_fingerprint` has it.
    """

    state: StageOne
    extra: dict[str, torch.Tensor]
    generated: list[list[int]] | None
    fingerprint: str


TakeSteps = Callable[[Begun, Keep, OnProgress | None], StageOne]
"""Makes the steps of stage 1, hands states worth keeping on, and gives the last one."""


@dataclass
class BuildResult:
    """What :func:`build` made.

    Attributes:
        directory: the emulator artefact.
        manifest: its manifest.
        reused_stage_one: whether stage 1 was finished before.
        seconds: by part: ``load``, ``stage_one``, ``emulator``.
        privacy: for a privacy level: what it requires and what was reached; None for a given (α, β).
    """

    directory: Path
    manifest: Manifest
    reused_stage_one: bool
    seconds: dict[str, float]
    privacy: dict[str, Any] | None


def build(
    model: ModelSettings | BaseModel,
    public: DataSettings,
    stage_one: StageOneSettings,
    emulator: EmulatorSettings,
    output: Path,
    *,
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stream: bool = False,
    take_steps: TakeSteps | None = None,
    audit: AuditLog | None = None,
    on_progress: OnProgress | None = None,
) -> BuildResult:
    """Builds an emulator, with stage 1 first unless its result is known already.

    Args:
        model: the full model, or where to load it from.
        public: the owner's public text.
        stage_one: settings of stage 1.
        emulator: which emulator.
        output: folder of the artefact.
        cache: folder of stage-1 results by digest of model, tokenizer, data and settings. An interrupted stage 1
            goes on from its checkpoint there. None keeps nothing.
        resume: if ``output`` holds the very emulator that would be built, take it as it is.
        overwrite: replace another artefact in ``output``.
        stream: leave the model's weights in their files and work on one decoder layer at a time, with harmonizers and
            scores in closed form; ``model`` is where they lie.
        take_steps: makes the steps of stage 1 elsewhere, as a group of workers does.
        audit: log of what leaves as a folder: the emulator then passes the gate before it is written, but
            for one that ``allow_unprotected`` let pass, which is written and must not be sent. None where
            something else takes it through the gate (a run's coordinator).
        on_progress: hears of the stages ``generate text``, ``calibrate``, ``layer damage``, ``stage 1``,
            ``measure full model``, ``compress``, ``measure emulator``, ``fit in order`` and ``measure fit``.

    Raises:
        ConfigError: settings are out of range or hide nothing, or ``output`` exists or holds ``cache``.
        DataError: the public text cannot be read or is too short.
        RunFailed: a loss is not finite.
        ResourcesMissing: memory or disk do not suffice.
        ArtifactRefused: with ``audit``: the emulator is not what may leave; it is not written.
    """
    seconds: dict[str, float] = {}
    if output.exists() and not (resume or overwrite):
        raise ConfigError(f"output: {output} exists already.", "Give another folder, or --overwrite.")
    if cache is not None and output.resolve() in (cache.resolve(), *cache.resolve().parents):
        raise ConfigError(
            f"cache: {cache} is output or lies in it, which is written whole and holds nothing but the emulator.",
            "Give a folder beside output.",
        )
    if overwrite:
        check_replaceable(output, MANIFEST_FILE, overwrite)  # before hours are spent on what could not be written
    if stream:
        check_streamable(stage_one, emulator, steps=take_steps is not None)
        stage_one = streamed_settings(stage_one, steps=take_steps is not None)
    with _timed(seconds, "load"):
        base, device = _base_model(model, stream)
        # Before hours are spent on stage 1. A privacy level chooses α and β after it, but not the plug-in layers.
        check = check_triplet if emulator.privacy is None else replaceable_layers
        check(layer_count(base.model.config), emulator)
        key = identity(
            version=__version__,
            model=base.digest,
            tokenizer=base.tokenizer_digest,
            public=data_digest(public, "public"),
            stage_one=stage_one.decisive(),
            **({"stream": True} if stream else {}),
        )
        folder = cache / key[:16] if cache is not None else None
    record = None
    if folder is not None:
        which = identity(emulator=emulator, base_model=model_name(base.name), licence=licence_notice(base.licence))
        record = folder / f"emulator-{which[:16]}.json"
        if resume and (found := _finished(output, record)) is not None:
            _leave(found[0], audit)
            return BuildResult(output, found[0].manifest, True, seconds | {"stage_one": 0.0, "emulator": 0.0}, found[1])
    if output.exists() and not overwrite:
        raise ConfigError(f"output: {output} holds something else already.", "Give another folder, or --overwrite.")
    with dataset_key("public"):
        text = read_public_text(public, base, stage_one)
    if emulator.privacy is not None:
        check_held_out(text.held_out, emulator)  # this too before stage 1
    with _timed(seconds, "stage_one"):
        result, reused = None, False
        if stream or emulator.builder == "scaleot":
            stage = _StageOne(base, stage_one, folder, device if stream else None, take_steps, on_progress)
            result, reused, text = stage.run(text)
    parts = None if record is None or not stream else record.with_suffix("")
    with _timed(seconds, "emulator"):
        reached = None
        if stream:
            assert result is not None
            artifact = streamed_emulator(base, text, result, emulator, device, parts, on_progress)
        elif emulator.privacy is None:
            facts = FullModelFacts(base.digest, _full_score(base, text, folder, on_progress))
            artifact, _ = build_emulator(
                base, result, emulator, facts, text.held_out, text.batches.batches(), on_progress
            )
        else:
            facts = FullModelFacts(base.digest, _full_score(base, text, folder, on_progress))
            chosen = build_for_privacy(base, result, emulator, facts, text.held_out, text.batches, on_progress)
            artifact, reached = chosen.artifact, chosen.as_json()
        _leave(artifact, audit)
        if record is not None:
            # First, so that whoever stops us in between finds the emulator to be this command's own.
            write_record(record, {"digest": artifact.digest, "privacy": reached})
        write_artifact(artifact, output, overwrite=overwrite)
    if parts is not None:
        shutil.rmtree(parts, ignore_errors=True)
    return BuildResult(output, artifact.manifest, reused, seconds, reached)


def _base_model(model: ModelSettings | BaseModel, stream: bool) -> tuple[BaseModel, torch.device]:
    """The model, and where its layers are computed."""
    if isinstance(model, BaseModel):
        return model, next(model.model.parameters()).device
    base = map_base_model(model) if stream else load_base_model(model)
    return base, resolve_device(model.device)


@dataclass(frozen=True)
class _StageOne:
    """Stage 1, wherever its parts are computed; ``stream_on``: the device of a model that stays on disk."""

    base: BaseModel
    settings: StageOneSettings
    folder: Path | None
    stream_on: torch.device | None
    take_steps: TakeSteps | None
    on_progress: OnProgress | None

    def run(self, text: PublicText) -> tuple[StageOne, bool, PublicText]:
        """The result, whether it was finished before, and the text with what the model has generated itself."""
        base, settings, checkpoint = self.base, self.settings, self._file()
        done = steps_done(checkpoint) if checkpoint is not None else None
        reused = done is not None and done >= settings.steps
        sequences = None
        if settings.generated_tokens:
            sequences = generated_sequences(base, settings, self.folder, self.on_progress)
            text = mixed_with(text, sequences, base, settings)
        if self.stream_on is not None:
            state, extra = streamed_start(base, text, settings, self.stream_on, self.folder, self.on_progress)
        else:
            state = train_stage_one(
                base.model,
                base.family,
                text.batches,
                text.held_out,
                settings,
                checkpoint,
                self.on_progress,
                to_the_end=self.take_steps is None,
            )
            extra = {}
            if self.take_steps is not None and checkpoint is not None:
                extra = StageOne.load(checkpoint, with_moments=False)[1]
        if state.step < settings.steps and self.take_steps is not None:
            # Its moments are large, and no step needs them.
            bare = replace(state, settings=settings, moments={}, leader={})
            begun = Begun(bare, extra, sequences, sampled_fingerprint(base.model, text.held_out))
            with _off_gpu(base.model):
                trained = self.take_steps(begun, self._keep, self.on_progress)
            state = replace(trained, moments=state.moments, leader=state.leader)
        return state, reused, text

    def _file(self) -> Path | None:
        return self.folder / "stage_one.safetensors" if self.folder is not None else None

    def _keep(self, state: StageOne, extra: dict[str, torch.Tensor]) -> None:
        if (file := self._file()) is not None:
            state.save(file, extra, with_moments=False)


@contextmanager
def _off_gpu(model: Any) -> Iterator[None]:
    """The model waits in memory while others compute, to whom its GPU may have been given."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        yield
        return
    model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(device)


def _full_score(base: BaseModel, text: PublicText, folder: Path | None, on_progress: OnProgress | None) -> LossScore:
    """The full model's loss on the held-out text; measured once per model and text."""
    path = folder / "full_model.json" if folder is not None else None
    known = read_record(path) if path is not None else {}
    if "sums" in known:
        score = score_from_record(known)
        assert isinstance(score, LossScore)
        return score
    score = evaluate_loss(base.model, text.held_out, on_progress, "measure full model")
    if path is not None:
        write_record(path, score_record(score))
    return score


def _leave(artifact: Artifact, audit: AuditLog | None) -> None:
    content = artifact.manifest.content
    assert isinstance(content, EmulatorContent)
    if audit is not None and content.protected:
        cross(artifact, MODEL_OWNER, DATA_OWNERS, audit)


def _finished(output: Path, record: Path) -> tuple[Artifact, dict[str, Any] | None] | None:
    """The emulator in ``output`` if it is, undamaged, the one that ``record`` names."""
    known = read_record(record)
    if not known or not output.exists():
        return None
    try:
        artifact = read_artifact(output, expected_kind="emulator")
    except ArtifactRefused:
        return None  # damaged since; it is built again from stage 1's result
    return (artifact, known.get("privacy")) if artifact.digest == known.get("digest") else None


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[part] = time.monotonic() - start

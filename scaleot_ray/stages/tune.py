"""Tune: an emulator and a data owner's rows → a delta and a few numbers on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaleot_ray import __version__
from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.atomic import check_replaceable
from scaleot_ray.artifacts.audit import MODEL_OWNER, AuditLog, data_owner
from scaleot_ray.artifacts.card import with_card
from scaleot_ray.artifacts.crossing import cross
from scaleot_ray.artifacts.manifest import MANIFEST_FILE, MetricsContent
from scaleot_ray.artifacts.storage import read_artifact, read_manifest, write_artifact
from scaleot_ray.config import DataSettings, TuneSettings
from scaleot_ray.data import HoldOut, TokenBatches, padding_id, token_examples
from scaleot_ray.data.dataset_key import dataset_key
from scaleot_ray.emulator.assemble import assemble, emulator_content
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families import Family, family_of
from scaleot_ray.families.loading import load_tokenizer, resolve_device
from scaleot_ray.plugin import plug
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.identity import data_digest, identity
from scaleot_ray.stages.limits import check_block_size, check_delta_size, vocabulary_size
from scaleot_ray.stages.record import read_record, write_record
from scaleot_ray.stages.score import TestRows, numbers
from scaleot_ray.tuning import Delta, Tuned, tune
from scaleot_ray.tuning.delta import from_artifact

RECORD = "tune.json"  # stays with the data owner: its key depends on the private rows

_PARTS = ("delta", "metrics")


@dataclass
class TuneResult:
    """What :func:`tune_emulator` made.

    Attributes:
        directory: holds the artefacts ``delta`` and ``metrics``; nothing else is meant to leave.
        delta: the delta.
        metrics: the numbers in ``metrics``.
        seconds: of the work; of the earlier one where a finished result was found.
        validation: (step, loss) of every evaluation on validation rows; stays with the data owner.
        steps: optimizer steps done; fewer than asked for where patience ran out.
    """

    directory: Path
    delta: Artifact
    metrics: dict[str, float]
    seconds: float
    validation: list[tuple[int, float]] = field(default_factory=list)
    steps: int | None = None


def tune_emulator(
    emulator: Artifact,
    train: DataSettings,
    tune: TuneSettings,
    output: Path,
    *,
    start: Artifact | None = None,
    name: str = "data owner",
    test: DataSettings | None = None,
    validation: DataSettings | None = None,
    device: str = "auto",
    evaluate_examples: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    audit: AuditLog | None = None,
    on_progress: OnProgress | None = None,
) -> TuneResult:
    """Tunes the plug-in layers of an emulator; the artefact and the package are all it needs.

    Writes ``output/delta`` and ``output/metrics`` (artefacts), ``output/tune.json`` and, while it
    runs, ``output/checkpoint``.

    Args:
        emulator: checked by the caller (reading it from disk does, the gate does).
        train: private rows to tune on.
        tune: method, steps, rates.
        output: the data owner's folder.
        start: delta of an earlier round to begin with; what comes out includes it. Default: the emulator as it is.
        name: of the data owner, for progress.
        test: held-out rows for the two metrics ``emulator_zero_shot`` and ``emulator_tuned``. Nothing
            about tuning depends on them.
        validation: rows for ``tune.evaluate_every``; default: ``tune.validation_fraction`` of ``train``.
        device: where to compute.
        evaluate_examples: at most so many test rows or blocks, and so many validation rows or blocks.
        overwrite: replace another result in ``output``.
        resume: take a finished result of the same emulator, rows and settings as it is, and go on from a
            checkpoint of them; False starts afresh.
        audit: log of what leaves as a folder: delta and metrics then pass the gate before they are written.
            None where something else takes them through it (a run's coordinator).
        on_progress: hears of ``tune NAME``, ``emulator zero shot NAME`` and ``emulator tuned NAME``.

    Raises:
        ConfigError: settings do not fit the model, or ``output`` holds another result.
        DataError: rows cannot be read, or are not what the settings say.
        RunFailed: a loss is not finite.
        ResourcesMissing: memory or disk do not suffice.
        ArtifactRefused: with ``audit``: delta or metrics are not what may leave; they are not written.
    """
    begun = time.monotonic()
    key = identity(
        version=__version__,
        emulator=emulator.digest,
        tune=tune.decisive(),
        train=data_digest(train, "train"),
        test=data_digest(test, "test") if test is not None else None,
        evaluate_examples=evaluate_examples,
        **({"validation": data_digest(validation, "validation")} if validation is not None else {}),
        **({"start": start.digest} if start is not None else {}),
    )
    if resume and (finished := _finished(output, key)) is not None:
        if audit is not None:
            _leave([finished.delta, read_artifact(output / "metrics")], name, emulator, start, audit)
        return finished
    overwrite = overwrite or _began(output, key)
    if not overwrite and any((output / part).exists() for part in _PARTS):
        raise ConfigError(
            f"output: {output} holds the result of another tuning.", "Give another folder, or --overwrite."
        )
    for part in _PARTS:  # now, before hours are spent on what could not be written
        check_replaceable(output / part, MANIFEST_FILE, overwrite)
    content = emulator_content(emulator.manifest)
    model = assemble(emulator, resolve_device(device))
    tokenizer = load_tokenizer(emulator.files)
    family = family_of(model.config)
    check_delta_size(emulator.manifest, family, tune)
    rows = None
    if test is not None:
        with dataset_key("test"):
            rows = TestRows(test, tokenizer, tune.block_size, evaluate_examples, tune.too_long)
    values: dict[str, float] = {}
    if rows is not None:
        values |= numbers(rows.score(model, f"emulator zero shot {name}", on_progress), "emulator_zero_shot")
    checkpoint = output / "checkpoint" / f"{key[:16]}.safetensors"
    tuned = tune_layers(
        model,
        family,
        content.plug_in_positions,
        tokenizer,
        train,
        validation,
        tune,
        evaluate_examples,
        f"tune {name}",
        checkpoint,
        resume,
        on_progress,
        from_artifact(start) if start is not None else None,
    )
    if rows is not None:
        with plug(model, family, tuned.delta):
            values |= numbers(rows.score(model, f"emulator tuned {name}", on_progress), "emulator_tuned")
    artifact = tuned.delta.to_artifact(emulator.manifest, start.digest if start is not None else None)
    metrics = with_card(Artifact.made_from(emulator.manifest, "metrics", MetricsContent(values=values)))
    if audit is not None:
        _leave([artifact, metrics], name, emulator, start, audit)
    seconds, history = time.monotonic() - begun, tuned.history
    record = {"key": key, "delta": artifact.digest, "metrics": metrics.digest, "seconds": seconds}
    # First, so that the same command, stopped before all is written, knows what is there as its own.
    write_record(output / RECORD, {**record, "validation": history.evaluations, "steps": history.steps})
    write_artifact(artifact, output / "delta", overwrite=overwrite)
    write_artifact(metrics, output / "metrics", overwrite=overwrite)
    checkpoint.unlink(missing_ok=True)
    with suppress(OSError):  # checkpoints of other tunings that were interrupted stay
        checkpoint.parent.rmdir()
    return TuneResult(output, artifact, values, seconds, history.evaluations, history.steps)


def tune_layers(
    model: Any,
    family: Family,
    positions: tuple[int, ...],
    tokenizer: Any,
    train: DataSettings,
    validation: DataSettings | None,
    settings: TuneSettings,
    evaluate_examples: int | None,
    stage: str,
    checkpoint: Path | None,
    resume: bool,
    on_progress: OnProgress | None,
    start: Delta | None = None,
) -> Tuned:
    """Tunes the layers at ``positions`` of an emulator or of a full model, on the same batches.

    Where ``settings`` ask for evaluations, they are made on ``validation``, or without it on rows of
    ``train`` that are then not trained on.
    """
    check_block_size(model.config, settings.block_size, "tune.block_size")
    if validation is not None and settings.evaluate_every is None:
        raise ConfigError(
            "validation: nothing evaluates on these rows.", "Set tune.evaluate_every, or leave validation out."
        )
    hold_out = None
    if settings.evaluate_every is not None and validation is None:
        hold_out = HoldOut(settings.validation_fraction, settings.seed)
    block_size, too_long = settings.block_size, settings.too_long
    with dataset_key("train"):
        examples = token_examples(train, tokenizer, block_size, too_long, hold_out.training if hold_out else None)
    batches = TokenBatches(
        examples, settings.batch_size, padding_id(tokenizer), settings.seed, vocab_size=vocabulary_size(model)
    )
    with dataset_key("train"):
        batches.prepare(settings.steps * settings.accumulate)
    evaluate: Callable[[], float] | None = None
    if settings.evaluate_every is not None:
        part = hold_out.validation if hold_out else None
        with dataset_key("validation" if validation is not None else "train"):
            rows = TestRows(validation or train, tokenizer, block_size, evaluate_examples, too_long, part=part)
        evaluate = lambda: rows.loss(model)  # noqa: E731
    return tune(
        model,
        family,
        positions,
        batches,
        settings,
        start=start,
        evaluate=evaluate,
        checkpoint=checkpoint,
        resume=resume,
        on_progress=on_progress,
        stage=stage,
    )


def _leave(artifacts: list[Artifact], name: str, emulator: Artifact, start: Artifact | None, audit: AuditLog) -> None:
    began = start.digest if start is not None else None
    for artifact in artifacts:
        cross(artifact, data_owner(name), MODEL_OWNER, audit, parent=emulator.manifest, start=began)


def _began(output: Path, key: str) -> bool:
    """Whether what ``output`` holds was written by the very tuning that ``key`` stands for, stopped while writing."""
    record = read_record(output / RECORD)
    if record.get("key") != key:
        return False
    try:
        there = {part: read_manifest(output / part).digest() for part in _PARTS if (output / part).exists()}
    except ArtifactRefused:
        return False
    return all(digest == record.get(part) for part, digest in there.items())


def _finished(output: Path, key: str) -> TuneResult | None:
    """The result in ``output`` if it is, undamaged, the one that ``key`` stands for."""
    record = read_record(output / RECORD)
    if record.get("key") != key:
        return None
    try:
        delta = read_artifact(output / "delta", expected_kind="delta")
        metrics = read_artifact(output / "metrics", expected_kind="metrics")
    except ArtifactRefused:
        return None  # damaged or removed since; tuned again
    if (delta.digest, metrics.digest) != (record.get("delta"), record.get("metrics")):
        return None
    assert isinstance(metrics.manifest.content, MetricsContent)
    evaluations = [(int(step), float(value)) for step, value in record.get("validation", ())]
    values = dict(metrics.manifest.content.values)
    return TuneResult(output, delta, values, float(record["seconds"]), evaluations, record.get("steps"))

"""Tune: an emulator and a data owner's rows → a delta and a few numbers on disk."""

from __future__ import annotations

import time
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
from scaleot_ray.data.dataset_key import dataset_key
from scaleot_ray.emulator.assemble import assemble, emulator_content
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families import family_of
from scaleot_ray.families.loading import load_tokenizer, resolve_device
from scaleot_ray.plugin import plug
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.identity import data_digest, identity
from scaleot_ray.stages.limits import check_delta_size
from scaleot_ray.stages.record import read_record, write_record
from scaleot_ray.stages.score import TestRows, numbers
from scaleot_ray.stages.tune_layers import tune_layers
from scaleot_ray.tuning import Delta, Tuned
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


@dataclass(frozen=True)
class TuneRequest:
    """One data owner's tuning.

    Attributes:
        name: of the data owner.
        train: private rows to tune on.
        tune: method, steps, rates.
        output: the data owner's folder.
        start: delta of an earlier round to begin with; what comes out includes it. Default: the emulator as it is.
        earlier_steps: optimizer steps of earlier rounds, whose batches are passed over.
        test: held-out rows for the two metrics ``emulator_zero_shot`` and ``emulator_tuned``. Nothing
            about tuning depends on them.
        validation: rows for ``tune.evaluate_every``; default: ``tune.validation_fraction`` of ``train``.
        evaluate_examples: at most so many test rows or blocks, and so many validation rows or blocks.
        overwrite: replace another result in ``output``.
        resume: take a finished result of the same emulator, rows and settings as it is, and go on from a
            checkpoint of them; False starts afresh.
        audit: log of what leaves as a folder: delta and metrics then pass the gate before they are written.
            None where something else takes them through it (a run's coordinator).
    """

    name: str
    train: DataSettings
    tune: TuneSettings
    output: Path
    start: Artifact | None = None
    test: DataSettings | None = None
    validation: DataSettings | None = None
    evaluate_examples: int | None = None
    overwrite: bool = False
    resume: bool = True
    audit: AuditLog | None = None
    earlier_steps: int = 0


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
    earlier_steps: int = 0,
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
        start, name, test, validation, evaluate_examples, overwrite, resume, audit, earlier_steps: as in
            :class:`TuneRequest`.
        device: where to compute.
        on_progress: hears of ``tune NAME``, ``emulator zero shot NAME`` and ``emulator tuned NAME``.

    Raises:
        ConfigError: settings do not fit the model, or ``output`` holds another result.
        DataError: rows cannot be read, or are not what the settings say.
        RunFailed: a loss is not finite.
        ResourcesMissing: memory or disk do not suffice.
        ArtifactRefused: with ``audit``: delta or metrics are not what may leave; they are not written.
    """
    request = TuneRequest(
        *(name, train, tune, output, start, test, validation, evaluate_examples, overwrite, resume, audit),
        earlier_steps,
    )
    tuning = OwnersTuning(emulator, request, on_progress)
    if (finished := tuning.finished()) is not None:
        return finished
    tuning.check_output()
    model, tokenizer = assemble(emulator, resolve_device(device)), load_tokenizer(emulator.files)
    tuning.measure(model, tokenizer)
    tuned = tune_layers(
        model,
        family_of(model.config),
        emulator_content(emulator.manifest).plug_in_positions,
        tokenizer,
        train,
        validation,
        tune,
        evaluate_examples,
        tuning.stage,
        tuning.checkpoint,
        resume,
        on_progress,
        tuning.start,
        earlier_steps,
    )
    return tuning.result(model, tuned)


class OwnersTuning:
    """One data owner's tuning, from what may be there already to what it leaves in its folder.

    What comes in between, the tuning itself, may be done alone or beside others'. The key that finished
    results and checkpoints are found by does not say which: both come to the same, but for the last digits.

    Args:
        emulator: what is tuned.
        request: by whom, on what and how.
        on_progress: hears of the measurements on test rows.

    Raises:
        DataError: rows are missing or of no known format.
    """

    def __init__(self, emulator: Artifact, request: TuneRequest, on_progress: OnProgress | None) -> None:
        self.emulator, self.request, self._on_progress = emulator, request, on_progress
        self.stage = f"tune {request.name}"
        self._begun = time.monotonic()
        self._key = _key(emulator, request)
        self.checkpoint = request.output / "checkpoint" / f"{self._key[:16]}.safetensors"
        self._overwrite = request.overwrite
        self._rows: TestRows | None = None
        self._values: dict[str, float] = {}

    @property
    def start(self) -> Delta | None:
        """What it begins with."""
        return from_artifact(self.request.start) if self.request.start is not None else None

    def finished(self) -> TuneResult | None:
        """The result where it is there already and may be taken.

        Raises:
            ArtifactRefused: it may not leave.
        """
        request = self.request
        finished = _finished(request.output, self._key) if request.resume else None
        if finished is not None:
            self._leave([finished.delta, read_artifact(request.output / "metrics")])
        return finished

    def check_output(self) -> None:
        """Looks whether the result can be written, now, before hours are spent on it.

        Raises:
            ConfigError: the folder holds something else.
        """
        output = self.request.output
        self._overwrite = self._overwrite or _began(output, self._key)
        if not self._overwrite and any((output / part).exists() for part in _PARTS):
            raise ConfigError(
                f"output: {output} holds the result of another tuning.", "Give another folder, or --overwrite."
            )
        for part in _PARTS:
            check_replaceable(output / part, MANIFEST_FILE, self._overwrite)

    def measure(self, model: Any, tokenizer: Any) -> None:
        """Reads the test rows, where there are any, and scores the emulator as it is.

        Raises:
            ConfigError: the delta would be too large to leave, or the model's context is too short.
            DataError: a row is not what the settings say.
        """
        request = self.request
        check_delta_size(self.emulator.manifest, family_of(model.config), request.tune)
        if request.test is not None:
            tune = request.tune
            with dataset_key("test"):
                self._rows = TestRows(
                    request.test, tokenizer, tune.block_size, request.evaluate_examples, tune.too_long
                )
            self._values = self._score(self._rows, model, "emulator zero shot")

    def result(self, model: Any, tuned: Tuned) -> TuneResult:
        """Scores the tuned emulator, and writes what there is.

        Args:
            model: the emulator as it was before tuning.
            tuned: what came out.

        Raises:
            ArtifactRefused: with an audit log: it is not what may leave; nothing is written.
            ResourcesMissing: the disk is full.
        """
        request, began = self.request, self.request.start
        values = dict(self._values)
        if self._rows is not None:
            with plug(model, family_of(model.config), tuned.delta):
                values |= self._score(self._rows, model, "emulator tuned")
        artifact = tuned.delta.to_artifact(self.emulator.manifest, began.digest if began is not None else None)
        metrics = with_card(Artifact.made_from(self.emulator.manifest, "metrics", MetricsContent(values=values)))
        self._leave([artifact, metrics])
        seconds, history = time.monotonic() - self._begun, tuned.history
        record = {"key": self._key, "delta": artifact.digest, "metrics": metrics.digest, "seconds": seconds}
        # First, so that the same command, stopped before all is written, knows what is there as its own.
        write_record(request.output / RECORD, {**record, "validation": history.evaluations, "steps": history.steps})
        write_artifact(artifact, request.output / "delta", overwrite=self._overwrite)
        write_artifact(metrics, request.output / "metrics", overwrite=self._overwrite)
        self.checkpoint.unlink(missing_ok=True)
        with suppress(OSError):  # checkpoints of other tunings that were interrupted stay
            self.checkpoint.parent.rmdir()
        return TuneResult(request.output, artifact, values, seconds, history.evaluations, history.steps)

    def _score(self, rows: TestRows, model: Any, what: str) -> dict[str, float]:
        score = rows.score(model, f"{what} {self.request.name}", self._on_progress)
        return numbers(score, what.replace(" ", "_"))

    def _leave(self, artifacts: list[Artifact]) -> None:
        request = self.request
        if request.audit is None:
            return
        began = request.start.digest if request.start is not None else None
        for artifact in artifacts:
            parent = self.emulator.manifest
            cross(artifact, data_owner(request.name), MODEL_OWNER, request.audit, parent=parent, start=began)


def _key(emulator: Artifact, request: TuneRequest) -> str:
    test, validation, start = request.test, request.validation, request.start
    return identity(
        version=__version__,
        emulator=emulator.digest,
        tune=request.tune.decisive(),
        train=data_digest(request.train, "train"),
        test=data_digest(test, "test") if test is not None else None,
        evaluate_examples=request.evaluate_examples,
        **({"validation": data_digest(validation, "validation")} if validation is not None else {}),
        **({"start": start.digest} if start is not None else {}),
        **({"earlier_steps": request.earlier_steps} if request.earlier_steps else {}),
    )


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

"""Evaluate: rows of the standard table for one data owner's test rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scaleot_ray import __version__
from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.delta_gate import ANY_START
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.config import DataSettings, TuneSettings
from scaleot_ray.data.dataset_key import dataset_key
from scaleot_ray.emulator.assemble import assemble, emulator_content
from scaleot_ray.errors import ConfigError, ScaleOTError
from scaleot_ray.evaluation.score import Score
from scaleot_ray.evaluation.table import AGGREGATE, ROWS, TenantTable
from scaleot_ray.families import family_of
from scaleot_ray.families.loading import BaseModel, load_tokenizer, resolve_device
from scaleot_ray.plugin import plug
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.identity import data_digest, identity
from scaleot_ray.stages.limits import check_block_size
from scaleot_ray.stages.plug import check_same_model, check_same_tokenizer
from scaleot_ray.stages.record import read_record, write_record
from scaleot_ray.stages.score import BATCH_SIZE, AnyScore, TestRows, score_from_record, score_record
from scaleot_ray.stages.tune_layers import tune_layers
from scaleot_ray.tuning import Delta, from_artifact

INPUTS = {
    "full_zero_shot": ("base",),
    "emulator_zero_shot": ("emulator",),
    "emulator_tuned": ("emulator", "delta"),
    "plug_in": ("base", "emulator", "delta"),
    "full_tuned": ("base", "emulator", "train", "tune"),
    AGGREGATE: ("base", "emulator", "aggregate"),
}
"""What each row is computed from, besides the test rows."""


def evaluate_rows(
    rows: Sequence[str],
    *,
    name: str,
    test: DataSettings,
    base: BaseModel | None = None,
    emulator: Artifact | None = None,
    delta: Artifact | None = None,
    aggregate: Artifact | None = None,
    train: DataSettings | None = None,
    validation: DataSettings | None = None,
    tune: TuneSettings | None = None,
    rounds: int = 1,
    evaluate_examples: int | None = None,
    batch_size: int = BATCH_SIZE,
    block_size: int = 128,
    device: str = "auto",
    folder: Path | None = None,
    on_progress: OnProgress | None = None,
    failed: Callable[[str, ScaleOTError], None] | None = None,
) -> TenantTable:
    """Measures the given rows on the same test rows; those whose inputs are missing stay out.

    Args:
        rows: names out of ``ROWS``, and ``AGGREGATE``.
        name: the data owner, for the table and for progress.
        test: test rows.
        base: the full model; for ``full_zero_shot``, ``plug_in`` and ``full_tuned``.
        emulator: for the emulator's rows, for ``plug_in`` (the delta is checked against it) and for
            ``full_tuned`` (which layers are tuned).
        delta: for ``emulator_tuned`` and ``plug_in``.
        aggregate: for the row of that name: the delta that all data owners have in common.
        train, tune: for ``full_tuned``: the same layers, steps and batches on the full model.
        rounds: for ``full_tuned``: how often ``tune`` was done, each time with the delta before and the next batches.
        validation: rows for ``tune.evaluate_every``; default: ``tune.validation_fraction`` of ``train``.
        evaluate_examples: at most so many test rows or blocks, and so many validation rows or blocks.
        batch_size: sequences per forward pass.
        block_size: tokens per test sequence.
        device: where the emulator is put; the full model stays where it is.
        folder: keeps finished rows and the checkpoint of ``full_tuned``, so that what was interrupted
            goes on and what was measured is not measured again. It depends on private rows: keep it there.
        on_progress: hears of ``ROW NAME`` for each row, and of ``tune full NAME``.
        failed: takes a row and its error; the row stays out and the others are measured. Without it the first
            error is raised.

    Raises:
        ConfigError: a row is unknown, or the full model or its tokenizer is not what the emulator was built from.
        ArtifactRefused: the delta does not belong to the emulator.
        DataError: rows cannot be read, or are not what the settings say.
        RunFailed: a loss is not finite.
    """
    for row in rows:
        if row not in INPUTS:
            raise ConfigError(f"rows: {row!r} is no row of the standard table.", f"Take some of {', '.join(ROWS)}.")
    work = _Evaluation(
        name,
        test,
        base,
        emulator,
        delta,
        aggregate,
        train,
        validation,
        tune,
        rounds,
        evaluate_examples,
        batch_size,
        block_size,
        device,
        folder,
    )
    scores: dict[str, Score | None] = {}
    for row in (*ROWS, AGGREGATE):
        if row in rows and work.possible(row):
            try:
                scores[row] = work.measure(row, on_progress)
            except ScaleOTError as error:
                if failed is None:
                    raise
                failed(row, error)
    metric = "accuracy" if test.task == "choice" else "loss"
    return TenantTable(name, metric, scores)


@dataclass
class _Evaluation:
    """The inputs of a table; test rows and models are made when the first row needs them."""

    name: str
    test: DataSettings
    base: BaseModel | None
    emulator: Artifact | None
    delta: Artifact | None
    aggregate: Artifact | None
    train: DataSettings | None
    validation: DataSettings | None
    tune: TuneSettings | None
    rounds: int
    limit: int | None
    batch_size: int
    block_size: int
    device: str
    folder: Path | None

    def __post_init__(self) -> None:
        for delta in (self.delta, self.aggregate):
            if self.emulator is not None and delta is not None:
                check_crossing(delta, parent=self.emulator.manifest, start=ANY_START)
        if self.emulator is not None and self.base is not None:
            check_same_model(self.base, self.emulator.manifest)
            check_same_tokenizer(self.base, self.emulator.files, chat=self.test.task == "chat")

    def possible(self, row: str) -> bool:
        """Whether all inputs of a row are there."""
        return all(getattr(self, name) is not None for name in INPUTS[row])

    def measure(self, row: str, on_progress: OnProgress | None) -> AnyScore:
        """A row's score, from the folder if it was measured before."""
        key, path = None, None
        if self.folder is not None:
            key, path = self._key(row), self.folder / f"{row}.json"
            known = read_record(path)
            if known.get("key") == key:
                return score_from_record(known)
        methods: dict[str, Callable[[str, OnProgress | None, str | None], AnyScore]] = {
            "full_zero_shot": self._zero_shot,
            "emulator_zero_shot": self._zero_shot,
            "emulator_tuned": self._with_delta,
            "plug_in": self._with_delta,
            "full_tuned": self._full_tuned,
            AGGREGATE: self._with_delta,
        }
        score = methods[row](row, on_progress, key)
        if path is not None:
            write_record(path, {"key": key, **score_record(score)})
            if row == "full_tuned":  # only now; and those of other settings with them
                for checkpoint in path.parent.glob("full_tuned-*.safetensors"):
                    checkpoint.unlink(missing_ok=True)
        return score

    def _zero_shot(self, row: str, on_progress: OnProgress | None, key: str | None) -> AnyScore:
        return self._score(self._model(row), row, on_progress)

    def _with_delta(self, row: str, on_progress: OnProgress | None, key: str | None) -> AnyScore:
        delta = self.aggregate if row == AGGREGATE else self.delta
        assert delta is not None
        model = self._model(row)
        with plug(model, family_of(model.config), from_artifact(delta)):
            return self._score(model, row, on_progress)

    def _full_tuned(self, row: str, on_progress: OnProgress | None, key: str | None) -> AnyScore:
        base, settings = self.base, self.tune
        assert base is not None
        assert settings is not None
        assert self.emulator is not None
        assert self.train is not None
        delta: Delta | None = None
        for number in range(1, self.rounds + 1):
            delta = tune_layers(
                base.model,
                base.family,
                emulator_content(self.emulator.manifest).plug_in_positions,
                base.tokenizer,
                self.train,
                self.validation,
                settings,
                self.limit,
                f"tune full {self.name}",
                self._checkpoint(key, number),
                True,
                on_progress,
                delta,
                (number - 1) * settings.steps,
            ).delta
        assert delta is not None
        with plug(base.model, base.family, delta):
            return self._score(base.model, row, on_progress)

    def _checkpoint(self, key: str | None, number: int) -> Path | None:
        """Of ``full_tuned``, one for each round: after a kill those that are done are only read."""
        if self.folder is None or key is None:
            return None
        return self.folder / f"full_tuned-{key[:16]}-{number}.safetensors"

    def _score(self, model: Any, row: str, on_progress: OnProgress | None) -> AnyScore:
        check_block_size(model.config, self.block_size, "block_size")
        return self._test_rows.score(model, f"{row.replace('_', ' ')} {self.name}", on_progress)

    @cached_property
    def _assembled(self) -> Any:
        assert self.emulator is not None
        return assemble(self.emulator, resolve_device(self.device))

    @cached_property
    def _test_rows(self) -> TestRows:
        if self.base is not None:
            tokenizer = self.base.tokenizer
        else:
            assert self.emulator is not None
            tokenizer = load_tokenizer(self.emulator.files)
        too_long = self.tune.too_long if self.tune is not None else "error"
        with dataset_key("test"):
            return TestRows(self.test, tokenizer, self.block_size, self.limit, too_long, self.batch_size)

    @cached_property
    def _test_digest(self) -> str:
        return data_digest(self.test, "test")

    def _model(self, row: str) -> Any:
        if row.startswith("emulator"):
            return self._assembled
        assert self.base is not None
        return self.base.model

    def _key(self, row: str) -> str:
        digests: dict[str, Callable[[Any], Any]] = {
            "base": lambda base: [base.digest, base.tokenizer_digest],
            # Tuning the full model needs to know which layers, and nothing else of the emulator.
            "emulator": lambda emulator: (
                list(emulator_content(emulator.manifest).plug_in_positions) if row == "full_tuned" else emulator.digest
            ),
            "delta": lambda delta: delta.digest,
            "aggregate": lambda aggregate: aggregate.digest,
            "train": lambda train: data_digest(train, "train"),
            "tune": lambda tune: tune.decisive(),
        }
        validation = {}
        if row == "full_tuned" and self.validation is not None:
            validation = {"validation": data_digest(self.validation, "validation")}
        return identity(
            version=__version__,
            row=row,
            test=self._test_digest,
            limit=self.limit,
            block_size=self.block_size,
            too_long=self.tune.too_long if self.tune is not None else "error",
            inputs={name: digests[name](getattr(self, name)) for name in INPUTS[row]} | validation,
            **({"rounds": self.rounds} if row == "full_tuned" and self.rounds > 1 else {}),
        )

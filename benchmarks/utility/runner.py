"""Computes cells one after the other and keeps each as one JSON file."""

from __future__ import annotations

import itertools
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, now
from benchmarks.utility.cell import Cell
from benchmarks.utility.estimate import budget_lines, task_tokens
from benchmarks.utility.measured import ALL_LAYERS, score_record
from benchmarks.utility.tasks import Task, prepare, public_text, task_named
from scaleot_ray import __version__
from scaleot_ray.artifacts import Artifact, read_artifact
from scaleot_ray.cli.bars import ProgressBars, clock
from scaleot_ray.config import DataSettings, ModelSettings
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import RunFailed
from scaleot_ray.evaluation.score import Score
from scaleot_ray.families import layer_count
from scaleot_ray.families.family import text_config
from scaleot_ray.families.loading import BaseModel, load_base_model, model_digest
from scaleot_ray.plugin import plug
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.build import build
from scaleot_ray.stages.evaluate import evaluate_rows
from scaleot_ray.stages.identity import data_digest, identity
from scaleot_ray.stages.record import read_record, write_record
from scaleot_ray.stages.score import TestRows
from scaleot_ray.stages.tune import tune_emulator
from scaleot_ray.stages.tune_layers import tune_layers


@dataclass(frozen=True)
class TaskData:
    """A task's rows: to tune on, and to measure on."""

    train: DataSettings
    test: DataSettings


class CellRunner:
    """Computes cells in one folder.

    Args:
        model: path of the full model.
        data: folder of the tasks' files.
        output: folder of everything that is written: ``cells``, ``full`` (rows of the full model),
            ``emulators``, ``stage_one``, ``data``, ``work``.
        device: where to compute.
    """

    def __init__(self, model: str, data: Path, output: Path, device: str = "auto") -> None:
        self.data, self.output, self.device = data, output, device
        self.base: BaseModel = load_base_model(ModelSettings(path=model, dtype="float32", device=device))
        self.identity = {
            "version": __version__,
            "model": model_digest(self.base.model),
            "matmul_precision": torch.get_float32_matmul_precision(),
        }
        self.environment = environment() | {"device": str(self.base.model.device)}
        self._tasks: dict[tuple[str, int, int], TaskData] = {}
        self._public: dict[str, tuple[DataSettings, str]] = {}

    def fitting(self, block_size: int) -> int:
        """A block size that the model's context holds."""
        context = getattr(text_config(self.base.model.config), "max_position_embeddings", None)
        return min(block_size, context) if context else block_size

    def task(self, task: Task, rows: int) -> TaskData:
        """A task's rows, prepared at first use."""
        block = self.fitting(task.block_size)
        key = (task.name, rows, block)
        if key not in self._tasks:
            self._tasks[key] = TaskData(*prepare(task, self.data, self.output / "data" / f"{rows}", rows, block))
        return self._tasks[key]

    def public(self, name: str) -> tuple[DataSettings, str]:
        """One of the public texts, and its digest."""
        if name not in self._public:
            text = public_text(name, self.data, self.output / "data")
            self._public[name] = text, data_digest(text, "public")
        return self._public[name]

    def announce(self, cells: Sequence[Cell]) -> None:
        """Prints how many tokens the cells take, on stderr."""
        tokens = {}
        for cell in cells:
            if cell.task not in tokens:
                rows = self._rows(cell)
                tokens[cell.task] = task_tokens(self.base, rows.train, rows.test, cell.tune, cell.test_rows)
        stages = {identity(s=cell.stage_one): cell.stage_one for cell in cells if cell.trains_harmonizers}
        for line in budget_lines(cells, tokens, list(stages.values()), self.base):
            _say(line)

    def run(self, cells: Sequence[Cell]) -> list[str]:
        """Computes all cells that are not finished; a cell that fails does not stop the others.

        Returns:
            Names of the cells that failed.
        """
        failed = []
        for number, cell in enumerate(cells, start=1):
            head = f"[{number}/{len(cells)}] {cell.name}"
            path = self.output / "cells" / f"{cell.name}.json"
            digest = self._digest(cell)
            known = read_record(path)
            finished = known.get("digest") == digest
            if finished and (ALL_LAYERS in known["rows"] or not cell.all_layers):
                _say(f"{head}: finished before")
                continue
            _say(f"{head}: begins")
            start = time.monotonic()
            try:
                with ProgressBars() as bars:
                    record = known if finished else self._compute(cell, bars)
                    if cell.all_layers:
                        record["rows"][ALL_LAYERS] = self._all_layers_tuned(cell, bars)
            except RunFailed as error:
                _say(f"{head}: failed. {error}")
                failed.append(cell.name)
                continue
            write_record(path, {**record, "digest": digest})
            _say(f"{head}: finished in {clock(time.monotonic() - start)}")
        return failed

    def _compute(self, cell: Cell, on_progress: OnProgress) -> dict[str, Any]:
        task, tune = self._rows(cell), cell.tune
        seconds: dict[str, float] = {}
        start = time.monotonic()
        emulator = self._emulator(cell, on_progress)
        seconds["build"] = time.monotonic() - start
        rows = self._full_rows(cell, emulator, on_progress)
        # A cell that was interrupted starts over.
        work = self.output / "work" / cell.name
        shutil.rmtree(work, ignore_errors=True)
        tuned = tune_emulator(
            emulator, task.train, tune, work, name=cell.task, device=self.device, on_progress=on_progress
        )
        seconds["tune"] = tuned.seconds
        start = time.monotonic()
        rows |= self._measure(
            ("emulator_zero_shot", "emulator_tuned", "plug_in"), cell, emulator, on_progress, delta=tuned.delta
        )
        seconds["evaluate"] = time.monotonic() - start
        shutil.rmtree(work, ignore_errors=True)
        return {
            "cell": {"task": cell.task, "seed": cell.seed, **cell.facts},
            "of": self.identity | {"public": self.public(cell.public)[1]} | self._digests(cell),
            "settings": {
                "stage_one": cell.stage_one.model_dump(mode="json") if cell.trains_harmonizers else None,
                "emulator": cell.emulator.model_dump(mode="json"),
                "tune": tune.model_dump(mode="json"),
                "test_rows": cell.test_rows,
            },
            "emulator": _emulator_facts(emulator),
            "delta_bytes": tuned.delta.nbytes,
            "seconds": seconds,
            "date": now(),
            "environment": self.environment,
            "rows": {name: score_record(score) for name, score in rows.items() if score is not None},
        }

    def _emulator(self, cell: Cell, on_progress: OnProgress) -> Artifact:
        directory = self.output / "emulators" / cell.emulator_label
        build(
            self.base,
            self.public(cell.public)[0],
            cell.stage_one,
            cell.emulator,
            directory,
            cache=self.output / "stage_one",
            resume=True,
            overwrite=True,
            on_progress=on_progress,
        )
        return read_artifact(directory, expected_kind="emulator")

    def _full_rows(self, cell: Cell, emulator: Artifact, on_progress: OnProgress) -> dict[str, Score | None]:
        """Rows that no emulator changes: computed once for a task, or for a task and a way of tuning, and kept."""
        which = identity(tune=cell.tune, layers=cell.emulator.plug_in_layers, layout=cell.emulator.layout)
        folders = {"full_zero_shot": f"{cell.test_rows}", "full_tuned": f"{cell.test_rows}-{which[:12]}"}
        rows: dict[str, Score | None] = {}
        for row, name in folders.items():
            folder = self.output / "full" / f"{cell.task}-{name}"
            rows |= self._measure((row,), cell, emulator, on_progress, folder=folder)
        return rows

    def _all_layers_tuned(self, cell: Cell, on_progress: OnProgress) -> dict[str, Any]:
        """Score of the full model with every decoder layer tuned, on the same batches and for as many steps."""
        which = identity(**self.identity, **self._digests(cell), tune=cell.tune)
        path = self.output / "full" / f"{cell.task}-{cell.test_rows}-all-{which[:12]}.json"
        record = read_record(path)
        if not record:
            path.parent.mkdir(parents=True, exist_ok=True)
            record = self._tune_all_layers(cell, path.with_suffix(".safetensors"), on_progress)
            write_record(path, record)
        return record

    def _tune_all_layers(self, cell: Cell, checkpoint: Path, on_progress: OnProgress) -> dict[str, Any]:
        base, task, tune = self.base, self._rows(cell), cell.tune
        delta = tune_layers(
            base.model,
            base.family,
            tuple(range(layer_count(base.model.config))),
            base.tokenizer,
            task.train,
            None,
            tune,
            None,
            f"tune all layers {cell.task}",
            checkpoint,
            True,
            on_progress,
        ).delta
        rows = TestRows(task.test, base.tokenizer, tune.block_size, cell.test_rows, tune.too_long)
        with plug(base.model, base.family, delta):
            score = rows.score(base.model, f"all layers tuned {cell.task}", on_progress)
        checkpoint.unlink(missing_ok=True)
        return score_record(score)

    def _measure(
        self,
        rows: Sequence[str],
        cell: Cell,
        emulator: Artifact,
        on_progress: OnProgress,
        delta: Artifact | None = None,
        folder: Path | None = None,
    ) -> dict[str, Score | None]:
        task = self._rows(cell)
        table = evaluate_rows(
            rows,
            name=cell.task,
            test=task.test,
            base=self.base,
            emulator=emulator,  # for rows of the full model it says which layers are tuned, nothing else
            delta=delta,
            train=task.train,
            tune=cell.tune,
            evaluate_examples=cell.test_rows,
            block_size=cell.tune.block_size,
            device=self.device,
            folder=folder,
            on_progress=on_progress,
        )
        return dict(table.rows)

    def _rows(self, cell: Cell) -> TaskData:
        return self.task(task_named(cell.task), cell.test_rows)

    def _digests(self, cell: Cell) -> dict[str, str]:
        task = self._rows(cell)
        return {"train": data_digest(task.train, "train"), "test": data_digest(task.test, "test")}

    def _digest(self, cell: Cell) -> str:
        return identity(
            **self.identity,
            **self._digests(cell),
            public=self.public(cell.public)[1],
            seed=cell.seed,
            stage_one=cell.stage_one,
            emulator=cell.emulator,
            tune=cell.tune.model_dump(mode="json", exclude={"checkpoint_every"}),
            limit=cell.test_rows,
        )


def _emulator_facts(emulator: Artifact) -> dict[str, Any]:
    content = emulator_content(emulator.manifest)
    counts = {role: len(list(group)) for role, group in itertools.groupby(sorted(content.layer_map))}
    return {
        "layers": counts,
        "layer_map": content.layer_map,
        "bytes": emulator.nbytes,
        "full_bytes": content.full_bytes,
        "verbatim_share": content.verbatim_share,
        "full_loss": content.full_loss,
        "emulator_loss": content.emulator_loss,
        "loss_margin": content.loss_margin,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

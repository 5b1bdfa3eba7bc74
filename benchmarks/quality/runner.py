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
from benchmarks.quality.measured import score_record
from benchmarks.quality.plan import Budget, Cell
from benchmarks.quality.tasks import prepare, public_text, task_named
from benchmarks.quality.tokens import budget_lines, task_tokens
from scaleot_ray import __version__
from scaleot_ray.artifacts import Artifact, read_artifact
from scaleot_ray.cli.bars import ProgressBars, clock
from scaleot_ray.config import DataSettings, ModelSettings, StageOneSettings, TuneSettings
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import RunFailed
from scaleot_ray.evaluation.score import Score
from scaleot_ray.families.family import text_config
from scaleot_ray.families.loading import BaseModel, load_base_model, model_digest
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.build import build
from scaleot_ray.stages.evaluate import evaluate_rows
from scaleot_ray.stages.identity import data_digest, identity
from scaleot_ray.stages.record import read_record, write_record
from scaleot_ray.stages.tune import tune_emulator

PUBLIC_BLOCK = 128
"""Tokens per sequence of stage 1."""


@dataclass(frozen=True)
class TaskSetup:
    """A task's rows and how they are tuned on; the seed is filled in per cell."""

    train: DataSettings
    test: DataSettings
    tune: TuneSettings
    limit: int


class Quality:
    """One benchmark run.

    Args:
        model: path of the full model.
        data: folder of the tasks' files.
        output: folder of everything that is written: ``cells``, ``full`` (rows of the full model),
            ``emulators``, ``stage_one``, ``data``, ``work``.
        budget: steps and shares.
        examples: test rows or blocks of every task, in place of the tasks' own numbers.
        device: where to compute.
    """

    def __init__(
        self, model: str, data: Path, output: Path, budget: Budget, examples: int | None = None, device: str = "auto"
    ) -> None:
        self.data, self.output, self.budget, self.examples, self.device = data, output, budget, examples, device
        self.public = public_text(data)
        public_digest = data_digest(self.public)  # a missing file shows before the model is loaded
        self.base: BaseModel = load_base_model(ModelSettings(path=model, dtype="float32", device=device))
        self.identity = {
            "version": __version__,
            "model": model_digest(self.base.model),
            "public": public_digest,
            "matmul_precision": torch.get_float32_matmul_precision(),
        }
        self._tasks: dict[str, TaskSetup] = {}

    def task(self, name: str) -> TaskSetup:
        """Rows and settings of a task, prepared at first use."""
        if name not in self._tasks:
            task = task_named(name)
            rows = self.examples or max(1, round(task.test_rows * self.budget.test_share))
            block = self._fitting(task.block_size)
            train, test = prepare(task, self.data, self.output / "data", rows, block)
            tune = TuneSettings(
                steps=self.budget.steps, batch_size=task.batch_size, block_size=block, too_long="truncate"
            )
            self._tasks[name] = TaskSetup(train, test, tune, rows)
        return self._tasks[name]

    def announce(self, cells: Sequence[Cell]) -> None:
        """Prints how many tokens the cells take, on stderr."""
        tokens = {}
        for name in dict.fromkeys(cell.task for cell in cells):
            setup = self.task(name)
            tokens[name] = task_tokens(self.base, setup.train, setup.test, setup.tune, setup.limit)
        stages = {identity(s=self._stage_one(c)): self._stage_one(c) for c in cells if c.variant != "uniform_drop"}
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
            if read_record(path).get("digest") == digest:
                _say(f"{head}: finished before")
                continue
            _say(f"{head}: begins")
            start = time.monotonic()
            try:
                with ProgressBars() as bars:
                    record = self._compute(cell, bars)
            except RunFailed as error:
                _say(f"{head}: failed. {error}")
                failed.append(cell.name)
                continue
            write_record(path, {"digest": digest, **record})
            _say(f"{head}: finished in {clock(time.monotonic() - start)}")
        return failed

    def _compute(self, cell: Cell, on_progress: OnProgress) -> dict[str, Any]:
        setup = self.task(cell.task)
        tune = setup.tune.model_copy(update={"seed": cell.seed})
        seconds: dict[str, float] = {}
        start = time.monotonic()
        emulator = self._emulator(cell, on_progress)
        seconds["build"] = time.monotonic() - start
        rows = self._full_rows(cell, setup, tune, emulator, on_progress)
        # A cell that was interrupted starts over.
        work = self.output / "work" / cell.name
        shutil.rmtree(work, ignore_errors=True)
        tuned = tune_emulator(
            emulator, setup.train, tune, work, name=cell.task, device=self.device, on_progress=on_progress
        )
        seconds["tune"] = tuned.seconds
        start = time.monotonic()
        table = evaluate_rows(
            ("emulator_zero_shot", "emulator_tuned", "plug_in"),
            name=cell.task,
            test=setup.test,
            base=self.base,
            emulator=emulator,
            delta=tuned.delta,
            tune=tune,
            evaluate_examples=setup.limit,
            block_size=tune.block_size,
            device=self.device,
            on_progress=on_progress,
        )
        seconds["evaluate"] = time.monotonic() - start
        shutil.rmtree(work, ignore_errors=True)
        rows |= table.rows
        return {
            "cell": {
                "task": cell.task,
                "seed": cell.seed,
                "variant": cell.variant,
                "plug_in_layers": cell.triplet.plug_in_layers,
                "alpha": cell.triplet.alpha,
                "beta": cell.triplet.beta,
            },
            "of": self.identity,
            "settings": {
                "stage_one": None if cell.variant == "uniform_drop" else self._stage_one(cell).model_dump(mode="json"),
                "tune": tune.model_dump(mode="json"),
                "test_rows": setup.limit,
            },
            "emulator": _emulator_facts(emulator),
            "delta_bytes": tuned.delta.nbytes,
            "seconds": seconds,
            "date": now(),
            "environment": environment() | {"device": str(self.base.model.device)},
            "rows": {name: score_record(score) for name, score in rows.items() if score is not None},
        }

    def _emulator(self, cell: Cell, on_progress: OnProgress) -> Artifact:
        directory = self.output / "emulators" / cell.emulator_name
        build(
            self.base,
            self.public,
            self._stage_one(cell),
            cell.emulator(),
            directory,
            cache=self.output / "stage_one",
            resume=True,
            overwrite=True,
            on_progress=on_progress,
        )
        return read_artifact(directory, expected_kind="emulator")

    def _full_rows(
        self, cell: Cell, setup: TaskSetup, tune: TuneSettings, emulator: Artifact, on_progress: OnProgress
    ) -> dict[str, Score | None]:
        """Rows that no emulator changes: computed once for a task, or for a task, a seed and N_a, and kept."""
        rows: dict[str, Score | None] = {}
        folders = {
            "full_zero_shot": cell.task,
            "full_tuned": f"{cell.task}-seed{cell.seed}-{cell.triplet.plug_in_layers}",
        }
        for row, folder in folders.items():
            rows |= evaluate_rows(
                (row,),
                name=cell.task,
                test=setup.test,
                base=self.base,
                emulator=emulator,  # says which layers are tuned, nothing else
                train=setup.train,
                tune=tune,
                evaluate_examples=setup.limit,
                block_size=tune.block_size,
                device=self.device,
                folder=self.output / "full" / folder,
                on_progress=on_progress,
            ).rows
        return rows

    def _stage_one(self, cell: Cell) -> StageOneSettings:
        return cell.stage_one(self.budget.stage_one_steps, self._fitting(PUBLIC_BLOCK))

    def _fitting(self, block_size: int) -> int:
        context = getattr(text_config(self.base.model.config), "max_position_embeddings", None)
        return min(block_size, context) if context else block_size

    def _digest(self, cell: Cell) -> str:
        setup = self.task(cell.task)
        return identity(
            **self.identity,
            seed=cell.seed,
            stage_one=self._stage_one(cell),
            emulator=cell.emulator(),
            train=data_digest(setup.train),
            test=data_digest(setup.test),
            tune=setup.tune.model_dump(mode="json", exclude={"checkpoint_every"}),
            limit=setup.limit,
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

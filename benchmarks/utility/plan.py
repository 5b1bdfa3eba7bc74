"""A point: settings that differ from this package's defaults, and how many tokens may be spent on each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.utility.cell import Cell
from benchmarks.utility.estimate import tokens_per_step
from benchmarks.utility.runner import CellRunner
from benchmarks.utility.tasks import Task
from scaleot_ray.config import PAPER, EmulatorSettings, StageOneSettings, TuneSettings, override, parse
from scaleot_ray.errors import ConfigError

TASKS = ("python_reference", "wikitext2", "sst2", "banking77", "arc_easy", "openbookqa")
SECTIONS: dict[str, Any] = {"stage_one": StageOneSettings, "emulator": EmulatorSettings, "tune": TuneSettings}


@dataclass(frozen=True)
class Budget:
    """Compute of one point.

    Attributes:
        stage_one_tokens: tokens, public and generated, of the harmonizer steps of stage 1.
        generated_tokens: tokens that the model generates for stage 1 and the fit.
        fit_tokens: tokens, public and generated, that the finished emulator is fitted on.
        tuning_tokens: private tokens of one tuning run, padding included.
        test_share: share of each task's test rows that is measured.
    """

    stage_one_tokens: int
    generated_tokens: int
    fit_tokens: int
    tuning_tokens: int
    test_share: float


BUDGETS = {
    "small": Budget(10_240, 8_192, 16_384, 20_480, 0.3),
    "medium": Budget(10_240, 32_768, 65_536, 51_200, 1.0),  # what the package's defaults spend
    "large": Budget(4_194_304, 262_144, 524_288, 819_200, 1.0),
}


@dataclass(frozen=True)
class Point:
    """Settings under a name.

    Attributes:
        label: names the point in files and tables.
        public: the model owner's public text.
        budget: what may be spent.
        changes: ``section.key=value``, what differs from the defaults, or from the recipe.
        recipe: ``default``, or ``paper`` for the paper's own choices.
        all_layers: also tune every decoder layer of the full model.
    """

    label: str
    public: str
    budget: Budget
    changes: tuple[str, ...] = ()
    recipe: str = "default"
    all_layers: bool = False

    def sections(self) -> dict[str, Any]:
        """The sections ``stage_one``, ``emulator`` and ``tune`` as typed settings.

        Steps and tokens follow from the budget unless a change or the recipe sets them; the steps of ``tune`` are
        filled in per task.

        Raises:
            ConfigError: a change names no key, or its value is not what the key takes.
        """
        recipe = PAPER if self.recipe == "paper" else {}
        values = override({name: dict(recipe.get(name, {})) for name in SECTIONS}, self.changes)
        for name in values:
            if name not in SECTIONS:
                raise ConfigError(f"--set {name}: there is no such section.", f"Take one of {', '.join(SECTIONS)}.")
        found = {name: parse(section, values[name], f"--set {name}") for name, section in SECTIONS.items()}
        stage_one = found["stage_one"]
        if "seed" in stage_one.model_fields_set:
            raise ConfigError("--set stage_one.seed: a point is computed for each of --seeds.", "Give --seeds instead.")
        batch = stage_one.batch_size * stage_one.block_size
        spent = {
            "stage_one": {
                "steps": max(1, self.budget.stage_one_tokens // batch),
                "generated_tokens": self.budget.generated_tokens,
            },
            "emulator": {"fit_tokens": self.budget.fit_tokens},
        }
        for name, tokens in spent.items():
            missing = {key: value for key, value in tokens.items() if key not in found[name].model_fields_set}
            found[name] = found[name].model_copy(update=missing)
        return found

    def cell(self, task: Task, seed: int, runner: CellRunner) -> Cell:
        """The point for one task and seed."""
        found = self.sections()
        stage_one, tune = found["stage_one"], found["tune"]
        rows = max(1, round(task.test_rows * self.budget.test_share))
        defaults = {
            "batch_size": task.batch_size,
            "block_size": runner.fitting(task.block_size),
            "too_long": "truncate",
            "seed": seed,
        }
        missing = {key: value for key, value in defaults.items() if key not in tune.model_fields_set}
        tune = tune.model_copy(update=missing)
        if "steps" not in tune.model_fields_set:
            # Batches of unlike lengths depend on the seed; means over seeds want as many steps of each.
            counted = tune.model_copy(update={"seed": 0})
            per_step = tokens_per_step(runner.base, runner.task(task, rows).train, counted)
            tune = tune.model_copy(update={"steps": max(1, round(self.budget.tuning_tokens / per_step))})
        return Cell(
            task=task.name,
            seed=seed,
            label=self.label,
            emulator_label="current",  # kept from task to task; one for every point would fill a disk
            public=self.public,
            stage_one=stage_one.model_copy(update={"seed": seed, "block_size": runner.fitting(stage_one.block_size)}),
            emulator=found["emulator"],
            tune=tune,
            test_rows=rows,
            all_layers=self.all_layers,
            facts={
                "label": self.label,
                "kind": task.kind,
                "public": self.public,
                "recipe": self.recipe,
                "changes": list(self.changes),
                "budget": vars(self.budget),
            },
        )


def cells(point: Point, tasks: Sequence[Task], seeds: Sequence[int], runner: CellRunner) -> list[Cell]:
    """The point for all tasks and seeds, one seed after the other."""
    return [point.cell(task, seed, runner) for seed in seeds for task in tasks]

"""Which cells there are, and the settings of each: task × seed × triplet × variant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.cells.cell import Cell
from benchmarks.cells.tasks import Task
from scaleot_ray.config import PAPER, EmulatorSettings, StageOneSettings, TuneSettings
from scaleot_ray.errors import ConfigError

TASKS = ("arc_easy", "openbookqa", "sst2", "wikitext2")

STAGE_ONE: dict[str, dict[str, Any]] = {
    "closed_form": {},
    "random_start": {"start": "random"},
    "paper": PAPER["stage_one"],
}
"""The ScaleOT variants, by what differs from this package's defaults in stage 1."""

VARIANTS = (*STAGE_ONE, "uniform_drop")
DEFAULT_VARIANTS = ("closed_form", "random_start", "uniform_drop")


PUBLIC_BLOCK = 128
"""Tokens per sequence of stage 1."""


@dataclass(frozen=True)
class Budget:
    """How much work a cell is.

    Attributes:
        steps: optimizer steps of each tuning run.
        stage_one_steps: harmonizer steps of stage 1.
        generated_tokens: text that the model generates for stage 1 and the fit.
        fit_tokens: public text that the finished emulator is fitted on.
        test_share: share of each task's test rows (``Task.test_rows``) that is evaluated.
    """

    steps: int
    stage_one_steps: int
    generated_tokens: int
    fit_tokens: int
    test_share: float


BUDGETS = {"full": Budget(100, 120, 32_768, 65_536, 1.0), "small": Budget(30, 40, 8_192, 16_384, 0.25)}


@dataclass(frozen=True)
class Triplet:
    """(N_a, α, β): plug-in layers, fraction of the middle layers replaced, rank reduction of the kept ones."""

    plug_in_layers: int
    alpha: float
    beta: float

    @classmethod
    def parse(cls, text: str) -> Triplet:
        """``4,0.5,0.8`` as a triplet.

        Raises:
            ConfigError: it is not three numbers of the right kind.
        """
        try:
            count, alpha, beta = text.split(",")
            return cls(int(count), float(alpha), float(beta))
        except ValueError:
            raise ConfigError(
                f"--settings: {text!r} is no triplet.", "Write plug-in layers, alpha and beta, such as 4,0.5,0.8."
            ) from None

    @property
    def label(self) -> str:
        """Fit for a file name."""
        return f"{self.plug_in_layers}-{self.alpha:g}-{self.beta:g}"

    @property
    def uncompressed(self) -> Triplet:
        """The same with β = 0."""
        return replace(self, beta=0.0)


@dataclass(frozen=True)
class Choice:
    """What one cell is about."""

    task: Task
    seed: int
    variant: str
    triplet: Triplet

    def cell(self, budget: Budget, context: Callable[[int], int], test_rows: int | None = None) -> Cell:
        """The cell with all its settings.

        Args:
            budget: steps and shares.
            context: the block size that the model's context holds, from the one that is wanted.
            test_rows: in place of the budget's share of the task's own.
        """
        label = f"{self.variant}-{self.triplet.label}"
        return Cell(
            task=self.task.name,
            seed=self.seed,
            label=label,
            # Uniform LayerDrop has no randomness, so seeds share it.
            emulator_label=label + ("" if self.variant == "uniform_drop" else f"-seed{self.seed}"),
            public="wikitext2",
            stage_one=self.stage_one(budget, context(PUBLIC_BLOCK)),
            emulator=self.emulator(budget),
            tune=TuneSettings(
                steps=budget.steps,
                batch_size=self.task.batch_size,
                block_size=context(self.task.block_size),
                too_long="truncate",
                seed=self.seed,
            ),
            test_rows=test_rows or max(1, round(self.task.test_rows * budget.test_share)),
            facts={
                "variant": self.variant,
                "plug_in_layers": self.triplet.plug_in_layers,
                "alpha": self.triplet.alpha,
                "beta": self.triplet.beta,
            },
        )

    def stage_one(self, budget: Budget, block_size: int) -> StageOneSettings:
        """Settings of stage 1: ``random_start`` differs from ``closed_form`` in the harmonizers' start alone.

        Uniform LayerDrop has no stage 1; its settings only say on which public text losses are measured.
        """
        if self.variant == "uniform_drop":
            return StageOneSettings(block_size=block_size)
        values = {"steps": budget.stage_one_steps, "generated_tokens": budget.generated_tokens}
        values |= {"block_size": block_size, "seed": self.seed, **STAGE_ONE[self.variant]}
        return StageOneSettings(**values)

    def emulator(self, budget: Budget) -> EmulatorSettings:
        """Settings of the emulator."""
        values: dict[str, Any] = {"fit_tokens": budget.fit_tokens}
        if self.variant == "paper":
            values |= PAPER["emulator"]
        return EmulatorSettings(
            plug_in_layers=self.triplet.plug_in_layers,
            alpha=self.triplet.alpha,
            beta=self.triplet.beta,
            builder="uniform_drop" if self.variant == "uniform_drop" else "scaleot",
            **values,
        )


def choices(
    tasks: Iterable[Task], seeds: Sequence[int], variants: Sequence[str], triplets: Sequence[Triplet]
) -> list[Choice]:
    """All cells, one seed after the other, so that an early end leaves whole seeds.

    Uniform LayerDrop has no rank compression in its own paper: its cells have β = 0 whatever the
    triplet says, and triplets that differ in β alone give one such cell.
    """
    tasks = list(tasks)
    found = [
        Choice(task, seed, variant, triplet.uncompressed if variant == "uniform_drop" else triplet)
        for seed in seeds
        for task in tasks
        for triplet in triplets
        for variant in variants
    ]
    return list({(choice.task.name, choice.seed, choice.variant, choice.triplet): choice for choice in found}.values())

"""Which cells there are, and the settings of each: task × seed × triplet × variant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scaleot_ray.config import EmulatorSettings, StageOneSettings
from scaleot_ray.errors import ConfigError

STAGE_ONE: dict[str, dict[str, Any]] = {
    "closed_form": {},
    "random_start": {"start": "random"},
    "paper": {"start": "random", "score_start": "zero", "objective": "lm"},
}
"""The ScaleOT variants, by what differs from this package's defaults in stage 1."""

VARIANTS = (*STAGE_ONE, "uniform_drop")
DEFAULT_VARIANTS = ("closed_form", "random_start", "uniform_drop")


@dataclass(frozen=True)
class Budget:
    """How much work a cell is.

    Attributes:
        steps: optimizer steps of each tuning run.
        stage_one_steps: harmonizer steps of stage 1.
        test_share: share of each task's test rows (``Task.test_rows``) that is evaluated.
    """

    steps: int
    stage_one_steps: int
    test_share: float


BUDGETS = {"full": Budget(100, 120, 1.0), "small": Budget(30, 40, 0.25)}


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

    def __str__(self) -> str:
        return f"{self.plug_in_layers},{self.alpha:g},{self.beta:g}"


@dataclass(frozen=True)
class Cell:
    """One emulator, tuned for one task with one seed."""

    task: str
    seed: int
    variant: str
    triplet: Triplet

    @property
    def name(self) -> str:
        """Unique, and fit for a file name."""
        return f"{self.task}-seed{self.seed}-{self.variant}-{str(self.triplet).replace(',', '-')}"

    def stage_one(self, steps: int, block_size: int) -> StageOneSettings:
        """Settings of stage 1: ``random_start`` differs from ``closed_form`` in the harmonizers' start alone.

        Uniform LayerDrop has no stage 1; its settings only say on which public text losses are measured.
        """
        if self.variant == "uniform_drop":
            return StageOneSettings(block_size=block_size)
        return StageOneSettings(steps=steps, block_size=block_size, seed=self.seed, **STAGE_ONE[self.variant])

    def emulator(self) -> EmulatorSettings:
        """Settings of the emulator."""
        return EmulatorSettings(
            plug_in_layers=self.triplet.plug_in_layers,
            alpha=self.triplet.alpha,
            beta=self.triplet.beta,
            compression="svd" if self.variant == "paper" else "activation_aware",
            builder="uniform_drop" if self.variant == "uniform_drop" else "scaleot",
        )

    @property
    def emulator_name(self) -> str:
        """Of the emulator alone, which tasks share; uniform LayerDrop has no randomness, so seeds share it too."""
        triplet = str(self.triplet).replace(",", "-")
        return f"{self.variant}-{triplet}" + ("" if self.variant == "uniform_drop" else f"-seed{self.seed}")


def cells(
    tasks: Iterable[str], seeds: Sequence[int], variants: Sequence[str], triplets: Sequence[Triplet]
) -> Iterator[Cell]:
    """All cells, one seed after the other, so that an early end leaves whole seeds.

    Uniform LayerDrop has no rank compression in its own paper: its cells have β = 0 whatever the
    triplet says, and triplets that differ in β alone give one such cell.
    """
    seen = set()
    tasks = list(tasks)
    for seed in seeds:
        for task in tasks:
            for triplet in triplets:
                for variant in variants:
                    beta = 0.0 if variant == "uniform_drop" else triplet.beta
                    cell = Cell(task, seed, variant, Triplet(triplet.plug_in_layers, triplet.alpha, beta))
                    if cell not in seen:
                        seen.add(cell)
                        yield cell

"""One cell: everything that decides its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from scaleot_ray.config import EmulatorSettings, StageOneSettings, TuneSettings


@dataclass(frozen=True)
class Cell:
    """One emulator, tuned for one task with one seed.

    Attributes:
        task: name of the task.
        seed: of tuning, and of stage 1 where there is one.
        label: with task and seed unique in a folder of cells, and fit for a file name.
        emulator_label: the same for the emulator alone, which tasks and ways of tuning share.
        public: name of the model owner's public text.
        stage_one: settings of stage 1; builders without one only measure losses on its public text.
        emulator: settings of the emulator.
        tune: settings of the tuning, on the emulator and on the full model.
        test_rows: test rows, or blocks of text, that are measured.
        all_layers: also tune every decoder layer of the full model.
        facts: what a summary groups cells by, beside task and seed.
    """

    task: str
    seed: int
    label: str
    emulator_label: str
    public: str
    stage_one: StageOneSettings
    emulator: EmulatorSettings
    tune: TuneSettings
    test_rows: int
    all_layers: bool = field(default=False, compare=False)
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.task}-seed{self.seed}-{self.label}"

    @property
    def trains_harmonizers(self) -> bool:
        """Whether its emulator needs a stage 1."""
        return self.emulator.builder == "scaleot"

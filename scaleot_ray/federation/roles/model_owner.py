"""The model owner's actor: it alone loads the full model for the build, and leaves the emulator on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import DataSettings, EmulatorSettings, ModelSettings, StageOneSettings
from scaleot_ray.federation.roles.coordinator import MODEL_OWNER
from scaleot_ray.federation.roles.object_store import Shared, to_shared
from scaleot_ray.federation.roles.role import Role
from scaleot_ray.stages.build import BuildResult, build


@dataclass(frozen=True)
class OwnerSections:
    """The sections of a run's settings that the model owner's actor is told: nothing of any tenant's."""

    model: ModelSettings
    public: DataSettings
    stage_one: StageOneSettings
    emulator: EmulatorSettings


@ray.remote
class ModelOwner(Role):
    """Builds the emulator of a run.

    Args:
        cpus: threads it computes with.
        coordinator: hears of progress.
        sections: its own settings.
        cache: folder of stage-1 results, which stay with the owner.
    """

    def __init__(self, cpus: int, coordinator: Any, sections: OwnerSections, cache: str) -> None:
        super().__init__(MODEL_OWNER, cpus, coordinator)
        self._sections, self._cache = sections, Path(cache)

    def build(self, directory: str) -> BuildResult:
        """Builds the emulator at ``directory``, or finds it there from an earlier run with the same settings."""
        sections = self._sections
        return build(
            sections.model,
            sections.public,
            sections.stage_one,
            sections.emulator,
            Path(directory),
            cache=self._cache,
            resume=True,
            overwrite=True,
            on_progress=self.reporter(),
        )

    def emulator(self, directory: str) -> Shared:
        """The emulator at ``directory``, for a coordinator on another node."""
        return to_shared(read_artifact(Path(directory), expected_kind="emulator"))

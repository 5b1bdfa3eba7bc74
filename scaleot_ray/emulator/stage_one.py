"""What stage 1 leaves behind: harmonizers, layer scores and how they came about, on disk.

The result never leaves the model owner. One result serves every emulator of the model: any number of
plug-in layers, any fraction replaced, any rank reduction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from scaleot_ray.checkpoints import read_header, read_state, write_state
from scaleot_ray.config import StageOneSettings
from scaleot_ray.errors import NO_ROOM, ResourcesMissing, RunFailed

Moments = dict[int, dict[str, torch.Tensor]]

_UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError)


@dataclass
class StageOne:
    """Result of stage 1, or its state after some steps.

    Attributes:
        settings: what it was made with.
        scores: importance of each layer that has a harmonizer; higher means more important.
        harmonizers: state of each harmonizer, by layer: ``down.weight`` (r, d), ``down.bias`` (r,),
            ``up.weight`` (d, r), ``up.bias`` (d,).
        fit: R² of the closed-form start per layer (empty for the random start).
        history: one record a step: losses of harmonizer steps, candidate losses of score steps.
        step: harmonizer steps done.
        scored: whether the scores have had their start; False between calibration and the end of layer damage.
        moments: second moments of attention inputs, see :class:`~.calibration.Calibration`; kept in a
            file of their own next to the result, since they are large and never change.
        leader: which projection's moment serves each attention projection.
    """

    settings: StageOneSettings
    scores: dict[int, float]
    harmonizers: dict[int, dict[str, torch.Tensor]]
    fit: dict[int, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    scored: bool = True
    moments: Moments = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)

    def moment(self, index: int, path: str) -> torch.Tensor | None:
        """Second moment (in, in) of an attention projection's input, by layer and path; None if not watched."""
        return self.moments[index][self.leader[path]] if index in self.moments else None

    def least_important(self, among: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The ``count`` layers of lowest score among the given positions, in order of depth."""
        known = sorted(
            (index for index in among if index in self.scores), key=lambda index: (self.scores[index], index)
        )
        return tuple(sorted(known[:count]))

    def save(self, path: Path, extra: dict[str, torch.Tensor] | None = None, with_moments: bool = True) -> None:
        """Writes the state atomically: tensors, and everything else as JSON in the header.

        Args:
            extra: further tensors (optimizer state) under names that begin with ``optimizer.``.
            with_moments: write the moments' own file too, and first: a state without it is never seen.

        Raises:
            ResourcesMissing: the disk is full; an earlier file is still there.
            RunFailed: the file cannot be written for another reason.
        """
        tensors = {
            f"{index}.{name}": value for index, state in self.harmonizers.items() for name, value in state.items()
        }
        record = {
            "settings": self.settings.model_dump(),
            "scores": self.scores,
            "fit": self.fit,
            "history": self.history,
            "step": self.step,
            "scored": self.scored,
        }
        if with_moments:
            flat = {f"{index}:{name}": value for index, layer in self.moments.items() for name, value in layer.items()}
            _write(_moments_file(path), flat, "leader", json.dumps(self.leader))
        _write(path, tensors | (extra or {}), "stage_one", json.dumps(record))

    @classmethod
    def load(cls, path: Path, with_moments: bool = True) -> tuple[StageOne, dict[str, torch.Tensor]]:
        """A saved state and the further tensors that were saved with it.

        Args:
            with_moments: read the moments too; else there are none.

        Raises:
            RunFailed: the file is not a stage-1 result or is damaged.
        """
        try:
            tensors, text = read_state(path, "stage_one")
            record = json.loads(text)
        except _UNREADABLE as error:
            # Hours may be in it, and there may be a copy: what to do is not ours to decide.
            raise RunFailed(
                f"{path}: is no readable stage-1 result ({error}).",
                "Put back a copy of it, or delete it; stage 1 then starts afresh.",
            ) from error
        harmonizers: dict[int, dict[str, torch.Tensor]] = {}
        extra: dict[str, torch.Tensor] = {}
        for name, value in tensors.items():
            index, _, inner = name.partition(".")
            if index.isdigit():
                harmonizers.setdefault(int(index), {})[inner] = value
            else:
                extra[name] = value
        moments, leader = load_moments(path) if with_moments else ({}, {})
        result = cls(
            settings=StageOneSettings(**record["settings"]),
            scores={int(index): score for index, score in record["scores"].items()},
            harmonizers=harmonizers,
            fit={int(index): value for index, value in record["fit"].items()},
            history=record["history"],
            step=record["step"],
            scored=record.get("scored", True),
            moments=moments,
            leader=leader,
        )
        return result, extra


def steps_done(path: Path) -> int | None:
    """Steps of the saved state at ``path``, from its header; None where none can be read that is ready for steps."""
    try:
        record = json.loads(read_header(path, "stage_one"))
        return int(record["step"]) if record.get("scored", True) else None
    except _UNREADABLE:
        return None


def load_moments(path: Path) -> tuple[Moments, dict[str, str]]:
    """Moments and leaders that were saved with the state at ``path``.

    Raises:
        RunFailed: their file is missing or damaged.
    """
    file = _moments_file(path)
    try:
        flat, text = read_state(file, "leader")
        leader = json.loads(text)
    except _UNREADABLE as error:
        raise RunFailed(
            f"{file}: holds no readable moments ({error}).", "Delete it; building again takes them anew."
        ) from error
    moments: Moments = {}
    for name, value in flat.items():
        index, _, projection = name.partition(":")
        moments.setdefault(int(index), {})[projection] = value
    return moments, leader


def _moments_file(path: Path) -> Path:
    return path.with_suffix(".moments.safetensors")


def _write(path: Path, tensors: dict[str, torch.Tensor], key: str, text: str) -> None:
    try:
        write_state(path, tensors, key, text)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise ResourcesMissing(
                f"{path}: no room to write stage 1 ({error}).",
                "Free disk space and run the same command again; it goes on from what was written before.",
            ) from error
        raise RunFailed(
            f"{path}: stage 1 could not be saved ({error}).", "Give a cache folder that can be written."
        ) from error

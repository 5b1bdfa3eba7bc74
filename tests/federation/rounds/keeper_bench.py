"""A keeper of rounds in a folder, and what its data owners send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.config import RoundSettings
from scaleot_ray.federation.rounds.intake import Sent
from scaleot_ray.federation.rounds.registry import Submission
from scaleot_ray.federation.rounds.round_keeper import RoundKeeper
from tests.federation.rounds.tiny_deltas import TinyDeltas

NAMES = ["ann", "ben", "cas"]


class Bench:
    """A keeper in a folder, which can be given up for a new one, and what its data owners send."""

    def __init__(self, tiny: TinyDeltas, folder: Path, **settings: Any) -> None:
        self.tiny, self.folder, self.tokens = tiny, folder, dict[str, str]()
        self.audit = AuditLog(folder / "audit.jsonl")
        self.settings: dict[str, Any] = {"rounds": RoundSettings(), "aggregation": None, "weights": {}}
        self.keeper = self.new(**settings)

    def new(self, **settings: Any) -> RoundKeeper:
        """The keeper that comes after the one that is, as after a crash."""
        self.settings |= settings
        emulator = self.tiny.emulator.manifest
        self.keeper = RoundKeeper(
            emulator, self.folder, self.folder / "c", self.folder / "r", self.audit, **self.settings
        )
        return self.keeper

    def begin(self, names: list[str] = NAMES) -> int:
        for name in names:
            token = self.keeper.admit(name, {})
            assert token is not None
            self.tokens[name] = token
        found = self.keeper.begin(names)
        assert found is not None
        return found.number

    def send(self, name: str, number: int, delta: Any, **changes: Any) -> Submission:
        """Sends what :meth:`sent` gives, in a round that is open."""
        taken = self.keeper.take(self.sent(name, number, delta, **changes))
        assert taken is not None
        return taken

    def sent(self, name: str, number: int, delta: Any, **changes: Any) -> Sent:
        """``delta``: an artefact, what gives one, or the value of one that was tuned as it should be."""
        start = changes.pop("start") if "start" in changes else self.keeper.registry.rounds.get(number).start
        artifact = self.tiny.delta(delta, start) if isinstance(delta, float) else delta
        values = {
            "tenant": name,
            "token": self.tokens.get(name, ""),
            "round": number,
            "delta": artifact if callable(artifact) else lambda: artifact,
            "metrics": self.tiny.metrics,
        }
        return Sent(**{**values, **changes})

    def value(self, name: str) -> float:
        """The single value of a plug-in in force."""
        found = self.keeper.registry.plug_ins.in_force(name)
        assert found is not None
        tensors = self.keeper.delta(found.digest, "someone").tensors.values()
        (value,) = {round(float(one), 6) for tensor in tensors for one in tensor.flatten().unique()}
        return value

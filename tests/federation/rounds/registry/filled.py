"""A registry with an emulator and data owners."""

from __future__ import annotations

from pathlib import Path

from scaleot_ray.federation.rounds.registry import NewSubmission, Registry
from tests.artifacts.examples import emulator

EMULATOR = emulator().manifest


class Clock:
    """A clock that stands until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def filled(path: Path, names: str = "ann ben cas", clock: Clock | None = None) -> Registry:
    """A registry at ``path`` that knows an emulator and admitted data owners of these names."""
    registry = Registry(path, clock=clock or Clock())
    registry.add_emulator(EMULATOR, path.parent / "emulator")
    for name in names.split():
        registry.tenants.admit(name, {})
    return registry


def delta_of(tenant: str, number: int = 1, digest: str | None = None, weight: float = 1.0) -> NewSubmission:
    """What a data owner submits in a round."""
    digest = digest or f"{tenant}{number}".encode().hex().ljust(64, "0")
    return NewSubmission(tenant, number, digest, f"deltas/{digest}", 1000, 0.5, weight, {"loss": 2.0}, "e" * 64)

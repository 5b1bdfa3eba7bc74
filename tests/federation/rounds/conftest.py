"""The emulator that all tests of rounds share, and a keeper on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.federation.rounds.keeper_bench import Bench
from tests.federation.rounds.tiny_deltas import TinyDeltas


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDeltas:
    """An emulator; nobody writes to its folder."""
    return TinyDeltas.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def bench(tiny: TinyDeltas, tmp_path: Path) -> Bench:
    """A keeper in a folder of its own."""
    return Bench(tiny, tmp_path)

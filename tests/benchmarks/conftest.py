"""A tiny model and tiny data for the benchmarks made of cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.tiny_data import write_tiny_data
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``data``, shared by the tests of a file."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model")
    write_tiny_data(folder / "data")
    return folder

"""Small records: written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaleot_ray.errors import ConfigError, ResourcesMissing
from scaleot_ray.stages.record import read_record, write_record
from tests.full_disk import largest_file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    assert read_record(path) == {}
    write_record(path, {"key": "é", "sums": [1.5]})
    assert read_record(path) == {"key": "é", "sums": [1.5]}
    path.write_text("[1]")
    assert read_record(path) == {}


def test_a_full_disk_leaves_the_earlier_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, {"key": "first"})
    with largest_file(1000), pytest.raises(ResourcesMissing, match="no room to write it") as caught:
        write_record(path, {"key": "x" * 2000})
    assert isinstance(caught.value.__cause__, OSError)
    assert read_record(path) == {"key": "first"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_not_called_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        write_record(tmp_path / "file" / "record.json", {"key": 1})
    assert "Give a folder that can be written" in caught.value.remedy

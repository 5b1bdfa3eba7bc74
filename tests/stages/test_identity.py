"""The key of a data owner's digests."""

from __future__ import annotations

from pathlib import Path

from scaleot_ray.config import DataSettings
from scaleot_ray.stages.identity import KEY_FILE, keyed_digest


def test_the_key_is_made_once_and_a_damaged_one_anew(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    settings = DataSettings(path=str(rows))
    first = keyed_digest(settings, tmp_path / "own")
    assert keyed_digest(settings, tmp_path / "own") == first
    assert keyed_digest(settings, tmp_path / "another") != first
    key = tmp_path / "own" / KEY_FILE
    assert (len(key.read_bytes()), key.stat().st_mode & 0o777) == (32, 0o600)
    key.write_bytes(b"")  # after a power loss: with it, anybody could make the digest of rows that he guesses
    again = keyed_digest(settings, tmp_path / "own")
    assert again != first
    assert len(key.read_bytes()) == 32
    assert [path.name for path in key.parent.iterdir()] == [KEY_FILE]

"""When checkpoints are written, and that damage to them is seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from scaleot_ray.checkpoints import CheckpointPace, read_header, read_state, write_state

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_due_every_so_many_steps_and_every_minute() -> None:
    clock = Clock()
    pace = CheckpointPace(50, clock)
    assert [step for step in range(1, 151) if pace.due(step)] == [50, 100, 150]
    clock.now += 59
    assert not pace.due(7)
    clock.now += 1
    assert pace.due(7)
    pace.write(lambda: None)
    assert not pace.due(8)
    assert pace.due(50)


def test_slow_writing_takes_a_twentieth_of_the_time_at_most() -> None:
    clock = Clock()
    pace = CheckpointPace(50, clock)

    def slowly() -> None:
        clock.now += 10

    pace.write(slowly)
    clock.now += 199
    assert not pace.due(1)
    clock.now += 1
    assert pace.due(1)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_state(tmp_path / "new" / "state", TENSORS, "kind", "text")
    tensors, text = read_state(tmp_path / "new" / "state", "kind")
    assert text == read_header(tmp_path / "new" / "state", "kind") == "text"
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state"]


def test_what_is_written_outlives_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, really = list[str](), os.fsync

    def fsync(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}") + (" named" if (tmp_path / "state").exists() else ""))
        really(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_state(tmp_path / "state", TENSORS, "kind", "text")
    assert flushed == [f"{tmp_path}/.state.{os.getpid()}", f"{tmp_path} named"]


def test_every_flipped_bit_and_every_missing_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, TENSORS, "kind", "some text")
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))]
    for place in range(len(whole)):
        damaged += [whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :] for bit in range(8)]
    unseen = []
    for data in damaged:
        path.write_bytes(data)
        try:
            tensors, text = read_state(path, "kind")
        except (SafetensorError, OSError, ValueError, KeyError):
            continue
        unseen.append((tensors, text))
    # Spaces that fill the header up may become other white space; that changes nothing.
    for tensors, text in unseen:
        assert text == "some text"
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert len(unseen) < 50

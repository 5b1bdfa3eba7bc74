"""A run's folder: one run at a time, nothing half-written stays."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.folder import FolderHeld, RunFolder


def test_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with first.held(), pytest.raises(ConfigError, match="another run is working"), second.held():
        pass
    with RunFolder(tmp_path / "run").held():
        pass


def test_whoever_looks_is_no_other_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path).held():
        pass
    handle = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as is_held does, but for longer
    threading.Timer(0.05, os.close, (handle,)).start()
    with RunFolder(tmp_path).held():
        assert RunFolder(tmp_path).is_held()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(ConfigError, match=f"cannot be locked .*{os.strerror(number)}") as caught,
        RunFolder(tmp_path).held(),
    ):
        pass
    assert not isinstance(caught.value, FolderHeld)
    assert "mounted with locks" in caught.value.remedy
    assert not RunFolder(tmp_path).is_held()


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path) -> None:
    keep = [tmp_path / "emulator" / "manifest.json", tmp_path / ".hidden", tmp_path / "tenants" / "a.1" / "tune.json"]
    gone = [
        tmp_path / ".scaleot-0a1b2c3d.partial" / "manifest.json",
        tmp_path / "tenants" / ".scaleot-0a1b2c3d.replaced" / "manifest.json",
        tmp_path / "model_owner" / ".stage_one.safetensors.4711",
    ]
    for path in [*keep, *gone]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    with RunFolder(tmp_path).held():
        assert all(path.exists() for path in keep)
        assert not any(path.exists() for path in gone)
        assert not (tmp_path / ".scaleot-0a1b2c3d.partial").exists()


def test_other_hidden_files_of_the_user_stay(tmp_path: Path) -> None:
    theirs = [tmp_path / ".venv-3.11" / "x", tmp_path / ".bashrc.20240101", tmp_path / "docs" / ".a.json.12"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    with RunFolder(tmp_path).held():
        assert all(path.exists() for path in theirs)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConfigError, match=r"output: .*file/run cannot be written"),
        RunFolder(tmp_path / "file/run").held(),
    ):
        pass

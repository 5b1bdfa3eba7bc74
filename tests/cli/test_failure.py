"""Exceptions become a problem, a remedy and an exit code."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from scaleot_ray.cli.failure import explain
from scaleot_ray.errors import (
    ArtifactRefused,
    ConfigError,
    DataError,
    Interrupted,
    ResourcesMissing,
    RunFailed,
    ScaleOTError,
    UnsupportedArchitectureError,
)
from tests.full_disk import largest_file


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ConfigError, 2),
        (DataError, 2),
        (UnsupportedArchitectureError, 2),
        (ArtifactRefused, 3),
        (ResourcesMissing, 4),
        (RunFailed, 5),
        (Interrupted, 130),
    ],
)
def test_own_errors_keep_their_words(kind: type[ScaleOTError], code: int) -> None:
    failure = explain(kind("the problem.", "The remedy."))
    assert (failure.code, failure.type) == (code, kind.__name__)
    assert failure.as_text() == "error: the problem.\n  → The remedy."
    assert failure.as_json() == {
        "error": {"code": code, "type": kind.__name__, "message": "the problem.", "remedy": "The remedy."}
    }


def test_a_subclass_made_elsewhere_is_named_by_its_base() -> None:
    # Ray raises RayTaskError(DataError): a class of its own making that is also ours.
    made = type("RayTaskError(DataError)", (DataError,), {})
    assert explain(made("p.", "r.")).type == "DataError"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_missing_resource(number: int) -> None:
    failure = explain(OSError(number, os.strerror(number), "out/tensors.safetensors"))
    assert (failure.code, failure.type) == (4, "ResourcesMissing")
    assert failure.message == f"the disk is full while writing out/tensors.safetensors ({os.strerror(number)})."


def test_out_of_memory_is_a_missing_resource() -> None:
    import torch

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")):
        failure = explain(error)
        assert (failure.code, failure.type) == (4, "ResourcesMissing")
        assert "batch_size" in failure.remedy


def test_the_unexpected_leaves_its_trace_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        {}["absent"]
    except KeyError as error:
        failure = explain(error)
    (file,) = tmp_path.iterdir()
    assert failure.code == 5
    assert failure.message == "unexpected KeyError: 'absent'"
    assert str(file) in failure.remedy
    assert "Traceback" in file.read_text()
    assert "Traceback" not in failure.as_text()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_trace_follows_no_link_that_somebody_laid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (tmp_path / f"scaleot-error-20260101-000000-{os.getpid()}.txt").symlink_to(mine)
    failure = explain(KeyError("absent"))
    (written,) = [path for path in tmp_path.glob("scaleot-error-*") if not path.is_symlink()]
    assert str(written) in failure.remedy
    assert mine.read_text() == "mine"


def test_where_no_trace_can_be_written_the_error_is_still_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    failure = explain(KeyError("absent"))
    assert (failure.code, failure.message) == (5, "unexpected KeyError: 'absent'")
    assert "could not be written; --debug shows it" in failure.remedy
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with largest_file(10):
        assert "could not be written" in explain(KeyError("absent")).remedy
    assert list(tmp_path.iterdir()) == []

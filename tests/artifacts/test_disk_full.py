"""A disk that is full, for real: the errors come from the operating system."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from scaleot_ray.artifacts import Artifact, DeltaContent, read_artifact, write_artifact
from scaleot_ray.errors import ResourcesMissing
from tests.artifacts.examples import small


@pytest.fixture
def tiny_disk(tmp_path):
    """Mounts a file system of a few hundred kilobytes; skips where we may not."""
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system needs privileges")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def _large(kilobytes: int) -> Artifact:
    tensors = {f"t{index}": torch.ones(256) for index in range(kilobytes)}
    return Artifact.create("delta", DeltaContent(method="layers", positions=[0]), tensors)


def test_too_little_room_is_seen_before_writing(tiny_disk):
    disk = tiny_disk("size=200k")
    artifact = _large(400)
    with pytest.raises(ResourcesMissing) as caught:
        write_artifact(artifact, disk / "a")
    free = shutil.disk_usage(disk).free
    assert f"{free} bytes free" in caught.value.problem
    needed = int(caught.value.problem.split("needs ")[1].split(" bytes")[0])
    assert artifact.nbytes < needed < artifact.nbytes + 200_000
    assert os.listdir(disk) == []


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("overwrite", [False, True])
def test_disk_that_fills_while_writing_leaves_nothing(tiny_disk, monkeypatch, overwrite):
    disk = tiny_disk("size=200k")
    if overwrite:
        write_artifact(small(), disk / "a")
    before = sorted(os.listdir(disk))
    # Another process takes the room between the look at it and the writing.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 0, 2**30))
    with pytest.raises(ResourcesMissing) as caught:
        write_artifact(_large(400), disk / "a", overwrite)
    assert isinstance(caught.value.__cause__, OSError)
    assert sorted(os.listdir(disk)) == before
    if overwrite:
        assert read_artifact(disk / "a").digest == small().digest


def test_no_files_left_on_the_disk(tiny_disk):
    # Room for bytes, but not for the names of all files.
    disk = tiny_disk("size=1m,nr_inodes=4")
    with pytest.raises(ResourcesMissing):
        write_artifact(small(), disk / "a")
    assert os.listdir(disk) == []


PROGRAM = """
import resource, sys
from scaleot_ray.artifacts import write_artifact
from scaleot_ray.errors import ResourcesMissing
from tests.artifacts.test_disk_full import _large
artifact = _large(400)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_artifact(artifact, sys.argv[1], overwrite=True)
except ResourcesMissing as error:
    assert isinstance(error.__cause__, OSError)
    sys.exit(error.exit_code)
"""


def test_file_size_limit_leaves_what_was_there(tmp_path):
    # Needs no privileges, so that a write which fails half-way is tested on every machine.
    write_artifact(small(), tmp_path / "a")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "a")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == ResourcesMissing.exit_code, done.stderr
    assert os.listdir(tmp_path) == ["a"]
    assert read_artifact(tmp_path / "a").digest == small().digest

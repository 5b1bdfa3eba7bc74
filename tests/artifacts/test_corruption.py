"""No byte of a written artefact can change unnoticed."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleot_ray.artifacts import Artifact, read_artifact, write_artifact
from scaleot_ray.errors import ArtifactRefused
from tests.artifacts.examples import small


@pytest.fixture(scope="module")
def written():
    folder = tempfile.mkdtemp()
    artifact = small()
    split = Artifact.create("delta", artifact.manifest.content, artifact.tensors, artifact.files, shard_bytes=48)
    yield write_artifact(split, Path(folder) / "artefact")
    shutil.rmtree(folder)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@settings(deadline=None, max_examples=500)
@given(place=st.floats(0, 1, exclude_max=True), which=st.integers(0, 6), flip=st.integers(1, 255))
def test_any_flipped_byte_is_refused(written, place, which, flip):
    files = _files(written)
    path = files[which % len(files)]
    whole = path.read_bytes()
    data = bytearray(whole)
    data[int(place * len(data))] ^= flip
    path.write_bytes(data)
    try:
        with pytest.raises(ArtifactRefused):
            read_artifact(written)
    finally:
        path.write_bytes(whole)
    read_artifact(written)


def test_white_space_that_json_does_not_see_counts(written):
    for path in _files(written):
        whole = path.read_bytes()
        for place in (place for place, byte in enumerate(whole) if byte in b" \n"):
            path.write_bytes(whole[:place] + b"\t" + whole[place + 1 :])
            with pytest.raises(ArtifactRefused):
                read_artifact(written)
        path.write_bytes(whole)
    read_artifact(written)


@settings(deadline=None, max_examples=100)
@given(place=st.floats(0, 1, exclude_max=True), which=st.integers(0, 6), insert=st.binary(min_size=1, max_size=9))
def test_inserted_and_removed_bytes_are_refused(written, place, which, insert):
    files = _files(written)
    path = files[which % len(files)]
    whole = path.read_bytes()
    start = int(place * len(whole))
    try:
        for data in (whole[:start] + insert + whole[start:], whole[:start] + whole[start + len(insert) :]):
            if data != whole:
                path.write_bytes(data)
                with pytest.raises(ArtifactRefused):
                    read_artifact(written)
    finally:
        path.write_bytes(whole)

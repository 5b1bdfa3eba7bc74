"""Reading an artefact's tensors piece by piece gives the same values, and refuses the same damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaleot_ray.artifacts import Artifact, write_artifact
from scaleot_ray.artifacts.piecewise import StoredArtifact
from scaleot_ray.errors import ArtifactRefused
from tests.artifacts.examples import small


@pytest.fixture
def written(tmp_path: Path) -> Path:
    artifact = small()
    split = Artifact.create("delta", artifact.manifest.content, artifact.tensors, artifact.files, shard_bytes=48)
    return write_artifact(split, tmp_path / "artefact")


@pytest.mark.parametrize("values", [1, 3, 5, 12, 100])
def test_pieces_together_are_the_tensor(written: Path, values: int) -> None:
    stored = StoredArtifact(written)
    for name, tensor in small().tensors.items():
        pieces = list(stored.pieces(name, values))
        assert all(0 < len(piece) <= values for piece in pieces) or tensor.numel() == 0
        assert torch.equal(torch.cat(pieces).reshape(tensor.shape), tensor)
        assert pieces[0].dtype == tensor.dtype


def test_a_changed_value_is_refused_at_the_last_piece(written: Path) -> None:
    stored = StoredArtifact(written)
    file = written / stored.manifest.tensors["a.weight"].file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    last = [name for name, entry in stored.manifest.tensors.items() if entry.file == file.name][-1]
    pieces = stored.pieces(last, 4)
    with pytest.raises(ArtifactRefused, match=f"{written}: tensor '{last}' was altered"):
        list(pieces)


def test_a_file_that_is_truncated_meanwhile_is_refused(written: Path) -> None:
    stored = StoredArtifact(written)
    file = written / stored.manifest.tensors["a.weight"].file
    pieces = stored.pieces("a.weight", 2)
    next(pieces)
    file.write_bytes(file.read_bytes()[:-48])
    with pytest.raises(ArtifactRefused, match=r"truncated within tensor 'a\.weight'"):
        list(pieces)


def test_damage_shows_before_anything_is_read(written: Path) -> None:
    file = written / StoredArtifact(written).manifest.tensors["b.weight"].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ArtifactRefused, match="truncated"):
        StoredArtifact(written)
    file.write_bytes(whole)
    (written / "extra.txt").write_text("x")
    with pytest.raises(ArtifactRefused, match=r"extra\.txt"):
        StoredArtifact(written)

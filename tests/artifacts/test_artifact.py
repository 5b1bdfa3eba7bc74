import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaleot_ray.artifacts import Artifact, DeltaContent, EmulatorContent
from scaleot_ray.artifacts.raw_bytes import DTYPES, fingerprint, raw_bytes
from scaleot_ray.errors import ArtifactRefused
from tests.artifacts.examples import emulator, small

CONTENT = DeltaContent(method="layers", positions=[0])


def test_sha256_is_that_of_the_little_endian_values():
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    entry = Artifact.create("delta", CONTENT, {"a": torch.from_numpy(values)}).manifest.tensors["a"]
    assert entry.sha256 == hashlib.sha256(values.tobytes()).hexdigest()
    assert (entry.dtype, entry.shape, entry.nbytes) == ("float32", [2, 3], 24)


@pytest.mark.parametrize("name", DTYPES)
def test_raw_bytes_are_not_copied(name):
    tensor = torch.ones(5, dtype=DTYPES[name])
    assert raw_bytes(tensor).ctypes.data == tensor.data_ptr()
    assert raw_bytes(tensor).size == tensor.nbytes


def test_contiguous_tensors_are_not_copied_and_others_made_contiguous():
    tensor = torch.randn(3, 4)
    artifact = Artifact.create("delta", CONTENT, {"a": tensor, "b": tensor.t()})
    assert artifact.tensors["a"].data_ptr() == tensor.data_ptr()
    assert artifact.tensors["b"].is_contiguous()
    assert torch.equal(artifact.tensors["b"], tensor.t())
    artifact.verify()


@given(
    position=st.integers(0, 600_000),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_one_value_that_is_not_finite_is_found(position, bad, dtype):
    tensor = torch.ones(600_001, dtype=dtype)  # more than two pieces of the fingerprint
    assert fingerprint(tensor)[1]
    tensor[position] = bad
    assert not fingerprint(tensor)[1]


def test_fingerprint_in_pieces_is_that_of_the_whole():
    tensor = torch.randn(600_001)
    assert fingerprint(tensor)[0] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.tensor([1.0, float("nan")]), "finite"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, dtype=torch.bool), "bool"),
        (torch.empty(2, device="meta"), "no plain data"),
        (torch.eye(2).to_sparse(), "no plain data"),
    ],
)
def test_tensors_that_artefacts_do_not_carry(tensor, why):
    with pytest.raises(ArtifactRefused, match=f"'the.one'.*{why}"):
        Artifact.create("delta", CONTENT, {"the.one": tensor})


def _drop(artifact):
    del artifact.tensors["a.weight"]


def _add(artifact):
    artifact.tensors["stowaway"] = torch.zeros(1)


def _reshape(artifact):
    artifact.tensors["a.weight"] = artifact.tensors["a.weight"].reshape(4, 3)


def _retype(artifact):
    artifact.tensors["a.weight"] = artifact.tensors["a.weight"].double()


def _retype_same_width(artifact):
    artifact.tensors["b.weight"] = artifact.tensors["b.weight"].view(torch.float16)


def _alter(artifact):
    artifact.tensors["a.weight"][0, 0] += 1


def _break(artifact):
    artifact.tensors["a.weight"][0, 0] = float("inf")


def _alter_scalar(artifact):
    artifact.tensors["c.count"] = torch.tensor(8)


def _drop_file(artifact):
    del artifact.files["README.md"]


def _add_file(artifact):
    artifact.files["stowaway.txt"] = b""


def _alter_file(artifact):
    artifact.files["README.md"] = b"# cart\n"


def _lengthen_file(artifact):
    artifact.files["README.md"] += b"\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"tensor 'a\.weight' is missing"),
        (_add, "tensor 'stowaway' is extra"),
        (_reshape, r"tensor 'a\.weight' has shape \[4, 3\], expected \[3, 4\]"),
        (_retype, r"tensor 'a\.weight' has type float64, expected float32"),
        (_retype_same_width, r"tensor 'b\.weight' has type float16"),
        (_alter, r"tensor 'a\.weight' was altered"),
        (_break, r"tensor 'a\.weight' has values that are not finite"),
        (_alter_scalar, r"tensor 'c\.count' was altered"),
        (_drop_file, r"file 'README\.md' is missing"),
        (_add_file, r"file 'stowaway\.txt' is extra"),
        (_alter_file, r"file 'README\.md' was altered"),
        (_lengthen_file, r"file 'README\.md' has 8 bytes"),
    ],
)
def test_verify_names_what_is_wrong(change, message):
    artifact = small()
    artifact.verify()
    change(artifact)
    with pytest.raises(ArtifactRefused, match=message) as caught:
        artifact.verify()
    assert caught.value.remedy


def test_training_on_shared_memory_after_creation_is_noticed():
    weight = torch.nn.Parameter(torch.ones(3))
    artifact = Artifact.create("delta", CONTENT, {"a": weight})
    with torch.no_grad():
        weight += 1
    with pytest.raises(ArtifactRefused, match="altered"):
        artifact.verify()


def test_files_can_be_added_without_touching_tensors():
    first = small()
    second = first.with_files({"README.md": b"new"})
    second.verify()
    first.verify()
    assert second.tensors is first.tensors
    assert (first.files["README.md"], second.files["README.md"]) == (b"# card\n", b"new")
    assert second.digest != first.digest


def test_large_artefacts_are_split_over_files():
    tensors = {f"t{index}": torch.zeros(10) for index in range(5)}
    whole = Artifact.create("delta", CONTENT, tensors)
    split = Artifact.create("delta", CONTENT, tensors, shard_bytes=80)
    assert {entry.file for entry in whole.manifest.tensors.values()} == {"tensors.safetensors"}
    assert [entry.file for entry in split.manifest.tensors.values()] == [
        f"tensors-{number:05d}-of-00003.safetensors" for number in (1, 1, 2, 2, 3)
    ]
    # A tensor larger than a file may be is alone in its own.
    large = Artifact.create("delta", CONTENT, {"a": torch.zeros(50), **tensors}, shard_bytes=80)
    numbers = [int(entry.file[8:13]) for entry in large.manifest.tensors.values()]
    assert numbers == [1, 2, 2, 3, 3, 4]


def test_type_of_most_parameters_and_size():
    artifact = small()
    assert artifact.manifest.dtype == "float32"
    assert artifact.nbytes == 12 * 4 + 5 * 2 + 8 + 7 + 1


def test_kind_and_content_go_together():
    content = emulator().manifest.content
    assert isinstance(content, EmulatorContent)
    with pytest.raises(ValueError, match="content"):
        Artifact.create("delta", content, {})

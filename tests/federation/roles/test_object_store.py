"""Artefacts in shared memory: the same bits, no copy, and no writer goes unnoticed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.manifest import MetricsContent
from scaleot_ray.errors import ArtifactRefused, RunFailed
from scaleot_ray.federation.roles.object_store import check_unchanged, from_shared, to_shared
from scaleot_ray.resources.failure import actor_failure
from scaleot_ray.resources.session import Session

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


def artifact_of(tensors: dict[str, torch.Tensor]) -> Artifact:
    """Tensors with a manifest; what kind it is does not matter here."""
    return Artifact.create("metrics", MetricsContent(values={}), tensors, files={"README.md": b"card"})


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_arrives_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = (torch.arange(24).reshape(2, 3, 4) - 7).to(dtype)
    artifact = artifact_of({"a.weight": tensor, "scalar": tensor[0, 0, 0].clone(), "none": tensor[:0]})
    received = from_shared(to_shared(artifact))
    received.verify()
    assert received.digest == artifact.digest
    assert received.files == artifact.files
    assert received.tensors["a.weight"].dtype == dtype
    assert torch.equal(received.tensors["a.weight"], tensor)


def test_nothing_is_copied_on_the_way() -> None:
    tensor = torch.randn(8, 8)
    received = from_shared(to_shared(artifact_of({"a": tensor})))
    assert received.tensors["a"].data_ptr() == tensor.data_ptr()


def test_wrong_sizes_and_extra_arrays_are_refused() -> None:
    shared = to_shared(artifact_of({"a": torch.zeros(4)}))
    with pytest.raises(ArtifactRefused, match="'a' has 12 bytes, its manifest says 16"):
        from_shared({**shared, "tensors": {"a": shared["tensors"]["a"][:12]}})
    extra = from_shared({**shared, "tensors": {**shared["tensors"], "b": np.zeros(4, dtype=np.uint8)}})
    with pytest.raises(ArtifactRefused, match="'b' is extra"):
        extra.verify()
    with pytest.raises(ArtifactRefused, match="'a' is missing"):
        from_shared({**shared, "tensors": {}}).verify()


def test_a_write_is_found_and_named() -> None:
    artifact = artifact_of({"a": torch.zeros(4), "b": torch.zeros(4)})
    received = from_shared(to_shared(artifact))
    check_unchanged(received, "data owner alice")
    received.tensors["b"][2] = 1.0
    with pytest.raises(RunFailed, match="data owner alice found that tensor 'b'"):
        check_unchanged(received, "data owner alice")


@ray.remote(num_cpus=0)
class Reader:
    """Reads a shared artefact; may write to it as a careless trainer would."""

    def __init__(self, reference: list[Any]) -> None:
        self.artifact = from_shared(ray.get(reference[0]))
        self.artifact.verify()

    def place(self) -> str:
        """The memory mapping that holds the first tensor."""
        address = self.artifact.tensors["a"].data_ptr()
        for line in Path("/proc/self/maps").read_text().splitlines():
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            if low <= address < high:
                return line
        return ""

    def write(self) -> None:
        """One in-place step on a tensor that should have been copied."""
        with torch.no_grad():
            self.artifact.tensors["a"].add_(1.0)

    def read(self) -> float:
        """The first value."""
        return float(self.artifact.tensors["a"][0])

    def check(self, name: str) -> None:
        """The check at the end of a round."""
        check_unchanged(self.artifact, name)


def test_readers_map_one_copy_and_a_writer_is_caught_by_all(connected_ray: Session) -> None:
    reference = ray.put(to_shared(artifact_of({"a": torch.arange(2.0**18)})))
    alice, bob = Reader.remote([reference]), Reader.remote([reference])
    assert all("plasma" in place for place in ray.get([alice.place.remote(), bob.place.remote()]))
    ray.get([alice.check.remote("alice"), bob.check.remote("bob")])
    ray.get(alice.write.remote())
    # This is the hazard: the other reader sees it. Should it be gone one day, copies crept in.
    assert ray.get(bob.read.remote()) == 1.0
    for reader, name in ((alice, "alice"), (bob, "bob")):
        with pytest.raises(RunFailed) as caught:
            ray.get(reader.check.remote(name))
        failure = actor_failure(caught.value, f"data owner {name}", None, connected_ray.logs)
        assert type(failure) is RunFailed
        assert re.search(rf"{name} found that tensor 'a' of the shared", failure.problem)
    with pytest.raises(RunFailed, match="coordinator found"):
        check_unchanged(from_shared(ray.get(reference)), "coordinator")

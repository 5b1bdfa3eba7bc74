"""Artefacts on a file system of ``pyarrow.fs``: whole or not there, and what is fetched is what was put in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.errors import ArtifactRefused, ConfigError, ResourcesMissing
from scaleot_ray.federation.rounds.artifact_location import Location
from scaleot_ray.federation.rounds.artifact_store import ArtifactStore, FolderStore
from scaleot_ray.federation.rounds.filesystem_store import FilesystemStore
from scaleot_ray.plugin.aggregation import ServerState
from tests.artifacts.examples import small
from tests.federation.rounds.faulty_filesystem import faulty
from tests.full_disk import largest_file

STATE = ServerState(3, {"momentum/a": torch.ones(4, dtype=torch.float64)})


def through_uri(tmp_path: Path) -> ArtifactStore:
    location = Location.of(f"file://{tmp_path}/remote")
    assert location.filesystem is not None
    return FilesystemStore(location.filesystem, f"{location.path}/one", f"{location.name}/one", tmp_path / "cache")


def in_a_folder(tmp_path: Path) -> ArtifactStore:
    return FolderStore(tmp_path / "remote" / "one")


class Remote:
    """A store on a file system that can fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, (location, self.handler) = folder, faulty(folder / "remote")
        self.filesystem = location.filesystem
        self.store = self.anew()

    def anew(self) -> FilesystemStore:
        """The store as another machine opens it, which has nothing of it yet."""
        number = len(list(self.folder.glob("cache-*")))
        (self.folder / f"cache-{number}").mkdir()
        assert self.filesystem is not None
        self.store = FilesystemStore(self.filesystem, "one", "faulty://store/one", self.folder / f"cache-{number}")
        return self.store

    def file(self, digest: str, name: str) -> Path:
        return self.handler.root / "one" / "deltas" / digest / name


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path)


@pytest.mark.parametrize("make", [through_uri, in_a_folder])
def test_what_is_put_in_comes_out_again(tmp_path: Path, make: Callable[[Path], ArtifactStore]) -> None:
    store, artifact = make(tmp_path), small()
    assert (store.has(artifact.digest), store.digests(), store.state(1)) == (False, [], None)
    store.add(artifact)
    store.add(artifact)
    store.release(())
    assert (store.has(artifact.digest), store.digests()) == (True, [artifact.digest])
    found = read_artifact(store.fetch(artifact.digest))
    assert found.files == artifact.files
    for name, tensor in artifact.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    assert store.manifest(artifact.digest) == artifact.manifest
    assert store.place(artifact.digest).endswith(f"/remote/one/deltas/{artifact.digest}")
    store.write_state(1, STATE)
    state = store.state(1)
    assert state is not None
    assert (state.rounds, state.tensors["momentum/a"].tolist()) == (3, [1.0] * 4)
    for _ in range(2):
        store.remove(artifact.digest)
        store.remove_state(1)
        assert (store.has(artifact.digest), store.digests(), store.state(1)) == (False, [], None)
    with pytest.raises(ArtifactRefused, match=r"is missing|no such directory"):
        store.manifest(artifact.digest)


@pytest.mark.parametrize("make", [through_uri, in_a_folder])
def test_what_is_looked_at_and_rejected_is_not_kept(tmp_path: Path, make: Callable[[Path], ArtifactStore]) -> None:
    store, artifact = make(tmp_path), small()

    def look() -> None:
        with store.adding(artifact) as place:
            assert read_artifact(place).digest == artifact.digest
            raise ValueError("too long")

    with pytest.raises(ValueError, match="too long"):
        look()
    assert not store.has(artifact.digest)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    store.add(artifact)
    with pytest.raises(ValueError, match="too long"):
        look()
    assert store.has(artifact.digest)  # it was there before


@pytest.mark.parametrize("make", [through_uri, in_a_folder])
def test_what_this_machine_cannot_write_is_said_in_words(tmp_path: Path, make: Callable[[Path], ArtifactStore]) -> None:
    store = make(tmp_path)
    with largest_file(100), pytest.raises(ResourcesMissing, match=r"artifacts: .* cannot be written .*too large"):
        store.write_state(1, STATE)
    assert store.state(1) is None


def test_what_cannot_be_removed_is_said_in_words(tmp_path: Path) -> None:
    store = in_a_folder(tmp_path)
    for name, remove in (("deltas", lambda: store.remove("ab")), ("server", lambda: store.remove_state(1))):
        (tmp_path / "remote" / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "remote" / "one" / name).touch()
        with pytest.raises(ResourcesMissing, match=rf"artifacts: .*{name}/.* cannot be removed \(Not a directory"):
            remove()


def test_an_upload_that_breaks_off_leaves_nothing_visible(remote: Remote) -> None:
    artifact = small()
    remote.store.add(artifact)
    sizes = sum(path.stat().st_size for path in remote.file(artifact.digest, "").rglob("*") if path.is_file())
    remote.store.remove(artifact.digest)
    for room in (0, 1, sizes // 2, sizes - 1):
        remote.handler.room = room
        with pytest.raises(
            ResourcesMissing, match=r"artifacts: faulty://store/one cannot be written \(.*lost"
        ) as caught:
            remote.store.add(artifact)
        assert "run the same command again" in caught.value.remedy
        remote.handler.room = None
        assert not remote.store.has(artifact.digest)
        with pytest.raises(ArtifactRefused, match="is missing, or not whole"):
            remote.anew().fetch(artifact.digest)
    remote.store.add(artifact)
    assert read_artifact(remote.anew().fetch(artifact.digest)).digest == artifact.digest


def test_a_store_that_stops_to_answer_at_any_moment_holds_all_of_it_or_nothing(remote: Remote) -> None:
    artifact, answered = small(), 0
    while True:
        remote.handler.answers = answered
        try:
            remote.store.add(artifact)
            break
        except ResourcesMissing:
            answered += 1
        finally:
            remote.handler.answers = None
        if remote.store.has(artifact.digest):
            read_artifact(remote.anew().fetch(artifact.digest))
            remote.store.remove(artifact.digest)
    assert answered > 10
    assert read_artifact(remote.anew().fetch(artifact.digest)).digest == artifact.digest


def test_the_file_that_makes_it_visible_is_written_last(remote: Remote) -> None:
    digest = small().digest
    remote.store.add(small())
    assert remote.handler.written[-1] == f"one/deltas/{digest}/manifest.sha256"
    assert len(remote.handler.written) == len(set(remote.handler.written)) > 3


def test_what_does_not_read_back_as_written_is_not_kept(remote: Remote) -> None:
    remote.handler.garbles = True
    with pytest.raises(ResourcesMissing, match="does not hold what was just written to it"):
        remote.store.add(small())
    assert not remote.store.has(small().digest)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("tensors.safetensors", r"deltas/\w+: tensor .* was altered.*\(in tensors\.safetensors\)"),
        ("README.md", r"deltas/\w+: file 'README\.md' was altered"),
        ("manifest.json", r"deltas/\w+/manifest\.json"),
        ("manifest.sha256", r"deltas/\w+: manifest\.json was altered: its SHA-256 is not that in manifest\.sha256"),
    ],
)
def test_damage_is_refused_by_name(remote: Remote, name: str, match: str) -> None:
    artifact = small()
    remote.store.add(artifact)
    path = remote.file(artifact.digest, name)
    data = bytearray(path.read_bytes())
    data[len(data) - 9 if name != "manifest.json" else 40] ^= 1
    path.write_bytes(data)
    remote.store.fetch(artifact.digest)  # what is here already is not fetched again
    store = remote.anew()
    for _ in range(2):  # what was refused once is not taken from the cache the second time
        with pytest.raises(ArtifactRefused, match=match) as caught:
            store.fetch(artifact.digest)
        assert caught.value.problem.startswith("artifacts: faulty://store/one/")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactRefused, match="faulty://store/one/"):
        store.fetch(artifact.digest)


def test_a_missing_file_and_another_artefact_are_refused(remote: Remote) -> None:
    artifact, other = small(), Artifact.create("delta", small().manifest.content, {"b": torch.ones(2)})
    for one in (artifact, other):
        remote.store.add(one)
    store = remote.anew()
    remote.file(artifact.digest, "tensors.safetensors").unlink()
    with pytest.raises(
        ArtifactRefused, match=r"^artifacts: faulty://store/one/deltas/\w+/tensors\.safetensors is missing"
    ):
        store.fetch(artifact.digest)
    remote.file(artifact.digest, "manifest.json").unlink()
    with pytest.raises(ArtifactRefused, match=r"^artifacts: faulty://store/one/deltas/\w+/manifest\.json is missing"):
        store.fetch(artifact.digest)
    for path in remote.file(other.digest, "").iterdir():
        path.rename(remote.file(artifact.digest, path.name))
    with pytest.raises(ArtifactRefused, match=r"manifest\.json was altered: its digest is another"):
        store.fetch(artifact.digest)


def test_a_fetch_that_breaks_off_leaves_nothing(remote: Remote) -> None:
    artifact = small()
    remote.store.add(artifact)
    store = remote.anew()
    for answers in range(6):
        remote.handler.answers = answers
        with pytest.raises(ResourcesMissing, match="cannot be read"):
            store.fetch(artifact.digest)
    remote.handler.answers = None
    assert read_artifact(store.fetch(artifact.digest)).digest == artifact.digest


def test_a_damaged_state_is_refused_by_name(remote: Remote) -> None:
    remote.store.write_state(2, STATE)
    path = remote.handler.root / "one/server/2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactRefused, match=r"artifacts: faulty://store/one/server/2\.safetensors: the server"):
        remote.store.state(2)


def test_only_what_is_in_use_takes_room_here(remote: Remote) -> None:
    artifact, other = small(), Artifact.create("delta", small().manifest.content, {"b": torch.ones(2)})
    for one in (artifact, other):
        remote.store.add(one)
    remote.store.release({other.digest})
    assert [path.name for path in (remote.folder / "cache-0").iterdir()] == [other.digest]
    assert sorted(remote.store.digests()) == sorted([artifact.digest, other.digest])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("foo://bucket/x", r"artifacts: foo://bucket/x cannot be used \(Unrecognized filesystem type"),
        ("hdfs://nowhere:8020/x?user=ann", r"artifacts: hdfs://nowhere:8020/x cannot be used \("),
        ("file://host/x", "artifacts: file://host/x cannot be used"),
        ("s3://id:sesame@bucket/x", "artifacts: the URI holds a secret"),
        ("s3://bucket/x?secret_key=sesame", "artifacts: the URI holds a secret"),
    ],
)
def test_a_place_that_cannot_be_one_is_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        Location.of(text).check()
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"artifacts: .*file/kept cannot be written to \(.*Not a directory"):
        Location.of(f"{scheme}{tmp_path}/file/kept").check()
    Location.of(f"{scheme}{tmp_path}/folder/kept").check()
    assert not list((tmp_path / "folder" / "kept").iterdir())


def test_a_place_that_garbles_or_does_not_answer_is_refused(tmp_path: Path) -> None:
    location, handler = faulty(tmp_path / "remote")
    location.check()
    handler.garbles = True
    with pytest.raises(ConfigError, match="artifacts: faulty://store/runs does not give back what was written"):
        location.check()
    handler.answers = 0
    with pytest.raises(ConfigError, match=r"artifacts: faulty://store/runs cannot be written to \(.*no answer"):
        location.check()

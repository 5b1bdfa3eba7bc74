import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleot_ray.artifacts import Artifact, DeltaContent, read_artifact, read_manifest, write_artifact
from scaleot_ray.artifacts.atomic import _swap, atomic_directory
from scaleot_ray.artifacts.raw_bytes import DTYPES, raw_bytes
from scaleot_ray.errors import ArtifactRefused, ConfigError
from tests.artifacts.examples import emulator, metrics, small

CONTENT = DeltaContent(method="layers", positions=[0])


@pytest.fixture
def written(tmp_path) -> Path:
    return write_artifact(small(), tmp_path / "artefact")


def _same(first: Artifact, second: Artifact) -> None:
    assert second.manifest == first.manifest
    assert list(second.tensors) == list(first.tensors)
    assert second.files == first.files
    for name, tensor in first.tensors.items():
        other = second.tensors[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(other).tobytes() == raw_bytes(tensor).tobytes()


_shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(deadline=None, max_examples=60)
@given(
    tensors=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), _shapes), max_size=6),
    shard_bytes=st.sampled_from([1, 64, 2**31]),
    seed=st.integers(0, 1000),
)
def test_round_trip_of_every_type_and_shape(tensors, shard_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    values = {
        f"tensor.{index}": (100 * torch.randn(shape, generator=generator)).abs().to(DTYPES[dtype])
        for index, (dtype, shape) in enumerate(tensors)
    }
    artifact = Artifact.create("delta", CONTENT, values, shard_bytes=shard_bytes)
    with tempfile.TemporaryDirectory() as folder:
        _same(artifact, read_artifact(write_artifact(artifact, Path(folder) / "a")))


@pytest.mark.parametrize("make", [small, emulator, metrics])
def test_every_kind_comes_back(make, tmp_path):
    artifact = make()
    directory = write_artifact(artifact, tmp_path / "deep" / "artefact")
    _same(artifact, read_artifact(directory, artifact.manifest.kind))
    assert read_manifest(directory) == artifact.manifest
    assert os.listdir(directory.parent) == ["artefact"]


def test_bits_survive_that_equality_does_not_see(tmp_path):
    tensor = torch.tensor([-0.0, 0.0, 1e-45, 3.4e38])
    back = read_artifact(write_artifact(Artifact.create("delta", CONTENT, {"a": tensor}), tmp_path / "a"))
    assert torch.equal(back.tensors["a"].view(torch.int32), tensor.view(torch.int32))


def test_any_safetensors_reader_opens_the_files(written, tmp_path):
    artifact = small()
    loaded = safetensors.torch.load_file(written / "tensors.safetensors")
    assert loaded.keys() == artifact.tensors.keys()
    for name, tensor in artifact.tensors.items():
        assert torch.equal(loaded[name], tensor)
    split = Artifact.create("delta", CONTENT, artifact.tensors, shard_bytes=16)
    directory = write_artifact(split, tmp_path / "split")
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) == 3
    assert {name for file in files for name in safetensors.torch.load_file(directory / file)} == loaded.keys()


def test_checksum_file_is_what_sha256sum_reads(written):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum on this machine")
    subprocess.run(["sha256sum", "--check", "--strict", "manifest.sha256"], cwd=written, check=True)


def test_what_was_read_does_not_follow_the_file(written):
    artifact = read_artifact(written)
    path = written / "tensors.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    artifact.verify()
    os.truncate(path, 0)
    artifact.verify()


def test_reading_takes_about_one_copy_of_memory(tmp_path):
    artifact = Artifact.create("delta", CONTENT, {f"t{index}": torch.ones(1 << 20) for index in range(16)})
    directory = write_artifact(artifact, tmp_path / "large")
    program = (
        "import resource, sys; from scaleot_ray.artifacts import read_artifact\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); artifact = read_artifact(sys.argv[1]); print((peak() - before) / artifact.nbytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert float(done.stdout) < 1.2


# What is refused when reading, each by name.


def _refused(directory: Path, message: str) -> None:
    with pytest.raises(ArtifactRefused, match=message) as caught:
        read_artifact(directory)
    assert str(directory) in caught.value.problem
    assert caught.value.remedy


def _edit(directory: Path, *path: str, value: object) -> None:
    file = directory / "manifest.json"
    values = place = json.loads(file.read_text())
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(values, indent=2) + "\n")


def test_other_kind_is_refused(written):
    with pytest.raises(ArtifactRefused, match="kind 'delta', expected 'emulator'"):
        read_artifact(written, expected_kind="emulator")


def test_directory_that_is_none_is_refused(tmp_path):
    _refused(tmp_path / "nowhere", "no such directory")
    _refused(tmp_path, "'manifest.json' is missing")


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.sha256", "tensors.safetensors", "README.md", "more/notes.txt"]
)
def test_missing_file_is_refused(written, name):
    (written / name).unlink()
    _refused(written, f"file '{name}' is missing")


@pytest.mark.parametrize("name", ["stowaway.bin", "more/.hidden", "pytorch_model.bin"])
def test_extra_file_is_refused(written, name):
    (written / name).write_bytes(b"x")
    _refused(written, f"file '{name}' is extra")


def test_extra_folder_is_refused(written):
    (written / "empty").mkdir()
    _refused(written, "folder 'empty' is extra")


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors", "README.md", "manifest.sha256"])
def test_symbolic_link_that_leaves_the_directory_is_refused(written, tmp_path, name):
    shutil.move(written / name, tmp_path / "outside")
    (written / name).symlink_to(tmp_path / "outside")
    _refused(written, f"'{name}' is a symbolic link")


def test_linked_folder_is_refused(written, tmp_path):
    shutil.move(written / "more", tmp_path / "outside")
    (written / "more").symlink_to(tmp_path / "outside")
    _refused(written, "'more' is a symbolic link")


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors", "README.md"])
def test_pipe_in_place_of_a_file_is_refused_and_not_waited_for(written, name):
    (written / name).unlink()
    os.mkfifo(written / name)
    _refused(written, f"'{name}' is no regular file")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "tensors.safetensors", "README.md"])
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_file_is_refused(written, name, verify):
    whole = (written / name).read_bytes()
    for size in {0, 1, 7, 8, len(whole) // 2, len(whole) - 1} & set(range(len(whole))):
        (written / name).write_bytes(whole[:size])
        with pytest.raises(ArtifactRefused, match=f"{name}.*"):
            read_artifact(written, verify=verify)
    (written / name).write_bytes(whole + b" ")
    with pytest.raises(ArtifactRefused, match=f"{name}.*"):
        read_artifact(written, verify=verify)


def test_altered_tensor_is_refused_by_name(written):
    file = written / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the narrowest type comes last
    file.write_bytes(data)
    _refused(written, r"tensor 'b\.weight' was altered")
    with pytest.raises(ArtifactRefused, match=r"tensor 'b\.weight' was altered"):
        read_artifact(written)
    read_artifact(written, verify=False)


def test_tensor_that_is_not_finite_is_refused_by_name(written):
    # Written by someone who computes right digests over wrong values.
    file = written / "tensors.safetensors"
    data = file.read_bytes()
    place = data.index(raw_bytes(small().tensors["a.weight"]).tobytes())
    bad = torch.full((3, 4), float("nan")).numpy().tobytes()
    file.write_bytes(data[:place] + bad + data[place + len(bad) :])
    _edit(written, "tensors", "a.weight", "sha256", value=hashlib.sha256(bad).hexdigest())
    _refused(written, r"tensor 'a\.weight' has values that are not finite")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("a.weight"), r"tensor 'a\.weight' is missing"),
        (lambda tensors: tensors.update(stowaway=torch.zeros(1)), "tensor 'stowaway' is extra"),
        (lambda tensors: tensors.update({"a.weight": torch.zeros(4, 3)}), r"tensor 'a\.weight' has shape \[4, 3\]"),
        (lambda tensors: tensors.update({"a.weight": torch.zeros(3, 4).double()}), r"'a\.weight' has type 'F64'"),
        (lambda tensors: tensors.update({"b.weight": torch.zeros(5).half()}), r"'b\.weight' has type 'F16'"),
        (lambda tensors: None, "header was altered"),  # another order of the same tensors
    ],
)
def test_another_tensor_file_is_refused_by_tensor(written, change, message):
    file = written / "tensors.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    metadata = {"format": "pt", "note": "saved again"}
    safetensors.torch.save_file(tensors, file, metadata)
    _refused(written, message)


def test_tensor_file_that_is_no_safetensors_is_refused(written):
    file = written / "tensors.safetensors"
    file.write_bytes(b"\x80\x04" + b"pickle" * 100)
    _refused(written, r"'tensors\.safetensors'.*truncated or no safetensors")
    file.write_bytes((64).to_bytes(8, "little") + b"{" * 1000)
    _refused(written, r"'tensors\.safetensors'.*damaged")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("tensors", "a.weight", "shape"),
            [4, 3],
            r"tensor 'a\.weight' has shape \[3, 4\], the manifest says \[4, 3\]",
        ),
        (("tensors", "a.weight", "dtype"), "int32", r"tensor 'a\.weight' has type 'F32', the manifest says int32"),
        (("tensors", "a.weight", "sha256"), "0" * 64, r"tensor 'a\.weight' was altered"),
        (("tensors", "a.weight", "file"), "other.safetensors", r"'other\.safetensors' is missing"),
        (("files", "README.md", "sha256"), "0" * 64, r"file 'README\.md' was altered"),
        (("schema_version",), 2, "newer than this library reads"),
        (("parent_digest",), "1" * 64, r"manifest\.json was altered"),
        (("created",), "2020-01-01T00:00:00Z", r"manifest\.json was altered"),
        (("content", "positions"), [0, 6], r"manifest\.json was altered"),
    ],
)
def test_edited_manifest_is_refused_as_precisely_as_can_be(written, path, value, message):
    _edit(written, *path, value=value)
    _refused(written, message)


def test_manifest_that_leads_outside_is_refused(written, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    _edit(written, "files", "../secret.txt", value={"bytes": 6, "sha256": "0" * 64})
    _refused(written, r"'\.\./secret\.txt' leads out")


def test_read_manifest_alone_notices_an_edit(written):
    assert read_manifest(written) == small().manifest.model_copy(update={"created": read_manifest(written).created})
    _edit(written, "created", value="2020-01-01T00:00:00Z")
    with pytest.raises(ArtifactRefused, match="altered"):
        read_manifest(written)


# Writing.


def test_existing_directory_is_not_touched(written):
    before = read_artifact(written)
    with pytest.raises(ConfigError, match="exists already"):
        write_artifact(metrics(), written)
    _same(before, read_artifact(written))
    write_artifact(metrics(), written, overwrite=True)
    assert read_artifact(written).manifest.kind == "metrics"
    assert os.listdir(written.parent) == ["artefact"]


def test_overwriting_deletes_artefacts_only(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("ten years")
    with pytest.raises(ConfigError, match="not overwritten"):
        write_artifact(small(), tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "ten years"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not overwritten"):
        write_artifact(small(), tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    read_artifact(write_artifact(small(), tmp_path / "empty", overwrite=True))


def test_folder_that_may_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="file"):
        write_artifact(small(), tmp_path / "file" / "artefact")


def test_altered_artefact_is_not_written(tmp_path):
    artifact = small()
    artifact.tensors["a.weight"][0] += 1
    with pytest.raises(ArtifactRefused, match="altered"):
        write_artifact(artifact, tmp_path / "a")
    artifact = small()
    artifact.files["../evil"] = b""
    values = artifact.manifest.files["README.md"]
    artifact.manifest = artifact.manifest.model_copy(update={"files": {**artifact.manifest.files, "../evil": values}})
    with pytest.raises(ArtifactRefused, match="leads out"):
        write_artifact(artifact, tmp_path / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_interrupted_writing_leaves_what_was_there(written, error):
    before = read_artifact(written)

    def write_half() -> None:
        with atomic_directory(written, 1, "manifest.json", overwrite=True) as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(error):
        write_half()
    _same(before, read_artifact(written))
    assert os.listdir(written.parent) == ["artefact"]


@pytest.mark.parametrize("fails", [False, True])
def test_interrupted_clean_up_is_done_all_the_same(written, monkeypatch, fails):
    remove = shutil.rmtree
    signals = [KeyboardInterrupt]  # one: commands ignore those that follow

    def interrupted(path, ignore_errors):
        if ".partial" in path.name and signals:
            raise signals.pop()
        remove(path, ignore_errors)

    def write() -> None:
        with atomic_directory(written, 1, "manifest.json", overwrite=True) as folder:
            (folder / "manifest.json").write_text("x")
            if fails:
                raise ValueError

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(written.parent) == ["artefact"]
    assert ((written / "manifest.json").read_text() == "x") is not fails


def test_failed_swap_puts_the_old_directory_back(written):
    before = read_artifact(written)
    with pytest.raises(FileNotFoundError):
        _swap(written.parent / "was never written", written, written.parent / "old")
    _same(before, read_artifact(written))
    assert os.listdir(written.parent) == ["artefact"]


@pytest.mark.parametrize(
    ("key", "value"), [("shape", "\x1b[2J" * 1000), ("shape", list(range(10_000))), ("dtype", "\x1b[2J" * 1000)]
)
def test_a_header_that_says_something_else_is_quoted_and_cut(written, key, value):
    file = written / "tensors.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a.weight"][key] = value
    text = json.dumps(header, ensure_ascii=False).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ArtifactRefused, match=r"tensor 'a\.weight' has") as caught:
        read_artifact(written)
    assert caught.value.problem.isprintable()
    assert len(caught.value.problem) < 500 + len(str(written))

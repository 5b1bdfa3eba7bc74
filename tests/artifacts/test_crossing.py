import hashlib
import json

import pytest

from scaleot_ray.artifacts import AuditLog, FileEntry, check_crossing, write_artifact
from scaleot_ray.artifacts.audit import data_owner
from scaleot_ray.artifacts.crossing import cross, crossing_bytes, receive
from scaleot_ray.artifacts.gate import FILES_LIMIT
from scaleot_ray.artifacts.manifest_json import SENT_LIMIT, parse_manifest, parse_sent, render_manifest
from scaleot_ray.artifacts.provenance import LICENCE_LIMIT
from scaleot_ray.artifacts.untrusted import PROBLEM_LIMIT, untrusted
from scaleot_ray.errors import ArtifactRefused, ResourcesMissing
from tests.artifacts.examples import MAP, delta, emulator, metrics, rewrite_manifest

OPEN = ["plug_in", *["kept"] * 6, "plug_in"]


@pytest.fixture
def audit(tmp_path):
    return AuditLog(tmp_path / "log" / "audit.jsonl")


def _lines(audit):
    return [tuple(line[key] for key in ("sender", "recipient", "kind", "decision")) for line in audit.read()]


def test_what_passes_is_a_line(audit):
    parent = emulator()
    cross(parent, "model owner", "data owners", audit)
    cross(delta(parent.manifest), "data owner a", "model owner", audit, parent=parent.manifest)
    assert _lines(audit) == [
        ("model owner", "data owners", "emulator", "sent"),
        ("data owner a", "model owner", "delta", "sent"),
    ]
    line = audit.read()[0]
    assert (line["digest"], line["bytes"], line["reason"]) == (parent.digest, crossing_bytes(parent.manifest), None)
    assert line["bytes"] == parent.nbytes + len(render_manifest(parent.manifest))


def test_what_is_refused_is_a_line_and_an_error(audit):
    with pytest.raises(ArtifactRefused, match="hides nothing"):
        cross(emulator(layer_map=OPEN), "model owner", "data owners", audit)
    (line,) = audit.read()
    assert line["decision"] == "refused"
    assert "hides nothing" in line["reason"]


def test_a_folder_is_received_through_the_gate(audit, tmp_path):
    artifact = emulator()
    write_artifact(artifact, tmp_path / "emulator")
    found = receive(tmp_path / "emulator", "emulator", "model owner", "data owner", audit)
    assert found.digest == artifact.digest
    check_crossing(found)
    assert _lines(audit) == [("model owner", "data owner", "emulator", "received")]


@pytest.mark.parametrize("damage", ["tensor", "file", "open", "kind", "parent", "size"])
def test_a_folder_that_is_refused_is_a_line(audit, tmp_path, damage):
    artifact = {
        "open": emulator(layer_map=OPEN),
        "kind": metrics(),
        "parent": delta(emulator().manifest),
        "size": delta(emulator().manifest, "lora", size=1000),
    }.get(damage, emulator())
    folder = write_artifact(artifact, tmp_path / "artifact")
    if damage == "tensor":
        data = bytearray((folder / "tensors.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "tensors.safetensors").write_bytes(data)
    elif damage == "file":
        (folder / "rows.jsonl").write_text("private")
    kind = "delta" if damage in ("parent", "size") else "emulator"
    parent = {"parent": emulator(layer_map=MAP, emulator_loss=5.0).manifest, "size": emulator().manifest}.get(damage)
    with pytest.raises(ArtifactRefused) as caught:
        receive(folder, kind, "a", "b", audit, parent=parent)
    (line,) = audit.read()
    assert (line["kind"], line["decision"], line["reason"]) == (kind, "refused", caught.value.problem)
    # Of what could not be read there is nothing to tell.
    assert (line["digest"] == "") == (damage == "kind")


@pytest.mark.parametrize("value", [10**400, -(10**400), [[]], "1"])
def test_a_folder_with_what_is_no_number_is_a_line(audit, tmp_path, value):
    folder = write_artifact(metrics(), tmp_path / "metrics")
    values = json.loads((folder / "manifest.json").read_bytes())
    values["content"]["values"] = {"loss": value}
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactRefused, match="not a finite number"):
        receive(folder, "metrics", "a", "b", audit)
    assert _lines(audit) == [("a", "b", "metrics", "refused")]


def test_a_delta_that_is_too_large_is_refused_before_it_is_read(audit, tmp_path):
    parent = emulator().manifest
    good = delta(parent)
    name, entry = next(iter(good.manifest.tensors.items()))
    huge = {**good.manifest.tensors, name: entry.model_copy(update={"shape": [1 << 40]})}
    low, rank = delta(parent, "lora").manifest, 1 << 36
    shapes = {name: [rank if size == 3 else size for size in entry.shape] for name, entry in low.tensors.items()}
    consistent = {
        "content": low.content.model_copy(update={"settings": {**low.content.settings, "rank": rank}}),
        "tensors": {name: entry.model_copy(update={"shape": shapes[name]}) for name, entry in low.tensors.items()},
    }
    for changes, match in (
        (consistent, "more than the .* of the plug-in layers"),
        ({"tensors": huge}, "has shape"),
        ({"tensors": {"x" * 100: huge[name]}}, "is missing from the delta"),
        ({"files": {"README.md": FileEntry(bytes=1 << 42, sha256="0" * 64)}}, "a card has at most"),
    ):
        folder = write_artifact(good, tmp_path / "delta", overwrite=True)
        manifest = good.manifest.model_copy(update=changes)
        rewrite_manifest(folder, manifest)
        for file in ("tensors.safetensors", *manifest.files):
            with open(folder / file, "ab") as sparse:
                sparse.truncate(1 << 42)
        with pytest.raises(ArtifactRefused, match=match):
            receive(folder, "delta", "a", "b", audit, parent=parent)
        line = audit.read()[-1]
        assert (line["decision"], line["digest"], line["bytes"]) == (
            "refused",
            manifest.digest(),
            crossing_bytes(manifest),
        )


@pytest.mark.parametrize("kind", ["delta", "metrics"])
def test_a_manifest_longer_than_any_is_refused_before_it_is_parsed(audit, tmp_path, kind):
    parent = emulator().manifest
    artifact = {"delta": delta(parent), "metrics": metrics(parent=parent)}[kind]
    folder = write_artifact(artifact, tmp_path / kind)
    receive(folder, kind, "a", "b", audit, parent=parent)
    with open(folder / "manifest.json", "ab") as file:
        file.truncate(SENT_LIMIT + 1)
    with pytest.raises(ArtifactRefused, match=f"more than the {SENT_LIMIT} it may have"):
        receive(folder, kind, "a", "b", audit, parent=parent)
    with pytest.raises(ArtifactRefused, match=f"has more than {SENT_LIMIT} bytes"):
        parse_sent(render_manifest(artifact.manifest) + b" " * SENT_LIMIT, None)
    assert [line["decision"] for line in audit.read()] == ["received", "refused"]


def test_an_emulator_whose_files_are_too_large_is_refused_before_they_are_read(audit, tmp_path):
    artifact = emulator()
    folder = write_artifact(artifact, tmp_path / "emulator")
    entry = FileEntry(bytes=1 << 42, sha256="0" * 64)
    rewrite_manifest(folder, artifact.manifest.model_copy(update={"files": {"tokenizer.json": entry}}))
    with open(folder / "tokenizer.json", "ab") as sparse:
        sparse.truncate(1 << 42)
    with pytest.raises(ArtifactRefused, match=f"more than the {FILES_LIMIT}"):
        receive(folder, "emulator", "a", "b", audit)
    assert _lines(audit) == [("a", "b", "emulator", "refused")]


def _spare(text):
    """Ways to write the same manifest that carry something else."""
    values = json.loads(text)
    yield text + b" " * 10_000
    yield text.replace(b"\n", b"\r\n")
    yield text.replace(b'"delta"', b'"\\u0064elta"').replace(b'"metrics"', b'"\\u006detrics"')
    yield json.dumps(values).encode()
    yield json.dumps(dict(reversed(values.items())), indent=2).encode() + b"\n"
    yield text.replace(b'"schema_version": 1', b'"schema_version":  1')
    if values["kind"] == "metrics":
        yield text.replace(b": 2.5", b": 2.500000000000000000000000001")
        yield text.replace(b": 2.0", b": 2")


@pytest.mark.parametrize("kind", ["delta", "metrics"])
def test_a_manifest_written_otherwise_is_refused(audit, tmp_path, kind):
    parent = emulator().manifest
    artifact = {"delta": delta(parent), "metrics": metrics(parent=parent)}[kind]
    folder = write_artifact(artifact, tmp_path / kind)
    text = (folder / "manifest.json").read_bytes()
    others = list(_spare(text))
    for other in others:
        assert parse_manifest(other).digest() == artifact.digest  # it says the same
        (folder / "manifest.json").write_bytes(other)
        (folder / "manifest.sha256").write_text(f"{hashlib.sha256(other).hexdigest()}  manifest.json\n")
        with pytest.raises(ArtifactRefused, match="not written as scaleot_ray writes it"):
            receive(folder, kind, "a", "b", audit, parent=parent)
    assert len(audit.read()) == len(others)


@pytest.mark.parametrize("kind", ["delta", "metrics"])
def test_a_manifest_that_an_earlier_version_wrote_is_received(audit, tmp_path, kind):
    parent = emulator().manifest.model_copy(update={"base_model": None, "licence": None})
    artifact = {"delta": delta(parent), "metrics": metrics(parent=parent)}[kind]
    folder = write_artifact(artifact, tmp_path / kind)
    values = json.loads((folder / "manifest.json").read_bytes())
    del values["base_model"], values["licence"]
    values["content"].pop("start", None)
    text = (json.dumps(values, indent=2) + "\n").encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    assert receive(folder, kind, "a", "b", audit, parent=parent).digest == artifact.digest


def test_largest_honest_manifest_of_a_delta_is_well_below_its_limit():
    good = delta(emulator().manifest, "lora").manifest
    entry = next(iter(good.tensors.values()))
    # All seven projections of all layers of a 70B model.
    names = [f"model.layers.{layer}.self_attn.projection_{part}.lora_A" for layer in range(80) for part in range(14)]
    large = good.model_copy(update={"tensors": dict.fromkeys(names, entry), "licence": "é" * (LICENCE_LIMIT // 2)})
    assert 4 * len(render_manifest(large)) < SENT_LIMIT


@pytest.mark.parametrize("error", [RuntimeError("\x1b[31m" + "x" * 10_000), OverflowError(), RecursionError("deep")])
def test_an_error_that_nobody_foresaw_is_a_refusal(error):
    with pytest.raises(ArtifactRefused, match=type(error).__name__) as caught, untrusted():
        raise error
    assert caught.value.problem.isprintable()
    assert len(caught.value.problem) < PROBLEM_LIMIT


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "full"), ResourcesMissing("a", "b")])
def test_what_is_not_the_senders_fault_is_no_refusal(error):
    with pytest.raises(type(error)) as caught, untrusted():
        raise error
    assert caught.value is error


def test_a_folder_that_is_not_there_is_no_crossing(audit, tmp_path):
    with pytest.raises(ArtifactRefused, match="no such directory"):
        receive(tmp_path / "nowhere", "emulator", "a", "b", audit)
    assert not audit.path.exists()


def test_nothing_crosses_without_its_line(tmp_path):
    (tmp_path / "log").write_text("a file where a folder must be")
    with pytest.raises(ResourcesMissing, match="audit log"):
        cross(emulator(), "a", "b", AuditLog(tmp_path / "log" / "audit.jsonl"))


def test_a_data_owner_without_a_name_is_called_so():
    assert (data_owner("alice"), data_owner("data owner")) == ("data owner alice", "data owner")

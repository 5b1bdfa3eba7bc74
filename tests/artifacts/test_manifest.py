import hashlib
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from scaleot_ray import __version__
from scaleot_ray.artifacts import Artifact, DeltaContent, EmulatorContent, MetricsContent
from scaleot_ray.artifacts.manifest import TensorEntry, check_file_name
from scaleot_ray.artifacts.manifest_json import MANIFEST_LIMIT, parse_manifest, render_manifest
from scaleot_ray.errors import ArtifactRefused
from tests.artifacts.examples import delta, emulator, metrics, small


def _edited(artifact, *path, value):
    """The manifest's text with one value replaced (or added)."""
    values = json.loads(render_manifest(artifact.manifest))
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(values).encode()


@pytest.mark.parametrize("make", [small, emulator, metrics])
def test_manifest_survives_its_file(make):
    manifest = make().manifest
    again = parse_manifest(render_manifest(manifest))
    assert again == manifest
    assert again.digest() == manifest.digest()


def test_digest_names_the_content_and_not_the_time():
    first = small().manifest
    later = first.model_copy(update={"created": "2031-01-01T00:00:00Z"})
    other = first.model_copy(update={"parent_digest": "1" * 64})
    assert later.digest() == first.digest() == small().digest
    assert other.digest() != first.digest()


def test_deltas_from_before_base_model_licence_and_start_are_read_and_keep_their_digests():
    manifest = delta(emulator().manifest.model_copy(update={"base_model": None, "licence": None})).manifest
    values = json.loads(render_manifest(manifest))
    assert (values.pop("base_model"), values.pop("licence"), values["content"].pop("start")) == (None, None, None)
    old = parse_manifest(json.dumps(values).encode())
    assert old == manifest
    del values["created"]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert old.digest() == hashlib.sha256(text.encode()).hexdigest()
    named = old.model_copy(update={"base_model": "m"})
    assert named.digest() != old.digest() != old.model_copy(update={"licence": "m"}).digest()
    begun = old.content.model_copy(update={"start": "ab" * 32})
    assert old.model_copy(update={"content": begun}).digest() != old.digest()


def test_a_stored_emulator_of_an_earlier_version_keeps_its_digest():
    text = (Path(__file__).parent / "earlier_emulator.json").read_bytes()  # written before emulators were fitted
    old = parse_manifest(text)
    # Deltas that were tuned on it name it so.
    assert old.digest() == "24ebcfed03ee1dfc6406e0d891c7a0e541e4ddd4d537418a6bd9824ad159db09"
    again = parse_manifest(render_manifest(old))
    assert (again, again.digest()) == (old, old.digest())
    said = [old.content.model_copy(update={name: 1}) for name in ("fit_tokens", "fit_steps")]
    stage_one = old.content.stage_one.model_copy(update={"generated_tokens": 1})
    said.append(old.content.model_copy(update={"stage_one": stage_one}))
    digests = {old.model_copy(update={"content": content}).digest() for content in said}
    assert len({old.digest(), *digests}) == 4


def test_emulators_from_before_compression_and_stage_one_are_read_and_keep_their_digests():
    manifest = emulator().manifest
    values = json.loads(render_manifest(manifest))
    assert (values["content"].pop("compression"), values["content"].pop("stage_one")) == (None, None)
    assert (values["content"].pop("fit_tokens"), values["content"].pop("fit_steps")) == (0, 0)
    old = parse_manifest(json.dumps(values).encode())
    assert old == manifest
    del values["created"]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert old.digest() == hashlib.sha256(text.encode()).hexdigest()
    spec = {"start": "random", "objective": "lm", "steps": 3}
    said = [emulator(compression="svd"), emulator(compression="other"), emulator(stage_one=spec)]
    said.append(emulator(stage_one={**spec, "steps": 4}))
    assert len({old.digest(), *(artifact.digest for artifact in said)}) == 5


def test_config_keys_become_those_of_json():
    # id2label has integer keys; sorted as integers or as strings they come in another order.
    artifact = emulator()
    config = {**artifact.manifest.model_config_json, "id2label": {9: "a", 10: "b"}, "pair": (1, 2)}
    manifest = type(artifact.manifest)(**{**dict(artifact.manifest), "model_config_json": config})
    assert manifest.model_config_json["id2label"] == {"9": "a", "10": "b"}
    assert manifest.model_config_json["pair"] == [1, 2]
    assert parse_manifest(render_manifest(manifest)).digest() == manifest.digest()


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/..",
        "./x",
        "a//b",
        "a\\b",
        "..\\x",
        "C:x",
        "",
        ".",
        "..",
        "a/",
        "~",
        "a b",
        "x\n",
        "\x1b[31m",
        ".hidden",
        "a" * 200,
        "/".join("abcdefghi"),
        "x\x00",
    ],
)
def test_file_names_that_are_refused(name):
    with pytest.raises(ArtifactRefused, match="file name"):
        check_file_name(name)


@pytest.mark.parametrize("name", ["README.md", "tokenizer/tokenizer.json", "a-b_c.1+x"])
def test_file_names_that_are_allowed(name):
    check_file_name(name)


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil", "a\\b"])
def test_manifest_with_a_file_outside_is_refused(name):
    entry = {"bytes": 1, "sha256": "0" * 64}
    with pytest.raises(ArtifactRefused, match="leads out"):
        parse_manifest(_edited(small(), "files", value={name: entry}))
    with pytest.raises(ArtifactRefused, match="leads out"):
        parse_manifest(_edited(small(), "tensors", "a.weight", "file", value=name))


@pytest.mark.parametrize(
    "name", ["manifest.json", "Manifest.JSON", "manifest.sha256", "tensors.safetensors", "readme.md"]
)
def test_colliding_file_names_are_refused(name):
    with pytest.raises(ArtifactRefused, match="collides"):
        small().with_files({name: b""})


def test_a_name_that_is_file_and_folder_is_refused():
    with pytest.raises(ArtifactRefused, match="collides"):
        small().with_files({"README.md/inner.txt": b""})


@pytest.mark.parametrize("name", ["", "__metadata__", "a b", "a/b", "\x1b[31m", "x" * 300])
def test_tensor_names_that_are_refused(name):
    entry = json.loads(render_manifest(small().manifest))["tensors"]["a.weight"]
    with pytest.raises(ArtifactRefused, match="tensor name"):
        parse_manifest(_edited(small(), "tensors", name, value=entry))


@pytest.mark.parametrize("file", ["weights.bin", "sub/x.safetensors"])
def test_tensor_files_are_safetensors_beside_the_manifest(file):
    with pytest.raises(ArtifactRefused, match=r"'a\.weight'"):
        parse_manifest(_edited(small(), "tensors", "a.weight", "file", value=file))


def test_newer_schema_is_refused_with_the_way_out():
    with pytest.raises(ArtifactRefused, match="newer") as caught:
        parse_manifest(_edited(small(), "schema_version", value=2))
    assert "Upgrade" in caught.value.remedy
    # Whatever else a later schema may bring, the version is what is named.
    with pytest.raises(ArtifactRefused, match="newer"):
        parse_manifest(b'{"schema_version": 7, "kind": "hologram", "stuff": []}')


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None])
def test_other_schema_versions_are_refused(version):
    with pytest.raises(ArtifactRefused, match="schema_version"):
        parse_manifest(_edited(small(), "schema_version", value=version))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("kind",), "pickle", "kind"),
        (("kind",), "metrics", "content"),
        (("surprise",), 1, "surprise"),
        (("content", "surprise"), 1, "content.surprise"),
        (("content", "positions"), ["0"], "content.positions.0"),
        (("content", "positions"), [-1], "content.positions.0"),
        (("content",), None, "content"),
        (("tensors", "a.weight", "dtype"), "complex64", "tensors.a.weight.dtype"),
        (("tensors", "a.weight", "shape"), [3, -4], "tensors.a.weight.shape.1"),
        (("tensors", "a.weight", "shape"), [3.5], "tensors.a.weight.shape.0"),
        (("tensors", "a.weight", "sha256"), "abc", "tensors.a.weight.sha256"),
        (("tensors", "a.weight", "shape"), [0, 10**30], "tensors.a.weight.shape.1"),
        (("tensors", "a.weight", "shape"), [0, 1 << 62, 4], "tensors.a.weight: shape"),
        (("tensors", "a.weight", "shape"), [1 << 61], "tensors.a.weight: shape"),
        (("tensors", "a.weight", "shape"), [1] * 100_000, "tensors.a.weight.shape"),
        (("files", "README.md", "bytes"), -1, "files.README.md.bytes"),
        (("files", "README.md", "bytes"), 10**30, "files.README.md.bytes"),
        (("created",), "yesterday", "created"),
        (("dtype",), "pickle", "dtype"),
        (("parent_digest",), "A" * 64, "parent_digest"),
        (("created",), "\u0662\u0660\u0662\u0666-11-23T15:02:07Z", "created"),
        (("library_version",), "1\n2", "library_version"),
        (("library_version",), "patient.Alice.Smith.HIV+", "library_version"),
        (("library_version",), "0.1.0+Alice", "library_version"),
        (("library_version",), "1\u0661.0", "library_version"),
    ],
)
def test_field_that_is_not_what_it_must_be_is_named(path, value, named):
    with pytest.raises(ArtifactRefused, match="manifest") as caught:
        parse_manifest(_edited(small(), *path, value=value))
    assert named in caught.value.problem


@pytest.mark.parametrize("version", [__version__, "0.1.0", "1.0.0rc1", "12.3.4.post1", "0.2.0.dev3"])
def test_versions_of_the_library_pass(version):
    assert parse_manifest(_edited(small(), "library_version", value=version)).library_version == version


@pytest.mark.parametrize("shape", [[1] * 8, [0, 1 << 60], [], [1, 0, 1 << 59, 2]])
def test_any_shape_that_a_tensor_can_have_passes(shape):
    entry = TensorEntry(dtype="float32", shape=shape, sha256="0" * 64, file="tensors.safetensors")
    assert list(torch.empty(entry.shape).view(entry.shape).shape) == shape


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 1.5),
        ("beta", 1.0),
        ("plug_in_layers", 3),
        ("full_parameters", 0),
        ("full_parameters", 10**400),
        ("full_loss", 10**400),
        ("fit_tokens", 10**400),
        ("verbatim_parameters", 10**9),
        ("layer_map", ["plug_in", "kept"]),
        ("layer_map", ["plug_in", "gone", "plug_in"]),
        ("harmonizer", None),
        ("compression", "svd\n# Heading"),
        ("stage_one", {"start": "random", "objective": "lm"}),
        ("stage_one", {"start": "random", "objective": "lm", "steps": -1}),
        ("stage_one", {"start": "`random`", "objective": "lm", "steps": 1}),
    ],
)
def test_emulator_content_that_contradicts_itself_is_refused(field, value):
    with pytest.raises(ArtifactRefused, match=r"content|full_loss"):
        parse_manifest(_edited(emulator(), "content", field, value=value))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), True, "1.0", None, [1.0], 10**400])
def test_metrics_are_finite_plain_numbers(number):
    with pytest.raises(ArtifactRefused, match="'loss'"):
        MetricsContent(values={"loss": number})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[1]", "object"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"content": {"x": 1, "x": 2}}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"a": 1e999}', "JSON"),
        (b"[" * 200_000, "JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "JSON"),
    ],
)
def test_text_that_is_no_strict_json_is_refused(data, why):
    with pytest.raises(ArtifactRefused, match=why):
        parse_manifest(data)


def test_oversized_text_is_refused():
    with pytest.raises(ArtifactRefused, match="more than"):
        parse_manifest(b" " * (MANIFEST_LIMIT + 1))


@pytest.mark.parametrize("long", ["\x1b[2J" + "x" * 1_000_000, "\u202e" * 1_000_000])
@pytest.mark.parametrize(
    "path",
    [
        ("kind",),
        ("schema_version",),
        ("dtype",),
        ("base_model",),
        ("created",),
        ("tensors", "a.weight", "dtype"),
        ("tensors", "a.weight", "file"),
        ("content", "positions", 0),
    ],
)
def test_whatever_a_manifest_says_its_refusal_is_short_and_readable(path, long):
    with pytest.raises(ArtifactRefused) as caught:
        parse_manifest(_edited(small(), *path, value=long))
    assert len(caught.value.problem) < 1000
    assert caught.value.problem.isprintable()


@pytest.mark.parametrize("path", [(), ("content",), ("content", "settings"), ("tensors",), ("files",)])
def test_whatever_keys_a_manifest_has_its_refusal_is_short_and_readable(path):
    for key in ("\x1b[2J", "\x1b[2J" * 250_000, "a\nb", "\u202e", "'" * 1_000_000):
        with pytest.raises(ArtifactRefused) as caught:
            parse_manifest(_edited(small(), *path, key, value=None))
        assert len(caught.value.problem) < 1000
        assert caught.value.problem.isprintable()
    twice = b'{"' + b"x" * 1_000_000 + b'": 1, "' + b"x" * 1_000_000 + b'": 2}'
    with pytest.raises(ArtifactRefused, match="twice") as caught:
        parse_manifest(twice)
    assert len(caught.value.problem) < 1000


def test_shares_and_margins():
    content = emulator().manifest.content
    assert isinstance(content, EmulatorContent)
    assert content.plug_in_positions == (0, 7)
    assert content.verbatim_share == pytest.approx(content.verbatim_parameters / content.full_parameters)
    assert content.loss_margin == pytest.approx(1.25)
    assert content.model_copy(update={"emulator_loss": None}).loss_margin is None


def test_loss_that_is_not_finite_is_refused_however_it_came_in():
    content = emulator().manifest.content
    with pytest.raises(ArtifactRefused, match="full_loss is nan"):
        emulator(full_loss=float("nan"))
    with pytest.raises(ArtifactRefused, match="emulator_loss is inf"):
        Artifact.create("emulator", content.model_copy(update={"emulator_loss": float("inf")}), {})


def test_contents_do_not_change_under_a_digest():
    content = DeltaContent(method="layers", positions=[0])
    with pytest.raises(ValidationError):
        content.method = "lora"

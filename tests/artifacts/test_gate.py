import numpy as np
import pytest
import torch

from scaleot_ray.artifacts import Artifact, DeltaContent, MetricsContent, check_crossing
from scaleot_ray.artifacts.card import with_card
from scaleot_ray.artifacts.delta_gate import ANY_START, delta_limit
from scaleot_ray.artifacts.gate import METRICS
from scaleot_ray.artifacts.provenance import LICENCE_LIMIT, NAME_LIMIT
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.evaluation.choice import ChoiceScore
from scaleot_ray.evaluation.loss import LossScore
from scaleot_ray.stages.score import numbers
from scaleot_ray.tuning.lora import alpha_of
from tests.artifacts.examples import MAP, delta, emulator, metrics

FAMILIES = ["llama", "gpt2", "neox"]
METHODS = ["layers", "lora", "bottleneck"]


def _refused(artifact: Artifact, message: str, **options) -> None:
    with pytest.raises(ArtifactRefused, match=message) as caught:
        check_crossing(artifact, **options)
    assert caught.value.remedy


def _with(artifact: Artifact, tensors=None, without=(), **manifest) -> Artifact:
    """The artefact with tensors added or taken away and manifest fields changed, digests all right."""
    old = artifact.manifest
    kept = {name: tensor for name, tensor in artifact.tensors.items() if name not in without}
    kept_fields = ("content", "family", "model_config_json", "base_model", "licence")
    fields = {**{name: getattr(old, name) for name in kept_fields}, **manifest}
    return Artifact.create(
        old.kind,
        fields["content"],
        {**kept, **(tensors or {})},
        fields.get("files", artifact.files),
        fields["family"],
        fields["model_config_json"],
        fields.get("parent_digest", old.parent_digest),
        fields["base_model"],
        fields["licence"],
    )


# Emulators.


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_protected_emulator_passes(name, beta):
    check_crossing(emulator(name, beta=beta))


def test_emulator_of_dropped_layers_passes():
    check_crossing(emulator(layer_map=[role.replace("replaced", "dropped") for role in MAP]))


NOTHING_HIDDEN = ["plug_in", *["kept"] * 6, "plug_in"]


@pytest.mark.parametrize("beta", [0.0, 0.8])
@pytest.mark.parametrize("claim", [True, False])
def test_emulator_that_hides_nothing_is_refused_whatever_it_claims(beta, claim):
    _refused(emulator(layer_map=NOTHING_HIDDEN, beta=beta, protected=claim), "hides nothing")


def test_emulator_built_unprotected_is_refused():
    _refused(emulator(protected=False), "built unprotected")


@pytest.mark.parametrize("role", ["replaced", "dropped"])
def test_raw_layer_that_the_map_calls_gone_is_refused(role):
    index = MAP.index(role)
    raw = emulator(layer_map=NOTHING_HIDDEN).tensors
    name = f"model.layers.{index}.mlp.up_proj.weight"
    _refused(_with(emulator(), {name: raw[name]}), f"'{name}' is layer {index}'s own")


def test_manifest_that_calls_raw_layers_replaced_is_refused():
    lie = emulator(layer_map=NOTHING_HIDDEN)
    _refused(_with(lie, content=emulator().manifest.content), "layer 2's own, which the layer map calls replaced")


def test_understated_verbatim_share_is_refused():
    honest = emulator().manifest.content.verbatim_parameters
    _refused(emulator(verbatim_parameters=honest - 1), f"{honest} of the owner's parameters would leave verbatim")


def test_layers_smuggled_under_another_name_are_refused():
    raw = emulator(layer_map=NOTHING_HIDDEN).tensors["model.layers.2.mlp.up_proj.weight"]
    _refused(_with(emulator(), {"model.extra.weight": raw}), "would leave verbatim")


def test_rank_reduced_matrices_stored_as_products_do_not_count_as_verbatim():
    # Where factors need more room than their product, the product is stored under the weight's name.
    artifact = emulator(beta=0.25)
    name = "model.layers.1.self_attn.q_proj"
    product = artifact.tensors[f"{name}.up.0"] @ artifact.tensors[f"{name}.down"]
    check_crossing(_with(artifact, {f"{name}.weight": product}, without=(f"{name}.up.0", f"{name}.down")))


@pytest.mark.parametrize("part", ["down.weight", "up.bias"])
def test_harmonizer_that_is_not_whole_is_refused(part):
    name = f"model.layers.2.{part}"
    _refused(_with(emulator(), without=(name,)), f"layer 2: harmonizer tensor '{part}' has shape None")
    _refused(_with(emulator(), {name: torch.ones(3)}), rf"harmonizer tensor '{part}' has shape \[3\]")


def test_layer_without_tensors_is_refused():
    artifact = emulator()
    names = tuple(name for name in artifact.tensors if name.startswith("model.layers.1."))
    _refused(_with(artifact, without=names), "layer 1 is kept by the layer map, but has no tensors")


def test_tensor_of_a_layer_beyond_the_map_is_refused():
    _refused(_with(emulator(), {"model.layers.8.x": torch.ones(1)}), r"'model\.layers\.8\.x' belongs to layer 8")


def test_empty_tensor_is_refused():
    _refused(_with(emulator(), {"model.norm.weight": torch.ones(0)}), r"'model\.norm\.weight' is empty")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no known model"),
        ({"model_type": "hologram"}, "no known model"),
        ({"model_type": "llama", "num_hidden_layers": "many"}, "no known model"),
        ({"model_type": "llama", "num_hidden_layers": 9}, "layer_map has 8 layers, the model has 9"),
    ],
)
def test_config_that_does_not_fit_is_refused(config, message):
    _refused(_with(emulator(), model_config_json=config), message)


def test_unknown_family_is_refused():
    _refused(_with(emulator(), family="hologram"), "family 'hologram' is unknown")


@pytest.mark.parametrize("name", ["weights.bin", "model.pkl", "run.py", "sub/setup.sh", "tokenizer"])
def test_files_that_an_emulator_does_not_have_are_refused(name):
    _refused(emulator().with_files({name: b""}), f"file '{name}' does not belong")


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "tokenizer/merges.txt", "chat_template.jinja"])
def test_card_licence_and_tokenizer_pass(name):
    check_crossing(emulator().with_files({name: b"text"}))


def test_altered_and_broken_emulators_are_refused():
    artifact = emulator()
    artifact.tensors = {**artifact.tensors, "model.norm.weight": artifact.tensors["model.norm.weight"] + 1}
    _refused(artifact, r"'model\.norm\.weight' was altered")
    artifact = emulator()
    artifact.tensors = {**artifact.tensors, "model.norm.weight": torch.full((32,), float("nan"))}
    _refused(artifact, r"'model\.norm\.weight' has values that are not finite")


# Deltas.


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_delta_of_its_parent_passes(name, method):
    parent = emulator(name).manifest
    check_crossing(delta(parent, method), parent=parent)


@pytest.mark.parametrize("method", METHODS)
def test_delta_of_another_parent_is_refused(method):
    parent, other = emulator().manifest, emulator(emulator_loss=5.0).manifest
    _refused(delta(parent, method), "was tuned on emulator", parent=other)
    _refused(delta(parent, method, parent_digest=None), "was tuned on emulator None", parent=parent)
    _refused(delta(parent, method), "without its emulator")
    _refused(delta(parent, method), "expected an emulator", parent=metrics().manifest)


@pytest.mark.parametrize("method", METHODS)
def test_delta_with_a_tensor_more_less_or_misshaped_is_refused(method):
    parent = emulator().manifest
    good = delta(parent, method)
    name = sorted(good.tensors)[0]
    _refused(_with(good, without=(name,)), f"'{name}' is missing", parent=parent)
    _refused(_with(good, {"private.rows": torch.ones(3)}), r"'private\.rows' is none", parent=parent)
    kept = "model.layers.1.mlp.up_proj.weight"
    _refused(_with(good, {kept: torch.ones(48, 32)}), f"'{kept}' is none", parent=parent)
    _refused(_with(good, {name: torch.ones(3, 3, 3)}), rf"'{name}' has shape \[3, 3, 3\]", parent=parent)
    whole = torch.zeros(good.tensors[name].shape, dtype=torch.int64)
    _refused(_with(good, {name: whole}), f"'{name}' has type int64", parent=parent)
    half = good.tensors[name].half()
    _refused(_with(good, {name: half}), f"'{name}' has type float16; on this emulator it is float32", parent=parent)


def test_transposed_lora_of_a_transposed_family_is_refused():
    parent = emulator("gpt2").manifest
    good = delta(parent, "lora")
    name = "transformer.h.0.attn.c_attn.lora_A"
    assert list(good.tensors[name].shape) == [3, 32]
    _refused(
        _with(good, {name: torch.zeros(3, 96)}), rf"'{name}' has shape \[3, 96\], expected \[3, 32\]", parent=parent
    )


@pytest.mark.parametrize("positions", [[0], [0, 1], [7, 0], [0, 7, 7], []])
def test_positions_are_the_plug_in_layers(positions):
    parent = emulator().manifest
    _refused(delta(parent, "layers", positions=positions), "positions are", parent=parent)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("magic", {}, "method 'magic' is unknown"),
        ("layers", {"note": "row 17: Alice"}, "settings of layers"),
        ("lora", {"rank": 3, "alpha": 6.0}, "settings of lora"),
        ("lora", {"rank": 0, "alpha": 6.0, "targets": ["self_attn.q_proj"]}, "rank is 0"),
        ("lora", {"rank": 2, "alpha": 6.0, "targets": ["self_attn.q_proj"]}, "expected"),
        ("lora", {"rank": 3, "alpha": -1.0, "targets": ["self_attn.q_proj"]}, "alpha is -1.0"),
        ("lora", {"rank": 3, "alpha": 6.0, "targets": ["lm_head"]}, "targets are"),
        ("lora", {"rank": 3, "alpha": 6.0, "targets": ["self_attn.q_proj"] * 2}, "targets are"),
        ("lora", {"rank": 3, "alpha": 6.0, "targets": []}, "targets are"),
        ("bottleneck", {"width": "5", "activation": "gelu"}, "width is '5'"),
        ("bottleneck", {"width": 5, "activation": "exec"}, "activation is 'exec'"),
    ],
)
def test_settings_are_those_of_the_method(method, settings, message):
    parent = emulator().manifest
    tensors = delta(parent, method if method in METHODS else "layers").tensors
    content = DeltaContent(method=method, positions=[0, 7], settings=settings)
    _refused(Artifact.made_from(parent, "delta", content, tensors), message, parent=parent)


def test_a_delta_begins_where_its_round_does():
    parent = emulator().manifest
    plain = delta(parent)
    content = plain.manifest.content.model_copy(update={"start": "ab" * 32})
    later = Artifact.made_from(parent, "delta", content, plain.tensors)
    check_crossing(plain, parent=parent)
    check_crossing(later, parent=parent, start="ab" * 32)
    check_crossing(later, parent=parent, start=ANY_START)
    _refused(later, "tuning began with delta abab.*begins with the emulator as it is", parent=parent)
    with pytest.raises(ArtifactRefused, match="began with the emulator as it is, this round begins with delta abab"):
        check_crossing(plain, parent=parent, start="ab" * 32)
    with pytest.raises(ArtifactRefused, match="this round begins with delta cdcd"):
        check_crossing(later, parent=parent, start="cd" * 32)
    assert plain.manifest.digest() != later.manifest.digest()


def test_delta_that_names_another_family_is_refused():
    parent = emulator().manifest
    _refused(delta(parent, family="gpt2"), "another model family", parent=parent)


@pytest.mark.parametrize("make", [delta, lambda parent: metrics(parent=parent)])
def test_files_in_a_delta_or_metrics_are_refused(make):
    parent = emulator().manifest
    artifact = make(parent)
    _refused(artifact.with_files({"rows.jsonl": b"private"}), r"'rows\.jsonl' does not belong", parent=parent)
    _refused(artifact.with_files({"README.md": b"x" * 100_000}), "100000 bytes; a card", parent=parent)


# Cards, base model, licence.


@pytest.mark.parametrize("make", [delta, lambda parent: metrics(parent=parent)])
def test_the_card_of_what_a_data_owner_sends_is_the_one_that_follows_from_its_manifest(make):
    parent = emulator().manifest
    artifact = with_card(make(parent))
    check_crossing(artifact, parent=parent)
    card = artifact.files["README.md"]
    for other in (b"", card + b"Row 17: Alice.\n", card.replace(b"Apache", b"MIT"), card.replace(b"some/", b"any/")):
        _refused(artifact.with_files({"README.md": other}), "'README.md' says something else", parent=parent)


LONG, ODD = "x" * (LICENCE_LIMIT + 1), "\u202eMIT"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("licence", LONG, f"licence has {LICENCE_LIMIT + 1} bytes"),
        ("licence", "é" * (LICENCE_LIMIT // 2 + 1), f"licence has {LICENCE_LIMIT + 2} bytes"),
        ("licence", "", "licence has 0 bytes"),
        ("licence", ODD, "licence has the character '.u202e'"),
        ("licence", "\x1b[2J", "licence has the character '.x1b'"),
        ("base_model", "x" * (NAME_LIMIT + 1), "base_model has 129 characters"),
        ("base_model", "", "base_model has 0 characters"),
        ("base_model", "/home/alice/model", "base_model is '/home/alice/model': a path"),
        ("base_model", "../model", "a path"),
        ("base_model", "home/alice/model", "a path"),
        ("base_model", "C:\\models", "base_model has the character ':'"),
        ("base_model", "m`\n# Heading", "base_model has the character '`'"),
    ],
)
@pytest.mark.parametrize("kind", ["emulator", "delta", "metrics"])
def test_overlong_and_odd_notices_are_refused_by_name(kind, field, value, message):
    parent = emulator().manifest
    artifact = {"emulator": emulator, "delta": lambda: delta(parent), "metrics": lambda: metrics(parent=parent)}[kind]()
    artifact.manifest = artifact.manifest.model_copy(update={field: value})
    _refused(artifact, message, parent=parent)


@pytest.mark.parametrize("field", ["base_model", "licence"])
@pytest.mark.parametrize("value", ["Alice lives at 12 Main Street", None])
def test_base_model_and_licence_of_what_a_data_owner_sends_are_the_emulators(field, value):
    parent = emulator().manifest
    for artifact in (delta(parent), metrics(parent=parent)):
        _refused(_with(artifact, **{field: value}), f"{field} of the .* is not what its emulator says", parent=parent)
    _refused(metrics(parent=parent), "belong to another emulator")


def test_artefacts_of_an_emulator_without_base_model_pass():
    parent = _with(emulator(), base_model=None, licence=None).manifest
    for artifact in (delta(parent), metrics(parent=parent)):
        check_crossing(with_card(artifact), parent=parent)


# Metrics, size, kind.


def test_metrics_pass():
    check_crossing(metrics())
    parent = emulator().manifest
    check_crossing(metrics(parent=parent), parent=parent)


def test_metrics_that_carry_something_in_fields_of_other_kinds_are_refused():
    parent = emulator().manifest
    good = metrics(parent=parent)
    _refused(_with(good, parent_digest="0" * 64), "belong to another emulator", parent=parent)
    _refused(_with(good, family="Alice"), "metrics carry no model config", parent=parent)
    _refused(_with(good, model_config_json={"rows": ["Alice"]}), "metrics carry no model config", parent=parent)
    _refused(_with(metrics(), parent_digest="0" * 64), "belong to another emulator")


def test_metrics_that_carry_more_than_numbers_are_refused():
    _refused(Artifact.create("metrics", MetricsContent(values={}), {"rows": torch.ones(1)}), "carry no tensors")
    _refused(metrics({"Alice's address\n": 1.0}), "metric name")
    for name in ("loss", "emulator_tuned.", "emulator_tuned.Alice", "Emulator_tuned", "", "x" * 100):
        _refused(metrics({"emulator_tuned": 1.0, name: 1.0}), "metric name")


def test_every_metric_that_tuning_writes_passes():
    choice = ChoiceScore(*(np.ones(3) for _ in range(4)))
    loss = LossScore(np.ones(3), np.ones(3, dtype=np.int64))
    values = {}
    for name in ("emulator_zero_shot", "emulator_tuned"):
        values |= numbers(choice, name) | numbers(loss, name)
    assert values.keys() == set(METRICS)
    parent = emulator().manifest
    check_crossing(metrics(values, parent), parent=parent)


@pytest.mark.parametrize(
    "files",
    [
        ["Alice.Smith.HIV.safetensors"],
        ["tensors-00001-of-00001.safetensors"],
        ["tensors-00001-of-00003.safetensors", "tensors-00003-of-00003.safetensors"],
        ["tensors-00002-of-00002.safetensors", "tensors.safetensors"],
        ["tensors-12345-of-67890.safetensors"],
        ["tensors-0000\u0661-of-00002.safetensors", "tensors-00002-of-00002.safetensors"],
    ],
)
def test_tensor_files_of_a_delta_that_could_say_something_are_refused(files):
    parent = emulator().manifest
    artifact = delta(parent)
    tensors = {
        name: entry.model_copy(update={"file": files[number % len(files)]})
        for number, (name, entry) in enumerate(artifact.manifest.tensors.items())
    }
    artifact.manifest = artifact.manifest.model_copy(update={"tensors": tensors})
    _refused(artifact, "file", parent=parent)


@pytest.mark.parametrize("shard_bytes", [1, 1000, 2**31])
def test_a_delta_in_any_number_of_files_passes(shard_bytes):
    parent = emulator().manifest
    plain = delta(parent)
    fields = {"family": plain.manifest.family, "parent_digest": plain.manifest.parent_digest}
    fields |= {"base_model": parent.base_model, "licence": parent.licence, "shard_bytes": shard_bytes}
    check_crossing(Artifact.create("delta", plain.manifest.content, plain.tensors, **fields), parent=parent)


def test_metrics_that_skipped_their_own_check_are_refused():
    artifact = metrics()
    content = MetricsContent.model_construct(values={"loss": float("nan")})
    artifact.manifest = artifact.manifest.model_copy(update={"content": content})
    _refused(artifact, "NaN is no JSON number")


@pytest.mark.parametrize("alpha", [10**400, 0, -1.0, float("inf")])
def test_alpha_that_is_no_number_above_zero_is_refused(alpha):
    parent = emulator().manifest
    good = delta(parent, "lora")
    bad = good.manifest.content.model_copy(update={"settings": {**good.manifest.content.settings, "alpha": alpha}})
    good.manifest = good.manifest.model_copy(update={"content": bad})
    _refused(good, "alpha is|no JSON number", parent=parent)
    with pytest.raises(ArtifactRefused, match="a number above zero"):
        alpha_of({"alpha": alpha})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("method", "setting"), [("lora", "rank"), ("bottleneck", "width")])
def test_delta_larger_than_the_layers_it_changes_is_refused(name, method, setting):
    parent = emulator(name).manifest
    limit = delta_limit(parent)
    assert limit == delta(parent, "layers").nbytes
    one, two = (delta(parent, method, size=size).nbytes for size in (1, 2))
    most = (limit - one) // (two - one) + 1
    check_crossing(delta(parent, method, size=most), parent=parent)
    more = delta(parent, method, size=most + 1)
    assert more.manifest.content.settings[setting] == most + 1
    _refused(
        more, f"delta of method '{method}' has {more.nbytes} bytes, more than the {limit} of the plug", parent=parent
    )


def test_delta_of_a_wider_type_than_deltas_have_is_refused():
    half = {name: tensor.bfloat16() for name, tensor in emulator().tensors.items()}
    for parent in (emulator().manifest, _with(emulator(), half).manifest):
        good = delta(parent, "layers")
        assert good.nbytes == delta_limit(parent)
        wide = {name: tensor.double() for name, tensor in good.tensors.items()}
        _refused(_with(good, wide), "has type float64; on this emulator it is float32", parent=parent)
    double = _with(emulator(), {name: tensor.double() for name, tensor in emulator().tensors.items()}).manifest
    good = delta(double, "layers")
    check_crossing(_with(good, {name: tensor.double() for name, tensor in good.tensors.items()}), parent=double)
    _refused(good, "has type float32; on this emulator it is float64", parent=double)


def test_kind_that_is_not_on_the_list_is_refused():
    artifact = metrics()
    artifact.manifest = artifact.manifest.model_copy(update={"kind": "pickle"})
    _refused(artifact, "kind is 'pickle'")

import json

import pytest

from scaleot_ray.artifacts import check_crossing, describe, layer_picture, model_card
from scaleot_ray.artifacts.card import CARD_LIMIT, with_card
from scaleot_ray.artifacts.provenance import LICENCE_LIMIT
from tests.artifacts.examples import MAP, delta, emulator, metrics


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_emulator_described(name, beta):
    artifact = emulator(name, beta=beta)
    content = describe(artifact.manifest)
    assert json.loads(json.dumps(content)) == content
    assert content["digest"] == artifact.digest
    assert content["bytes"] == artifact.nbytes
    assert (content["plug_in_layers"], content["alpha"], content["beta"]) == (2, 0.5, beta)
    assert content["layer_map"] == MAP
    assert content["layers_by_role"] == {"plug_in": 2, "kept": 3, "replaced": 2, "dropped": 1}
    assert content["loss_margin"] == pytest.approx(1.25)
    assert 0 < content["verbatim_share"] < 1
    counts = content["parameters_by_role"]
    assert sum(counts.values()) == content["parameters"] == sum(t.numel() for t in artifact.tensors.values())
    assert counts["harmonizers"] == 2 * (4 * 32 + 4 + 32 * 4 + 32)
    assert (counts["kept_factors"] > 0) is (beta > 0)
    assert counts["outside_layers"] + counts["plug_in"] + counts["kept"] == content["verbatim_parameters"]


def test_other_kinds_described():
    parent = emulator()
    content = describe(delta(parent.manifest, "lora").manifest)
    assert (content["kind"], content["method"], content["positions"]) == ("delta", "lora", [0, 7])
    assert content["parent_digest"] == parent.digest
    assert content["settings"]["rank"] == 3
    assert describe(metrics().manifest)["values"] == {"emulator_zero_shot": 2.5, "emulator_tuned": 2.0}


@pytest.mark.parametrize("layers", [1, 8, 30, 50, 51, 80, 126])
def test_picture_shows_every_layer_within_eighty_columns(layers):
    roles = ["plug_in", "kept", "replaced", "dropped"]
    layer_map = [roles[(index * 7) % 4] for index in range(layers)]
    lines = layer_picture(layer_map).splitlines()
    assert max(len(line) for line in lines) <= 80
    rows = [line for line in lines if line[:5].strip().isdigit()]
    letters = "".join(row[7:].replace(" ", "") for row in rows)
    assert letters == "".join(
        {"plug_in": "P", "kept": "k", "replaced": "h", "dropped": "."}[role] for role in layer_map
    )
    assert [int(row[:5]) for row in rows] == list(range(0, layers, 50))
    for role, word in zip(roles, ["plug-in", "kept", "replaced by a harmonizer", "dropped"], strict=True):
        legend = [line for line in lines if word in line]
        assert len(legend) == (1 if role in layer_map else 0)
        if legend:
            assert str(layer_map.count(role)) in legend[0].split()


def test_picture_of_a_small_emulator():
    assert layer_picture(MAP).splitlines()[0] == "    0  Pkhkh.kP"


def test_card_of_an_emulator_is_honest():
    artifact = emulator(beta=0.8)
    card = model_card(artifact.manifest)
    assert card.startswith("# Emulator for `some/model`\n")
    assert "> Apache-2.0\n> Copyright Somebody" in card
    assert "(2, 0.5, 0.8)" in card
    assert "rank 4, silu" in card
    assert "full model 3.000, emulator 4.250, margin +1.250" in card
    share = artifact.manifest.content.verbatim_share
    assert f"{100 * share:.1f} % of the full model's parameters" in card
    assert "Embeddings, output head and final norm leave verbatim" in card
    assert "Plug-in layers leave verbatim: 0, 7" in card
    assert "Kept layers 1, 3, 6: attention weights are cut in rank by β = 0.8" in card
    assert "Kept layers leave verbatim: 1, 3, 6" in model_card(emulator().manifest)
    assert layer_picture(MAP) in card
    assert "hides nothing" not in card
    check_crossing(with_card(artifact))
    assert with_card(artifact).files["README.md"] == card.encode()
    # The card does not count the card: the receiver, who has both, finds the same.
    assert model_card(with_card(artifact).manifest) == card


EMULATOR_CARD = """\
## How it was built

- Builder `scaleot`, triplet (plug-in layers, α, β) = (2, 0.5, 0.8), layout `ends`.
- Replaced layers have a harmonizer each: x + W_up · act(W_down x + b_d) + b_u, rank 4, silu, fitted on the owner's \
public text.
{learnt}- Loss on public held-out text, nats per token: full model 3.000, emulator 4.250, margin +1.250.

"""


def test_card_of_an_emulator_says_how_it_was_learnt():
    # That of an emulator of before, which does not know, stays as it was.
    assert EMULATOR_CARD.format(learnt="") in model_card(emulator(beta=0.8).manifest)
    spec = {"start": "closed_form", "objective": "distill", "steps": 1200}
    artifact = emulator(beta=0.8, stage_one=spec, compression="svd")
    line = "- Stage 1: start `closed_form`, objective `distill`, 1,200 steps. Rank compression: `svd`.\n"
    assert EMULATOR_CARD.format(learnt=line) in model_card(artifact.manifest)
    content = describe(artifact.manifest)
    assert (content["stage_one"], content["compression"]) == ({**spec, "generated_tokens": 0}, "svd")
    assert content["fit_tokens"] == 0
    assert (describe(emulator().manifest)["stage_one"], describe(emulator().manifest)["compression"]) == (None, None)
    check_crossing(with_card(artifact))
    artifact = emulator(beta=0.8, stage_one={**spec, "generated_tokens": 2048}, fit_tokens=4096)
    line = (
        "- Stage 1: start `closed_form`, objective `distill`, 1,200 steps. Beside public text, 2,048 tokens that the "
        "model generated itself. Fitted in order of depth on 4,096 tokens.\n"
    )
    assert EMULATOR_CARD.format(learnt=line) in model_card(artifact.manifest)
    assert (describe(artifact.manifest)["fit_tokens"], describe(artifact.manifest)["fit_steps"]) == (4096, 0)
    check_crossing(with_card(artifact))


def test_card_says_when_an_emulator_hides_nothing():
    bare = emulator(layer_map=["plug_in", *["kept"] * 6, "plug_in"], full_loss=None, protected=False)
    card = model_card(bare.manifest.model_copy(update={"base_model": None, "licence": None}))
    assert "It hides nothing" in card
    assert "Kept layers leave verbatim: 1-6" in card
    assert "not measured" in card
    assert "# Emulator for a model that is not named\n" in card
    assert "> not stated" in card


# The gate of another version compares cards: a change of their wording is a change of the format.
DELTA_CARD = """\
# Delta for `some/model`

Base model: `some/model` (family llama).
Its licence notice, which also applies to what is made from it:

> Apache-2.0
> Copyright Somebody

## How it was made

Plug-in layers 0, 7 tuned by the method `bottleneck` (width 5, activation gelu) on emulator `{digest}`.

## What it reveals

{parameters} numbers that tuning on private data changed, and nothing else. Such numbers can still tell something \
about the data they were tuned on; this artefact claims no differential privacy.

## What it is for

It goes into the full model whose emulator it was tuned on, and into no other.
"""
METRICS_CARD = """\
# Metrics for `some/model`

Base model: `some/model` (family llama).
Its licence notice, which also applies to what is made from it:

> Apache-2.0
> Copyright Somebody

## How it was made

Measured by the data owner on test rows of its own on emulator `{digest}`.

## What it reveals

2 numbers about these rows, and nothing else: emulator_zero_shot, emulator_tuned.

## What it is for

It tells the model owner how well the tuning went.
"""


def test_card_of_a_delta_and_of_metrics():
    parent = emulator().manifest
    artifact = delta(parent, "bottleneck")
    parameters = sum(tensor.numel() for tensor in artifact.tensors.values())
    assert model_card(artifact.manifest) == DELTA_CARD.format(digest=parent.digest(), parameters=parameters)
    assert model_card(metrics(parent=parent).manifest) == METRICS_CARD.format(digest=parent.digest())


@pytest.mark.parametrize("letter", ["x", "\n", "é\n", "€", "𝕏\n"])
def test_no_card_is_longer_than_a_card_may_be(letter):
    licence = ("x" + letter * LICENCE_LIMIT).encode()[: LICENCE_LIMIT - 1].decode(errors="ignore") + "y"
    parent = emulator().manifest.model_copy(update={"licence": licence})
    many = {f"{index:03d} {'n' * 96}": 1.0 for index in range(1000)}
    for manifest in (parent, delta(parent).manifest, metrics(many, parent).manifest):
        assert len(model_card(manifest).encode()) <= CARD_LIMIT
    # Nor one of a model with more layers than any has.
    layers = 200_000
    content = parent.content.model_copy(update={"layer_map": ["kept", "dropped"] * layers})
    card = model_card(parent.model_copy(update={"content": content}))
    assert len(card.encode()) <= CARD_LIMIT
    assert card.endswith("[…] cut here: the rest is in the manifest.\n")


def test_licence_cannot_leave_its_quotation():
    manifest = metrics(parent=emulator().manifest).manifest
    card = model_card(manifest.model_copy(update={"licence": "MIT\n# Fake heading\u2028# Fake\n\nend"}))
    assert "> MIT\n> # Fake heading\n> # Fake\n>\n> end\n" in card

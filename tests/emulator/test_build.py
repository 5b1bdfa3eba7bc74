import copy
import json
import math
import re
from functools import cache

import pytest
import torch

from scaleot_ray.artifacts import read_artifact, write_artifact
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.config import EmulatorSettings, StageOneSettings
from scaleot_ray.emulator.assemble import assemble
from scaleot_ray.emulator.build import FullModelFacts, build_emulator, choose_layers
from scaleot_ray.emulator.layer_map import LayerRole, positions
from scaleot_ray.emulator.layer_replace import train_stage_one
from scaleot_ray.emulator.rank_compression import kept_rank
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families import dense_weight, family_of
from scaleot_ray.families.loading import BaseModel
from tests.emulator.token_stream import RandomTokens
from tests.tiny_models import TINY, tiny_model, tiny_tokenizer, tiny_tokens

FACTS = FullModelFacts(digest="0" * 64)
STREAM = RandomTokens()


def _base(name="llama"):
    model = tiny_model(name).requires_grad_(False)
    return BaseModel(model, tiny_tokenizer(), family_of(model.config), name, "Apache-2.0")


def _stage_one(base, **changes):
    """Trained once for each model and settings; a copy, whose scores a test may set."""
    return copy.copy(_trained(base.source, base.model.dtype, **changes))


@cache
def _trained(name, dtype, **changes):
    base = _base(name)
    base.model.to(dtype)
    values = {"harmonizer_rank": 8, "start_tokens": 256, "steps": 2, "block_size": 16, "generated_tokens": 0}
    settings = StageOneSettings(**{**values, **changes})
    return train_stage_one(base.model, base.family, STREAM, STREAM.fixed(2), settings)


def _settings(**changes):
    return EmulatorSettings(**{"plug_in_layers": 2, "alpha": 0.5, "beta": 0.5, "compression": "svd", **changes})


def emulator_artifact(*arguments):
    return build_emulator(*arguments)[0]


@torch.no_grad()
def _logits(model):
    return model(input_ids=tiny_tokens()).logits


@pytest.mark.parametrize("name", list(TINY))
def test_nothing_replaced_and_nothing_compressed_is_the_model_exactly(name, tmp_path):
    base = _base(name)
    settings = _settings(alpha=0, beta=0, allow_unprotected=True)
    artifact = emulator_artifact(base, None, settings, FACTS)
    write_artifact(artifact, tmp_path / "emulator")
    emulator = assemble(read_artifact(tmp_path / "emulator", "emulator"))
    assert torch.equal(_logits(emulator), _logits(base.model))
    assert artifact.manifest.content.verbatim_share == 1


@pytest.mark.parametrize("name", list(TINY))
def test_every_family_survives_the_disk_with_layers_replaced_and_compressed(name, tmp_path):
    base = _base(name)
    artifact = emulator_artifact(base, _stage_one(base), _settings(), FACTS, STREAM.fixed(2))
    built = assemble(artifact)
    write_artifact(artifact, tmp_path / "emulator")
    read = assemble(read_artifact(tmp_path / "emulator", "emulator"))
    assert torch.equal(_logits(built), _logits(read))
    assert not torch.allclose(_logits(built), _logits(base.model), atol=1e-3)
    content = artifact.manifest.content
    assert content.layer_map.count("replaced") == 3
    assert content.emulator_loss is not None
    assert content.verbatim_share < 0.9
    check_crossing(artifact)


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8])
def test_factors_give_what_their_products_give(name, beta):
    base = _base(name)
    stage_one = _stage_one(base)
    artifact = emulator_artifact(base, stage_one, _settings(beta=beta), FACTS)
    factored = any(name.endswith(".down") for name in artifact.tensors)
    assert factored == (beta >= 0.5), "factors are stored where they have no more numbers than their product"
    plain = assemble(emulator_artifact(base, stage_one, _settings(beta=0), FACTS))
    for index in positions(artifact.manifest.content.layer_map, LayerRole.KEPT):
        for projection in base.family.attention:
            module = base.family.layers(plain)[index].get_submodule(projection.path)
            weight = dense_weight(module)
            rows = projection.parts(base.model.config) if projection.parts else [torch.arange(len(weight))]
            product = weight.clone()
            for row in rows:
                u, s, vh = torch.linalg.svd(weight[row], full_matrices=False)
                rank = kept_rank((len(row), weight.shape[1]), beta)
                product[row] = u[:, :rank] * s[:rank] @ vh[:rank]
            weight.data.copy_(product)  # dense_weight is a view of the module's own
    assert torch.allclose(_logits(assemble(artifact)), _logits(plain), atol=1e-4)


def test_a_square_matrix_is_stored_as_factors_at_half_its_rank():
    base = _base("opt")  # query, key, value and output are all 32 × 32
    artifact = emulator_artifact(base, _stage_one(base), _settings(beta=0.5), FACTS)
    kept = positions(artifact.manifest.content.layer_map, LayerRole.KEPT)
    assert kept
    for index in kept:
        for projection in base.family.attention:
            name = base.family.layer_prefix(index) + projection.path
            assert artifact.tensors[name + ".up.0"].shape == (32, 16)
            assert artifact.tensors[name + ".down"].shape == (16, 32)
            assert name + ".weight" not in artifact.tensors
    # As many numbers as the product has: the size and what is verbatim do not depend on how it is stored.
    whole = sum(
        dense_weight(base.family.layers(base.model)[0].get_submodule(p.path)).numel() for p in base.family.attention
    )
    content = artifact.manifest.content
    uncompressed = emulator_artifact(base, _stage_one(base), _settings(beta=0), FACTS).manifest.content
    assert content.verbatim_parameters == uncompressed.verbatim_parameters - whole * len(kept)
    check_crossing(artifact)


def test_plug_in_layers_and_everything_outside_layers_leave_as_they_are():
    base = _base()
    artifact = emulator_artifact(base, _stage_one(base), _settings(), FACTS)
    raw = dict(base.model.named_parameters())
    for name in raw:
        inside = name.startswith("model.layers.")
        if not inside or name.startswith(("model.layers.0.", "model.layers.7.")):
            assert torch.equal(artifact.tensors[name], raw[name])


def test_no_raw_weight_of_a_replaced_layer_leaves():
    base = _base()
    artifact = emulator_artifact(base, _stage_one(base), _settings(), FACTS)
    for index in positions(artifact.manifest.content.layer_map, LayerRole.REPLACED):
        prefix = base.family.layer_prefix(index)
        names = {name[len(prefix) :] for name in artifact.tensors if name.startswith(prefix)}
        assert names == {"down.weight", "down.bias", "up.weight", "up.bias"}


def test_the_verbatim_share_counts_what_left_unchanged():
    base = _base()
    artifact = emulator_artifact(base, _stage_one(base), _settings(), FACTS)
    raw = dict(base.model.named_parameters())
    same = sum(
        tensor.numel() for name, tensor in artifact.tensors.items() if name in raw and torch.equal(tensor, raw[name])
    )
    content = artifact.manifest.content
    assert content.verbatim_parameters == same
    assert content.full_parameters == sum(parameter.numel() for parameter in raw.values())


def test_one_stage_one_result_serves_every_triplet_and_layout():
    base = _base()
    stage_one = _stage_one(base)
    for count in (1, 2, 3, 4):
        for layout in ("ends", "spread", "last", "block"):
            for alpha in (0.3, 0.5, 0.75):
                settings = _settings(plug_in_layers=count, layout=layout, alpha=alpha)
                content = emulator_artifact(base, stage_one, settings, FACTS).manifest.content
                assert content.layer_map.count("plug_in") == count
                assert content.layer_map.count("replaced") == math.ceil(alpha * (8 - count))


def test_in_the_block_layout_nothing_in_front_of_the_plug_in_layers_is_replaced():
    base = _base()
    stage_one = _stage_one(base)
    stage_one.scores = {1: -9.0, 2: -8.0, 3: -7.0, 4: 2.0, 5: 1.0, 6: 3.0}
    roles = choose_layers(8, stage_one, _settings(layout="block", plug_in_layers=2, alpha=0.3))
    assert positions(roles, LayerRole.PLUG_IN) == (3, 4)
    assert positions(roles, LayerRole.REPLACED) == (5, 6)
    roles = choose_layers(8, stage_one, _settings(layout="block", plug_in_layers=2, alpha=0.5))
    assert positions(roles, LayerRole.PLUG_IN) == (2, 3)
    assert positions(roles, LayerRole.REPLACED) == (4, 5, 6)
    roles = choose_layers(8, None, _settings(layout="block", plug_in_layers=2, alpha=0.3, builder="uniform_drop"))
    assert min(positions(roles, LayerRole.DROPPED)) > 4
    with pytest.raises(ConfigError, match=r"emulator\.alpha: 1\.0.*\n.*Set emulator\.alpha to at most 0\.83"):
        emulator_artifact(base, stage_one, _settings(layout="block", plug_in_layers=2, alpha=1.0), FACTS)


def test_least_important_layers_are_replaced():
    base = _base()
    stage_one = _stage_one(base)
    stage_one.scores = {1: 3.0, 2: -1.0, 3: 2.0, 4: -2.0, 5: 1.0, 6: -3.0}
    roles = choose_layers(8, stage_one, _settings())
    assert positions(roles, LayerRole.REPLACED) == (2, 4, 6)


def test_uniform_drop_keeps_evenly_spaced_layers():
    roles = choose_layers(30, None, _settings(plug_in_layers=4, builder="uniform_drop"))
    assert positions(roles, LayerRole.DROPPED) == (3, 5, 7, 9, 11, 13, 15, 16, 18, 20, 22, 24, 26)
    base = _base()
    content = emulator_artifact(base, None, _settings(builder="uniform_drop"), FACTS).manifest.content
    assert content.layer_map == ["plug_in", "kept", "dropped", "kept", "dropped", "dropped", "kept", "plug_in"]


@pytest.mark.parametrize("changes", [{"alpha": 0}, {"alpha": 0, "beta": 0.8}])
def test_settings_that_hide_nothing_are_refused_by_name(changes):
    base = _base()
    with pytest.raises(ConfigError, match=r"emulator\.alpha.*\n.*Raise emulator.alpha"):
        emulator_artifact(base, _stage_one(base), _settings(**changes), FACTS)


def test_an_unprotected_emulator_is_built_on_request_and_never_sent():
    base = _base()
    artifact = emulator_artifact(base, None, _settings(alpha=0, allow_unprotected=True), FACTS)
    with pytest.raises(ArtifactRefused, match="protect"):
        check_crossing(artifact)


def test_a_manifest_that_lies_about_protection_is_still_not_sent():
    base = _base()
    artifact = emulator_artifact(base, None, _settings(alpha=0, allow_unprotected=True), FACTS)
    content = artifact.manifest.content.model_copy(update={"protected": True})
    artifact.manifest = artifact.manifest.model_copy(update={"content": content})
    with pytest.raises(ArtifactRefused):
        check_crossing(artifact)


def test_a_missing_tensor_is_named_when_assembling():
    base = _base()
    stage_one = _stage_one(base)
    factor = next(name for name in emulator_artifact(base, stage_one, _settings(), FACTS).tensors if ".up.0" in name)
    for name in ("model.norm.weight", factor, factor.replace("up.0", "down")):
        artifact = emulator_artifact(base, stage_one, _settings(), FACTS)
        del artifact.tensors[name]
        with pytest.raises(ArtifactRefused, match=re.escape(name.removesuffix(".down"))):
            assemble(artifact)


def test_the_card_and_the_tokenizer_travel_along():
    base = _base()
    artifact = emulator_artifact(base, _stage_one(base), _settings(), FACTS)
    assert "Apache-2.0" in artifact.files["README.md"].decode()
    assert json.loads(artifact.files["tokenizer.json"])


def test_the_manifest_says_how_it_was_learnt_and_compressed():
    base = _base()

    def said(stage_one, **changes):
        artifact = emulator_artifact(base, stage_one, _settings(**changes), FACTS)
        return artifact.manifest.content, artifact.files["README.md"].decode()

    paper = _stage_one(base, start="random", objective="lm")
    content, card = said(paper)
    assert (content.stage_one.start, content.stage_one.objective, content.stage_one.steps) == ("random", "lm", 2)
    assert content.compression == "svd"
    assert "- Stage 1: start `random`, objective `lm`, 2 steps. Rank compression: `svd`.\n" in card
    content, card = said(_stage_one(base), compression="activation_aware")
    assert (content.stage_one.start, content.stage_one.objective) == ("closed_form", "distill")
    assert content.compression == "activation_aware"
    content, card = said(_stage_one(base, generated_tokens=4096))
    assert content.stage_one.generated_tokens == 4096
    assert "2 steps. Beside public text, 4,096 tokens that the model generated itself. Rank" in card
    # Nothing is said of what was not done.
    assert said(paper, beta=0)[0].compression is None
    assert said(paper, alpha=1)[0].compression is None
    content, card = said(None, builder="uniform_drop", compression="activation_aware")
    assert (content.stage_one, content.compression) == (None, "svd")  # it has seen no text
    assert "- Rank compression: `svd`.\n" in card


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_activation_aware_compression_loses_less_on_public_text(name):
    base = _base(name)
    stage_one = _stage_one(base)
    tokens = torch.cat([batch["input_ids"] for batch in STREAM.fixed(8)])

    def error(compression):
        # Attention is what is compared, so harmonizers stay out: a third of the layers is replaced in both.
        settings = _settings(alpha=0.3, beta=0.8, compression=compression)
        emulator = assemble(emulator_artifact(base, stage_one, settings, FACTS))
        plain = assemble(emulator_artifact(base, stage_one, _settings(alpha=0.3, beta=0), FACTS))
        with torch.no_grad():
            return (emulator(input_ids=tokens).logits - plain(input_ids=tokens).logits).square().mean()

    assert error("activation_aware") < error("svd")


def test_a_saved_stage_one_result_builds_the_same_emulator(tmp_path):
    base = _base()
    stage_one = _stage_one(base)
    stage_one.save(tmp_path / "stage_one.safetensors")
    loaded, _ = StageOne.load(tmp_path / "stage_one.safetensors")
    settings = _settings(compression="activation_aware")
    built = emulator_artifact(base, stage_one, settings, FACTS)
    again = emulator_artifact(base, loaded, settings, FACTS)
    assert built.digest == again.digest
    assert built.digest != emulator_artifact(base, loaded, _settings(compression="svd"), FACTS).digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types_get_emulators_of_their_type(dtype):
    base = _base()
    base.model.to(dtype)
    artifact = emulator_artifact(
        base, _stage_one(base), _settings(compression="activation_aware"), FACTS, STREAM.fixed(2)
    )
    assert {tensor.dtype for tensor in artifact.tensors.values()} == {dtype}
    assert _logits(assemble(artifact)).dtype == dtype
    assert artifact.manifest.content.emulator_loss is not None


def test_a_sender_does_not_choose_the_receivers_attention_code():
    base = _base()
    artifact = emulator_artifact(base, _stage_one(base), _settings(), FACTS)
    own, manifest = artifact.manifest.model_config_json, artifact.manifest
    config = {**own, "attn_implementation": "somebody/kernel", "auto_map": {"x": "y"}}
    artifact.manifest = manifest.model_copy(update={"model_config_json": config})
    assert torch.isfinite(_logits(assemble(artifact))).all()
    config = {**own, "attribute_map": {"zz": "_attn_implementation_internal"}, "zz": "somebody/kernel"}
    artifact.manifest = manifest.model_copy(update={"model_config_json": config})
    for read in (assemble, check_crossing):
        with pytest.raises(ArtifactRefused, match="'attribute_map' is no part"):
            read(artifact)


def test_what_the_owners_files_say_besides_stays_at_home():
    base = _base()
    base.model.config.internal_notes = "s3://owner/model"
    base.model.config.id2label = {0: "s3://owner/label"}
    base.tokenizer.init_kwargs["internal_notes"] = "s3://owner/tokenizer"
    artifact = emulator_artifact(base, _stage_one(base), _settings(), FACTS)
    assert "s3://owner" not in json.dumps(artifact.manifest.model_config_json)
    assert not any(b"s3://owner" in data for data in artifact.files.values())
    assert torch.isfinite(_logits(assemble(artifact))).all()

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from scaleot_ray.config import ModelSettings
from scaleot_ray.errors import ArtifactRefused, ConfigError, ResourcesMissing
from scaleot_ray.families import family_of
from scaleot_ray.families.loading import BaseModel, load_base_model
from scaleot_ray.plugin import check_place, export_checkpoint, export_peft, merged_weights, plug
from scaleot_ray.plugin.export import EXPORT_FILE
from tests.plugin.deltas import random_delta
from tests.plugin.test_plug import identical, logits
from tests.tiny_models import TINY, save_tiny, tiny_model
from tests.tuning.test_resume import largest_file
from tests.tuning.tiny_batches import bits


def base_model(directory: Path, architecture: str = "llama", dtype: str = "float32") -> BaseModel:
    return load_base_model(
        ModelSettings(path=str(save_tiny(directory / "base", architecture)), dtype=dtype, device="cpu")
    )


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("method", ["layers", "lora"])
def test_a_merged_checkpoint_loads_anywhere(method: str, architecture: str, tmp_path: Path) -> None:
    base = base_model(tmp_path, architecture)
    delta, before = random_delta(base.model, method, size=0.1), bits(base.model)
    assert export_checkpoint(base, delta, tmp_path / "merged") == tmp_path / "merged"
    assert identical(base.model, before)
    with plug(base.model, base.family, delta):
        plugged = logits(base.model)
    assert not torch.allclose(plugged, logits(base.model), atol=1e-2)
    loaded = load(tmp_path / "merged")
    if method == "layers":
        assert torch.equal(logits(loaded), plugged)
    else:
        torch.testing.assert_close(logits(loaded), plugged, rtol=1e-4, atol=1e-5)
    tied = base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("the owner tunes")["input_ids"] == base.tokenizer("the owner tunes")["input_ids"]
    assert "use_cache" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]


@pytest.mark.parametrize("method", ["layers", "lora"])
def test_scale_and_type_travel_along(method: str, tmp_path: Path) -> None:
    base = base_model(tmp_path, dtype="bfloat16")
    delta = random_delta(base.model, method)
    export_checkpoint(base, delta, tmp_path / "merged", scale=0.5)
    loaded = load(tmp_path / "merged")
    assert loaded.dtype is torch.bfloat16
    expected = merged_weights(base.model, base.family, delta, 0.5)
    assert all(torch.equal(loaded.get_parameter(name), value) for name, value in expected.items())


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_peft_adapter_gives_the_plugged_logits(architecture: str, scale: float, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", architecture)
    model = load(tmp_path / "base")
    base, delta = logits(model), random_delta(model, "lora", size=0.1)
    with plug(model, family_of(model.config), delta, scale):
        plugged = logits(model)
    export_peft(delta, model.config, tmp_path / "adapter", base="someone/base", scale=scale)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "scaleot_export.json",
    ]
    adapted = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(adapted), plugged)
    assert not torch.allclose(plugged, base, atol=1e-3)
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA"
    assert values["base_model_name_or_path"] == "someone/base"
    assert values["fan_in_fan_out"] is (architecture == "gpt2")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), plugged, rtol=1e-4, atol=1e-5)


def test_the_adapter_comparison_can_fail(tmp_path: Path) -> None:
    model = tiny_model("llama")
    delta = random_delta(model, "lora", size=0.1)
    with plug(model, family_of(model.config), delta):
        plugged = logits(model)
    delta.tensors["model.layers.7.mlp.down_proj.lora_B"][0, 0] += 1
    export_peft(delta, model.config, tmp_path / "adapter")
    assert not torch.equal(logits(PeftModel.from_pretrained(model, tmp_path / "adapter")), plugged)


def test_a_bfloat16_base_takes_the_adapter_too(tmp_path: Path) -> None:
    base = base_model(tmp_path, dtype="bfloat16")
    delta = random_delta(base.model, "lora", size=0.1)
    with plug(base.model, base.family, delta):
        plugged = logits(base.model)
    export_peft(delta, base.model.config, tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(base.model, tmp_path / "adapter")), plugged)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    with pytest.raises(ConfigError, match="cannot be merged"):
        export_checkpoint(base, random_delta(base.model, "bottleneck"), tmp_path / "out")
    for method in ("layers", "bottleneck"):
        with pytest.raises(ConfigError, match=f"the delta's method is '{method}'"):
            export_peft(random_delta(base.model, method), base.model.config, tmp_path / "out")
    other = random_delta(tiny_model("gpt2"), "lora")
    with pytest.raises(ArtifactRefused, match="no projections of llama"):
        export_peft(other, base.model.config, tmp_path / "out")
    with pytest.raises(ArtifactRefused):
        export_checkpoint(base, other, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_folder_that_exists(kind: str, tmp_path: Path) -> None:
    base, out = base_model(tmp_path), tmp_path / "out"

    def export(overwrite: bool = False, scale: float = 1.0) -> None:
        delta = random_delta(base.model, "lora")
        if kind == "checkpoint":
            export_checkpoint(base, delta, out, scale=scale, overwrite=overwrite)
        else:
            export_peft(delta, base.model.config, out, scale=scale, overwrite=overwrite)

    export()
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="exists already"):
        export()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written
    export(overwrite=True, scale=0.5)
    assert {path.name: path.read_bytes() for path in out.iterdir()} != written
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "photo.jpg").write_text("")
    with pytest.raises(ConfigError, match="is not overwritten"):
        export(overwrite=True)
    assert (out / "photo.jpg").exists()
    out = save_tiny(tmp_path / "other-model")
    (out / "adapter_config.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match=r"holds no scaleot_export\.json"):
        export(overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_export_never_lies_over_what_it_is_made_from(tmp_path: Path) -> None:
    model, link = save_tiny(tmp_path / "models" / "base"), tmp_path / "link"
    (model / EXPORT_FILE).write_text("{}")  # it may be an earlier export itself
    link.symlink_to(model)
    for place in (model, link, model / "inside", tmp_path / "models"):
        with pytest.raises(ConfigError, match=r"output: .* and model\.path"):
            check_place(place, True, {"delta": tmp_path / "none", "model.path": model})
    check_place(tmp_path / "models" / "base2", True, {"model.path": model, "emulator": "somebody/id"})
    check_place(model, True)


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_full_disk_leaves_nothing(kind: str, tmp_path: Path) -> None:
    base = base_model(tmp_path)
    delta = random_delta(base.model, "lora")
    exports = {
        "checkpoint": lambda: export_checkpoint(base, delta, tmp_path / "out"),
        "adapter": lambda: export_peft(delta, base.model.config, tmp_path / "out"),
    }
    with largest_file(8_000), pytest.raises(ResourcesMissing, match="out: writing needs"):
        exports[kind]()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]

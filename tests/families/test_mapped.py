"""Base models whose weights stay in their files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scaleot_ray.config import ModelSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import load_base_model
from scaleot_ray.families.mapped import map_base_model
from tests.tiny_models import TINY, save_tiny, tiny_model, tiny_tokenizer, tiny_tokens


def _settings(path: Path, dtype: str = "float32", **settings: Any) -> ModelSettings:
    return ModelSettings(path=str(path), dtype=dtype, device="cpu", **settings)


def _refused(path: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        map_base_model(_settings(path, **settings))
    assert caught.value.remedy
    return caught.value.problem


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_is_the_model_that_loading_gives(name: str, dtype: str, tmp_path: Path) -> None:
    tiny_model(name).to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, mapped = load_base_model(_settings(tmp_path, dtype)), map_base_model(_settings(tmp_path, dtype))
    assert mapped.digest == loaded.digest
    assert mapped.tokenizer_digest == loaded.tokenizer_digest
    assert (mapped.licence, mapped.name, mapped.family) == (loaded.licence, loaded.name, loaded.family)
    assert torch.equal(mapped.model(tiny_tokens()).logits, loaded.model(tiny_tokens()).logits)


def test_a_few_tensors_of_another_type_are_converted(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors = {
        name: value.to(torch.float32 if "norm" in name else torch.bfloat16) for name, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    base = map_base_model(_settings(tmp_path, "bfloat16"))
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert base.digest == load_base_model(_settings(tmp_path, "bfloat16")).digest


_WATCH = """
import sys
from scaleot_ray.config import ModelSettings
from scaleot_ray.families.loading import load_base_model
from scaleot_ray.families.mapped import map_base_model
def anonymous():
    rows = (line.split() for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return next(int(row[1]) for row in rows) * 1024
def load(path):
    load = map_base_model if sys.argv[3] == "bfloat16" else load_base_model
    return load(ModelSettings(path=path, dtype=sys.argv[3], device="cpu"))
load(sys.argv[1])  # what is imported
before = anonymous()
base = load(sys.argv[2])
total = sum(float(parameter.sum()) for parameter in base.model.parameters())
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    config = TINY["llama"]()
    config.hidden_size, config.intermediate_size = 512, 4096
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "large", max_shard_size="30MB")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))

    def growth(dtype: str) -> int:
        command = [sys.executable, "-c", _WATCH, str(tmp_path / "small"), str(tmp_path / "large"), dtype]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert growth("bfloat16") < 0.2 * size
    assert growth("float32") > 1.5 * size, "a copy shows"


def test_another_type_than_the_stored(tmp_path: Path) -> None:
    problem = _refused(save_tiny(tmp_path, "llama"), dtype="bfloat16")
    assert problem.startswith("model.dtype: bfloat16 is asked for, but the weights of")
    assert "are float32" in problem


def test_files_that_make_no_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    file.write_bytes(b"cut")
    assert "cannot be read" in _refused(folder)
    file.unlink()
    assert "cannot be read" in _refused(folder)


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "GGUF" in _refused(tmp_path / "model.gguf")

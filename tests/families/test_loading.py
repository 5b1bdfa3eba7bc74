"""Base models from directories and GGUF files, tokenizers as files, digests, devices, empty models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from scaleot_ray.config import EmulatorSettings, ModelSettings
from scaleot_ray.emulator.assemble import assemble
from scaleot_ray.emulator.build import FullModelFacts, build_emulator
from scaleot_ray.errors import ArtifactRefused, ConfigError, ResourcesMissing, UnsupportedArchitectureError
from scaleot_ray.families.gguf import gguf_metadata
from scaleot_ray.families.loading import (
    BaseModel,
    empty_model,
    load_base_model,
    load_tokenizer,
    model_digest,
    resolve_device,
    tokenizer_digest,
    tokenizer_files,
)
from scaleot_ray.families.size import model_size
from scaleot_ray.families.sources import UNKNOWN_LICENCE
from tests.tiny_models import TINY, save_tiny, swapped_tokenizer, tiny_model, tiny_tokenizer, tiny_tokens

SMOLLM2 = Path(__file__).parents[2] / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ENGLISH = (
    "The history of the city begins in the twelfth century, when a small group of traders built a market "
    "beside the river. Over time the market grew into a town, and the town became the capital of the region."
)


def _load(path: str | Path, **settings: Any) -> BaseModel:
    return load_base_model(ModelSettings(path=str(path), device="cpu", **settings))


def _refused(path: str | Path, **settings: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        _load(path, **settings)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_directory_comes_back_as_it_was_written(name: str, tmp_path: Path) -> None:
    base = _load(save_tiny(tmp_path, name))
    model = tiny_model(name)
    assert torch.equal(base.model(tiny_tokens()).logits, model(tiny_tokens()).logits)
    assert model_digest(base.model) == model_digest(model)
    assert base.family.model_types.count(model.config.model_type) == 1
    assert base.source == str(tmp_path)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.config.use_cache is False
    assert base.tokenizer("the owner")["input_ids"] == tiny_tokenizer()("the owner")["input_ids"]


@torch.no_grad()
def test_a_head_of_its_own_counts_more_than_a_config_that_ties_it(tmp_path: Path) -> None:
    # As a fine-tune with a trained head leaves it; transformers loads both and keeps the config's word.
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": model.lm_head.weight.detach()}, tmp_path / "model.safetensors")
    base = _load(tmp_path)
    assert torch.equal(base.model.lm_head.weight, model.lm_head.weight)
    assert base.model.config.tie_word_embeddings is False
    settings = EmulatorSettings(alpha=0, beta=0, plug_in_layers=2, allow_unprotected=True)
    emulator = assemble(build_emulator(base, None, settings, FullModelFacts(base.digest))[0])
    ids = tiny_tokens()
    assert torch.equal(emulator(input_ids=ids).logits, base.model(input_ids=ids).logits)


def test_the_path_does_not_stay_in_the_config(tmp_path: Path) -> None:
    base = _load(save_tiny(tmp_path))
    assert str(tmp_path) not in json.dumps(base.model.config.to_dict(), default=str)
    assert not any(str(tmp_path).encode() in content for content in tokenizer_files(base.tokenizer).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_weights_are_loaded_as_the_type_asked_for(dtype: str, tmp_path: Path) -> None:
    base = _load(save_tiny(tmp_path), dtype=dtype)
    assert {str(parameter.dtype) for parameter in base.model.parameters()} == {f"torch.{dtype}"}


def test_the_licence_is_the_cards_then_the_file_then_what_the_user_says(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert _load(tmp_path).licence == UNKNOWN_LICENCE
    (tmp_path / "LICENSE").write_text("Do as you like.\n")
    assert _load(tmp_path).licence == "Do as you like."
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n# Tiny")
    assert _load(tmp_path).licence == "Do as you like."
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny")
    assert _load(tmp_path).licence == "apache-2.0"
    assert _load(tmp_path, licence="mine").licence == "mine"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/nowhere/at/all", "does not exist"),
        ("nowhere.gguf", "does not exist"),
        ("no-such-owner/no-such-model-2f9c", "neither a directory"),
    ],
)
def test_what_leads_nowhere_is_named(place: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = _refused(place)
    assert "model.path" in error.problem
    assert place in error.problem
    assert words in error.problem


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "neither a directory nor a .gguf file" in _refused(tmp_path / "weights.bin").problem
    (tmp_path / "text.gguf").write_bytes(b"this is no model at all, only some text")
    assert "no GGUF file" in _refused(tmp_path / "text.gguf").problem
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "cut short" in _refused(tmp_path / "empty.gguf").problem


def test_a_directory_without_its_parts_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in _refused(tmp_path).problem
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "weights" in _refused(tmp_path).problem
    # A pickle in its place changes nothing.
    torch.save(tiny_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    assert "pickled" in _refused(tmp_path).remedy
    (tmp_path / "config.json").write_text("{ broken")
    assert "no valid JSON" in _refused(tmp_path).problem
    (tmp_path / "config.json").write_text("{}")
    assert "model_type" in _refused(tmp_path).problem


def test_damaged_and_incomplete_weights_are_refused(tmp_path: Path) -> None:
    weights = save_tiny(tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in _refused(tmp_path).problem
    weights.write_bytes(whole)
    tensors = load_file(weights)
    lost = "model.layers.3.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights, {"format": "pt"})
    assert lost in _refused(tmp_path).problem
    save_file({**tensors, lost: tensors[lost][:-1].clone()}, weights, {"format": "pt"})
    assert "cannot be read" in _refused(tmp_path).problem


def test_an_unknown_architecture_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    config = json.loads((save_tiny(tmp_path) / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    for model_type in ("mamba", "never_heard_of"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        with pytest.raises(UnsupportedArchitectureError, match=model_type):
            _load(tmp_path)


def test_quantised_directories_are_refused(tmp_path: Path) -> None:
    config = json.loads((save_tiny(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "quantised (gptq)" in _refused(tmp_path).problem
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": "awq"}))
    assert "quantised (awq)" in _refused(tmp_path).problem


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "abc"},
        {"num_attention_heads": 0},
        {"rope_parameters": 3},
        {"layer_types": "all"},
        {"dtype": "?"},
    ],
)
def test_a_config_with_values_of_another_kind_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    config = json.loads((save_tiny(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
    error = _refused(tmp_path)
    assert f"{tmp_path / 'config.json'} is refused" in error.problem
    assert error.exit_code == 2


def test_a_config_that_is_no_file_or_no_end_is_refused(tmp_path: Path) -> None:
    config = save_tiny(tmp_path) / "config.json"
    config.write_text("[" * 100_000)
    assert f"{config} is no valid JSON" in _refused(tmp_path).problem
    config.unlink()
    config.mkdir()
    assert f"{config} cannot be read (Is a directory)" in _refused(tmp_path).problem


def test_a_missing_tokenizer_is_named_and_may_come_from_elsewhere(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for file in (tmp_path / "model").glob("*token*"):
        if "config" in file.name or file.name == "tokenizer.json":
            file.unlink()
    error = _refused(tmp_path / "model")
    assert "model.tokenizer" in error.problem
    assert "model.tokenizer" in error.remedy
    assert len(_load(tmp_path / "model", tokenizer=str(tmp_path / "tokenizer")).tokenizer) == 97
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    assert "model.tokenizer" in _refused(tmp_path / "model", tokenizer=str(tmp_path / "tokenizer")).problem


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    error = _refused(tmp_path / "model", tokenizer=str(tmp_path / "tokenizer"))
    assert "model.tokenizer" in error.problem
    assert "97" in error.problem


def test_tokenizer_files_bring_back_ids_and_template() -> None:
    tokenizer = tiny_tokenizer()
    files = tokenizer_files(tokenizer)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    back = load_tokenizer({**files, "README.md": b"a card"})
    text = "The owner's 3 models:\n (plug-in)  é <|end|>"
    assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert back.decode(back(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert back.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(messages, tokenize=False)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(back, token) == getattr(tokenizer, token)
    assert back.model_max_length == tokenizer.model_max_length


def test_every_kind_of_tokenizer_survives_the_files() -> None:
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", *"▁Ġabcdeh ", "ab", "▁a", "Ġa"])}
    merges = [("a", "b"), ("▁", "a"), ("Ġ", "a")]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = [
        transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, **special),
        transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, add_eos_token=True, **special),
        transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges, **special),
        transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges, **special),
        transformers.GPTNeoXTokenizer(vocab=vocabulary, merges=merges, **special),
    ]
    for tokenizer in made:
        back = load_tokenizer(tokenizer_files(tokenizer))
        for text in ("abba head", " a  bad", "ab</s>ab", ""):
            for add in (True, False):
                expected = tokenizer(text, add_special_tokens=add)["input_ids"]
                assert back(text, add_special_tokens=add)["input_ids"] == expected


def test_other_keys_of_a_tokenizers_config_neither_leave_nor_arrive() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= {
        "internal_notes": "s3://owner",
        "auto_map": {"AutoTokenizer": "x"},
        "vendor_token": "s3://",
    }
    files = tokenizer_files(tokenizer)
    assert files == tokenizer_files(tiny_tokenizer())
    sent = {**json.loads(files["tokenizer_config.json"]), "tokenizer_truncation": {"max_length": 1}, "gguf_file": "x"}
    back = load_tokenizer({**files, "tokenizer_config.json": json.dumps(sent).encode()})
    assert {"tokenizer_truncation", "gguf_file"}.isdisjoint(back.init_kwargs)
    assert back("the owner")["input_ids"] == tokenizer("the owner")["input_ids"]


def test_tokenizer_files_that_lack_a_file_or_are_damaged_are_refused() -> None:
    files = tokenizer_files(tiny_tokenizer())
    with pytest.raises(ArtifactRefused, match=r"tokenizer_config\.json"):
        load_tokenizer({"tokenizer.json": files["tokenizer.json"]})
    with pytest.raises(ArtifactRefused, match=r"tokenizer\.json"):
        load_tokenizer({**files, "tokenizer.json": files["tokenizer.json"][:100]})
    for damaged in (b"[]", b"{", b"[" * 100_000):
        with pytest.raises(ArtifactRefused, match="cannot be read"):
            load_tokenizer({**files, "tokenizer_config.json": damaged})


def test_the_digest_follows_the_weights_and_nothing_else() -> None:
    model = tiny_model("llama")
    digest = model_digest(model)
    assert digest == model_digest(tiny_model("llama"))
    assert digest != model_digest(tiny_model("llama", seed=1))
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    assert digest == model_digest(model.requires_grad_(False))
    weight = model.model.layers[3].mlp.up_proj.weight
    old = weight[0, 0].item()
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(torch.inf))
    assert digest != model_digest(model)
    weight.data[0, 0] = old
    assert digest == model_digest(model)
    model.config.rms_norm_eps *= 2
    assert digest != model_digest(model)


def test_the_digest_tells_types_and_tying_apart() -> None:
    digest = model_digest(tiny_model("llama"))
    assert digest != model_digest(tiny_model("llama").to(torch.bfloat16))
    untied = tiny_model("llama")
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    assert digest != model_digest(untied)


def test_a_tokenizers_digest_is_the_same_in_every_process(tmp_path: Path) -> None:
    base = _load(save_tiny(tmp_path / "one"))
    assert _load(save_tiny(tmp_path / "two" / "deeper")).tokenizer_digest == base.tokenizer_digest
    program = (
        "import sys; from scaleot_ray.families.loading import tokenizer_digest; "
        "from scaleot_ray.families.tokenizer import read_tokenizer; "
        "print(tokenizer_digest(read_tokenizer(sys.argv[1])))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "one")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert other.stdout.strip() == base.tokenizer_digest


def test_a_tokenizers_digest_follows_what_it_says_and_not_its_use() -> None:
    tokenizer = tiny_tokenizer()
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "the owner"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.chat_template += " "
    assert tokenizer_digest(tokenizer) != digest
    other = tiny_tokenizer()
    other.eos_token = "<pad>"
    assert tokenizer_digest(other) != digest
    assert tokenizer_digest(swapped_tokenizer()) != digest


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("banana", "meta", "cuda:x"):
        with pytest.raises(ConfigError, match=f"^device: '{wrong}' is no device"):
            resolve_device(wrong)


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ResourcesMissing, match="cuda:99") as caught:
        resolve_device("cuda:99")
    assert caught.value.exit_code == 4
    # Commands without a full model have no key model.device: the name is the one that all of them know.
    assert caught.value.problem.startswith("device: cuda:99 is asked for")
    assert caught.value.remedy.startswith("Set device (--device, or model.device ")
    if not torch.cuda.is_available():
        with pytest.raises(ResourcesMissing, match="cuda"):
            resolve_device("cuda")


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_an_empty_model_filled_is_the_model(name: str) -> None:
    model = tiny_model(name)
    empty = empty_model(model.config, torch.float32)
    assert model.config.use_cache
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert not any(buffer.is_meta for buffer in empty.buffers())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert torch.equal(empty(tiny_tokens()).logits, model(tiny_tokens()).logits)
    assert not empty.training
    assert not any(parameter.requires_grad for parameter in empty.parameters())


def test_an_empty_model_has_the_type_asked_for() -> None:
    empty = empty_model(tiny_model("llama").config, torch.bfloat16)
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def _write_gguf(path: Path, architecture: str = "llama", vocab_size: bool = True, scaling: str = "") -> Any:
    """The tiny Llama as an unquantised GGUF file, the way llama.cpp's converter lays it out."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if scaling in ("yarn", "none"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    if scaling == "llama3":
        writer.add_tensor("rope_freqs.weight", torch.ones(config.head_dim // 2).numpy())
    if vocab_size:
        writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(backend["vocab"], key=backend["vocab"].get))
    writer.add_token_types([3] * 4 + [1] * 93)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        part = name.split(".")[-2]
        if part in heads:
            # llama.cpp stores the two halves of each head interleaved.
            tensor = tensor.view(heads[part], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@torch.no_grad()
def test_a_gguf_file_is_the_model_and_can_be_saved_as_a_directory(tmp_path: Path) -> None:
    model = _write_gguf(tmp_path / "tiny.gguf")
    base = _load(tmp_path / "tiny.gguf")
    assert base.licence == "mit"
    assert torch.allclose(base.model(tiny_tokens()).logits, model(tiny_tokens()).logits, atol=1e-5)
    text = "the owner tunes (the plug-in) layers<|end|>"
    assert base.tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert len(base.tokenizer) == 97
    base.model.save_pretrained(tmp_path / "saved")
    base.tokenizer.save_pretrained(tmp_path / "saved")
    again = _load(tmp_path / "saved")
    assert model_digest(again.model) == model_digest(base.model)
    assert again.tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert again.tokenizer.chat_template == base.tokenizer.chat_template == tiny_tokenizer().chat_template


def test_gguf_metadata_is_read_without_the_tensors(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    metadata = gguf_metadata(tmp_path / "tiny.gguf")
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.attention.head_count_kv"] == 2
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert "tokenizer.ggml.tokens" not in metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    assert metadata["tokenizer.ggml.tokens.length"] == 97


def test_gguf_numbers_that_are_no_sizes_are_refused(tmp_path: Path) -> None:
    for name, alignment in (("zero", 0), ("float", float("inf"))):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_key_value("general.alignment", alignment, gguf.GGUFValueType.get_type(alignment))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    assert "zero.gguf is damaged: its general.alignment is 0" in _refused(tmp_path / "zero.gguf").problem
    assert "float.gguf is cut short or damaged" in _refused(tmp_path / "float.gguf").problem


@pytest.mark.parametrize("vocab_size", [True, False])
def test_the_size_of_a_gguf_model_counts_its_embedding(tmp_path: Path, vocab_size: bool) -> None:
    model = _write_gguf(tmp_path / "tiny.gguf", vocab_size=vocab_size)
    size = model_size(ModelSettings(path=str(tmp_path / "tiny.gguf")))
    assert (size.vocabulary, size.layers, size.width) == (97, 8, 32)
    # At most what is there and a head of its own, and nearly all of it.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 0.98 * parameters < size.parameters < 1.1 * parameters


def test_a_gguf_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for length in (*range(0, 6000, 50), len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"cut\.gguf is cut short"):
            gguf_metadata(tmp_path / "cut.gguf")


@pytest.mark.parametrize(("scaling", "named"), [("yarn", "yarn"), ("llama3", "rope_freqs.weight")])
def test_a_gguf_file_that_scales_its_positions_is_refused(tmp_path: Path, scaling: str, named: str) -> None:
    _write_gguf(tmp_path / "long.gguf", scaling=scaling)
    error = _refused(tmp_path / "long.gguf")
    assert f"long.gguf scales its rotary positions ({named})" in error.problem
    assert "Hugging Face directory" in error.remedy
    _write_gguf(tmp_path / "plain.gguf", scaling="none")
    _load(tmp_path / "plain.gguf")


def test_a_gguf_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "odd.gguf", architecture="hypothetical")
    with pytest.raises(UnsupportedArchitectureError, match="hypothetical"):
        _load(tmp_path / "odd.gguf")


@pytest.mark.skipif(not SMOLLM2.is_file(), reason="the model is not there; `make test` obtains it")
@torch.no_grad()
def test_smollm2_reads_english(tmp_path: Path) -> None:
    base = _load(SMOLLM2)
    assert base.family.name == "llama"
    assert base.licence == "apache-2.0"
    tokens = base.tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    loss = base.model(input_ids=tokens, labels=tokens).loss.item()
    assert 1.5 < loss < 3.5
    shuffled = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))]
    assert base.model(input_ids=shuffled, labels=shuffled).loss.item() > loss + 2
    back = load_tokenizer(tokenizer_files(base.tokenizer))
    for text in (ENGLISH, "def f(x):\n    return x  # é 漢字 <|im_start|>user\n"):
        assert back(text)["input_ids"] == base.tokenizer(text)["input_ids"]
        assert back.decode(back(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "Hello"}]
    prompt = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>user\nHello<|im_end|>" in prompt
    assert back.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    base.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["model.layers.7.mlp.up_proj.weight"], base.model.model.layers[7].mlp.up_proj.weight)

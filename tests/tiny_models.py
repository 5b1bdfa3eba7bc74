"""Tiny random models, one for each architecture the families know, and a tiny tokenizer, for tests on the CPU."""

from __future__ import annotations

import functools
import json
import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PLAIN = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}


def _opt(**settings: Any) -> Any:
    return transformers.OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )


TINY: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-untied-bias": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=False, attention_bias=True),
    "mistral-sliding": lambda: transformers.MistralConfig(**_SIZES, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=4),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, head_dim=8, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=8),
    # Every fourth layer has no position encoding; here these layers also see a window only.
    "smollm3": lambda: transformers.SmolLM3Config(**_SIZES, use_sliding_window=True, sliding_window=8),
    "phi3": lambda: transformers.Phi3Config(**_SIZES),
    "phi3-sliding": lambda: transformers.Phi3Config(**_SIZES, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=8, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: _opt(word_embed_proj_dim=32),
    # As OPT-350M: norms after the residual, none at the end, embeddings narrower than the layers.
    "opt-post-norm": lambda: _opt(word_embed_proj_dim=16, do_layer_norm_before=False),
    "neox": lambda: transformers.GPTNeoXConfig(**_PLAIN, tie_word_embeddings=False),
    "neox-sequential": lambda: transformers.GPTNeoXConfig(
        **_PLAIN, tie_word_embeddings=False, use_parallel_residual=False
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=8, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random causal LM of the named architecture: 8 layers, d = 32, vocabulary 97, fp32, eval mode."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(TINY[name]())
    # Freshly initialised biases and norms are constants that would hide a lost or swapped tensor.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokens(batch: int = 2, time: int = 24, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, time) inside the tiny models' vocabulary, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, time), generator=generator)


_CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_CHARACTERS = string.ascii_letters + string.digits + " \n.,:;!?'\"()-_/"
_SAMPLE = (
    "the owner tunes the plug-in layers on the data that never leaves the machine",
    "there is another answer in the other part of the text and it is the right one",
)


@functools.cache
def _tiny_backend() -> str:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=97,
        special_tokens=["<pad>", "<|start|>", "<|end|>", "<unk>"],
        # Every character as the byte-level alphabet spells it, so that a sample text need not hold them all.
        initial_alphabet=[piece for c in _CHARACTERS for piece, _ in backend.pre_tokenizer.pre_tokenize_str(c)],
        show_progress=False,
    )
    backend.train_from_iterator(_SAMPLE, trainer)
    return str(backend.to_str())


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a chat template; 97 tokens, pad 0, begin 1, end 2, unknown 3.

    It adds no special tokens of its own. Letters, digits, space, newline and common punctuation come
    back from ``decode`` as they were; each byte of any other character becomes ``<unk>``.
    """
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_tiny_backend()),
        pad_token="<pad>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        unk_token="<unk>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=64,
    )


def swapped_tokenizer() -> Any:
    """:func:`tiny_tokenizer` with two letters' ids exchanged: as large, and no id is beyond the model's."""
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = content["model"]["vocab"]
    ids["a"], ids["e"] = ids["e"], ids["a"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)),
        **tokenizer.special_tokens_map,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=64,
    )


def save_tiny(directory: str | Path, name: str = "llama", seed: int = 0) -> Path:
    """Writes :func:`tiny_model` and :func:`tiny_tokenizer` as one Hugging Face directory; returns its path."""
    directory = Path(directory)
    tiny_model(name, seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory

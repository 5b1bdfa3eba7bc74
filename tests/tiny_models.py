"""Tiny random models, one for each architecture the families know, for parity tests on the CPU."""

from __future__ import annotations

from typing import Any

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

TINY: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-untied-bias": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=False, attention_bias=True),
    "mistral-sliding": lambda: transformers.MistralConfig(**_SIZES, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=4),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, head_dim=8, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=8),
    "phi3": lambda: transformers.Phi3Config(**_SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=8, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**_PLAIN, tie_word_embeddings=False),
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

"""Words that mean nothing, and a tokenizer for them: for what is measured of random models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
import transformers

_WORDS = [f"w{number}" for number in range(252)]
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

VOCABULARY = len(_SPECIAL) + len(_WORDS)
"""Tokens of :func:`random_tokenizer`."""


def random_tokenizer() -> Any:
    """A tokenizer with one token a word; pad 0, begin 1, end 2, unknown 3."""
    vocabulary = {piece: number for number, piece in enumerate([*_SPECIAL, *_WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_random_text(path: Path, block_size: int, seed: int, blocks: int = 32) -> None:
    """JSON Lines of random words, as many ``blocks`` of tokens, one a row."""
    order = random.Random(seed)
    rows = ({"text": " ".join(order.choices(_WORDS, k=block_size))} for _ in range(blocks))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

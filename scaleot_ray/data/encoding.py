"""Text → token ids, the same way in training and in evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from scaleot_ray.errors import DataError


class Encoder:
    """A tokenizer with the conventions of this package around it.

    A BOS token comes first where the tokenizer puts one itself (Llama 2 and 3, Gemma, OPT), no other
    special token is added by it.

    Args:
        tokenizer: a fast Hugging Face tokenizer.

    Raises:
        DataError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token.",
                "Add eos_token to its tokenizer_config.json, or set model.tokenizer to one that has it.",
            )
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        bos = tokenizer.bos_token_id
        self.start = self.eos if bos is None else int(bos)
        starts = list(tokenizer("a", verbose=False)["input_ids"])
        self.prefix = [int(bos)] if bos is not None and starts[:1] == [bos] else []

    def plain(self, text: str) -> list[int]:
        """Token ids of ``text`` with no special token added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def text(self, text: str) -> list[int]:
        """Token ids of ``text`` as the start of a sequence."""
        return self.prefix + self.plain(text)

    def placed(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, and for each token the characters of ``text`` that it stands for, from and to."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [(first, last) for first, last in encoded["offset_mapping"]]

    def joined(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        """Token ids of ``prompt + completion`` encoded as one text, and for each whether the completion is in it.

        A token that reaches over the border, such as a word with the space before it, belongs to the completion.
        Where that is the first one, BOS (EOS without one) comes before it, so that it can be predicted.
        """
        ids, places = self.placed(prompt + completion)
        learned = [end > len(prompt) for _, end in places]
        start = self.prefix or ([self.start] if all(learned[:1]) else [])
        return start + ids, [False] * len(start) + learned

    def pairs(self, context: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of a context and of each text that may follow it, split as lm-evaluation-harness does.

        White space at the end of the context moves to the continuation; context + continuation is
        encoded as one, and the continuation's tokens are those after as many as the context has when
        encoded alone. An empty context becomes BOS (EOS without one).
        """
        stripped = context.rstrip()
        texts = [context[len(stripped) :] + continuation for continuation in continuations]
        if not stripped:
            return [self.start], [self.plain(text) for text in texts]
        start = self.plain(stripped)
        return self.prefix + start, [self.plain(stripped + text)[len(start) :] for text in texts]

    def rules(self) -> dict[str, Any]:
        """What decides the token ids, by name: two encoders with equal rules give the same ids for every text.

        How a batch is filled up or cut, and how ids become text again, does not count.
        """
        written = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return {
            "vocabulary": written["model"],
            **{part: written[part] for part in ("added_tokens", "normalizer", "pre_tokenizer")},
            "split_special_tokens": bool(getattr(self.tokenizer, "split_special_tokens", False)),
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.eos,
            "prefix": self.prefix,
        }


def check_vocabulary(ids: Iterable[int], vocab_size: int | None) -> None:
    """Refuses token ids that the model has no embedding for; ``vocab_size`` None checks nothing.

    Raises:
        DataError: an id is not below ``vocab_size``.
    """
    largest = max(ids, default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise DataError(
            f"The tokenizer gave token id {largest}, but the model has {vocab_size} tokens: they do not match.",
            "Use the tokenizer that belongs to the model (model.tokenizer).",
        )

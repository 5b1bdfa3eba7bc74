"""Text that a model generates itself: a picture of all it has learnt, for an owner whose corpus is narrower.

A data owner's domain is unknown to the model owner. An emulator that was fitted on public text of one kind follows
the model on that kind alone; on the model's own samples it is fitted to everything that the model says, chat
included. (Ours; training on a model's own samples instead of its data is known from data-free distillation,
LLM-QAT, arXiv 2305.17888.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import DynamicCache

from scaleot_ray.data.chat import ON_A_FIXED_DAY
from scaleot_ray.errors import RunFailed
from scaleot_ray.families.head import HeadPositions
from scaleot_ray.progress import OnProgress, ProgressMeter

BATCH = 128
"""Sequences generated side by side: one step reads all weights, for one sequence as for many."""


def openings(tokenizer: Any) -> list[list[int]]:
    """What generated sequences begin with: the start of a document, and the user's turn of the chat template.

    The token in front of a document is the tokenizer's BOS; many instruct models give that one another meaning and
    have ``<|endoftext|>`` for it, so both are taken where there are both.
    """
    found: list[list[int]] = []
    separator = tokenizer.get_vocab().get("<|endoftext|>")
    for token in (tokenizer.bos_token_id, separator):
        if token is not None and [token] not in found:
            found.append([token])
    if not found:
        found.append([tokenizer.eos_token_id])
    user = _user_turn(tokenizer) if tokenizer.chat_template else []
    return [*found, user] if user else found


def _user_turn(tokenizer: Any) -> list[int]:
    """What the chat template puts in front of a user's first message; empty where it has nothing to say there."""
    mark = "…"
    try:
        template = ON_A_FIXED_DAY + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], chat_template=template, tokenize=False
        )
    except (TemplateError, ValueError):  # it wants other turns first, or there are several templates and no default
        return []
    before, met, _ = text.partition(mark)
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]) if met else []


@torch.no_grad()
def generate_text(
    model: Any,
    tokenizer: Any,
    tokens: int,
    block_size: int,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> torch.Tensor:
    """Sequences sampled from the model at temperature 1, as many of each opening.

    A sequence goes on after an end-of-text or end-of-turn token, as training text does.

    Args:
        model: a causal LM in evaluation mode.
        tokenizer: its tokenizer.
        tokens: at least so many in all.
        block_size: tokens per sequence, openings included.
        seed: of the sampling; the caller's random generators are left alone.
        on_progress: hears of ``generate text``.

    Returns:
        Token ids (sequences, block_size), int64, on the CPU.

    Raises:
        RunFailed: the model's output is not finite.
    """
    # Of a long system prompt the end is kept, for there the user's turn begins.
    starts = [start[-(block_size // 2) :] for start in openings(tokenizer)]
    count = -(-tokens // block_size)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    meter = ProgressMeter("generate text", count * block_size, on_progress)
    made = []
    with _exact_products(device):
        for index, start in enumerate(starts):
            wanted = len(range(index, count, len(starts)))
            for first in range(0, wanted, BATCH):
                prompt = torch.tensor([start] * min(BATCH, wanted - first), device=device)
                made.append(_sample(model, prompt, block_size, generator, meter))
    return torch.cat(made)


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """On a CPU, products of a few rows in bf16 would take three times as long: all weights are converted for each."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _sample(
    model: Any, prompt: torch.Tensor, length: int, generator: torch.Generator, meter: ProgressMeter
) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    parts, latest = [prompt], prompt
    unreported = prompt.numel()  # openings come for nothing: counted before any work they would make a wild rate
    head = HeadPositions(model)  # logits of a whole opening would take more memory than all the rest
    try:
        for _ in range(length - prompt.shape[1]):
            count, time = latest.shape
            last = torch.arange(1, count + 1, device=latest.device) * time - 1
            with head.at(last):
                logits = model(input_ids=latest, past_key_values=cache, use_cache=True).logits[0]
            chances = logits.float().softmax(-1)
            if not torch.isfinite(chances).all():
                raise RunFailed(
                    "The model's output for text of its own is not finite.",
                    "Set model.dtype to float32 and check the model's weights.",
                )
            latest = torch.multinomial(chances, 1, generator=generator)
            parts.append(latest)
            unreported += len(latest)
            meter.advance(unreported, tokens=unreported)
            unreported = 0
    finally:
        head.close()
    return torch.cat(parts, dim=1).cpu()

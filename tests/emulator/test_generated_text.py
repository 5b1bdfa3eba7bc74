"""Text that a tiny model generates itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scaleot_ray.emulator.generated_text import BATCH, generate_text, openings
from scaleot_ray.errors import RunFailed
from scaleot_ray.progress import Progress
from tests.tiny_models import TINY, tiny_model, tiny_tokenizer, tiny_tokens


def opinionated(name: str = "llama") -> Any:
    """A tiny model whose distributions are far from uniform."""
    model = tiny_model(name).requires_grad_(False)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(20 * head.weight.detach(), requires_grad=False)
    return model


@pytest.mark.parametrize("name", list(TINY))
def test_text_is_what_the_model_says(name: str) -> None:
    model = opinionated(name)
    made = generate_text(model, tiny_tokenizer(), 40 * 16, 16)
    assert made.shape == (40, 16)
    assert made.dtype == torch.int64
    logits = model(input_ids=made).logits[:, :-1].log_softmax(-1)
    own = logits.gather(-1, made[:, 1:, None]).squeeze(-1)
    entropy = -(logits.exp() * logits).sum(-1)
    # In the mean, −log p of a sample is the entropy; what is beyond the openings was sampled.
    sampled = slice(8, None)
    assert float(own[:, sampled].mean()) == pytest.approx(-float(entropy[:, sampled].mean()), abs=0.25)
    # Of tokens that it did not choose, it thinks little.
    other = logits.gather(-1, tiny_tokens(40, 15)[..., None]).squeeze(-1)
    assert float(other[:, sampled].mean()) < float(own[:, sampled].mean()) - 0.3


def test_the_same_seed_makes_the_same_text_and_leaves_other_generators_alone() -> None:
    model, tokenizer = opinionated(), tiny_tokenizer()
    before = torch.get_rng_state()
    first, again, other = (generate_text(model, tokenizer, 256, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_openings_are_a_document_and_a_user() -> None:
    tokenizer = tiny_tokenizer()
    document, user = openings(tokenizer)
    assert document == [tokenizer.bos_token_id]
    assert tokenizer.decode(user) == "<|start|>user\n"
    made = generate_text(opinionated(), tokenizer, 10 * 16, 16)
    assert len(made) == 10
    assert (made[:5, 0] == document[0]).all()
    assert (made[5:, : len(user)] == torch.tensor(user)).all()


def test_without_a_template_or_bos_a_document_ends_first() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.bos_token = None
    assert openings(tokenizer) == [[tokenizer.eos_token_id]]


def test_many_sequences_come_in_batches_and_are_reported() -> None:
    heard = list[Progress]()
    made = generate_text(opinionated(), tiny_tokenizer(), 3 * BATCH * 8, 8, on_progress=heard.append)
    assert len(made) == 3 * BATCH
    assert (heard[-1].stage, heard[-1].step, heard[-1].steps) == ("generate text", 3 * BATCH * 8, 3 * BATCH * 8)
    # Openings are no work: a report of them alone would say that the rest takes no time.
    assert heard[0].step == BATCH * (len(openings(tiny_tokenizer())[0]) + 1)


def test_a_broken_model_is_said_as_such() -> None:
    model = opinionated()
    model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(RunFailed, match="is not finite"):
        generate_text(model, tiny_tokenizer(), 64, 16)


def test_a_template_that_cannot_begin_with_a_user_is_done_without() -> None:
    tokenizer = tiny_tokenizer()
    document = openings(tokenizer)[:1]
    for template in (
        "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}",  # nothing in front of it
        "{{ raise_exception('a system message is missing') }}",
        {"tool_use": "{{ messages[0].content }}", "rag": "{{ messages[0].content }}"},  # no default
    ):
        tokenizer.chat_template = template
        assert openings(tokenizer) == document
        assert generate_text(opinionated(), tokenizer, 8 * 16, 16).shape == (8, 16)


def test_the_day_it_is_made_on_does_not_show() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }} user: {{ messages[0].content }}"
    assert tokenizer.decode(openings(tokenizer)[-1]) == "01 January 2025 user: "


def test_of_a_long_system_prompt_the_end_is_kept() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'a system prompt of many words ' * 20 }}<|start|>user\n{{ messages[0].content }}"
    made = generate_text(opinionated(), tokenizer, 4 * 32, 32)
    assert tokenizer.decode(made[-1, :16]).endswith("<|start|>user\n")

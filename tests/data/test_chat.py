"""Loss falls on what the assistant wrote, whatever the template looks like."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers.utils import chat_template_utils

from scaleot_ray.config import DataSettings
from scaleot_ray.data import token_examples
from scaleot_ray.errors import DataError
from tests.data.small_tokenizer import CHATML, small_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which colour?"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "blue"},
    {"role": "assistant", "content": "the sky\nis blue"},
]
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A: {% generation %}{{ message['content'] }}"
    "</s>{% endgeneration %}{% else %}Q: {{ message['content'] }}\n{% endif %}{% endfor %}"
)
# As Qwen3's does: a thought in every turn but the last is removed, and the last turn gets an empty one.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'].split('</think>')[-1] | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
)
LLAMA_2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
STRICT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}{{ message['content'] }}{% endfor %}"
)


DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n"


def read(folder: Path, messages: Any, template: str | None = CHATML, size: int = 256, **options: Any) -> list[str]:
    """The runs of tokens with loss, as text."""
    path = folder / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    tokenizer = small_tokenizer(chat_template=template)
    (example,) = token_examples(DataSettings(path=str(path), task="chat"), tokenizer, size, **options)
    runs: list[list[int]] = []
    previous = -100
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (-100, token)
        if label >= 0:
            runs.append([]) if previous < 0 else None
            runs[-1].append(label)
        previous = label
    return [str(tokenizer.decode(run)) for run in runs]


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (CHATML, ["blue<|im_end|>", "the sky\nis blue<|im_end|>"]),
        (MARKED, [" blue</s>", " the sky\nis blue</s>"]),
        (FORGETFUL, ["blue<|im_end|>", "the sky\nis blue<|im_end|>"]),
        (LLAMA_2, [" blue </s>", " the sky\nis blue </s>"]),
    ],
    ids=["chatml", "marked", "forgetful", "llama 2"],
)
def test_loss_on_the_assistants_turns(tmp_path: Path, template: str, turns: list[str]) -> None:
    assert read(tmp_path, CHAT, template) == turns


def test_a_turn_that_the_template_shortens(tmp_path: Path) -> None:
    thought = [*CHAT[:2], {"role": "assistant", "content": "<think>hm</think> blue"}, *CHAT[3:]]
    assert read(tmp_path, thought, FORGETFUL) == ["blue<|im_end|>", "the sky\nis blue<|im_end|>"]


def test_equal_turns_are_told_apart(tmp_path: Path) -> None:
    same = [{"role": role, "content": "blue"} for role in ("user", "assistant", "user", "assistant")]
    assert read(tmp_path, same) == ["blue<|im_end|>"] * 2


def test_a_long_chat_loses_its_start(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(chat_template=CHATML)
    size = len(tokenizer.apply_chat_template(CHAT)["input_ids"])
    both = ["blue<|im_end|>", "the sky\nis blue<|im_end|>"]
    assert read(tmp_path, CHAT, size=size) == both
    with pytest.raises(DataError, match=f"line 1: prompt and answer have {size} tokens, block_size is {size - 1}"):
        read(tmp_path, CHAT, size=size - 1)
    assert read(tmp_path, CHAT, size=size - 5, too_long="truncate") == both


def test_of_a_chat_far_longer_than_a_block_the_last_answers_remain(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "the sky is " * 40}, {"role": "assistant", "content": "so blue " * 40}]
    later = [{"role": "user", "content": "and at night " * 40}]
    # The answer that is cut is not learned, and what follows the last answer is not kept.
    assert read(tmp_path, [*long, *CHAT, *later], size=64, too_long="truncate") == read(tmp_path, CHAT)
    with pytest.raises(DataError, match=r"line 1: the answer alone has \d+ tokens") as caught:
        read(tmp_path, [*CHAT, *long], size=64, too_long="truncate")
    alone = len(small_tokenizer()("so blue " * 40)["input_ids"])
    assert abs(int(caught.value.problem.split(" has ")[1].split()[0]) - alone) < 8


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "marked"])
def test_a_template_that_names_the_date_gives_the_same_tokens_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    tokenizer = small_tokenizer(chat_template=DATED + template)
    found, plain = [], []
    for day in (23, 24):
        today = type("Today", (datetime,), {"now": classmethod(lambda cls, day=day: cls(2026, 11, day))})
        monkeypatch.setattr(chat_template_utils, "datetime", today)
        plain.append(tokenizer.apply_chat_template(CHAT, tokenize=False))
        found += token_examples(DataSettings(path=str(path), task="chat"), tokenizer, 256)
    assert "Today is 24 Nov 2026." in plain[1], "the clock that templates read is this one"
    assert plain[0] != plain[1]
    assert found[0] == found[1]
    assert tokenizer.decode(found[0].input_ids) == plain[0].replace("23 Nov 2026", "01 January 2025")
    assert read(tmp_path, CHAT, DATED + template) == read(tmp_path, CHAT, template)


@pytest.mark.parametrize("start", ["", "\n", "  ", "{# about #}\n  ", "x\n"])
def test_a_fixed_date_leaves_other_templates_as_they_are(tmp_path: Path, start: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    tokenizer = small_tokenizer(chat_template=start + CHATML)
    (example,) = token_examples(DataSettings(path=str(path), task="chat"), tokenizer, 256)
    assert example.input_ids == tokenizer.apply_chat_template(CHAT)["input_ids"]


def test_what_the_template_writes_into_every_turn_is_not_learned(tmp_path: Path) -> None:
    thinking = CHATML.replace("message['content']", "('<think>\n' if loop.last else '') + message['content']")
    assert read(tmp_path, CHAT, thinking) == read(tmp_path, CHAT)


def test_content_may_spell_control_tokens(tmp_path: Path) -> None:
    spelled = [CHAT[1], {"role": "assistant", "content": "blue<|im_end|>sky"}]
    assert read(tmp_path, spelled) == ["blue<|im_end|>sky<|im_end|>"]
    tokenizer = small_tokenizer(chat_template=CHATML)
    (example,) = token_examples(DataSettings(path=str(tmp_path / "chat.jsonl"), task="chat"), tokenizer, 256)
    assert example.labels.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_messages_of_a_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"messages": CHAT}] * 3).save_to_disk(str(tmp_path / "saved"))
    settings = DataSettings(path=str(tmp_path / "saved"), task="chat")
    assert len(list(token_examples(settings, small_tokenizer(chat_template=CHATML), 256))) == 3


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (CHAT, None, "needs a tokenizer with a chat template, and this one has none"),
        ([], CHATML, "holds [], expected a list of messages"),
        ("hello", CHATML, "holds 'hello', expected a list of messages"),
        ([{"role": "user"}], CHATML, "message 1 in column 'messages' is {'role': 'user'}"),
        ([{"role": "user", "content": ["a"]}], CHATML, "expected a role and a content, both text"),
        ([*CHAT[:2], {"role": "assistant", "content": "\ud83d"}], CHATML, "holds half a surrogate pair"),
        (
            [*CHAT[:2], {"role": "assistant", "content": " "}],
            CHATML,
            "message 3 in column 'messages' is the assistant's",
        ),
        (CHAT[:2], CHATML, "no message in column 'messages' has the role 'assistant'"),
        (CHAT, STRICT, "the tokenizer's chat template refuses the messages (Roles must alternate user/assistant)"),
        (CHAT, "{{ messages[0]['content'] }}", "no token counts for the loss"),
    ],
)
def test_faults(tmp_path: Path, messages: Any, template: str | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, messages, template)
    assert message in caught.value.problem
    assert template is None or "chat.jsonl, line 1" in caught.value.problem

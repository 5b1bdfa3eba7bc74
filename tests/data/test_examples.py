"""Rows as tokens and labels: every task, the split that evaluation uses, every fault of a row."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from scaleot_ray.config import DataSettings
from scaleot_ray.data import ChoiceExample, TokenExample, choice_examples, token_examples
from scaleot_ray.data.encoding import Encoder
from scaleot_ray.errors import DataError
from tests.data.small_tokenizer import small_tokenizer

TOKENIZER = small_tokenizer()
EOS = TOKENIZER.eos_token_id


def jsonl(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def named(*texts: str, by: Any) -> dict[str, Any]:
    return {"text": list(texts), "label": by}


def learned(example: TokenExample) -> str:
    return str(TOKENIZER.decode([label for label in example.labels if label >= 0]))


def whole(example: TokenExample) -> str:
    return str(TOKENIZER.decode(example.input_ids))


# ---- text


def test_text_is_packed_into_blocks(tmp_path: Path) -> None:
    documents = ["the cat sat", "", "on the mat", "  \n", "and the dog"]
    path = jsonl(tmp_path, [{"text": text} for text in documents])
    examples = list(token_examples(DataSettings(path=path), TOKENIZER, 4))
    stream = [
        token
        for text in documents
        if text.strip()
        for token in [*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS]
    ]
    assert [example.input_ids for example in examples] == [
        stream[start : start + 4] for start in range(0, len(stream) - 3, 4)
    ]
    assert all(example.labels == example.input_ids for example in examples)


def test_a_short_text_is_one_short_block(tmp_path: Path) -> None:
    (example,) = token_examples(DataSettings(path=jsonl(tmp_path, [{"text": "the cat"}])), TOKENIZER, 50)
    assert example.input_ids == [*TOKENIZER("the cat", add_special_tokens=False)["input_ids"], EOS]


def test_text_in_pieces_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaleot_ray.data.rows.PIECE_CHARACTERS", 20)
    (tmp_path / "long.txt").write_text("the cat sat\non the mat\nand the dog\nsat on the log\n" * 3)
    examples = list(token_examples(DataSettings(path=str(tmp_path / "long.txt")), TOKENIZER, 500))
    assert whole(examples[0]) == "the cat sat\non the mat\nand the dog\nsat on the log\n" * 3 + "</s>"


def test_blank_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'text' holds no text"):
        token_examples(DataSettings(path=jsonl(tmp_path, [{"text": " "}])), TOKENIZER, 8)


def test_each_document_starts_with_bos_where_the_tokenizer_does(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": "the cat"}, {"text": "the dog"}])
    (example,) = token_examples(DataSettings(path=path), small_tokenizer(bos=True), 100)
    assert whole(example) == "<s>the cat</s><s>the dog</s>"


# ---- completion


def test_completion_has_loss_on_the_completion_only(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "the cat sat on ", "completion": "the mat"}])
    (example,) = token_examples(DataSettings(path=path, task="completion"), TOKENIZER, 32)
    assert whole(example) == "the cat sat on the mat</s>"
    assert learned(example) == " the mat</s>", "the space belongs to the word it precedes"


def test_completion_with_a_template(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"question": "sky?", "n": 3, "completion": " blue"}])
    settings = DataSettings(path=path, task="completion", prompt_template="{{{n}}} {question}\nAnswer:")
    (example,) = token_examples(settings, TOKENIZER, 64)
    assert whole(example) == "{3} sky?\nAnswer: blue</s>"
    assert learned(example) == " blue</s>"


@pytest.mark.parametrize("bos", [False, True])
@given(
    prompt=st.text(alphabet="the catso \n?é<>(", max_size=12),
    completion=st.text(alphabet="the catso \n?é<>(", min_size=1, max_size=12),
)
def test_no_character_is_lost_between_prompt_and_completion(bos: bool, prompt: str, completion: str) -> None:
    encoder = Encoder(small_tokenizer(bos=bos))
    ids, learned = encoder.joined(prompt, completion)
    assert TOKENIZER.decode(ids) in (prompt + completion, f"<s>{prompt}{completion}")
    assert learned == sorted(learned), "the completion comes last"
    end = str(TOKENIZER.decode([token for token, counts in zip(ids, learned, strict=True) if counts]))
    assert end.endswith(completion)
    assert (prompt + completion).endswith(end)
    assert not learned[0], "something is there to predict the completion from"


def test_a_token_over_the_border_is_the_completions(tmp_path: Path) -> None:
    # "the" is one token: split after its first letters, nothing of it may disappear.
    path = jsonl(tmp_path, [{"prompt": "on th", "completion": "e"}, {"prompt": "th", "completion": "e"}])
    later, first = token_examples(DataSettings(path=path, task="completion"), TOKENIZER, 32)
    assert (whole(later), learned(later)) == ("on the</s>", " the</s>")
    assert (whole(first), learned(first)) == ("<s>the</s>", "the</s>")


def test_a_completion_that_the_tokenizer_drops_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer.__wrapped__()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    settings = DataSettings(path=jsonl(tmp_path, [{"prompt": "the cat", "completion": " \n"}]), task="completion")
    with pytest.raises(DataError, match="line 1: column 'completion' has no token of its own after the prompt"):
        token_examples(settings, tokenizer, 32)
    assert len(list(token_examples(settings, TOKENIZER, 32))) == 1


def test_too_long(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "the cat sat on the mat and", "completion": " the dog"}])
    settings = DataSettings(path=path, task="completion")
    (full,) = token_examples(settings, TOKENIZER, 64)
    size = len(full.input_ids)
    assert next(iter(token_examples(settings, TOKENIZER, size))) == full
    with pytest.raises(DataError, match=f"line 1: prompt and answer have {size} tokens, block_size is {size - 1}"):
        token_examples(settings, TOKENIZER, size - 1)
    (cut,) = token_examples(settings, TOKENIZER, size - 3, too_long="truncate")
    assert (cut.input_ids, cut.labels) == (full.input_ids[3:], full.labels[3:])
    with pytest.raises(DataError, match="leaves no room for the prompt"):
        token_examples(settings, TOKENIZER, 2, too_long="truncate")


# ---- choice: the formats of common benchmarks

ARC = {"question": "Which is blue?", "choices": ["the sky", "the cat", "the mat"], "label": 0}
TEMPLATE = "Question: {question}\nAnswer:"
BENCHMARKS: dict[str, tuple[dict[str, Any], dict[str, Any], int, list[str]]] = {
    "arc_easy": (ARC, {"prompt_template": TEMPLATE}, 0, ARC["choices"]),
    "openbookqa": ({**ARC, "label": 2}, {"prompt_column": "question"}, 2, ARC["choices"]),
    "sst2": (
        {"text": "a funny film", "label": 1},
        {"prompt_template": "{text}\nSentiment:", "choices": ("negative", "positive")},
        1,
        ["negative", "positive"],
    ),
    "banking77": (
        {"text": "Where is my card?", "label": "card_arrival"},
        {"prompt_column": "text", "choices": ("age_limit", "card_arrival", "top_up")},
        1,
        ["age_limit", "card_arrival", "top_up"],
    ),
    "arc of the hub": (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"prompt_template": TEMPLATE, "label_column": "answerKey"},
        1,
        ["x", "y"],
    ),
    "numbered from 1": (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": [1, 2]}, "answerKey": 1},
        {"prompt_template": TEMPLATE, "label_column": "answerKey"},
        0,
        ["x", "y"],
    ),
    "named, label an index": (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "label": 1},
        {"prompt_template": TEMPLATE},
        1,
        ["x", "y"],
    ),
    "unnamed": (
        {"question": "Why?", "choices": {"text": ["x", "y"]}, "label": 1},
        {"prompt_template": TEMPLATE},
        1,
        ["x", "y"],
    ),
    "texts that are their letters": (
        {**ARC, "choices": ["A", "B"], "label": "B"},
        {"prompt_template": TEMPLATE},
        1,
        ["A", "B"],
    ),
    "an index where texts are letters": (
        {**ARC, "choices": ["B", "A"], "label": 1},
        {"prompt_template": TEMPLATE},
        1,
        ["B", "A"],
    ),
    "equal wrong answers": (
        {**ARC, "choices": ["x", "y", "x"], "label": 1},
        {"prompt_template": TEMPLATE},
        1,
        ["x", "y", "x"],
    ),
    "letters": ({**ARC, "label": "C"}, {"prompt_template": TEMPLATE}, 2, ARC["choices"]),
    "digits": ({**ARC, "label": "2"}, {"prompt_template": TEMPLATE}, 2, ARC["choices"]),
    "texts": ({**ARC, "label": "the cat"}, {"prompt_template": TEMPLATE}, 1, ARC["choices"]),
    "boolq": ({"text": "Is it?", "label": True}, {"prompt_column": "text", "choices": ("no", "yes")}, 1, ["no", "yes"]),
}


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_choice_formats(tmp_path: Path, name: str, write: Any) -> None:
    row, options, label, texts = BENCHMARKS[name]
    settings = DataSettings(path=write(tmp_path, [row]), task="choice", **options)
    (question,) = choice_examples(settings, TOKENIZER, 64)
    assert question.label == label
    assert question.lengths == [len(text) for text in texts]
    assert [TOKENIZER.decode(ids) for ids in question.continuations] == [f" {text}" for text in texts]
    (example,) = token_examples(settings, TOKENIZER, 64)
    answer = question.continuations[label]
    assert example.input_ids == question.context + answer, "training sees the tokens that evaluation scores"
    assert example.labels == [-100] * len(question.context) + answer


def test_a_prompt_that_ends_with_white_space_gets_no_second_space(tmp_path: Path) -> None:
    settings = DataSettings(path=jsonl(tmp_path, [ARC]), task="choice", prompt_template="{question}\n")
    (question,) = choice_examples(settings, TOKENIZER, 64)
    assert TOKENIZER.decode(question.context) == "Which is blue?"
    assert TOKENIZER.decode(question.continuations[0]) == "\nthe sky"


def test_choice_too_long(tmp_path: Path) -> None:
    settings = DataSettings(path=jsonl(tmp_path, [ARC]), task="choice", prompt_template=TEMPLATE)
    (question,) = choice_examples(settings, TOKENIZER, 64)
    longest = max(map(len, question.continuations))
    with pytest.raises(DataError, match="line 1: prompt and answer have"):
        choice_examples(settings, TOKENIZER, len(question.context) + longest - 1)
    (cut,) = choice_examples(settings, TOKENIZER, len(question.context) + longest - 1, too_long="truncate")
    assert cut == ChoiceExample(question.context[1:], question.continuations, question.label, question.lengths)


@pytest.mark.parametrize("bos", [False, True])
def test_a_cut_choice_is_trained_on_as_it_is_scored(tmp_path: Path, bos: bool) -> None:
    tokenizer = small_tokenizer(bos=bos)
    row = {**ARC, "choices": ["the sky", "the mat and the log and the dog"]}
    settings = DataSettings(path=jsonl(tmp_path, [row]), task="choice", prompt_template=TEMPLATE)
    (full,) = choice_examples(settings, tokenizer, 64)
    longest = len(full.continuations[1])
    assert longest > len(full.continuations[0]), "the right answer alone would leave more room"
    size = len(full.context) + longest - 3
    (cut,) = choice_examples(settings, tokenizer, size, too_long="truncate")
    (example,) = token_examples(settings, tokenizer, size, too_long="truncate")
    assert cut.context == full.context[:bos] + full.context[bos + 3 :], "BOS stays"
    assert cut.continuations == full.continuations
    assert example.input_ids == cut.context + cut.continuations[0]
    for examples in (choice_examples, token_examples):
        assert len(list(examples(settings, tokenizer, size + 3))) == 1
        with pytest.raises(DataError, match=f"line 1: prompt and answer have {size + 3} tokens"):
            examples(settings, tokenizer, size)
        assert len(list(examples(settings, tokenizer, longest + bos + 1, too_long="truncate"))) == 1
        with pytest.raises(DataError, match="leaves no room for the prompt"):
            examples(settings, tokenizer, longest + bos, too_long="truncate")


def test_a_cut_completion_keeps_its_start(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "the cat sat on the mat and", "completion": " the dog"}])
    settings, tokenizer = DataSettings(path=path, task="completion"), small_tokenizer(bos=True)
    (full,) = token_examples(settings, tokenizer, 64)
    (cut,) = token_examples(settings, tokenizer, len(full.input_ids) - 3, too_long="truncate")
    assert cut.input_ids == full.input_ids[:1] + full.input_ids[4:]
    assert cut.labels == full.labels[:1] + full.labels[4:]
    assert whole(cut).startswith("<s>")


def harness_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness 0.4, ``TemplateLM._encode_pair`` for causal models."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole_enc = tokenizer.encode(context + continuation)
    context_enc = tokenizer.encode(context)
    return context_enc, whole_enc[len(context_enc) :]


@pytest.mark.parametrize("bos", [False, True])
@given(
    context=st.text(alphabet="the catso \n?é", min_size=1).filter(str.strip),
    continuation=st.text(alphabet="the catso \n?é", min_size=1),
)
def test_pairs_split_as_the_harness_does(bos: bool, context: str, continuation: str) -> None:
    tokenizer = small_tokenizer(bos=bos)
    start, (end,) = Encoder(tokenizer).pairs(context, [continuation])
    assert (start, end) == harness_pair(tokenizer, context, continuation)


def test_an_empty_context_becomes_one_token() -> None:
    context, (ids,) = Encoder(TOKENIZER).pairs(" ", ["the cat"])
    assert context == [TOKENIZER.bos_token_id]
    assert TOKENIZER.decode(ids) == " the cat"


# ---- faults

HALF = "a \ud83d b"


def test_whole_emoji_and_numbers_are_taken(tmp_path: Path) -> None:
    row = {"text": "a 😀 b", "n": 1.5, "completion": " é"}
    settings = DataSettings(path=jsonl(tmp_path, [row]), task="completion", prompt_template="{text} {n}")
    (example,) = token_examples(settings, TOKENIZER, 64)
    assert whole(example) == "a 😀 b 1.5 é</s>"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"body": "x"}, {}, "there is no column 'text'; the columns are 'body'"),
        ({"text": 3}, {}, "column 'text' holds int (3), expected text"),
        ({"text": None}, {}, "column 'text' is null"),
        ({"prompt": "x"}, {"task": "completion"}, "there is no column 'completion'; the columns are 'prompt'"),
        ({"prompt": "x", "completion": ""}, {"task": "completion"}, "column 'completion' is empty"),
        ({"text": HALF}, {}, r"column 'text' holds half a surrogate pair ('\ud83d')"),
        ({"prompt": HALF, "completion": "x"}, {"task": "completion"}, "column 'prompt' holds half a surrogate"),
        ({"prompt": "x", "completion": HALF}, {"task": "completion"}, "column 'completion' holds half a surrogate"),
        ({**ARC, "question": HALF}, {}, "column 'question' holds half a surrogate"),
        ({**ARC, "choices": ["a", HALF]}, {}, "column 'choices' holds half a surrogate"),
        ({**ARC, "question": math.nan}, {}, "column 'question', which prompt_template names, is nan"),
        ({**ARC, "question": -math.inf}, {}, "column 'question', which prompt_template names, is -inf"),
        (ARC, {"task": "choice"}, "there is no column 'prompt'"),
        (ARC, {"task": "choice", "prompt_template": "{query}:"}, "there is no column 'query'; the columns are"),
        (ARC, {"task": "choice", "prompt_template": "{choices}:"}, "wants text in column 'choices', which holds list"),
        (ARC, {"task": "choice", "prompt_template": "{question"}, "prompt_template: expected '}'"),
        (ARC, {"task": "choice", "prompt_template": "{question!r}"}, "no plain {column}"),
        (ARC, {"task": "choice", "prompt_template": "{question.__class__}"}, "no column 'question.__class__'"),
        ({**ARC, "label": 3}, {}, "the label 3 in column 'label' is out of range: there are 3 choices"),
        ({**ARC, "label": -1}, {}, "the label -1 in column 'label' is out of range"),
        ({**ARC, "label": 1.0}, {}, "is float (1.0), expected an int"),
        ({**ARC, "label": "D"}, {}, "the label 'D' in column 'label' is none of the choices"),
        ({**ARC, "label": "-1"}, {}, "the label -1 in column 'label' is out of range"),
        ({**ARC, "choices": ["2", "1", "0"], "label": "2"}, {}, "the text of one choice and the index of another"),
        ({**ARC, "choices": ["B", "A"], "label": "A"}, {}, "the text of one choice and the letter of another"),
        ({**ARC, "choices": named("x", "y", "z", by=[1, 2]), "label": 1}, {}, "3 texts, but [1, 2] as their names"),
        ({**ARC, "choices": named("x", "y", by=["A", "B", "C"]), "label": "C"}, {}, "2 texts, but ['A', 'B', 'C'] as"),
        ({**ARC, "choices": named("x", "y", by="AB"), "label": "A"}, {}, "2 texts, but 'AB' as their names"),
        ({**ARC, "choices": named("x", "y", by=["A", "A"]), "label": "A"}, {}, "the choices' name 'A' is there twice"),
        ({**ARC, "choices": named("x", "y", by=[1, 2]), "label": 0}, {}, "the label 0 in column 'label' is none of"),
        ({**ARC, "choices": named("x", "y", by=[1, 2]), "label": "0"}, {}, "label '0' in column 'label' is none of"),
        ({**ARC, "choices": ["x", "y", "x"]}, {}, "the right choice 'x' is there twice"),
        ({**ARC, "choices": ["", "b"]}, {}, "one of the choices is empty (['', 'b'])"),
        ({**ARC, "choices": ["b", "\n"]}, {}, "one of the choices is empty"),
        ({**ARC, "label": None}, {}, "column 'label' is null"),
        ({**ARC, "choices": ["one"]}, {}, "there is one choice, expected at least 2"),
        ({**ARC, "choices": []}, {}, "there are no choices, expected at least 2"),
        ({**ARC, "choices": "a, b"}, {}, "column 'choices' holds 'a, b', expected a list of texts"),
        ({**ARC, "choices": [1, 2]}, {}, "column 'choices' holds [1, 2], expected a list of texts"),
    ],
)
def test_faults_of_a_row(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    if row.get("question") and not options:
        options = {"task": "choice", "prompt_template": TEMPLATE}
    with pytest.raises(DataError) as caught:
        token_examples(DataSettings(path=jsonl(tmp_path, [row]), **options), TOKENIZER, 64)
    assert message in caught.value.problem
    assert caught.value.remedy.endswith(".")
    if "prompt_template:" not in caught.value.problem:
        assert "rows.jsonl, line 1" in caught.value.problem


def test_a_later_row_is_named(tmp_path: Path) -> None:
    rows = [ARC, ARC, {**ARC, "label": 7}]
    settings = DataSettings(path=parquet(tmp_path, rows), task="choice", prompt_template=TEMPLATE)
    examples = choice_examples(settings, TOKENIZER, 64)
    with pytest.raises(DataError, match=r"row 3 of .*rows.parquet: the label 7"):
        list(examples)


def test_a_tokenizer_without_end_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer.__wrapped__()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        token_examples(DataSettings(path=jsonl(tmp_path, [{"text": "x"}])), tokenizer, 8)

"""Rows kept out of training: whole documents, every row once, the same ones each time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleot_ray.config import DataSettings
from scaleot_ray.data import HoldOut, Rows, open_rows, rows, token_examples
from scaleot_ray.errors import DataError
from tests.data.small_tokenizer import small_tokenizer

TOKENIZER = small_tokenizer()


def written(folder: Path, count: int) -> Rows:
    """Rows that say which they are."""
    path = folder / f"{count}.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {index}"}) + "\n" for index in range(count)))
    return open_rows(DataSettings(path=str(path)))


def texts(some: Rows) -> list[str]:
    return [row["text"] for row in some]


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.1), (200, 0.1), (97, 0.25), (30, 0.9)])
def test_every_row_is_in_one_part(tmp_path: Path, count: int, fraction: float) -> None:
    rows, hold_out = written(tmp_path, count), HoldOut(fraction, seed=3)
    training, validation = texts(hold_out.training(rows)), texts(hold_out.validation(rows))
    assert sorted(training + validation) == sorted(texts(rows))
    assert abs(len(validation) - count * fraction) <= 1
    assert texts(hold_out.validation(rows)) == validation  # a second pass, as every epoch makes one


def test_the_seed_draws(tmp_path: Path) -> None:
    rows = written(tmp_path, 200)
    first, again, other = (texts(HoldOut(0.1, seed).validation(rows)) for seed in (0, 0, 1))
    assert first == again != other
    # Neither the first rows nor every tenth one: a sorted or an alternating dataset is held out evenly.
    places = [int(text.split()[1]) for text in first]
    assert all(place // 10 == index for index, place in enumerate(places))
    assert len({place % 10 for place in places}) > 3


@given(st.floats(0.001, 0.999), st.integers(0, 9))
def test_one_row_of_each_stretch_is_marked(fraction: float, seed: int) -> None:
    marks = list(itertools.islice(HoldOut(fraction, seed).marks(), 3000))
    assert abs(sum(marks) - 3000 * fraction) <= 1


def test_a_document_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large text file comes in pieces; in which part it is, is decided once."""
    monkeypatch.setattr(rows, "PIECE_CHARACTERS", 10)
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.txt").write_text(f"{index}{index}{index} words\n" * 5)
    every, hold_out = open_rows(DataSettings(path=str(folder))), HoldOut(0.25, seed=0)
    assert len(texts(every)) == 24
    parts = [{text[0] for text in texts(part)} for part in (hold_out.training(every), hold_out.validation(every))]
    assert [len(part) for part in parts] == [6, 2]
    assert not parts[0] & parts[1]


def test_no_token_is_in_both_parts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{chr(97 + index)} " * 9}) + "\n" for index in range(20)))
    settings, hold_out = DataSettings(path=str(path)), HoldOut(0.2, seed=0)
    parts = []
    for part in (hold_out.training, hold_out.validation):
        examples = token_examples(settings, TOKENIZER, 4, part=part)
        text = "".join(TOKENIZER.decode(example.input_ids, skip_special_tokens=True) for example in examples)
        parts.append(set(text) & set("abcdefghijklmnopqrst"))
    assert parts[1]
    assert not parts[0] & parts[1]


def test_an_empty_part_names_key_and_remedy(tmp_path: Path) -> None:
    one, found = written(tmp_path, 1), set()
    for seed in range(20):  # the one row is in either part
        with pytest.raises(DataError, match=r"tune.validation_fraction: 0.5 of .*\(1 row or document\)") as caught:
            _ = texts(HoldOut(0.5, seed).validation(one)), texts(HoldOut(0.5, seed).training(one))
        assert "--validation FILE" in caught.value.remedy
        assert "tune.evaluate_every" in caught.value.remedy
        found.add(caught.value.problem.partition("leaves none ")[2])
    assert found == {"to evaluate on.", "to train on."}

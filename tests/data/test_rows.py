"""Every kind of source gives the same rows; every fault names its file, row or column."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from scaleot_ray.config import DataSettings, ModelSettings
from scaleot_ray.data import open_rows
from scaleot_ray.errors import DataError

ROWS: list[dict[str, Any]] = [{"text": f"row {n}", "label": n, "choices": ["a", "b"]} for n in range(600)]


def settings(path: Path, **values: Any) -> DataSettings:
    return DataSettings(path=str(path), **values)


def write_jsonl(path: Path, rows: list[Any] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[Any] = ROWS) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_arrow_stream(path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


def write_feather(path: Path) -> Path:
    feather.write_feather(pa.Table.from_pylist(ROWS), path)
    return path


def write_saved(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.parquet": write_parquet,
    "rows.arrow": write_arrow_stream,
    "rows.feather": write_feather,
    "saved": write_saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = open_rows(settings(WRITERS[name](tmp_path / name)))
    capsys.readouterr()
    assert list(rows) == ROWS
    assert list(rows) == ROWS, "rows can be read a second time"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", WRITERS)
def test_where_names_the_row(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name)
    where = list(open_rows(settings(path)))[399].where
    assert where == (f"{path}, line 400" if name.endswith("jsonl") else f"row 400 of {path}")


def write_separated(path: Path, columns: str, *rows: str) -> Path:
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([columns, *rows, ""]).encode())
    return path


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_separated_values_stay_the_text_they_are(tmp_path: Path, ending: str, separator: str) -> None:
    # Readers that guess types turn these into a date, a number and a null.
    rows = [
        ["when", "label", "note"],
        ["2020-01-01", "007", ""],
        ['"a, b\tand\nmore"', "1", '"""quoted"""'],
        ["ü", "x", "NA"],
    ]
    lines = [separator.join(row) for row in rows]
    read = list(open_rows(settings(write_separated(tmp_path / f"x.{ending}", *lines[:2], "", *lines[2:]))))
    assert read == [
        {"when": "2020-01-01", "label": "007", "note": ""},
        {"when": "a, b\tand\nmore", "label": "1", "note": '"quoted"'},
        {"when": "ü", "label": "x", "note": "NA"},
    ]
    assert [row.where.rpartition(" ")[2] for row in read] == ["2", "4", "6"], "the line on which a row begins"


def test_a_cell_may_be_a_whole_document(tmp_path: Path) -> None:
    text = "word " * 100_000
    assert next(iter(open_rows(settings(write_separated(tmp_path / "x.csv", "text", text)))))["text"] == text


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n\nstill second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "README.md").write_text("about the folder")
    rows = list(open_rows(settings(tmp_path)))
    assert [row["text"] for row in rows] == ["first", "second\n\nstill second"]
    assert not any(row.unfinished for row in rows)


def test_a_long_text_file_comes_in_pieces(tmp_path: Path) -> None:
    text = "".join(f"line {n}\n" for n in range(250_000))
    (tmp_path / "long.txt").write_text(text)
    rows = list(open_rows(settings(tmp_path / "long.txt")))
    assert len(rows) > 1
    assert [row.unfinished for row in rows] == [True] * (len(rows) - 1) + [False]
    assert all(row["text"].endswith("\n") for row in rows)
    assert "".join(row["text"] for row in rows) == text


def test_max_examples(tmp_path: Path) -> None:
    assert list(open_rows(settings(write_jsonl(tmp_path / "x.jsonl"), max_examples=7))) == ROWS[:7]


def test_max_examples_counts_documents_not_their_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaleot_ray.data.rows.PIECE_CHARACTERS", 20)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"line of {name}\n" * 10)
    rows = list(open_rows(settings(tmp_path, max_examples=2)))
    assert len(rows) > 2
    assert "".join(row["text"] for row in rows) == "line of a\n" * 10 + "line of b\n" * 10


def test_jsonl_keeps_values_as_written(tmp_path: Path) -> None:
    # Readers that guess a column's type turn the first into a timestamp and refuse the mixture.
    rows = [{"text": "2020-01-01"}, {"text": "x", "more": 1}, {"text": 3}]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, rows)).encode() + b"\n")
    assert list(open_rows(settings(path))) == rows


def test_split_chooses_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ROWS[2:5])
    write_parquet(tmp_path / "test.parquet", ROWS[5:9])
    (tmp_path / "validation").mkdir()
    write_parquet(tmp_path / "validation" / "0.parquet", ROWS[9:10])
    assert list(open_rows(settings(tmp_path, split="train"))) == ROWS[:5]
    assert list(open_rows(settings(tmp_path, split="test"))) == ROWS[5:9]
    assert list(open_rows(settings(tmp_path, split="validation"))) == ROWS[9:10]
    with pytest.raises(DataError, match="several splits \\(test, train, validation\\)"):
        open_rows(settings(tmp_path))
    with pytest.raises(DataError, match=r"no file in .* belongs to 'dev'"):
        open_rows(settings(tmp_path, split="dev"))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train.jsonl", "Test.jsonl"),
        ("law-train.jsonl", "law-test.jsonl"),
        ("wiki.train.jsonl", "wiki.test.jsonl"),
        ("TRAIN/0.jsonl", "TEST/0.jsonl"),
        ("law_train/0.jsonl", "law_test/0.jsonl"),
        ("training/train.jsonl", "test.jsonl"),
    ],
)
def test_a_split_is_a_word_anywhere_in_the_name(tmp_path: Path, train: str, test: str) -> None:
    for name, rows in ((train, ROWS[:3]), (test, ROWS[3:5])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, rows)
    assert list(open_rows(settings(tmp_path, split="train"))) == ROWS[:3]
    assert list(open_rows(settings(tmp_path, split="Test"))) == ROWS[3:5]
    assert len(list(open_rows(settings(tmp_path, split="all")))) == 5
    with pytest.raises(DataError, match=r"holds several splits .*and none was chosen"):
        open_rows(settings(tmp_path))
    (tmp_path / test).unlink()
    assert list(open_rows(settings(tmp_path))) == ROWS[:3], "one split alone needs no choice"


def test_words_that_only_contain_a_split_are_none(tmp_path: Path) -> None:
    for name in ("testing-latest.jsonl", "trains.jsonl", "developer1.jsonl"):
        write_jsonl(tmp_path / name, ROWS[:1])
    assert len(list(open_rows(settings(tmp_path)))) == 3


def test_files_of_a_split_beside_others(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "law.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "law-test.jsonl", ROWS[3:5])
    message = r"files of a split and others, such as law.jsonl \(test\)"
    with pytest.raises(DataError, match=f"path: .* holds {message}, and none was chosen"):
        open_rows(settings(tmp_path))
    with pytest.raises(DataError, match=f"split: .* has for 'law' {message}"):
        open_rows(settings(tmp_path, split="law"))
    assert list(open_rows(settings(tmp_path, split="test"))) == ROWS[3:5]
    assert len(list(open_rows(settings(tmp_path, split="all")))) == 5


def test_a_file_of_two_splits_is_taken_for_neither(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write_jsonl(tmp_path / "train" / "law-test.jsonl", ROWS[:3])
    for split in ("train", "test"):
        with pytest.raises(DataError, match=rf"has for '{split}' several splits \(test, train\)"):
            open_rows(settings(tmp_path, split=split))


def test_split_of_a_saved_dataset(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS[:3]), "test": datasets.Dataset.from_list(ROWS[3:5])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    assert list(open_rows(settings(tmp_path / "both", split="test"))) == ROWS[3:5]
    with pytest.raises(DataError, match="several splits \\(train, test\\)"):
        open_rows(settings(tmp_path / "both"))
    with pytest.raises(DataError, match="no split 'dev' \\(train, test\\)"):
        open_rows(settings(tmp_path / "both", split="dev"))
    with pytest.raises(DataError, match="single dataset"):
        open_rows(settings(tmp_path / "both" / "train", split="dev"))


def test_a_saved_dataset_leaves_the_home_directory_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    write_saved(tmp_path / "saved")
    code = "import sys; from scaleot_ray.config import DataSettings as D; from scaleot_ray.data import open_rows"
    code += "; print(len(list(open_rows(D(path=sys.argv[1])))))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved")],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == "600\n"
    assert list(home.iterdir()) == []


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


def damaged_page(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[8:300] = b"\xff" * 292
    path.write_bytes(content)
    return path


def broken_line(path: Path) -> Path:
    path.write_text('{"text": "good"}\n{"text": "half\n')
    return path


def bad_bytes(path: Path) -> Path:
    path.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    return path


def nothing(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x.jsonl", lambda path: path, "x.jsonl does not exist"),
        ("x.jsonl", nothing, "x.jsonl: the dataset is empty"),
        ("x.txt", nothing, "x.txt: the dataset is empty"),
        ("x.jsonl", broken_line, "x.jsonl, line 2: is not valid JSON"),
        ("x.jsonl", bad_bytes, "x.jsonl, line 2: is not valid JSON"),
        ("x.jsonl", lambda path: write_jsonl(path, [[1, 2]]), "x.jsonl, line 1: holds list, expected an object"),
        ("x.parquet", nothing, "x.parquet: is not a valid parquet file"),
        ("x.parquet", lambda path: truncated(write_parquet(path)), "x.parquet: "),
        ("x.parquet", lambda path: damaged_page(write_parquet(path)), "x.parquet: "),
        ("x.arrow", nothing, "x.arrow: "),
        ("x.arrow", lambda path: truncated(write_arrow_stream(path)), "x.arrow: "),
        ("x.feather", lambda path: truncated(write_feather(path)), "x.feather: "),
        ("x.xlsx", nothing, "ending of no known format"),
        ("x.csv", nothing, "x.csv: the dataset is empty"),
        ("x.csv", lambda path: write_separated(path, "a,b"), "x.csv: the dataset is empty"),
        (
            "x.csv",
            lambda path: write_separated(path, "a,b", "1,2", "1,2,3"),
            "line 3: expected 2 values, as the first line names columns, found 3",
        ),
        ("x.csv", lambda path: write_separated(path, "a,b", "1", "1,2"), "line 2: expected 2 values"),
        ("x.csv", lambda path: write_separated(path, "a,b,a", "1,2,3"), "line 1: names the column 'a' twice"),
        (
            "x.csv",
            lambda path: write_separated(path, "a,b", '"1,2'),
            "line 2: is not valid csv (unexpected end of data)",
        ),
        ("x.tsv", lambda path: write_separated(path, "a", '"1"2'), "line 2: is not valid tsv"),
        ("x.csv", bad_bytes, "x.csv: is not UTF-8 text"),
        ("x.txt", bad_bytes, "x.txt: is not UTF-8 text"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, make: Any, message: str) -> None:
    path = make(tmp_path / name)
    with pytest.raises(DataError) as caught:
        list(open_rows(settings(path)))
    assert message in caught.value.problem
    assert str(tmp_path / name) in caught.value.problem
    assert caught.value.remedy.endswith(".")


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="the dataset is empty"):
        open_rows(settings(tmp_path / "x.parquet"))


def test_a_damaged_saved_dataset(tmp_path: Path) -> None:
    path = write_saved(tmp_path / "saved")
    for file in path.glob("*.arrow"):
        truncated(file)
    with pytest.raises(DataError, match="saved"):
        list(open_rows(settings(path)))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="cannot be read as a dataset that save_to_disk wrote"):
        open_rows(settings(tmp_path / "other", format="hf"))


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file that can be read"):
        open_rows(settings(tmp_path))
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match="several formats \\(jsonl, text\\)"):
        open_rows(settings(tmp_path))
    assert list(open_rows(settings(tmp_path, format="jsonl"))) == ROWS
    with pytest.raises(DataError, match="is a single file and has no splits"):
        open_rows(settings(tmp_path / "a.jsonl", split="train"))


@pytest.mark.parametrize("kind", [DataSettings, ModelSettings])
def test_an_empty_path_is_not_the_working_directory(kind: Any) -> None:
    with pytest.raises(ValidationError, match="at least 1 character"):
        kind(path="")
    assert kind(path=".").path == "."


def test_values_say_which_column_there_is(tmp_path: Path) -> None:
    row = next(iter(open_rows(settings(write_jsonl(tmp_path / "x.jsonl", [{"a": 1, "b": None}])))))
    with pytest.raises(DataError, match="line 1: there is no column 'text'; the columns are 'a', 'b'"):
        row.text("text", "text_column")
    with pytest.raises(DataError, match="line 1: column 'b' is null"):
        row.value("b", "label_column")
    with pytest.raises(DataError, match="line 1: column 'a' holds int \\(1\\), expected text") as caught:
        row.text("a", "text_column")
    assert "text_column" in caught.value.remedy


LINE = json.dumps({"text": "word " * 200}) + "\n"
CSV_LINE = f'"{"word " * 200}"\n'


@pytest.mark.parametrize(("name", "head", "line"), [("large.jsonl", "", LINE), ("large.csv", "text\n", CSV_LINE)])
def test_memory_stays_flat_over_many_lines(tmp_path: Path, name: str, head: str, line: str) -> None:
    path = tmp_path / name
    with open(path, "w") as file:
        file.write(head)
        for _ in range(50):
            file.write(line * 1000)
    assert os.path.getsize(path) > 50e6
    rows = open_rows(settings(path))
    tracemalloc.start()
    count = sum(1 for _ in rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 50_000
    assert peak < 2e6
    tracemalloc.start()
    held = list(open_rows(settings(path, max_examples=5_000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(held) == 5_000
    assert peak > 2e6, "the measure would see rows that are kept"


@pytest.mark.parametrize("format", ["parquet", "arrow", "hf"])
def test_memory_stays_flat_over_one_large_batch(tmp_path: Path, format: str) -> None:
    # All rows in one row group or record batch: the worst case for a reader that takes these whole.
    words = os.urandom(40_000_000).hex()
    table = pa.table({"text": [words[start : start + 8_000] for start in range(0, len(words), 8_000)]})
    path = tmp_path / f"x.{format}"
    if format == "parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False)
    elif format == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    del table, words
    gc.collect()
    pa.default_memory_pool().release_unused()
    rows = open_rows(settings(path))
    before, most = pa.total_allocated_bytes(), 0
    for number, row in enumerate(rows):
        assert len(row["text"]) == 8_000
        if number % 500 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert number == 9_999
    assert most < 40e6

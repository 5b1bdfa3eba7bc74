"""Rows of a dataset, one after the other, whatever holds them and however large it is.

Text, JSON Lines and CSV are read line by line, Parquet and Arrow record batch by record batch, folders
written by ``datasets.save_to_disk`` through their memory map: no source is ever in memory as a
whole. JSON Lines and CSV are parsed here rather than by ``datasets`` or ``pyarrow``, which guess one type
per column from the first megabytes (a column of dates stops being text) and do not say which line is
broken.
Nothing is cached on disk and nothing reaches for a network.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from scaleot_ray.config import DataSettings
from scaleot_ray.data.sources import Source, find_sources, first_line
from scaleot_ray.errors import DataError

PIECE_CHARACTERS = 1 << 20
ROWS_PER_BATCH = 256
CELL_CHARACTERS = 1 << 26
"""Longest cell of a CSV file; what exceeds it is more likely a quote that nobody closed than a document."""


class Row(dict[str, Any]):
    """One row: its columns, and where it comes from for messages.

    Attributes:
        where: e.g. ``row 3 of train.parquet`` or ``train.jsonl, line 3``; rows count from 1.
        unfinished: for text files, whether the next row goes on with the same document.
    """

    __slots__ = ("unfinished", "where")

    def __init__(self, columns: dict[str, Any], where: str, unfinished: bool = False) -> None:
        super().__init__(columns)
        self.where = where
        self.unfinished = unfinished

    def value(self, column: str, key: str) -> Any:
        """What the row has in ``column``, which the setting ``key`` names.

        Raises:
            DataError: there is no such column (the message names those there are), or it is null.
        """
        if column not in self:
            raise DataError(
                f"{self.where}: there is no column {column!r}; the columns are {', '.join(map(repr, self)) or 'none'}.",
                f"Set {key} to one of these{_option(key)}.",
            )
        if self[column] is None:
            raise DataError(
                f"{self.where}: column {column!r} is null.",
                f"Fill it or remove the row, or set {key} to another{_option(key)}.",
            )
        return self[column]

    def text(self, column: str, key: str) -> str:
        """The same for a column that must hold text.

        Raises:
            DataError: also when the value is not text.
        """
        value = self.value(column, key)
        if not isinstance(value, str):
            raise DataError(
                f"{self.where}: column {column!r} holds {type(value).__name__} ({short(value)}), expected text.",
                f"Write it as text, or set {key} to a column of text{_option(key)}.",
            )
        return self.whole(value, column)

    def whole(self, text: str, column: str) -> str:
        """``text``, which ``column`` holds, refused where it has half of a surrogate pair: no tokenizer takes it.

        Raises:
            DataError: it has one, as JSON can write it (``\\ud83d`` alone).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.where}: column {column!r} holds half a surrogate pair ({error.object[error.start]!a}), which "
                "is no character.",
                "Write the whole character, or remove the half; a text that was cut within an emoji has such a one.",
            ) from None
        return text


class Rows(Iterable[Row]):
    """All rows of a dataset in order; may be iterated any number of times.

    Raises:
        DataError: while iterating: a file cannot be read, is not what its format says, or there is
            no row at all.
    """

    def __init__(self, sources: list[Source], path: str, limit: int | None = None) -> None:
        self.path = path
        self._sources, self._limit = sources, limit

    def __iter__(self) -> Iterator[Row]:
        documents, any_row = 0, False
        for row in self._all():
            any_row = True
            yield row
            documents += not row.unfinished
            if documents == self._limit:
                break
        if not any_row:
            raise DataError(f"{self.path}: the dataset is empty.", "Give a dataset with at least one row.")

    def _all(self) -> Iterator[Row]:
        for source in self._sources:
            yield from READERS[source.format](source)


def open_rows(settings: DataSettings) -> Rows:
    """The rows of the dataset that ``settings`` names; the first is read at once, so that mistakes show early.

    Raises:
        DataError: the path is missing, of no known format, holds several splits and none was
            chosen, cannot be read, or has no rows.
    """
    rows = Rows(find_sources(settings), settings.path, settings.max_examples)
    next(iter(rows))
    return rows


def _text_rows(source: Source) -> Iterator[Row]:
    # A document is one file; one that exceeds memory comes in pieces that end with a line.
    with _readable(source), open(source.path, encoding="utf-8-sig") as file:
        piece = _piece(file)
        while piece:
            following = _piece(file)
            yield Row({"text": piece}, str(source.path), unfinished=bool(following))
            piece = following


def _piece(file: TextIO) -> str:
    start = file.read(PIECE_CHARACTERS)
    return start + file.readline(PIECE_CHARACTERS) if start else ""


def _jsonl_rows(source: Source) -> Iterator[Row]:
    with _readable(source), open(source.path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(line, f"{source.path}, line {number}")


def _json_row(line: bytes, where: str) -> Row:
    try:
        columns = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: is not valid JSON ({error}).",
            'JSON Lines has one whole object on each line, such as {"text": "..."}; correct or remove this one.',
        ) from None
    if not isinstance(columns, dict):
        raise DataError(
            f"{where}: holds {type(columns).__name__}, expected an object with named columns.",
            "JSON Lines has one object on each line; write a list of objects as one object per line.",
        )
    return Row(columns, where)


def _csv_rows(source: Source) -> Iterator[Row]:
    # Every value stays the text it is in the file.
    csv.field_size_limit(CELL_CHARACTERS)  # csv's own is 131,072 characters
    with _readable(source), open(source.path, encoding="utf-8-sig", newline="") as file:
        reader, begin = csv.reader(file, delimiter="\t" if source.format == "tsv" else ",", strict=True), 1
        try:
            columns = next(reader, [])
            _check_columns(columns, source)
            begin = reader.line_num + 1
            for cells in reader:
                if cells:  # a blank line has none
                    yield _csv_row(columns, cells, f"{source.path}, line {begin}")
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{source.path}, line {begin}: is not valid {source.format} ({error}).",
                "Close every quote, and write a quote inside a quoted value twice.",
            ) from None


def _check_columns(columns: list[str], source: Source) -> None:
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"{source.path}, line 1: names the column {twice!r} twice.",
            "The first line names the columns; give each its own name.",
        )


def _csv_row(columns: list[str], cells: list[str], where: str) -> Row:
    if len(cells) != len(columns):
        raise DataError(
            f"{where}: expected {len(columns)} values, as the first line names columns, found {len(cells)}.",
            "Put quotes around values that hold the separator or a line break, and name every column in the first "
            "line.",
        )
    return Row(dict(zip(columns, cells, strict=True)), where)


def _parquet_rows(source: Source) -> Iterator[Row]:
    # Without these two, pyarrow reads a whole row group ahead, which may be the whole file.
    with _readable(source), pq.ParquetFile(source.path, buffer_size=PIECE_CHARACTERS, pre_buffer=False) as file:
        yield from _numbered(file.iter_batches(batch_size=ROWS_PER_BATCH, use_threads=False), source)


def _arrow_rows(source: Source) -> Iterator[Row]:
    # The file format (Feather) starts with a magic word, the stream format does not.
    with _readable(source), pa.memory_map(str(source.path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            yield from _numbered((reader.get_batch(index) for index in range(reader.num_record_batches)), source)
        else:
            file.seek(0)
            yield from _numbered(pa.ipc.open_stream(file), source)


def _saved_rows(source: Source) -> Iterator[Row]:
    with _readable(source):
        for start in range(0, len(source.dataset), ROWS_PER_BATCH):
            columns = source.dataset[start : start + ROWS_PER_BATCH]
            for number, values in enumerate(zip(*columns.values(), strict=True), start=start + 1):
                yield Row(dict(zip(columns, values, strict=True)), f"row {number} of {source.path}")


def _numbered(batches: Iterable[pa.RecordBatch], source: Source) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            for columns in batch.slice(start, ROWS_PER_BATCH).to_pylist():
                number += 1
                yield Row(columns, f"row {number} of {source.path}")


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source.path}: is not UTF-8 text ({error.reason} at byte {error.start}).", "Convert the file to UTF-8."
        ) from None
    except OSError as error:
        # pyarrow reports damaged pages as OSError too.
        raise DataError(
            f"{source.path}: cannot be read ({first_line(error)}).",
            "Check the path and its permissions, and that the file is whole.",
        ) from error
    except pa.ArrowException as error:
        raise DataError(
            f"{source.path}: is not a valid {source.format} file ({first_line(error)}).",
            "Write or copy it again, or set format to what it is.",
        ) from error


READERS: dict[str, Callable[[Source], Iterator[Row]]] = {
    "text": _text_rows,
    "jsonl": _jsonl_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "csv": _csv_rows,
    "tsv": _csv_rows,
    "hf": _saved_rows,
}


def _option(key: str) -> str:
    """How a command line says the same as a setting such as ``text_column``."""
    role, is_column, _ = key.partition("_column")
    return f" (--column {role}=COLUMN)" if is_column else ""


def short(value: Any) -> str:
    """A value as messages quote it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

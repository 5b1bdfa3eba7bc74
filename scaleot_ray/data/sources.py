"""Which files a dataset is made of, and in which format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaleot_ray.config import DataSettings
from scaleot_ray.errors import DataError

ENDINGS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
# What lies beside the data in many folders without being part of it.
_NO_DATA = re.compile(r"(README|LICEN[CS]E|NOTICE|dataset_infos?)\b|[._]", re.IGNORECASE)
# Words in the names of a split's files, and the split they mean.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val"), "validation"),
    **{word: word for word in ("dev", "test", "eval")},
}
ALL = "all"


@dataclass(frozen=True)
class Source:
    """One file, or one dataset that ``datasets.save_to_disk`` wrote.

    Attributes:
        path: the file, or the dataset's folder.
        format: ``text``, ``jsonl``, ``parquet``, ``arrow``, ``csv``, ``tsv`` or ``hf``.
        dataset: for ``hf``, the memory-mapped ``datasets.Dataset``.
    """

    path: Path
    format: str
    dataset: Any = None


def find_sources(settings: DataSettings) -> list[Source]:
    """The files of a dataset, in the order of their names.

    A folder holds files of one format. With ``split``, those in whose name or folders the split is a word, in
    large or small letters (``train.parquet``, ``law-Train.csv``, ``train/0.csv``); with ``all``, every file.

    Raises:
        DataError: the path is missing, holds nothing that can be read, several formats, or several
            splits (or one, and files of none) of which none was chosen.
    """
    path = Path(settings.path).expanduser()
    if not path.exists():
        raise DataError(f"path: {path} does not exist.", "Give the path of a file, or of a folder of files.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file() or settings.format == "hf":
        if settings.format not in ("auto", "hf"):
            raise DataError(
                f"format: {path} was written by datasets.save_to_disk, not as {settings.format}.",
                "Leave format out, or set it to hf.",
            )
        return [_saved(path, settings.split)]
    if path.is_dir():
        return _folder(path, settings)
    if settings.split is not None:
        raise DataError(f"split: {path} is a single file and has no splits.", "Leave split out, or give a folder.")
    return [Source(path, _format(path, settings.format))]


def _format(path: Path, chosen: str) -> str:
    if chosen != "auto":
        return chosen
    if path.suffix.lower() not in ENDINGS:
        raise DataError(
            f"path: {path} has an ending of no known format ({', '.join(ENDINGS)}).",
            "Set format to jsonl, parquet, arrow, csv or tsv, or to text, which reads the file as one document.",
        )
    return ENDINGS[path.suffix.lower()]


def _folder(folder: Path, settings: DataSettings) -> list[Source]:
    wanted = [ending for ending, format in ENDINGS.items() if settings.format in ("auto", format)]
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in wanted)
    names = [name for name in names if not any(_NO_DATA.match(part) for part in name.parts)]
    names = [name for name in names if (folder / name).is_file()]
    if not names:
        raise DataError(
            f"path: the folder {folder} holds no file that can be read (endings: {', '.join(wanted)}).",
            "Give a folder of such files, a single file, or a folder written by datasets.save_to_disk.",
        )
    names = _chosen(names, folder, settings.split)
    formats = sorted({_format(name, settings.format) for name in names})
    if len(formats) > 1:
        raise DataError(
            f"path: the folder {folder} holds files of several formats ({', '.join(formats)}).",
            "Set format to the one that is the dataset.",
        )
    return [Source(folder / name, formats[0]) for name in names]


def _chosen(names: list[Path], folder: Path, split: str | None) -> list[Path]:
    """The files of a split, or all where there is nothing to choose among."""
    if split == ALL:
        return names
    chosen = [name for name in names if split is None or _belongs(name, split)]
    if not chosen:
        raise DataError(
            f"split: no file in {folder} belongs to {split!r} (its names say: {_listed(names) or 'no splits'}).",
            f"A split's files are called {split}.parquet, {split}-00000-of-00002.parquet or law-{split}.parquet, "
            f"or lie in a folder {split}.",
        )
    found = {SPLITS[word] for name in chosen for word in _words(name)}
    others = next((name for name in chosen if not _words(name)), None)
    # A file of test rows beside one whose name says nothing would be trained on unnoticed, too.
    if len(found) > 1 or (found and others is not None):
        what = "holds" if split is None else f"has for {split!r}"
        mixture = "several splits" if len(found) > 1 else f"files of a split and others, such as {others}"
        raise DataError(
            f"{'path' if split is None else 'split'}: the folder {folder} {what} {mixture} ({_listed(chosen)})"
            f"{', and none was chosen' if split is None else ''}.",
            f"Set split to what names the wanted files alone, to {ALL} for every file, or give the path of one file.",
        )
    return chosen


def _listed(names: list[Path]) -> str:
    return ", ".join(sorted({word for name in names for word in _words(name)}))


def _words(name: Path) -> set[str]:
    """The words for splits in a file's name and folders."""
    return {word for word in SPLITS if _belongs(name, word)}


def _belongs(name: Path, split: str) -> bool:
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9])", re.IGNORECASE)
    return any(word.search(part) for part in (*name.parts[:-1], name.stem))


def _saved(path: Path, split: str | None) -> Source:
    import datasets  # loads slowly; only this format needs it

    bars = not datasets.are_progress_bars_disabled()
    if bars:
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"path: {path} cannot be read as a dataset that save_to_disk wrote ({first_line(error)}).",
            "Write it again with save_to_disk, or set format to what the folder's files are.",
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    if isinstance(loaded, datasets.DatasetDict):
        names = ", ".join(loaded)
        if split is None and len(loaded) > 1:
            raise DataError(f"path: {path} holds several splits ({names}), and none was chosen.", "Set split to one.")
        if split is not None and split not in loaded:
            raise DataError(f"split: {path} has no split {split!r} ({names}).", "Set split to one of these.")
        split = split or next(iter(loaded))
        return Source(path / split, "hf", loaded[split].with_format(None))
    if split is not None and str(loaded.split) != split:
        raise DataError(f"split: {path} is a single dataset and has no split {split!r}.", "Leave split out.")
    return Source(path, "hf", loaded.with_format(None))


def first_line(error: BaseException) -> str:
    """What went wrong, without the rest of a long message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

"""Which of a command's datasets it is: errors say so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from scaleot_ray.config import DataSettings
from scaleot_ray.data.sources import find_sources
from scaleot_ray.errors import DataError


@contextmanager
def dataset_key(key: str) -> Iterator[None]:
    """Puts the dataset's key in front of an error: ``path: …`` becomes ``public.path: …``.

    Raises:
        DataError: the one that came from inside.
    """
    try:
        yield
    except DataError as error:
        field = error.problem.partition(":")[0]
        link = "." if field in DataSettings.model_fields else ": "
        raise DataError(f"{key}{link}{error.problem}", error.remedy) from None


def check_sources(datasets: Mapping[str, DataSettings | None]) -> None:
    """Looks whether datasets are there, before anything is read or written.

    Args:
        datasets: by key; None for one that was not given.

    Raises:
        DataError: one is missing or of no known format; names the key.
    """
    for key, settings in datasets.items():
        if settings is not None:
            with dataset_key(key):
                find_sources(settings)

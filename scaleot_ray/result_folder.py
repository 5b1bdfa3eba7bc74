"""Folders that results go to; inside a job of ``ray job submit`` they must outlive the job.

With ``--working-dir`` Ray copies a folder to the cluster and runs the job in the copy. Relative paths lead
into it, and Ray deletes it when it is no longer used, so results there would be lost.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

# What Ray puts into the environment of a job, and what it calls the folder of its copies.
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_COPIES = "working_dir_files"


_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_uri(text: str) -> bool:
    """Whether a setting names a place by a URI and no folder."""
    return _URI.match(text) is not None


def _outlives_the_job(folder: str) -> str:
    if _JOB in os.environ and _COPIES in Path(folder).expanduser().resolve().parts:
        raise ValueError(
            f"{folder} lies in Ray's copy of the job's --working-dir, which Ray deletes; "
            "give an absolute path on a disk that stays, best one that all nodes share"
        )
    return str(Path(folder).expanduser())  # a shell does that for options; in YAML it is left to us


def _folder_outlives_the_job(place: str) -> str:
    return place if is_uri(place) else _outlives_the_job(place)


ResultFolder = Annotated[str, Field(min_length=1), AfterValidator(_outlives_the_job)]
"""The setting of such a folder; :func:`scaleot_ray.config.parse` turns the refusal into a ConfigError."""

ResultPlace = Annotated[str, AfterValidator(_folder_outlives_the_job)]
"""The setting of such a folder, or of a URI."""

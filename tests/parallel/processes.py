"""Several processes of one group, without Ray; each runs the same function with its rank."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from scaleot_ray.parallel.zero import use_group
from scaleot_ray.ranks import join_group

SECONDS = 60.0


def in_group(size: int, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Runs ``function(ranks, folder, *arguments)`` in ``size`` processes; what one raises is raised here."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    multiprocessing.spawn(_member, (size, port, function, folder, arguments), nprocs=size)


def _member(rank: int, size: int, port: int, function: Any, folder: Path, arguments: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    ranks = join_group(rank, size, f"127.0.0.1:{port}", torch.device("cpu"), SECONDS)
    use_group()
    function(ranks, folder, *arguments)

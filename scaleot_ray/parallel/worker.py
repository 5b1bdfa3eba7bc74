"""A worker of a group: a Ray actor that joins the others and makes steps with them."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass

import ray
import torch
import transformers

from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.parallel.stage_one import Assignment, take_part
from scaleot_ray.progress import Progress
from scaleot_ray.ranks import join_group

_EXCHANGE_SECONDS = 1800.0
"""Workers wait so long for one another: the slowest may still read the model. One that has died is noticed at once."""


@dataclass(frozen=True)
class Present:
    """A worker's answer once it has started.

    Attributes:
        pid: its process.
        node: the address of its node.
        port: one that is free there.
    """

    pid: int
    node: str
    port: int


@dataclass(frozen=True)
class News:
    """What has happened since the last time that somebody asked.

    Attributes:
        progress: the latest report of each stage.
        kept: the latest state that was worth keeping, with its further tensors; None where there is no new one.
    """

    progress: list[Progress]
    kept: tuple[StageOne, dict[str, torch.Tensor]] | None


@ray.remote
class Worker:
    """One process of a group. It answers while it works: two of its methods run at a time.

    Args:
        rank: its number, from 0.
        size: how many there are.
        threads: it computes with.
    """

    def __init__(self, rank: int, size: int, threads: int) -> None:
        self._rank, self._size = rank, size
        self._lock = threading.Lock()
        self._progress: dict[str, Progress] = {}
        self._kept: tuple[StageOne, dict[str, torch.Tensor]] | None = None
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        transformers.utils.logging.disable_progress_bar()  # nobody watches a worker's own output

    def present(self) -> Present:
        """Answers once the worker has started."""
        with socket.socket() as found:
            found.bind(("", 0))
            return Present(os.getpid(), ray.util.get_node_ip_address(), found.getsockname()[1])

    def work(self, assignment: Assignment, address: str) -> None:
        """Makes all steps, with the first worker listening at ``address``."""
        device = torch.device("cuda" if assignment.parallel.gpus else "cpu")
        ranks = join_group(self._rank, self._size, address, device, _EXCHANGE_SECONDS)
        take_part(assignment, ranks, device, self._keep, self._report if ranks.first else None)

    def news(self) -> News:
        """What there is to tell."""
        with self._lock:
            found = News(list(self._progress.values()), self._kept)
            self._progress, self._kept = {}, None
        return found

    def _report(self, progress: Progress) -> None:
        with self._lock:
            self._progress[progress.stage] = progress

    def _keep(self, state: StageOne, extra: dict[str, torch.Tensor]) -> None:
        with self._lock:
            self._kept = state, extra

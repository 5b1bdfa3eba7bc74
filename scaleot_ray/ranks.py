"""Processes that train the same thing together, each on its share of every batch (torch.distributed, no Ray)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from scaleot_ray.errors import RunFailed


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: of tensors that they exchange: the GPU with NCCL, the CPU with gloo.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def rows(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's share of a batch's rows: every ``size``-th one, so that all of a batch are somebody's."""
        return {name: value[self.rank :: self.size] for name, value in batch.items()}

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        # NCCL knows float64; what has not (MPS, some NPUs) has no group of its own either.
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def agreed(self, decision: bool) -> bool:
        """The first process's decision: what goes by the clock is not the same everywhere."""
        if self.size == 1:
            return decision
        flag = torch.tensor([int(decision)], device=self.device)
        distributed.broadcast(flag, src=0)
        return bool(flag.item())

    def check_same(self, what: str, numbers: Sequence[int], remedy: str) -> None:
        """Makes sure that all processes have the same numbers, before they are used where a difference would hang.

        Args:
            what: they are, for the message.
            numbers: below 2⁶³; as many on every process.
            remedy: what to do where they differ.

        Raises:
            RunFailed: they differ; raised on every process.
        """
        if self.size == 1:
            return
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(all_of_them, mine)
        others = [rank for rank, theirs in enumerate(all_of_them) if not torch.equal(theirs, all_of_them[0])]
        if others:
            raise RunFailed(f"{what} of worker {others[0]} is not the one of worker 0.", remedy)


ALONE = Ranks()
"""One process that does everything itself."""


def join_group(rank: int, size: int, address: str, device: torch.device, timeout: float) -> Ranks:
    """Makes this process one of a group that works together.

    Args:
        rank, size: its number, and how many there are.
        address: ``HOST:PORT`` where the first one listens.
        device: what it computes on.
        timeout: seconds to wait for the others, now and in every exchange.
    """
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    return Ranks(rank, size, str(device))

"""Which GPU a part of the run gets, as Ray gives them out: a share lies within one GPU."""

from __future__ import annotations

_UNITS = 10_000
"""Of a GPU; Ray counts in the same."""


class Gpus:
    """The GPUs of one machine, and what is free of each.

    Args:
        there: how many; where others hold some, whole ones and a share of one more.
    """

    def __init__(self, there: float) -> None:
        whole, share = divmod(_units(there), _UNITS)
        self._free = [_UNITS] * whole + ([share] if share else [])
        self._taken: dict[str, tuple[int, int]] = {}

    def have(self, wanted: float) -> bool:
        """Whether one of them has so much free."""
        return not wanted or self._best(_units(wanted)) is not None

    def take(self, role: str, wanted: float) -> None:
        """Gives a part what :meth:`have` says is there."""
        if not wanted:
            return
        index = self._best(_units(wanted))
        assert index is not None, f"{role} has no GPU"
        self._free[index] -= _units(wanted)
        self._taken[role] = index, _units(wanted)

    def give_back(self, role: str) -> None:
        """Takes back what a part had, if it had any."""
        index, units = self._taken.pop(role, (0, 0))
        if units:
            self._free[index] += units

    def _best(self, units: int) -> int | None:
        """The one that has least left of it afterwards, the first of several: Ray's own choice."""
        able = [index for index, there in enumerate(self._free) if there >= units]
        return min(able, key=lambda index: self._free[index], default=None)


def _units(share: float) -> int:
    return round(share * _UNITS)

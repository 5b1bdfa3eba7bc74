"""How often something of a sender was refused, and from when on nothing more of it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.federation.rounds.registry import Registry, UnknownSender

REFUSALS_READ = 100
"""Refused submissions of one sender, after which nothing more of it is looked at: checking costs time."""

WRITTEN_EVERY = 100
"""Of what is not looked at, so many together are one write to the disk."""

_NOT_READ = "more that were not looked at"


class NotRead(ArtifactRefused):
    """One more of a sender of whom nothing is looked at any more: it is counted, and that is all."""


class Refusals:
    """Refusals of one coordinator's life, by sender; all senders that do not show who they are are one, None.

    Args:
        registry: keeps reasons and numbers.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._counts: dict[str | None, int] = {}
        self._unwritten: dict[str | None, int] = {}

    @contextmanager
    def counting(self, sender: str | None) -> Iterator[None]:
        """Has the registry know of what is refused in here."""
        try:
            yield
        except ArtifactRefused as error:
            self._counts[sender] = self._counts.get(sender, 0) + 1
            self._registry.tenants.refuse(sender, error.problem)
            raise

    def check(self, sender: str | None) -> None:
        """Whether something of a sender is still looked at.

        Raises:
            ArtifactRefused: it is not, from now on.
            NotRead: it is not, as was said before.
        """
        count, who = self._counts.get(sender, 0), sender or "senders that do not show who they are"
        if count < REFUSALS_READ:
            return
        words = (
            f"{REFUSALS_READ} submissions of {who} were refused; no more of them are looked at.",
            "Begin the run again once what comes is what `tune` wrote.",
        )
        self._counts[sender] = count + 1
        if count == REFUSALS_READ:
            self._registry.tenants.refuse(sender, words[0])
            raise ArtifactRefused(*words) if sender is not None else UnknownSender(*words)
        self._unwritten[sender] = self._unwritten.get(sender, 0) + 1
        if self._unwritten[sender] >= WRITTEN_EVERY:
            self.write()
        raise NotRead(*words)

    def write(self) -> None:
        """Has the registry know how many there were that were not looked at."""
        for sender, count in self._unwritten.items():
            self._registry.tenants.refuse(sender, _NOT_READ, count)
        self._unwritten.clear()

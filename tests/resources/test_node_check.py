"""Many data owners are looked at a few at a time."""

from __future__ import annotations

import time
from functools import partial

import pytest
import ray

from scaleot_ray.errors import DataError
from scaleot_ray.resources import node_check


@ray.remote(num_cpus=0)
def look(number: int) -> tuple[int, float, float]:
    """Takes a moment; says who it is, and from when to when."""
    begun = time.time()
    time.sleep(2)
    return number, begun, time.time()


@ray.remote(num_cpus=0)
def refuse() -> None:
    """There is no such data."""
    raise DataError("There are no rows.", "Look for them.")


@pytest.mark.usefixtures("connected_ray")
def test_no_more_are_looked_at_at_once_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_check, "AT_ONCE", 2)
    found = node_check._answers({f"data owner {number}": partial(look.remote, number) for number in range(5)})
    assert [number for number, _, _ in found.values()] == list(range(5))
    spans = [span for _, *span in found.values()]
    assert max(sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans) <= 2


@pytest.mark.usefixtures("connected_ray")
def test_one_that_fails_is_named() -> None:
    with pytest.raises(DataError, match=r"^data owner bob: There are no rows"):
        node_check._answers({"data owner alice": partial(look.remote, 1), "data owner bob": refuse.remote})

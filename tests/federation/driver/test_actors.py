"""The name that a coordinator is found by when its driver was killed."""

from __future__ import annotations

from scaleot_ray.federation.driver.actors import coordinator_name


def test_the_same_path_on_two_nodes_is_of_two_runs() -> None:
    first = coordinator_name("/scratch/run", "a1")
    assert first == coordinator_name("/scratch/run", "a1")
    assert first not in (coordinator_name("/scratch/run", "b2"), coordinator_name("/scratch/other", "a1"))

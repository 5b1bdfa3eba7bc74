"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from scaleot_ray.resources.session import Session

# Ray's workers run at nice 15: beside other work, or another test process, an actor takes minutes to start. What the
# tests wait for is a run, not a turn.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def connected_ray() -> Iterator[Session]:
    """One Ray of two processors for all tests that only need one to work on; runs attach to it."""
    from scaleot_ray.resources.session import local_ray

    with local_ray(cpus=2, gpus=0, object_store_bytes=256 << 20) as session:
        yield session

"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from scaleot_ray.federation.resources.session import Session


@pytest.fixture(scope="session")
def connected_ray() -> Iterator[Session]:
    """One Ray of two processors for all tests that only need one to work on; runs attach to it."""
    from scaleot_ray.federation.resources.session import local_ray

    with local_ray(cpus=2, gpus=0, object_store_bytes=256 << 20) as session:
        yield session

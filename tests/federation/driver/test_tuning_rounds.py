"""Who may tune when not all may at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from scaleot_ray.config import TenantSettings
from scaleot_ray.federation.driver import placement
from scaleot_ray.federation.driver.packs import Pack
from scaleot_ray.federation.driver.placement import Placement
from scaleot_ray.federation.driver.run_state import Tenant
from scaleot_ray.federation.driver.schedule import MachineSchedule, Schedule
from scaleot_ray.federation.driver.tuning_rounds import TuningRounds
from scaleot_ray.resources.needs import Memory


def owner(name: str, gpus: float = 0) -> Tenant:
    """A data owner that waits."""
    data = {"path": "rows.jsonl"}
    return Tenant(TenantSettings.model_validate({"name": name, "train": data, "test": data, "gpus": gpus}))


def begun(schedule: Schedule, tenants: Sequence[Tenant], at_once: int | None, per_process: int = 1) -> list[str]:
    """Whose tuning begins in a round that has just been opened."""
    roles = list[str]()
    needs = SimpleNamespace(data_owners={tenant.name: Memory(1, 1) for tenant in tenants})
    settings = SimpleNamespace(tenants_at_once=at_once, tenants_per_process=per_process)
    state: Any = SimpleNamespace(settings=settings, schedule=schedule, tenants=tenants, needs=needs)
    rounds: Any = TuningRounds(state, lambda: None)
    rounds._open = SimpleNamespace(
        round=SimpleNamespace(number=1), submitted={tenant.name: False for tenant in tenants}
    )

    def tune(pack: Pack) -> None:
        roles.append(pack.role)
        for tenant in pack.tenants:
            tenant.tuning = 1

    rounds._tune = tune
    schedule.start(rounds.possible)
    return roles


@pytest.mark.parametrize("at_once", [None, 2])
def test_one_that_does_not_fit_leaves_its_turn_to_those_behind_it(at_once: int | None) -> None:
    tenants = [owner("a", gpus=1), owner("b", gpus=1), owner("c")]
    assert begun(MachineSchedule(8, 1, 1 << 30), tenants, at_once) == ["data owner a", "data owner c"]


@pytest.mark.parametrize(
    ("at_once", "per_process", "roles"),
    [
        (1, 1, ["data owner a"]),
        (3, 2, ["data owners a, b", "data owner c"]),
        (2, 4, ["data owners a, b"]),
        (None, 2, ["data owners a, b", "data owners c, d"]),
    ],
)
def test_no_more_tune_at_once_than_may(at_once: int | None, per_process: int, roles: list[str]) -> None:
    assert begun(MachineSchedule(8, 0, 1 << 30), [owner(name) for name in "abcd"], at_once, per_process) == roles


@contextmanager
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Placement]:
    """A cluster where everything finds its place."""
    monkeypatch.setattr(placement, "_group", lambda work: work.role)
    monkeypatch.setattr(placement, "placement_group_table", lambda group: {"state": "CREATED"})
    monkeypatch.setattr(placement, "remove_placement_group", lambda group: None)
    with Placement(300, None, autoscaling=True) as found:
        yield found


@pytest.mark.parametrize(("at_once", "count"), [(None, 4), (3, 3)])
def test_no_more_ask_for_a_place_than_may_tune(
    monkeypatch: pytest.MonkeyPatch, at_once: int | None, count: int
) -> None:
    with places(monkeypatch) as schedule:
        assert len(begun(schedule, [owner(name) for name in "abcd"], at_once)) == count

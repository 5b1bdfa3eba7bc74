"""What starts next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from scaleot_ray.federation.driver.gpus import Gpus
from scaleot_ray.federation.driver.schedule import MachineSchedule, Work, next_work

NONE = Gpus(0)


def work(role: str, cpus: int = 1, memory: int = 1, gpus: float = 0) -> Work:
    """Work that does nothing."""
    return Work(role, cpus, gpus, memory, lambda: None)


def test_in_order_while_processors_last() -> None:
    waiting = [work("a"), work("b"), work("c")]
    assert next_work(waiting, [], 2, NONE, 10) is waiting[0]
    assert next_work(waiting[1:], [waiting[0]], 2, NONE, 10) is waiting[1]
    assert next_work(waiting[2:], waiting[:2], 2, NONE, 10) is None


def test_one_that_does_not_fit_is_overtaken() -> None:
    wide, narrow = work("wide", cpus=2), work("narrow")
    assert next_work([wide, narrow], [work("runs")], 2, NONE, 10) is narrow


def started(schedule: MachineSchedule, waiting: Sequence[Work]) -> list[str]:
    """What of this starts, in its order."""
    roles = list[str]()
    begun = [replace(one, begin=partial(roles.append, one.role)) for one in waiting]
    schedule.start(lambda: [one for one in begun if not schedule.has(one.role)])
    return roles


def test_gpus_count() -> None:
    halves = [work(name, gpus=0.5) for name in "abc"]
    assert started(MachineSchedule(8, 1, 10), halves) == ["a", "b"]


def test_a_share_lies_within_one_gpu() -> None:
    schedule = MachineSchedule(8, 2, 10)
    large = [work(name, gpus=0.6) for name in "abc"]
    assert started(schedule, large) == ["a", "b"]  # 0.8 are free, 0.4 of each
    assert started(schedule, [*large, work("d", gpus=0.4)]) == ["d"]
    schedule.over("b")
    assert started(schedule, [work("e", gpus=1)]) == ["e"]


def test_a_share_goes_where_least_is_left_of_a_gpu() -> None:
    schedule = MachineSchedule(8, 2, 10)
    assert started(schedule, [work("a", gpus=0.7), work("b", gpus=0.4), work("c", gpus=0.3)]) == ["a", "b", "c"]
    schedule.over("b")  # it had the other one for itself
    assert started(schedule, [work("whole", gpus=1)]) == ["whole"]


def test_where_others_hold_a_share_the_rest_is_one_gpu() -> None:
    third = [work(name, gpus=0.3333) for name in "abc"]
    assert started(MachineSchedule(8, 1.5, 10), [work("a", gpus=0.6), work("b", gpus=0.6)]) == ["a"]
    assert started(MachineSchedule(8, 1, 10), third) == ["a", "b", "c"]


def test_what_memory_there_is_holds() -> None:
    schedule = MachineSchedule(8, 0, 10)
    assert started(schedule, [work("runs", memory=9)]) == ["runs"]
    assert [schedule.fits(work("a", memory=memory)) for memory in (10, 11)] == [True, False]


def test_memory_is_reserved_but_never_blocks_the_first() -> None:
    large = work("large", memory=8)
    assert next_work([large], [large], 8, NONE, 10) is None
    assert next_work([large], [], 8, NONE, 4) is large

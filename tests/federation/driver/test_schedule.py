"""What starts next."""

from __future__ import annotations

from scaleot_ray.federation.driver.schedule import Work, next_work


def work(role: str, cpus: int = 1, memory: int = 1, gpus: float = 0) -> Work:
    """Work that does nothing."""
    return Work(role, cpus, gpus, memory, lambda: None)


def test_in_order_while_processors_last() -> None:
    waiting = [work("a"), work("b"), work("c")]
    assert next_work(waiting, [], 2, 0, 10) is waiting[0]
    assert next_work(waiting[1:], [waiting[0]], 2, 0, 10) is waiting[1]
    assert next_work(waiting[2:], waiting[:2], 2, 0, 10) is None


def test_one_that_does_not_fit_is_overtaken() -> None:
    wide, narrow = work("wide", cpus=2), work("narrow")
    assert next_work([wide, narrow], [work("runs")], 2, 0, 10) is narrow


def test_gpus_count() -> None:
    half = work("half", gpus=0.5)
    assert next_work([half], [half], 8, 1, 10) is half
    assert next_work([half], [half, half], 8, 1, 10) is None


def test_memory_is_reserved_but_never_blocks_the_first() -> None:
    large = work("large", memory=8)
    assert next_work([large], [large], 8, 0, 10) is None
    assert next_work([large], [], 8, 0, 4) is large

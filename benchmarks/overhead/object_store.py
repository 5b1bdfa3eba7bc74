"""Putting an emulator into Ray's object store and getting it out, against memcpy of the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import ray

from benchmarks.overhead.spread import ratios, spread
from scaleot_ray.artifacts import Artifact
from scaleot_ray.federation.roles.object_store import from_shared, to_shared
from scaleot_ray.resources.session import local_ray

Bytes = npt.NDArray[np.uint8]
Result = TypeVar("Result")

_ROOM = 256 << 20


def compare_object_store(emulator: Artifact, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures copy, put and get in turn, ``rounds`` times, on a private Ray.

    Two copies stand beside put and get: ``memcpy`` into memory that is mapped already, and ``fresh_copy`` into
    memory that is not, which is what a copy per reader would cost. Put writes into the store's shared
    memory, whose pages are mapped when first used: the first round is reported on its own (``first``).
    Get is what a reader does, ``ray.get`` and :func:`from_shared`; here the reader is the process that put.

    Args:
        emulator: what is put, with tensors in memory of their own.
        rounds: after the first.
        say: hears of each round.

    Returns:
        ``bytes``; seconds of ``memcpy``, ``fresh_copy``, ``put``, ``get``; ``ratios`` to memcpy, and of put to
        fresh_copy; ``first`` (the same seconds); ``zero_copy`` (two gets give views of one memory).
    """
    arrays = list(to_shared(emulator)["tensors"].values())
    destinations = [np.zeros_like(array) for array in arrays]
    _copy(arrays, destinations)  # maps it
    found: list[dict[str, float]] = []
    with local_ray(cpus=1, gpus=0, object_store_bytes=2 * emulator.nbytes + _ROOM):
        for number in range(rounds + 1):
            one = {
                "memcpy": _timed(_copy, arrays, destinations)[1],
                "fresh_copy": _timed(_fresh_copy, arrays)[1],
            }
            reference, one["put"] = _timed(_put, emulator)
            read, one["get"] = _timed(_get, reference)
            if number == 0:
                read.verify()
            zero_copy = _same_memory(read, _get(reference))
            # The store gives the room back once nothing refers to the object, views included.
            del read, reference
            found.append(one)
            say(
                f"object store, round {number} of {rounds}: put {one['put']:.3f} s, get {one['get'] * 1000:.1f} ms, "
                f"memcpy {one['memcpy']:.3f} s"
            )
    first, rest = found[0], found[1:]
    seconds = {key: [one[key] for one in rest] for key in first}
    return {
        "bytes": emulator.nbytes,
        **{key: spread(values) for key, values in seconds.items()},
        "ratios": {
            "put / memcpy": ratios(seconds["put"], seconds["memcpy"]),
            "put / fresh_copy": ratios(seconds["put"], seconds["fresh_copy"]),
            "get / memcpy": ratios(seconds["get"], seconds["memcpy"]),
        },
        "first": first,
        "zero_copy": zero_copy,
    }


def _put(artifact: Artifact) -> ray.ObjectRef:
    return ray.put(to_shared(artifact))


def _get(reference: ray.ObjectRef) -> Artifact:
    return from_shared(ray.get(reference))


def _copy(sources: Sequence[Bytes], destinations: Sequence[Bytes]) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        np.copyto(destination, source)


def _fresh_copy(sources: Sequence[Bytes]) -> list[Bytes]:
    return [source.copy() for source in sources]


def _same_memory(one: Artifact, other: Artifact) -> bool:
    """Whether two readers' tensors are the same memory: then neither is a copy."""
    return all(tensor.data_ptr() == other.tensors[name].data_ptr() for name, tensor in one.tensors.items())


def _timed(work: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    start = time.perf_counter()
    result = work(*arguments)
    return result, time.perf_counter() - start

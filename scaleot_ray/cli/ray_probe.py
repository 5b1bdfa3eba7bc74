"""Starts a small Ray, shares an array and prints what it found as JSON.

A program of its own, so that ``scaleot doctor`` can give up on a Ray that hangs; the folder for Ray's
session files is its argument.
"""

from __future__ import annotations

import json
import os
import sys
import time


def probe(folder: str) -> dict[str, float | bool]:
    """Seconds until a task has answered, and whether it read the array without a copy.

    Args:
        folder: for Ray's session files, as short as
            :func:`scaleot_ray.resources.machine.session_folder` makes it.
    """
    start = time.monotonic()
    import numpy
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=folder,
    )
    try:

        @ray.remote(num_cpus=1)
        def shares_memory(array: numpy.ndarray) -> bool:
            # A copy would own its memory and be writable.
            return not array.flags.owndata and not array.flags.writeable

        reference = ray.put(numpy.zeros(2**20, dtype=numpy.float32))
        zero_copy = bool(ray.get(shares_memory.remote(reference), timeout=60))
    finally:
        ray.shutdown()
    return {"seconds": time.monotonic() - start, "zero_copy": zero_copy}


if __name__ == "__main__":
    # Ray prints where it likes; only the last line is ours.
    saved = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = probe(sys.argv[1])
    saved.write(json.dumps(found) + "\n")
    saved.flush()
    sys.exit(0)

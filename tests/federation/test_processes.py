"""Memory of a process tree, and processes that must not be left."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

from scaleot_ray.federation.processes import PeakMemory, ask_to_end, end_marked, marked

HOLD = "import time; held = bytearray({size}); print('ready', flush=True); time.sleep(60)"
SHARE = """
import mmap, os, time
shared = mmap.mmap(-1, {size})
shared.write(bytes({size}))
for _ in range(3):
    if os.fork() == 0:
        shared.seek(0)
        sum(shared.read()[::4096])
        break
print('ready', flush=True)
time.sleep(60)
"""
SIZE = 200 << 20


def child(program: str, count: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Starts Python on a program and waits until it has printed ``count`` lines."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and its children."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()


def test_children_count_and_the_peak_stays() -> None:
    memory = PeakMemory()
    memory.look()
    before = memory.bytes
    process = child(HOLD.format(size=SIZE))
    memory.look()
    end(process)
    memory.look()
    assert SIZE * 0.9 < memory.bytes - before < SIZE * 1.5


def test_shared_pages_count_once() -> None:
    memory = PeakMemory()
    memory.look()
    before = memory.bytes
    process = child(SHARE.format(size=SIZE), count=4)
    memory.look()
    end(process)
    assert memory.bytes - before < SIZE * 1.5


def test_a_thread_looks_by_itself() -> None:
    with PeakMemory() as memory:
        time.sleep(0.1)
    assert memory.bytes > psutil.Process().memory_full_info().uss / 2


def test_marked_processes_are_found_and_ended_whoever_their_parent_is() -> None:
    orphan = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL); "
        "print('ready', flush=True)"
    )
    child(orphan, SCALEOT_TEST_MARK="xyz").wait()
    assert len(marked("SCALEOT_TEST_MARK", "xyz")) == 1
    end_marked("SCALEOT_TEST_MARK", "xyz")
    assert not marked("SCALEOT_TEST_MARK", "xyz")


def test_asking_to_end_waits() -> None:
    process = child(HOLD.format(size=10))
    start = time.monotonic()
    ask_to_end({process.pid, 2**22 - 1}, seconds=10)
    assert process.wait(1) == -15
    assert time.monotonic() - start < 5

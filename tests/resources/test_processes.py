"""Memory of a process tree, and processes that must not be left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil

from scaleot_ray.resources.processes import (
    PeakMemory,
    end,
    end_marked,
    end_users_of,
    marked,
    users_of,
    wait_for_end,
)

HOLD = "import time; held = bytearray({size}); print('ready', flush=True); time.sleep(60)"
SHARE = """
import mmap, os, time
shared = mmap.mmap(-1, {size})
for page in range(0, {size}, 4096):
    shared[page] = 1
for _ in range(3):
    if os.fork() == 0:
        assert all(shared[page] for page in range(0, {size}, 4096))
        break
os.write(1, b'ready' + bytes([10]))  # in one piece: print may write the end of the line apart
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
        line = process.stdout.readline()
        assert line == "ready\n", f"printed {line!r}, status {process.poll()}"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    """Kills a process and its children."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()


def in_a_process_of_its_own(measure: Callable[[], int]) -> int:
    """What a function returns in a process without other children: those of other tests come and go."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure).result()


def growth_with_a_child() -> int:
    memory = PeakMemory()
    memory.look()
    before = memory.bytes
    process = child(HOLD.format(size=SIZE))
    memory.look()
    kill(process)
    memory.look()
    return memory.bytes - before


def growth_with_shared_pages() -> int:
    memory = PeakMemory()
    memory.look()
    before = memory.bytes
    process = child(SHARE.format(size=SIZE), count=4)
    memory.look()
    kill(process)
    return memory.bytes - before


def difference_if_a_child_is_named_too() -> int:
    process = child(HOLD.format(size=SIZE))
    named, plain = PeakMemory(), PeakMemory()
    named.others = {process.pid, os.getpid(), 2**22 - 1}
    named.look()
    plain.look()
    kill(process)
    assert named.others == {process.pid, os.getpid()}
    return abs(named.bytes - plain.bytes)


def test_children_count_and_the_peak_stays() -> None:
    assert SIZE * 0.9 < in_a_process_of_its_own(growth_with_a_child) < SIZE * 1.5


def test_shared_pages_count_once() -> None:
    assert SIZE * 0.9 < in_a_process_of_its_own(growth_with_shared_pages) < SIZE * 1.5


def test_a_process_counts_once_even_if_it_is_named_too() -> None:
    # Counted twice it would weigh SIZE more.
    assert in_a_process_of_its_own(difference_if_a_child_is_named_too) < SIZE / 2


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


def test_ending_gives_time_to_unwind_and_then_none(tmp_path: Path) -> None:
    clean = f"""
import time
from pathlib import Path
print('ready', flush=True)
try:
    time.sleep(60)
finally:
    Path({str(tmp_path / "unwound")!r}).write_text('yes')
"""
    polite = child("import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))" + clean)
    deaf = child("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + clean.replace("unwound", "never"))
    start = time.monotonic()
    end({polite.pid, deaf.pid, 2**22 - 1}, unwind_seconds=1.0)
    assert time.monotonic() - start < 8
    assert not psutil.pid_exists(polite.pid)
    assert not psutil.pid_exists(deaf.pid)
    assert [path.name for path in tmp_path.iterdir()] == ["unwound"]
    wait_for_end(polite.pid, 1.0)


def test_only_rays_own_users_of_its_folder_end(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "raylet.out"
    log.parent.mkdir()
    log.touch()
    reader = subprocess.Popen(["tail", "-f", str(log)], stdout=subprocess.DEVNULL)
    agent = subprocess.Popen(["bash", "-c", f"exec -a ray::DashboardAgent sleep 60 < {log}"])
    try:
        deadline = time.monotonic() + 10
        while [process.pid for process in users_of(tmp_path)] != [agent.pid] and time.monotonic() < deadline:
            time.sleep(0.05)
        end_users_of(tmp_path)
        agent.wait(5)
        assert reader.poll() is None
    finally:
        for process in (reader, agent):
            process.kill()
            process.wait()

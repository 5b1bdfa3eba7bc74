"""The Ray a run works on: one of its own, started for the run and gone after it.

Only where a Ray is given explicitly does a run attach to it: the process is connected already, or
``RAY_ADDRESS`` is set, as in a job that ``ray job submit`` started. A Ray that merely happens to run
on the machine is left alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import ray._private.state
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scaleot_ray.errors import ResourcesMissing, RunFailed
from scaleot_ray.resources.machine import Machine, session_folder, usable_memory
from scaleot_ray.resources.processes import end_marked, end_users_of
from scaleot_ray.resources.watchdog import watched

MARK = "SCALEOT_RUN"  # in the environment of every process of a private Ray
_CONNECT_SECONDS = 10.0
_SHUTDOWN_SECONDS = 4.0  # it takes 1.5
_SETTLE_SECONDS = 5.0  # what actors held that ended just now is free within a tenth, on a busy machine later
# All of a private Ray's processes inherit it. Workers that Ray starts beforehand, one a processor, would never be used,
# since each actor of a run has an environment of its own; they would only slow down the start of the first actors.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"}


@dataclass(frozen=True)
class Session:
    """The connected Ray.

    Attributes:
        private: started for this run.
        node: id of the node we run on; actors of the environment ``local`` stay on it.
        cpus, gpus, object_store_bytes: what Ray has there in all.
        logs: folder of the workers' logs.
    """

    private: bool
    node: str
    cpus: int
    gpus: int
    object_store_bytes: int
    logs: Path

    def machine(self) -> Machine:
        """What this Ray lets us use of the machine: on our node, and free now."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (free := self.free()) != (self.cpus, self.gpus) and time.monotonic() < deadline:
            time.sleep(0.05)
        cpus, gpus = int(free[0]), free[1]
        return Machine(
            cpus, gpus, usable_memory(), self.object_store_bytes, cpus_held=self.cpus - cpus, gpus_held=self.gpus - gpus
        )

    def free(self) -> tuple[float, float]:
        """Processors and GPUs of our node that no one has claimed."""
        resources = ray._private.state.available_resources_per_node().get(self.node, {})
        return resources.get("CPU", 0.0), resources.get("GPU", 0.0)

    def on_this_node(self) -> NodeAffinitySchedulingStrategy:
        """Keeps an actor on our node: artefacts and private data are paths on it."""
        return NodeAffinitySchedulingStrategy(self.node, soft=False)


def ray_is_given() -> bool:
    """Whether a Ray was given explicitly; else a run starts its own."""
    return ray.is_initialized() or _address() is not None


def _address() -> str | None:
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


@contextmanager
def local_ray(cpus: int, gpus: int, object_store_bytes: int, debug: bool = False) -> Iterator[Session]:
    """Connects to a Ray for the time of a run.

    A Ray that was given explicitly is used as it is. Else one is started with exactly these
    resources, and when the block is left, in whatever way, all its processes are gone.

    Args:
        cpus: what actors may claim together.
        gpus: the same.
        object_store_bytes: size of the shared memory for artefacts.
        debug: print what the workers print.

    Raises:
        ResourcesMissing: the Ray that was given cannot be reached.
        RunFailed: Ray does not start.
    """
    if ray.is_initialized():
        yield _session(private=False)
        return
    address = _address()
    if address is not None:
        with _connected(address, debug):
            yield _session(private=False)
        return
    with _started(cpus, gpus, object_store_bytes, debug):
        yield _session(private=True)


@contextmanager
def _connected(address: str, debug: bool) -> Iterator[None]:
    if "://" in address:  # of Ray Client, whose driver is no process of the cluster, or of the jobs' server
        raise ResourcesMissing(
            f"RAY_ADDRESS: a run cannot work at {address}, since it is led from a node of the cluster.",
            "Submit it with `ray job submit`; or set RAY_ADDRESS on a node to HOST:PORT of `ray start` (port 6379), or "
            "unset it to start a Ray for this run.",
        )
    try:
        _look_for_port(address)
        ray.init(address=address, log_to_driver=debug, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ResourcesMissing(
            f"RAY_ADDRESS: no Ray answers at {address} ({first}).",
            "Unset RAY_ADDRESS to start a Ray for this run, or start the cluster. One that asks for a token answers "
            "only with RAY_AUTH_MODE=token and its token in ~/.ray/auth_token or RAY_AUTH_TOKEN.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _look_for_port(address: str) -> None:
    """Ray itself tries for a quarter of an hour, and says nothing."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from error


@contextmanager
def _started(cpus: int, gpus: int, object_store_bytes: int, debug: bool) -> Iterator[None]:
    mark = secrets.token_hex(8)
    folder = session_folder()
    # Ray prints what happens to workers, whatever log_to_driver says; we say it in our own words.
    worker = ray._private.worker
    talkative, worker._worker_logs_enabled = worker._worker_logs_enabled, debug
    with watched(MARK, mark, folder):
        try:
            with _environment({MARK: mark, **_ENVIRONMENT}):
                _start(cpus, gpus, object_store_bytes, folder, debug)
            yield
        finally:
            # Where a signal reached Ray's own processes as well, Ray would wait for them half a minute.
            impatience = threading.Timer(_SHUTDOWN_SECONDS, end_marked, (MARK, mark))
            impatience.start()
            # Interrupted while starting, Ray may not know of its own processes: the mark finds them all.
            with contextlib.suppress(Exception):
                ray.shutdown()
            impatience.cancel()
            worker._worker_logs_enabled = talkative
            end_marked(MARK, mark)
            end_users_of(folder)  # agents, which have lost the mark; Ray does not end them where its raylet was killed
            shutil.rmtree(folder, ignore_errors=True)


def _start(cpus: int, gpus: int, object_store_bytes: int, folder: Path, debug: bool) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=debug,
            logging_level="INFO" if debug else "ERROR",
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray raises many types here; each means that the run cannot start
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunFailed(
            f"Ray did not start on this machine: {first}",
            "`scaleot doctor` looks at what Ray needs; with --debug Ray's own output is shown.",
        ) from error


def _session(private: bool) -> Session:
    node = ray.get_runtime_context().get_node_id()
    resources = next(item["Resources"] for item in ray.nodes() if item["NodeID"] == node)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    return Session(
        private,
        node,
        int(resources.get("CPU", 0)),
        int(resources.get("GPU", 0)),
        int(resources.get("object_store_memory", 0)),
        logs,
    )


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

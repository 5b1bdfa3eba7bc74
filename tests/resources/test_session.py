"""A run's own Ray: private, gone afterwards; another one only when it is given."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from scaleot_ray.errors import ResourcesMissing
from scaleot_ray.resources import session as sessions
from scaleot_ray.resources.processes import marked
from scaleot_ray.resources.session import MARK, Session
from tests.cli.command import scaleot
from tests.tiny_run import write_tiny_run

PROGRAM = """
import json, os, sys, tempfile, time
from pathlib import Path
import psutil, ray
from scaleot_ray.resources.processes import marked
from scaleot_ray.resources.session import MARK, local_ray, ray_is_given

before = dict(os.environ)
given = ray_is_given()
with local_ray(cpus=1, gpus=0, object_store_bytes=100 << 20) as session:
    inside = len(psutil.Process().children(recursive=True))
    folder = session.logs.parents[1]
    result = {"given": given, "private": session.private, "node": session.node, "cpus": session.cpus,
              "store": session.object_store_bytes, "folder": str(folder), "processes": inside}
result["left"] = len(psutil.Process().children(recursive=True))
result["folder_left"] = folder.exists()
result["environment"] = {name for name in os.environ.keys() | before.keys()
                         if os.environ.get(name) != before.get(name) and not name.startswith("RAY_")} != set()
print(json.dumps(result))
"""


def in_a_process(**environment: str) -> dict[str, Any]:
    """Connects in a process of its own; says what it found."""
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**clean, **environment},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_ray_that_happens_to_run_is_left_alone(connected_ray: Session, tmp_path: Path) -> None:
    # A temporary folder whose path would be too long for Ray's sockets.
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    found = in_a_process(TMPDIR=str(deep))
    assert (found["given"], found["private"], found["cpus"]) == (False, True, 1)
    assert found["node"] != connected_ray.node
    assert 90 << 20 < found["store"] <= 100 << 20
    assert found["processes"] > 3
    assert (found["left"], found["folder_left"], found["environment"]) == (0, False, False)
    assert not found["folder"].startswith(str(deep))


def test_a_driver_that_is_killed_leaves_neither_processes_nor_a_folder(connected_ray: Session) -> None:
    program = (
        "import time\nfrom scaleot_ray.resources.session import local_ray\n"
        "with local_ray(cpus=1, gpus=0, object_store_bytes=100 << 20) as session:\n"
        "    print(session.logs.parents[1], flush=True)\n    time.sleep(600)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=clean,
        start_new_session=True,
    )
    assert driver.stdout is not None
    folder = Path(driver.stdout.readline().strip())
    family = psutil.Process(driver.pid).children(recursive=True)
    assert folder.exists()
    assert len(family) > 4
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs(family, timeout=30)  # on its own, an agent of Ray's takes a minute
    assert left == []
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()


def test_a_given_ray_is_used_and_left_running(connected_ray: Session) -> None:
    found = in_a_process(RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    assert (found["given"], found["private"], found["node"]) == (True, False, connected_ray.node)
    assert ray.cluster_resources()["CPU"] == 2


def test_processes_of_a_private_ray_carry_its_mark(connected_ray: Session) -> None:
    assert connected_ray.private
    assert MARK not in os.environ
    marks = {process.environ().get(MARK) for process in _children()}
    (mark,) = marks - {None}
    assert mark is not None
    assert len(marked(MARK, mark)) >= 4


def test_an_address_where_nothing_listens_is_said_at_once() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))  # taken, and deaf
        address = f"127.0.0.1:{one.getsockname()[1]}"
        begun = time.monotonic()
        with (
            pytest.raises(ResourcesMissing, match=f"no Ray answers at {address} .Connection refused.") as caught,
            sessions._connected(address, False),
        ):
            pytest.fail("there is none")
    assert time.monotonic() - begun < 5
    assert "Unset RAY_ADDRESS" in caught.value.remedy


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://10.0.0.1:8265"])
def test_an_address_that_no_driver_can_work_at_is_refused(address: str) -> None:
    with pytest.raises(ResourcesMissing, match=address) as caught, sessions._connected(address, False):
        pytest.fail("nobody is asked")
    assert "ray job submit" in caught.value.remedy


def test_a_token_that_is_missing_is_said(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, evaluator=False)
    (tmp_path / "run.yaml").write_text(json.dumps(settings.model_dump(mode="json")))
    with socket.create_server(("127.0.0.1", 0)) as one:
        error = scaleot(
            "run",
            tmp_path / "run.yaml",
            "--format",
            "json",
            RAY_ADDRESS=f"127.0.0.1:{one.getsockname()[1]}",
            RAY_AUTH_MODE="token",
            HOME=str(tmp_path),
        ).error
    assert (error["code"], error["type"]) == (4, "ResourcesMissing")
    assert "no authentication token was found" in error["message"]
    assert "RAY_AUTH_TOKEN" in error["remedy"]


def _children() -> list[Any]:
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        if "raylet" in process.name() or "gcs" in process.name():
            found.append(process)
    return found

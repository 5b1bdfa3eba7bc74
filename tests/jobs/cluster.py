"""A Ray cluster of one node with a dashboard, as ``ray job submit`` needs it, and nobody else's."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scaleot_ray.resources.processes import end_marked, marked
from tests.cli.command import PROJECT, environment

MARK = "SCALEOT_TEST_CLUSTER"  # in the environment of every process of the cluster
_RAY = Path(sys.executable).with_name("ray")


@dataclass
class Submitted:
    """What ``ray job submit`` left: its own exit code, the job's as Ray reports it, everything printed."""

    code: int
    driver_code: int
    out: str


@dataclass
class Cluster:
    """The running cluster; commands reach it by their environment."""

    folder: Path
    env: dict[str, str]
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def ray(self, *arguments: object, seconds: float = 480) -> subprocess.CompletedProcess[str]:
        """Runs ``ray`` and waits."""
        # Not pipes: the cluster's own processes would keep them open.
        with tempfile.TemporaryFile("w+", encoding="utf-8") as shown:
            done = subprocess.run(
                [str(_RAY), *map(str, arguments)],
                cwd=PROJECT,
                env=self.env,
                stdout=shown,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
            shown.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, shown.read())

    def submit(self, *entrypoint: object, working_dir: Path = PROJECT / "jobs", cpus: int = 1) -> Submitted:
        """Submits a job as README.md says and waits for its end."""
        done = self.ray("job", "submit", "--working-dir", working_dir, "--entrypoint-num-cpus", cpus, "--", *entrypoint)
        failed = re.search(r"failed with exit code (\d+)", done.stdout)
        return Submitted(done.returncode, int(failed.group(1)) if failed else done.returncode, done.stdout)

    def processes(self, words: str) -> list[str]:
        """Command lines of the cluster's processes that match ``words``."""
        lines = [" ".join(process.cmdline()) for process in marked(MARK, self.mark)]
        return [line for line in lines if re.search(words, line)]

    def start(self) -> None:
        """Starts the node."""
        ports = iter(_free_ports(7))
        options = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        options += ("metrics-export-port", "runtime-env-agent-port", "ray-client-server-port")
        chosen = {name: next(ports) for name in options}
        self.env |= {MARK: self.mark, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{chosen['dashboard-port']}"}
        done = self.ray(
            *("start", "--head", "--num-cpus=4", f"--object-store-memory={256 << 20}", f"--temp-dir={self.folder}"),
            *("--dashboard-host=127.0.0.1", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--{name}={port}" for name, port in chosen.items()),
        )
        assert done.returncode == 0, done.stdout

    def stop(self) -> None:
        """Ends every process of the cluster and removes its files; nothing of any other Ray."""
        end_marked(MARK, self.mark)
        left = marked(MARK, self.mark)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not left


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster for the time of the tests, with a token of its own."""
    path = f"{_RAY.parent}{os.pathsep}{os.environ['PATH']}"  # `python` is the one that has the package
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), PATH=path)
    # Sockets have short names, so pytest's folder will not do.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="scaleot-", dir="/tmp")), env)
    cluster.env.pop("RAY_ADDRESS", None)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]

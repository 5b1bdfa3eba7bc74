"""What every actor of a run has in common: its threads, its name, and where it reports to."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
import transformers
from ray.exceptions import ObjectLostError

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import tenant_of
from scaleot_ray.federation.roles.object_store import from_shared
from scaleot_ray.processors import thread_environment
from scaleot_ray.progress import OnProgress, Progress

ACTORS = "SCALEOT_ACTORS"  # in the environment of every actor's process: which run it belongs to
_TRIES, _LOST_SECONDS = 10, 1.0
_REPORT_SECONDS = 0.25  # a report costs a message; nobody reads more than four a second


@dataclass(frozen=True)
class Present:
    """An actor's answer once it has started.

    Attributes:
        pid: its process.
        node, address: Ray's id of the node that it is on, and the node's IP.
        threads: threads torch computes with.
        gpus: GPUs it sees.
    """

    pid: int
    node: str
    address: str
    threads: int
    gpus: int


class Role:
    """Base of the actors.

    Args:
        name: who this is in messages, in the audit log and in progress reports.
        cpus: threads it computes with, the ``num_cpus`` it was given.
        coordinator: the coordinator's handle; None for the coordinator itself.
    """

    def __init__(self, name: str, cpus: int, coordinator: Any = None) -> None:
        self.name, self.coordinator = name, coordinator
        # The environment has sized OpenMP's pool; torch's own count and its inter-op pool follow suit.
        torch.set_num_threads(cpus)
        torch.set_num_interop_threads(1)
        transformers.utils.logging.disable_progress_bar()  # nobody watches an actor's own output

    def present(self) -> Present:
        """Answers once the actor has started."""
        node = ray.get_runtime_context().get_node_id()
        address = ray.util.get_node_ip_address()
        return Present(os.getpid(), node, address, torch.get_num_threads(), torch.cuda.device_count())

    def shared_emulator(self) -> Artifact:
        """The shared emulator, not verified yet; asked for again where the coordinator was started anew meanwhile.

        What an actor has put goes with it when it dies, even where it comes back.
        """
        for _ in range(_TRIES):
            reference = ray.get(self.coordinator.emulator.remote())[0]
            try:
                return from_shared(ray.get(reference))
            except ObjectLostError as error:
                lost = error
                time.sleep(_LOST_SECONDS)
        raise lost

    def reporter(self, number: int | None = None, role: str | None = None) -> OnProgress:
        """A callback that passes progress on to the coordinator, without waiting for it.

        Args:
            number: of the round that it is about.
            role: whose progress it is; default: of the actor itself.
        """
        last: dict[str, float] = {}
        who = role or self.name
        tenant = tenant_of(who)

        def report(progress: Progress) -> None:
            now = time.monotonic()
            finished = progress.step >= progress.steps
            if finished or now - last.get(progress.stage, -_REPORT_SECONDS) >= _REPORT_SECONDS:
                last[progress.stage] = now
                self.coordinator.report.remote(replace(progress, tenant=tenant, round=number), who)

        return report


def start(
    actor: Any,
    cpus: int,
    gpus: float,
    *arguments: Any,
    mark: str,
    claim: bool = True,
    **options: Any,
) -> Any:
    """Starts an actor with exactly these processors.

    Args:
        actor: the actor class.
        cpus: threads it computes with.
        gpus: GPUs, or a share of one; with 0 it sees none.
        arguments: of its constructor.
        mark: value of :data:`ACTORS` in its environment; finds its process before it has answered.
        claim: whether Ray counts the processors; the coordinator, which only waits, claims none.
        options: further ones of Ray's, where it goes among them.
    """
    environment = {**thread_environment(cpus), ACTORS: mark}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return actor.options(
        num_cpus=cpus if claim else 0,
        num_gpus=gpus,
        runtime_env={"env_vars": environment},
        **options,
    ).remote(*arguments)


def stop(actor: Any) -> None:
    """Ends an actor at once; its processors and memory are free again."""
    ray.kill(actor, no_restart=True)

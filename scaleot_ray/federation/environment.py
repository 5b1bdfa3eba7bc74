"""Where a run works: on this machine, or on the nodes of a cluster. What it needs is looked at before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from scaleot_ray.config import RunSettings
from scaleot_ray.data.dataset_key import check_sources
from scaleot_ray.errors import ResourcesMissing
from scaleot_ray.families.size import ModelSize, model_size
from scaleot_ray.federation.driver.placement import Placement, check_labels, check_places, check_sharing
from scaleot_ray.federation.driver.schedule import MachineSchedule, Schedule
from scaleot_ray.federation.driver.works import all_works
from scaleot_ray.federation.preflight import check_coordinator, check_storage, preflight
from scaleot_ray.progress import OnProgress
from scaleot_ray.resources.data_check import check_public, model_tokenizer, tenant_checks
from scaleot_ray.resources.machine import this_machine, usable_memory
from scaleot_ray.resources.needs import RAY, Needs, run_needs
from scaleot_ray.resources.node_check import look_at_owner, look_at_tenants
from scaleot_ray.resources.nodes import living_nodes
from scaleot_ray.resources.session import Session, local_ray, ray_is_given


@dataclass(frozen=True)
class Environment:
    """Where a run works.

    Attributes:
        session: the connected Ray.
        schedule: starts its parts.
        place: where the actor of a role goes; None: on our node.
        needs: memory of every part.
        rows_bytes: of each data owner's datasets on disk.
    """

    session: Session
    schedule: Schedule
    place: Callable[[str], Any] | None
    needs: Needs
    rows_bytes: dict[str, int]


@dataclass(frozen=True)
class Facts:
    """What is known of a run before a Ray is there.

    Attributes:
        size: of the model.
        rows_bytes: of each data owner's datasets on disk.
    """

    size: ModelSize
    rows_bytes: dict[str, int]


def look_here(settings: RunSettings) -> Facts:
    """Looks at model and datasets, all of which are on this machine.

    Raises:
        ConfigError, DataError: one is missing, or not what the settings say; names the key.
    """
    checks = tenant_checks(settings)
    check_sources({"public": settings.public})
    rows_bytes = {check.tenant.name: check.sources() for check in checks}
    size = model_size(settings.model)
    tokenizer = model_tokenizer(settings.model)
    check_public(settings, size.context, tokenizer)
    for check in checks:
        check.rows(size.context, tokenizer)
    return Facts(size, rows_bytes)


@contextmanager
def on_this_machine(
    settings: RunSettings, facts: Facts, debug: bool, started: Callable[[], None]
) -> Iterator[Environment]:
    """The environment ``local``: a Ray of its own, or our node of the one that is given.

    Args:
        settings: the run.
        facts: what :func:`look_here` found.
        debug: print what the actors print.
        started: called once Ray is connected.

    Raises:
        ResourcesMissing: the machine has not what the run needs.
        RunFailed: Ray does not start.
    """
    needs, machine, given = run_needs(settings, facts.size), this_machine(), ray_is_given()
    if not given:
        preflight(settings, needs, machine)
    with local_ray(machine.cpus, int(machine.gpus), needs.object_store, debug) as session:
        started()
        if given:
            machine = session.machine()
            preflight(settings, needs, machine)
        schedule = MachineSchedule(machine.cpus, machine.gpus, machine.memory - RAY - needs.emulator)
        yield Environment(session, schedule, None, needs, facts.rows_bytes)


@contextmanager
def on_cluster(
    settings: RunSettings, debug: bool, started: Callable[[], None], on_progress: OnProgress | None
) -> Iterator[Environment]:
    """The environment ``cluster``: any node of the Ray that is given; model and data are looked at where they are.

    Args:
        settings: the run.
        debug: print what the actors print.
        started: called once Ray is connected.
        on_progress: hears what waits for room.

    Raises:
        ResourcesMissing: no Ray is given, or no node has what a part of the run needs.
        ConfigError, DataError: model or data are not where their part of the run will be.
    """
    if not ray_is_given():
        raise ResourcesMissing(
            "environment: cluster needs a Ray to work on, and none is given.",
            "Submit the run with `ray job submit`, set RAY_ADDRESS to the cluster's, or set environment to local.",
        )
    with local_ray(0, 0, 0, debug) as session:
        started()
        placement, nodes = settings.placement, living_nodes()
        if not placement.autoscaling:
            check_labels(settings, nodes)
        owner = look_at_owner(settings)
        needs = run_needs(settings, owner.size)
        check_storage(settings, needs)
        check_coordinator(needs, usable_memory())
        check_sharing(needs.emulator, nodes[0])
        if not placement.autoscaling:
            check_places(all_works(settings, needs), needs.emulator, nodes)
        rows_bytes = look_at_tenants(settings, owner)
        with Placement(placement.timeout, on_progress, placement.autoscaling) as schedule:
            yield Environment(session, schedule, schedule.place, needs, rows_bytes)

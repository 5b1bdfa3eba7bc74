"""The parts of a run as work that a schedule takes: what each claims, and on which nodes it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from scaleot_ray.config import RunSettings, TenantSettings
from scaleot_ray.errors import ScaleOTError
from scaleot_ray.federation.driver.schedule import Work
from scaleot_ray.federation.roles.coordinator import MODEL_OWNER, data_owner, evaluator
from scaleot_ray.planner.plan import PROCESS
from scaleot_ray.resources.needs import Memory, Needs

Begin = Callable[[], None]


def building(settings: RunSettings, needs: Needs, begin: Begin) -> Work:
    """The model owner's build."""
    claims = (settings.owner_cpus, settings.owner_gpus, needs.owner.total)
    return Work(MODEL_OWNER, *claims, begin, settings.placement.owner_labels)


def tuning(
    needs: Needs,
    role: str,
    tenants: Sequence[TenantSettings],
    begin: Begin,
    no_place: Callable[[ScaleOTError], None] | None = None,
) -> Work:
    """The tuning of data owners in one process, where their data is; without a place for it the others may do."""
    works = [_of(role, tenant, needs.data_owners, begin, tenant.node_labels) for tenant in tenants]
    # Each estimate has a process of its own in it.
    memory = sum(work.memory for work in works) - PROCESS * (len(works) - 1)
    return replace(works[0], memory=memory, no_place=no_place)


def measuring(
    settings: RunSettings,
    needs: Needs,
    tenant: TenantSettings,
    begin: Begin,
    no_place: Callable[[ScaleOTError], None] | None = None,
) -> Work:
    """The measuring of a data owner's rows: the evaluator holds the full model, so it is where that may be."""
    work = _of(evaluator(tenant.name), tenant, needs.evaluators, begin, settings.placement.owner_labels)
    return replace(work, no_place=no_place)


def all_works(settings: RunSettings, needs: Needs) -> list[Work]:
    """Every part of a run that claims anything, none of which can begin: for looking whether there is room for it.

    Data owners that may share a process are looked at one by one: they share it only as far as there is room.
    """

    def never() -> None:
        raise AssertionError("this work is only looked at")

    found = [building(settings, needs, never)]
    found += [tuning(needs, data_owner(tenant.name), [tenant], never) for tenant in settings.tenants]
    if settings.evaluator:
        found += [measuring(settings, needs, tenant, never) for tenant in settings.tenants]
    return found


def _of(
    role: str, tenant: TenantSettings, memory: Mapping[str, Memory], begin: Begin, labels: Mapping[str, str]
) -> Work:
    needed = memory[tenant.name].total if tenant.memory_gb is None else int(tenant.memory_gb * 1e9)
    return Work(role, tenant.cpus, tenant.gpus, needed, begin, labels)

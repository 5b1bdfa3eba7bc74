"""Which data owners tune in one process, and who of them still does.

A pack holds the emulator and computes with its frozen weights once for all (:mod:`scaleot_ray.tuning.packed`).
A data owner by itself is a pack of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scaleot_ray.federation.driver.run_state import Tenant
from scaleot_ray.federation.driver.schedule import Schedule
from scaleot_ray.federation.roles.coordinator import data_owner


@dataclass(eq=False)
class Pack:
    """Data owners that tune in one process.

    Attributes:
        tenants: those of whom something is expected still.
        role: who the process is; it does not change when one of them leaves.
        shared: whether it was made for several.
    """

    tenants: list[Tenant]
    role: str

    def __post_init__(self) -> None:
        self.shared = len(self.tenants) > 1


class Packs:
    """The packs that tune, or wait for their place.

    Args:
        largest: data owners in one pack at most.
        schedule: knows which of them work or wait.
        fit: whether there is room for a process of these data owners.
    """

    def __init__(self, largest: int, schedule: Schedule, fit: Callable[[list[Tenant]], bool]) -> None:
        self._largest, self._schedule, self._fit = largest, schedule, fit
        self._packs: dict[str, Pack] = {}

    def of(self, tenant: Tenant) -> Pack | None:
        """The pack that a data owner is in."""
        return next((pack for pack in self._there() if tenant in pack.tenants), None)

    def grouped(self, waiting: Sequence[Tenant], room: int) -> Iterator[Pack]:
        """Packs of those that wait, in their order; in one are only such as claim the same on the same nodes.

        No pack claims more than there is; a data owner that does not fit in with others is one by itself. Those that
        the schedule takes are known from then on.

        Args:
            waiting: data owners.
            room: so many more may tune; no pack is larger.
        """
        alike: dict[tuple[object, ...], list[Tenant]] = {}
        for tenant in waiting:
            settings = tenant.settings
            claims = (settings.cpus, settings.gpus, tuple(sorted(settings.node_labels.items())))
            alike.setdefault(claims, []).append(tenant)
        largest = min(self._largest, room)
        for members in (members for tenants in alike.values() for members in self._filled(tenants, largest)):
            pack = Pack(members, _role([tenant.name for tenant in members]))
            self._packs[pack.role] = pack
            yield pack

    def _filled(self, tenants: Sequence[Tenant], largest: int) -> Iterator[list[Tenant]]:
        """These in their order, as many together as may be."""
        members: list[Tenant] = []
        for tenant in tenants:
            joined = [*members, tenant]
            full = len(joined) > largest or any(one.alone for one in joined) or not self._fit(joined)
            if members and full:
                yield members
                joined = [tenant]
            members = joined
        yield members

    def leave(self, tenant: Tenant, others_go_on: Callable[[Pack], None], all_end: Callable[[Pack], None]) -> None:
        """Takes a data owner out of its pack, if it is in one.

        Args:
            tenant: who leaves.
            others_go_on: called where others of the pack tune still.
            all_end: called where none does, or the pack has not begun.
        """
        pack = self.of(tenant)
        if pack is None:
            return
        pack.tenants.remove(tenant)
        if any(other.tuning is not None for other in pack.tenants):
            others_go_on(pack)
        else:
            all_end(pack)

    def _there(self) -> list[Pack]:
        self._packs = {role: pack for role, pack in self._packs.items() if self._schedule.has(role)}
        return list(self._packs.values())


def _role(names: Sequence[str]) -> str:
    """Who a process is in which these tune."""
    return data_owner(names[0]) if len(names) == 1 else f"data owners {', '.join(names)}"

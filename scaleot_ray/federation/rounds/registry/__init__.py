"""The registry of a run: one SQLite file that a coordinator can come back from."""

from scaleot_ray.federation.rounds.registry.plug_ins import NewPlugIn
from scaleot_ray.federation.rounds.registry.records import (
    AGGREGATE,
    NewSubmission,
    Part,
    PlugIn,
    Round,
    Submission,
    Tenant,
    TenantState,
    Withdrawal,
)
from scaleot_ray.federation.rounds.registry.registry import Registry
from scaleot_ray.federation.rounds.registry.tenants import UnknownSender

__all__ = [
    "AGGREGATE",
    "NewPlugIn",
    "NewSubmission",
    "Part",
    "PlugIn",
    "Registry",
    "Round",
    "Submission",
    "Tenant",
    "TenantState",
    "UnknownSender",
    "Withdrawal",
]

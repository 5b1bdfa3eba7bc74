"""Rows of the registry as values."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from typing import Any, Literal

AGGREGATE = "aggregate"
"""Name of the plug-in that all data owners have in common; no data owner may be called so."""

RoundState = Literal["open", "closed", "finished", "failed"]
TenantState = Literal["admitted", "paused", "cancelled", "revoked"]
PartState = Literal["waiting", "tuning", "submitted", "late", "missing", "failed"]


@dataclass(frozen=True)
class Tenant:
    """A data owner.

    Attributes:
        name: its name.
        state: ``admitted``; ``paused``: starts nothing new; ``cancelled``: takes no further part, what it
            submitted counts; ``revoked``: what it submitted is withdrawn.
        reason: why it is not admitted any more.
        settings: its section of the run's settings.
    """

    name: str
    state: TenantState
    reason: str | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Round:
    """A round.

    Attributes:
        number: from 1.
        emulator: digest of the emulator.
        start: digest of the aggregate it begins with; None for the emulator as it is.
        quorum: submissions without which it fails.
        state: ``open``: takes submissions; ``closed``: what counts is settled; ``finished``; ``failed``.
        reason: why it failed.
        opened, deadline, ended: seconds since 1970, UTC.
    """

    number: int
    emulator: str
    start: str | None
    quorum: int
    state: RoundState
    reason: str | None
    opened: float
    deadline: float | None
    ended: float | None


@dataclass(frozen=True)
class Part:
    """How far a data owner is in a round; ``attempts``: how often its tuning was started."""

    round: int
    tenant: str
    state: PartState
    reason: str | None
    attempts: int
    changed: float


@dataclass(frozen=True)
class NewSubmission:
    """A delta that has passed the gate and lies in its folder.

    Attributes:
        tenant: whose.
        tuned_round: it was tuned in.
        digest, folder, bytes: of the delta's artefact; its folder, or its URI where the setting artifacts is one.
        norm: length of the change.
        weight: in the aggregate, before shares are made of the weights.
        metrics: numbers that came with it.
        data_digest: HMAC of the data it was tuned on, under the data owner's own key; None where it sent none.
        settings: what it was tuned with: the delta's method and the method's own numbers, and under ``tune`` what
            the run told its data owner; empty where a registry of before does not say.
        code_version: of the program that tuned it; empty likewise.
    """

    tenant: str
    tuned_round: int
    digest: str
    folder: str
    bytes: int
    norm: float
    weight: float
    metrics: dict[str, float]
    data_digest: str | None
    settings: dict[str, Any] = field(default_factory=dict, kw_only=True)
    code_version: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Submission(NewSubmission):
    """A delta that counts.

    Attributes:
        round: it counts in; a later one than it was tuned in where it was late and still fresh enough.
        received: seconds since 1970, UTC.
    """

    round: int
    received: float


@dataclass(frozen=True)
class Withdrawal:
    """A submission that counted in a round before it had a result, and does not any more.

    Attributes:
        round: it counted in.
        tenant: whose it was.
        digest: of the delta's artefact, which is gone unless something else needs it.
        reason: why.
        withdrawn: seconds since 1970, UTC.
    """

    round: int
    tenant: str
    digest: str
    reason: str
    withdrawn: float


@dataclass(frozen=True)
class PlugIn:
    """A version of a plug-in.

    Attributes:
        name: its data owner, or :data:`AGGREGATE`.
        version: from 1; a rebuilt aggregate is a new version of the same round.
        round: it is the result of.
        digest, folder: of the delta's artefact, as of a submission; that of a revoked one is gone.
        state: ``active`` or ``revoked``; ``reason``: why.
        settings: how it was made.
        code_version: of the program that made it.
        created: seconds since 1970, UTC.
    """

    name: str
    version: int
    round: int
    digest: str
    folder: str
    state: Literal["active", "revoked"]
    reason: str | None
    settings: dict[str, Any]
    code_version: str
    created: float


def tenant_of(row: sqlite3.Row) -> Tenant:
    """A row of ``tenants``."""
    return Tenant(row["name"], row["state"], row["reason"], json.loads(row["settings"]))


def round_of(row: sqlite3.Row) -> Round:
    """A row of ``rounds``."""
    return Round(**dict(row))


def part_of(row: sqlite3.Row) -> Part:
    """A row of ``parts``."""
    values = dict(row)
    values.pop("start_id", None)
    return Part(**values)


def submission_of(row: sqlite3.Row) -> Submission:
    """A row of ``submissions``."""
    values = dict(row)
    return Submission(
        **{**values, "metrics": json.loads(row["metrics"]), "settings": json.loads(values.get("settings", "{}"))}
    )


def withdrawal_of(row: sqlite3.Row) -> Withdrawal:
    """A row of ``withdrawals``."""
    return Withdrawal(**dict(row))


def plug_in_of(row: sqlite3.Row) -> PlugIn:
    """A row of ``plug_ins``."""
    return PlugIn(**{**dict(row), "settings": json.loads(row["settings"])})

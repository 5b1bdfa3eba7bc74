"""Data owners in the registry: admitted, paused, cancelled, revoked, and what was refused of them."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable
from typing import Any

from scaleot_ray.artifacts.untrusted import shortened
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.federation.rounds.registry.database import Database
from scaleot_ray.federation.rounds.registry.records import AGGREGATE, Tenant, TenantState, tenant_of

REFUSALS_KEPT = 20
"""Different reasons kept of one sender; the others are counted together."""

_OTHERS, _UNKNOWN = "(others)", "(unknown)"  # no data owner is called so
_NAME_LIMIT = 64


class UnknownSender(ArtifactRefused):
    """Something was sent in a name that the sender could not show to be its own."""


class Tenants:
    """Table of data owners; see :class:`~scaleot_ray.federation.rounds.registry.registry.Registry`."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database, self._clock = database, clock

    def admit(self, name: str, settings: dict[str, Any]) -> str:
        """Admits a data owner, or one that was admitted before with new settings.

        Returns:
            The token that its submissions must carry; the one it had before is void.

        Raises:
            ConfigError: the name is the aggregate's, or the data owner was cancelled or revoked.
        """
        if name == AGGREGATE:
            raise ConfigError(f"tenants: no data owner can be called {name!r}.", "Give it another name.")
        token = secrets.token_hex(16)
        with self._database.writing():
            before = self.find(name)
            if before is not None and before.state in ("cancelled", "revoked"):
                why = f" ({before.reason})" if before.reason else ""
                raise ConfigError(
                    f"tenants: {name} was {before.state}{why}.", "Leave it out, or begin a new run with it."
                )
            self._database.execute(
                "INSERT INTO tenants VALUES (?, 'admitted', NULL, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                "settings = excluded.settings, token_hash = excluded.token_hash, changed = excluded.changed",
                name,
                json.dumps(settings),
                _hash(token),
                self._clock(),
            )
        return token

    def set_state(self, name: str, state: TenantState, reason: str | None = None) -> None:
        """Pauses, cancels or revokes a data owner, or admits one that was paused.

        Raises:
            ConfigError: there is no such data owner, or it was cancelled or revoked before, which is final
                (but who was cancelled may be revoked).
        """
        with self._database.writing():
            before = self.get(name)
            final = {"cancelled": ("cancelled", "revoked"), "revoked": ("revoked",)}.get(before.state)
            if final is not None and state not in final:
                raise ConfigError(f"{name} was {before.state}, which is final.", "Begin a new run with it.")
            self._database.execute(
                "UPDATE tenants SET state = ?, reason = ?, changed = ? WHERE name = ?",
                state,
                reason,
                self._clock(),
                name,
            )

    def find(self, name: str) -> Tenant | None:
        """A data owner, if it is known."""
        row = self._database.row("SELECT * FROM tenants WHERE name = ?", name)
        return tenant_of(row) if row else None

    def get(self, name: str) -> Tenant:
        """A data owner.

        Raises:
            ConfigError: there is none of this name.
        """
        found = self.find(name)
        if found is None:
            known = ", ".join(tenant.name for tenant in self.all()) or "none"
            raise ConfigError(f"There is no data owner {name!r} in this run.", f"Known are: {known}.")
        return found

    def all(self) -> list[Tenant]:
        """All data owners, by name."""
        return [tenant_of(row) for row in self._database.rows("SELECT * FROM tenants ORDER BY name")]

    def authenticate(self, name: str, token: str) -> None:
        """Whether something is from who it says it is from; costs nothing, so it comes before anything is read.

        Args:
            name, token: whatever came; neither is to be trusted.

        Raises:
            UnknownSender: the data owner is unknown, or its token is wrong.
        """
        plain = isinstance(name, str) and len(name) <= _NAME_LIMIT and name.isprintable()
        row = self._database.row("SELECT token_hash FROM tenants WHERE name = ?", name) if plain else None
        if row is None:
            shown = (
                ascii(name if len(name) <= _NAME_LIMIT else name[:_NAME_LIMIT] + "...") if isinstance(name, str) else ""
            )
            raise UnknownSender(
                f"{shown or 'whoever sends without a name'} is no data owner of this run.",
                "Ask whoever runs it to admit you.",
            )
        if not isinstance(token, str) or not hmac.compare_digest(row["token_hash"], _hash(token)):
            raise UnknownSender(f"it does not carry the token of {name}.", "Only its own actor may submit for it.")

    def check_active(self, name: str) -> None:
        """Whether anything is still taken from a data owner.

        Raises:
            ArtifactRefused: it was cancelled or revoked.
        """
        state = self.get(name).state
        if state in ("cancelled", "revoked"):
            raise ArtifactRefused(f"{name} was {state}.", "Nothing more is taken from this data owner.")

    def refuse(self, sender: str | None, reason: str, count: int = 1) -> int:
        """Records refusals; gives how many there are of this sender by now.

        However many come, what is kept stays small.

        Args:
            sender: a data owner that showed who it is; None for all others together.
            reason: why.
            count: how many.
        """
        name, reason = sender if sender is not None else _UNKNOWN, shortened(reason)
        with self._database.writing():
            kept = {known for known, _ in self.refusals(sender)}
            if reason not in kept and len(kept) >= REFUSALS_KEPT:
                reason = _OTHERS
            self._database.execute(
                "INSERT INTO refusals VALUES (?, ?, ?, ?) "
                "ON CONFLICT (tenant, reason) DO UPDATE SET count = count + excluded.count, last = excluded.last",
                name,
                reason,
                count,
                self._clock(),
            )
        return sum(many for _, many in self.refusals(sender))

    def refusals(self, sender: str | None) -> list[tuple[str, int]]:
        """Why something of a sender was refused, and how often, the most frequent first; None as in :meth:`refuse`."""
        name = sender if sender is not None else _UNKNOWN
        rows = self._database.rows("SELECT * FROM refusals WHERE tenant = ? ORDER BY count DESC, reason", name)
        return [(row["reason"], row["count"]) for row in rows]


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()

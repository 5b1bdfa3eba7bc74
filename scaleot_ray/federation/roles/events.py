"""What happens in a run, told to its log and to its metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.untrusted import shortened
from scaleot_ray.federation.roles.metrics import RunMetrics
from scaleot_ray.federation.roles.run_log import RunLog
from scaleot_ray.federation.rounds.administration import Request
from scaleot_ray.federation.rounds.registry import Round, Submission, Withdrawal


class Events:
    """The log and the metrics of one run.

    Args:
        log: file of the log.
        run: name of the run.
    """

    def __init__(self, log: Path, run: str) -> None:
        self.metrics, self._log = RunMetrics(run), RunLog(log)

    def started_again(self) -> None:
        """The coordinator's process had died."""
        self._log.warning("the coordinator's process had died; it goes on from the registry")

    def published(self, emulator: Artifact, recipients: int) -> None:
        """The emulator may be read by so many parties."""
        self._log.info(f"emulator {emulator.digest[:16]} ({emulator.nbytes} bytes) is there for {recipients} parties")

    def admitted(self, tenant: str, taking_part: bool) -> None:
        """A data owner is let in, or was cancelled or revoked before."""
        self._log.info("admitted" if taking_part else "takes no part any more", tenant=tenant)

    def round_begins(self, found: Round, submitted: Mapping[str, bool]) -> None:
        """A round was opened; by data owner that takes part, whether its delta is there already."""
        self._log.info(f"begins with {len(submitted)} data owners, quorum {found.quorum}", round=found.number)
        self.metrics.round_is(found, sum(submitted.values()))

    def tuning_starts(self, tenant: str, number: int, attempt: int) -> None:
        """A data owner's tuning was started."""
        self._log.info(f"tuning starts (attempt {attempt})", round=number, tenant=tenant)
        self.metrics.tuning_starts(tenant, number)

    def left_out(self, tenant: str, number: int, reason: str) -> None:
        """Nothing is expected of a data owner in a round any more."""
        self._log.warning(f"left out: {reason}", round=number, tenant=tenant)
        self.metrics.left_out(tenant, number)

    def died(self, tenant: str, number: int, reason: str) -> None:
        """The process that a data owner tuned in has died; it starts again, or is left out next."""
        self._log.warning(reason, round=number, tenant=tenant)

    def noted(self, what: str, tenant: str | None, number: int | None) -> None:
        """Something that the registry has no place for, about a data owner mostly."""
        self._log.warning(what, round=number, tenant=tenant)

    def submitted(self, found: Submission, current: Round, there: int) -> None:
        """A delta has passed the gate, and is in the registry; ``there`` count in its round by now."""
        late = f" late, from round {found.tuned_round}," if found.round != found.tuned_round else ""
        what = f"submitted {found.digest[:16]}{late} ({found.bytes} bytes, norm {found.norm:.4g})"
        self._log.info(what, round=found.round, tenant=found.tenant)
        self.metrics.round_is(current, there)

    def withdrawn(self, one: Withdrawal) -> None:
        """What a data owner submitted before does not count any more."""
        self._log.warning(one.reason, round=one.round, tenant=one.tenant)

    def refused(self, tenant: str | None, number: int | None, reason: str) -> None:
        """A submission was refused; without a name where it did not show whose it is."""
        self._log.warning(f"refused: {shortened(reason)}", round=number, tenant=tenant)

    def round_ends(self, found: Round, submitted: Mapping[str, bool]) -> None:
        """A round is finished, or has failed."""
        seconds = (found.ended or time.time()) - found.opened
        there = f"{sum(submitted.values())} of {len(submitted)} deltas, {seconds:.0f} seconds"
        if found.state == "failed":
            self._log.warning(f"failed: {found.reason} ({there})", round=found.number)
        else:
            self._log.info(f"{found.state} ({there})", round=found.number)
        self.metrics.round_is(found, sum(submitted.values()))
        self.metrics.round_ended(found.state, seconds)

    def administered(self, request: Request, changed: list[int]) -> None:
        """An administrator's request was carried out; ``changed``: rounds whose aggregate was made anew."""
        again = f"; {_made_anew(changed)}" if changed else ""
        self._log.info(f"{request.action} ({request.reason or 'no reason given'}){again}", tenant=request.tenant)

    def made_anew(self, changed: list[int]) -> None:
        """A revocation that was cut short is finished; ``changed``: rounds whose aggregate was made anew."""
        if changed:
            self._log.warning(f"a revocation had been cut short; {_made_anew(changed)}")


def _made_anew(changed: list[int]) -> str:
    return f"made anew, or withdrawn where too few are left: the aggregates of rounds {', '.join(map(str, changed))}"

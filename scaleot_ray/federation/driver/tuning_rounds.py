"""The driver's side of the rounds: who tunes, who starts again, who is left out, and when a round is over.

What counts is what the coordinator's registry has; here is only who is being waited for. A data owner whose
process dies starts again, alone where it shared it with others, and is left out where the quorum holds without it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial

from scaleot_ray.errors import ResourcesMissing, RunFailed, ScaleOTError
from scaleot_ray.federation.driver.actors import Running
from scaleot_ray.federation.driver.packs import Pack, Packs
from scaleot_ray.federation.driver.report import RoundResult
from scaleot_ray.federation.driver.run_state import RunState, Tenant
from scaleot_ray.federation.driver.schedule import Work
from scaleot_ray.federation.driver.works import tuning
from scaleot_ray.federation.roles.coordinator import Entry, Opened
from scaleot_ray.federation.roles.data_owner import DataOwner, PackedDataOwners
from scaleot_ray.federation.rounds.registry import Round
from scaleot_ray.resources.failure import has_died

_NO_PART = "it takes no part"


class TuningRounds:
    """Leads the data owners of a run through its rounds.

    Args:
        state: the run's.
        start_what_fits: starts what can start now, of these rounds and whatever else there is to do.
    """

    def __init__(self, state: RunState, start_what_fits: Callable[[], None]) -> None:
        self.finished: list[RoundResult] = []
        self._state, self._start_what_fits = state, start_what_fits
        self._open: Opened | None = None
        self._last = False  # the round under way is the last: what data owners submit stays
        self._packs = Packs(
            state.settings.tenants_per_process,
            state.schedule,
            lambda tenants: state.schedule.fits(self._work(Pack(tenants, ""))),
        )

    def run(self) -> None:
        """Every round that the registry does not have yet; then each data owner's entry is final."""
        actors, tenants = self._state.actors, self._state.tenants
        names = [tenant.name for tenant in tenants]
        while not self._last and (opened := actors.ask_coordinator("begin_round", names)) is not None:
            self._round(opened)
        last = self.finished[-1].number if self.finished else None  # without one, all were finished before
        for tenant in tenants:
            if tenant.entry is None:
                tenant.entry = actors.ask_coordinator("entry", tenant.name, last)
                if tenant.entry is not None:
                    self._state.tell(tenant, "submitted", tenant.entry.round)
                elif last is None:
                    self._state.tell(tenant, "left out", reason=_NO_PART)
        self._open = None

    def possible(self) -> list[Work]:
        """The tuning that could start, in the order of the settings."""
        state, opened = self._state, self._open
        if opened is None:
            return []
        busy = [tenant for tenant in state.tenants if tenant.tuning is not None or self._packs.of(tenant) is not None]
        most = state.settings.tenants_at_once
        waiting = [
            tenant
            for tenant in self._taking_part()
            if tenant not in busy and tenant.left_out is None and tenant.submitted < opened.round.number
        ]
        # Who does not fit leaves its turn to those behind it, so all are offered; the schedule asks anew after each.
        room = len(waiting) if most is None else max(most - len(busy), 0)
        return [self._work(pack) for pack in self._packs.grouped(waiting, room)] if room else []

    def _work(self, pack: Pack) -> Work:
        return tuning(
            self._state.needs,
            pack.role,
            [tenant.settings for tenant in pack.tenants],
            partial(self._tune, pack),
            partial(self._no_place, pack),
        )

    def leave_out(self, tenant: Tenant, why: str) -> None:
        """Expects nothing more of a data owner in the round under way, and ends its tuning."""
        if self._open is None:
            if not tenant.submitted:  # revoked: there is no round, and nothing of it counts
                self._state.tell(tenant, "left out", reason=f"{why}.")
            return
        if tenant.submitted < self._open.round.number:
            self._left_out(
                tenant, RunFailed(f"{why}.", "`scaleot tenants` shows who takes part, `scaleot status` in what.")
            )

    def _round(self, opened: Opened) -> None:
        """One round, from its opening to its plug-ins."""
        begun, number, state = time.monotonic(), opened.round.number, self._state
        self._open, self._last = opened, opened.last
        for tenant in state.tenants:
            tenant.begin_round()
            if opened.submitted.get(tenant.name):
                tenant.submitted = number
            self._tell_of_begin(tenant)
        state.actors.until(self._is_over)
        self._stop_late()
        ended: Opened = state.actors.ask_coordinator("end_round", number)
        missing = self._missing(ended)
        for tenant in state.tenants:
            if tenant.name in missing and tenant.left_out is None and tenant.tuning is None:
                state.tell(tenant, "left out", number, missing[tenant.name])
        self.finished.append(RoundResult.of(ended, time.monotonic() - begun, missing))
        if ended.round.state == "failed":
            raise self._failure(ended)

    def _tell_of_begin(self, tenant: Tenant) -> None:
        assert self._open is not None
        number, state = self._open.round.number, self._state
        if tenant.tuning is not None:
            return  # late: it goes on for the round before
        if tenant.name not in self._open.submitted:
            state.tell(tenant, "left out", number, _NO_PART)
        else:
            state.tell(tenant, "submitted" if tenant.submitted >= number else "waiting", number)

    def _is_over(self) -> bool:
        """Starts what can start; true when nothing more is to be waited for."""
        assert self._open is not None
        for tenant in self._taking_part():
            longest, took = tenant.settings.deadline, tenant.tuned_for(time.monotonic())
            if tenant.tuning is not None and longest is not None and took > longest:
                self.leave_out(tenant, f"{tenant.name} took longer than its deadline of {longest:g} seconds")
        self._start_what_fits()
        waiting = [tenant for tenant in self._taking_part() if tenant.submitted < self._open.round.number]
        hopeful = [tenant for tenant in waiting if tenant.left_out is None]
        there = len(self._taking_part()) - len(waiting)
        return not hopeful or _deadline_passed(self._open.round) or there + len(hopeful) < self._open.round.quorum

    def _taking_part(self) -> list[Tenant]:
        assert self._open is not None
        return [tenant for tenant in self._state.tenants if tenant.name in self._open.submitted]

    def _stop_late(self) -> None:
        """Ends tuning that nothing waits for; what may be late goes on, unless no round will take it."""
        assert self._open is not None
        for tenant in self._state.tenants:
            # The next round takes what is at most so late.
            useful = (tenant.tuning or 0) + self._state.settings.rounds.staleness > self._open.round.number
            if self._last or not useful:
                self._end_tuning(tenant)

    def _tune(self, pack: Pack) -> None:
        assert self._open is not None
        state, actors, number, final = self._state, self._state.actors, self._open.round.number, self._last
        begun = time.monotonic()
        for tenant in pack.tenants:
            tenant.begin_tuning(number, begun)
            actors.call_coordinator("begin_part", number, tenant.name, secrets.token_hex(8))
            state.tell(tenant, "tuning", number)
        actor = self._start(pack, lambda error: self._tuning_failed(pack, actor, error))

        def tuned(failures: Mapping[str, ScaleOTError] | None) -> None:
            state.finish(actor, pack.tenants, "tune", begun)
            for tenant in list(pack.tenants):
                if failures is not None and tenant.name in failures:
                    self._left_out(tenant, failures[tenant.name])
                else:
                    # What counts is what passed the gate, so the coordinator is asked, not the data owner.
                    actors.call_coordinator("entry", tenant.name, then=partial(took, tenant))

        def took(tenant: Tenant, entry: Entry | None) -> None:
            if tenant.tuning != number:
                return  # left out, or its round closed, while the coordinator was asked
            tenant.end_tuning(time.monotonic())
            if entry is None:
                return  # revoked meanwhile
            tenant.submitted = entry.round  # of a late one: the round that it counts in
            state.tell(tenant, "submitted", entry.round)
            if final or self._last:
                tenant.entry = entry

        if len(pack.tenants) == 1:
            answer = actor.handle.tune.remote(number, pack.tenants[0].token)
        else:
            answer = actor.handle.tune.remote(number, {tenant.name: tenant.token for tenant in pack.tenants})
        actors.call(actor, answer, tuned, lambda error: self._tuning_failed(pack, actor, error))

    def _start(self, pack: Pack, failed: Callable[[Exception], bool]) -> Running:
        state, first = self._state, pack.tenants[0].settings
        parts = [state.part(tenant, state.folder.tenant(tenant.name)) for tenant in pack.tenants]
        start = partial(state.actors.start, pack.role, failed=failed)
        if len(parts) == 1:
            return start(DataOwner, first.cpus, first.gpus, parts[0])
        return start(PackedDataOwners, first.cpus, first.gpus, pack.role, parts)

    def _tuning_failed(self, pack: Pack, actor: Running, error: Exception) -> bool:
        """What becomes of data owners whose process failed: they start again, or are left out of the round."""
        actors = self._state.actors
        if actor not in actors.living:
            return True  # both answers of a dead actor fail; the first has been seen to
        problem, died = actors.failure(actor, error), has_died(error)
        # What does not suffice for all of them may well suffice for each.
        again = died or (pack.shared and isinstance(problem, ResourcesMissing))
        attempts = self._state.settings.rounds.attempts
        for tenant in list(pack.tenants):
            number = tenant.tuning
            # Who of them made it die is not known: only alone does that cost nobody else's attempts.
            tenant.alone = tenant.alone or pack.shared
            if again and tenant.attempts < attempts:
                actors.call_coordinator("died", number, tenant.name, problem.problem.splitlines()[0])
                self._end_tuning(tenant)
                why = f"{'died' if died else 'lacked room'} and starts again ({tenant.attempts + 1} of {attempts})"
                self._state.tell(tenant, "waiting", number, why)
            else:
                self._left_out(tenant, problem)
        return True

    def _no_place(self, pack: Pack, problem: ScaleOTError) -> None:
        assert self._open is not None
        for tenant in list(pack.tenants):
            if pack.shared:
                tenant.alone = True
                why = "found no place with others and waits for one alone"
                self._state.tell(tenant, "waiting", self._open.round.number, why)
            else:
                self._left_out(tenant, problem)

    def _left_out(self, tenant: Tenant, problem: ScaleOTError) -> None:
        assert self._open is not None
        self._end_tuning(tenant)
        tenant.left_out = problem
        self._state.tell(tenant, "left out", self._open.round.number, problem.problem)
        self._state.actors.call_coordinator("leave_out", self._open.round.number, tenant.name, problem.problem)

    def _end_tuning(self, tenant: Tenant) -> None:
        tenant.end_tuning(time.monotonic())
        actors = self._state.actors

        def leave(pack: Pack) -> None:
            for actor in actors.of(pack.role):
                actors.call(actor, actor.handle.leave.remote(tenant.name), failed=lambda _: True)

        self._packs.leave(tenant, leave, lambda pack: self._state.end_work(pack.role))

    def _missing(self, ended: Opened) -> dict[str, str]:
        """Who is not in a round, and why."""
        late = (
            "submitted nothing in time" if _deadline_passed(ended.round) else "ended, since the quorum was out of reach"
        )
        missing = [tenant for tenant in self._taking_part() if not ended.submitted.get(tenant.name)]
        return {tenant.name: tenant.left_out.problem if tenant.left_out else late for tenant in missing}

    def _failure(self, ended: Opened) -> ScaleOTError:
        """Why a round stays below its quorum: the one data owner's own error, or all of them."""
        errors = [tenant.left_out for tenant in self._taking_part() if tenant.left_out is not None]
        if len(errors) == 1 and not _deadline_passed(ended.round):
            return errors[0]
        names = "; ".join(f"{name}: {reason}" for name, reason in self._missing(ended).items())
        return RunFailed(
            f"Round {ended.round.number} has {sum(ended.submitted.values())} of the {ended.round.quorum} deltas of its "
            f"quorum ({names}).",
            "Mend what is said of them, lower rounds.quorum or raise rounds.deadline, and run the same command again: "
            "what was submitted counts.",
        )


def _deadline_passed(one: Round) -> bool:
    return one.deadline is not None and time.time() > one.deadline

"""How long work reports where it is, and a run what its data owners are about: small records, handed to callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """One report of a running stage.

    Attributes:
        stage: what runs, e.g. ``stage 1`` or ``tune alice``.
        step: steps done; ``steps`` steps make the whole.
        loss: nats per token of the latest step, where there is one.
        tokens_per_second: over the stage so far, in this process.
        seconds_left: estimated from the steps so far.
        tenant: in a run of many: the data owner whose part this is. What works does not know; its actor says so.
        round: the round that the data owner tunes for; None where that is not what it reports of.
    """

    stage: str
    step: int
    steps: int
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    tenant: str | None = None
    round: int | None = None


State = Literal["waiting", "tuning", "submitted", "left out", "measuring", "measured", "not measured"]


@dataclass(frozen=True)
class TenantState:
    """What a data owner is about from now on, as the driver of its run knows.

    Its rounds and its evaluator go their own ways: one may measure for it while it tunes.

    Attributes:
        tenant: the data owner.
        state: in the rounds ``waiting`` for its turn, ``tuning`` (or about to), ``submitted``, ``left out`` of the
            round; and ``measuring`` while its evaluator works, ``measured`` when that has done what there was to do,
            ``not measured`` when rows are missing that it could not measure.
        round: which one; None where it is about none, as what the evaluator does.
        reason: why it is left out, waits or is measured again, or could not be measured.
    """

    tenant: str
    state: State
    round: int | None = None
    reason: str = ""


OnTenantState = Callable[[TenantState], None]
OnProgress = Callable[[Progress], None]


class ProgressMeter:
    """Turns "so many steps and tokens done" into :class:`Progress` reports.

    Args:
        stage: name of the stage.
        steps: steps of the whole stage.
        on_progress: receives the reports; None keeps the meter silent.
        done: steps that were done before (a resumed run), so that the rate counts new ones only.
    """

    def __init__(self, stage: str, steps: int, on_progress: OnProgress | None, done: int = 0) -> None:
        self.stage, self.steps, self.done = stage, steps, done
        self._report = on_progress
        self._start_step, self._tokens, self._start = done, 0, time.monotonic()

    def advance(self, steps: int = 1, tokens: int = 0, loss: float | None = None) -> Progress:
        """Counts work as done and reports it."""
        self.done += steps
        self._tokens += tokens
        elapsed = max(time.monotonic() - self._start, 1e-9)
        fresh = self.done - self._start_step
        progress = Progress(
            self.stage,
            self.done,
            self.steps,
            loss,
            self._tokens / elapsed if self._tokens else None,
            elapsed / fresh * (self.steps - self.done) if fresh else None,
        )
        if self._report is not None:
            self._report(progress)
        return progress

"""What the table of a run knows: of each data owner, and of the stages that are nobody's but the run's own."""

from __future__ import annotations

from scaleot_ray.progress import Progress, TenantState

AT_WORK, LEFT_OUT = "at work", "left out"
CONDITIONS = (AT_WORK, "waiting", "submitted", "measured", LEFT_OUT)
"""What a data owner can be counted as, each as one of these."""


class TenantRow:
    """One data owner: its place in the rounds, what works for it now, and its latest loss.

    What the driver says decides; a report that comes late, of a part that has ended, changes nothing.

    Args:
        name: the data owner.

    Attributes:
        round: the latest that it was told to be in.
        reason: why it is left out, or waits again.
    """

    def __init__(self, name: str) -> None:
        self.name, self.reason = name, ""
        self.round: int | None = None
        self._state = "waiting"
        self._measuring = self._measured = False
        self._unmeasured = ""
        self._loss: float | None = None
        self._tuning: Progress | None = None
        self._beside: Progress | None = None  # of its evaluator, or of a wait for processors

    def change(self, told: TenantState) -> None:
        """Takes what the driver says of it."""
        if told.state in ("measuring", "measured", "not measured"):
            self._measuring, self._measured = told.state == "measuring", told.state == "measured"
            self._unmeasured = f"not measured: {told.reason}" if told.state == "not measured" else ""
            self._beside = None
            return
        self._state, self.reason = told.state, told.reason
        self.round = told.round if told.round is not None else self.round
        self._measured, self._tuning = False, None

    def report(self, progress: Progress) -> None:
        """Takes a report of what works for it."""
        if progress.round is None:
            self._beside = progress
        elif progress.round == self.round:
            self._loss = progress.loss if progress.loss is not None else self._loss
            self._tuning = progress if self._state == "tuning" else None

    @property
    def busy(self) -> bool:
        """Whether a process works for it; an evaluator also does for one that is left out."""
        return self._state == "tuning" or self._measuring

    @property
    def condition(self) -> str:
        """What it is counted as, out of :data:`CONDITIONS`."""
        if self.busy and self._state != LEFT_OUT:
            return AT_WORK
        return "measured" if self._state == "submitted" and self._measured else self._state

    @property
    def shown(self) -> Progress | None:
        """The report to show: of its tuning before that of its evaluator, which may work at the same time."""
        if self._tuning is not None:
            return self._tuning
        beside = self._beside
        return beside if beside is not None and (self._measuring or beside.step < beside.steps) else None

    @property
    def loss(self) -> float | None:
        """The loss to show: of what works, else the last of its tuning."""
        return self.shown.loss if self.shown is not None else self._loss

    @property
    def doing(self) -> str:
        """What it does now, without its name: a stage, or what it is waiting for or done with."""
        if self.shown is not None:
            return _without(self.name, self.shown.stage)
        if self.busy:
            return "starts tuning" if self._state == "tuning" else "starts measuring"
        return self.reason or self._unmeasured or self.condition


class OwnStages:
    """The stages that are no data owner's: those of the model owner, and waits for processors."""

    def __init__(self) -> None:
        self._stages: dict[str, Progress] = {}
        self._last: list[Progress] = []

    def report(self, progress: Progress) -> None:
        """Takes a report."""
        self._stages[progress.stage] = progress
        self._last = [progress]

    def shown(self, most: int) -> list[Progress]:
        """The latest of those that run, at most so many; else the one that ended last."""
        running = [progress for progress in self._stages.values() if progress.step < progress.steps]
        return running[-most:] or self._last

    @property
    def finished(self) -> int:
        """How many have ended."""
        return sum(progress.step >= progress.steps for progress in self._stages.values())


def _without(name: str, stage: str) -> str:
    """A stage without a data owner's name, which stands beside it anyway."""
    words = stage.split(" ")
    if name in words:
        del words[len(words) - 1 - words[::-1].index(name)]
    return " ".join(words)

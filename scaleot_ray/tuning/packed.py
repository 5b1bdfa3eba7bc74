"""Tunes several data owners' low-rank pairs at once on one resident model: one pass for the rows of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from scaleot_ray.config import TuneSettings
from scaleot_ray.data.batches import Batch, Batches
from scaleot_ray.errors import ConfigError
from scaleot_ray.families import Family
from scaleot_ray.families.family import text_config
from scaleot_ray.progress import OnProgress
from scaleot_ray.tuning.checkpoint import model_fingerprint, resumable
from scaleot_ray.tuning.delta import Delta
from scaleot_ray.tuning.lora import LowRank
from scaleot_ray.tuning.loss import LabelledLoss
from scaleot_ray.tuning.optimization import Optimization
from scaleot_ray.tuning.packed_lora import PackedLowRank, Pairs
from scaleot_ray.tuning.run import TuningRun
from scaleot_ray.tuning.trainer import Tuned, check_settings, run_identity, training_mode


@dataclass(frozen=True)
class PackedTenant:
    """One data owner of a pack; all as :func:`~scaleot_ray.tuning.trainer.tune` takes it.

    Attributes:
        name: unlike all others' in the pack.
        evaluate: called with this data owner's pairs alone on the model.
        on_progress: hears of every step; what it raises ends this data owner's tuning alone.
    """

    name: str
    batches: Batches
    settings: TuneSettings
    start: Delta | None = None
    evaluate: Callable[[], float] | None = None
    checkpoint: Path | None = None
    resume: bool = True
    on_progress: OnProgress | None = None
    stage: str = "tune"


def tune_packed(
    model: Any,
    family: Family,
    positions: tuple[int, ...],
    tenants: Sequence[PackedTenant],
    *,
    finished: Callable[[str, Tuned], None],
    failed: Callable[[str, Exception], None],
) -> None:
    """Tunes low-rank pairs of several data owners; the model is then as it was before.

    Each pass takes one batch of every data owner that is still tuning. Each has its own steps, rates, rank,
    clipping, evaluations, checkpoint and random generators, and the outcome is that of
    :func:`~scaleot_ray.tuning.trainer.tune` alone, but for the order in which floats are added up: relative to
    losses and factors at most 1e-9 in fp64; in fp32 about 1e-7 of the losses and 1e-5 of the factors after a few steps.
    A checkpoint of the one is gone on with by the other.
    Rows are filled up to the longest of the pass, so a pack is fastest where block sizes are alike.

    Args:
        model: a causal LM whose layers at ``positions`` are raw: an emulator or a full model.
        tenants: who tunes.
        finished: takes a data owner's name and result as soon as there is one. The model is then bare and in
            the mode it came in. What it raises makes the data owner one that failed.
        failed: takes a data owner's name and error: what ``tune`` would have raised, and ``ConfigError`` where the
            method is not ``lora``. Such a one leaves; the others go on as if it had never been there.

    Raises:
        ConfigError: two have the same name, the model draws random numbers while it trains (dropout), of which
            data owners in one pass would get others than alone, it cannot recompute activations where one asks for
            ``gradient_checkpointing``, or it carries a plug-in.
    """
    names = [tenant.name for tenant in tenants]
    if len(set(names)) < len(names):
        raise ConfigError(f"Data owners of one pack have names of their own, found {names}.", "Rename one of them.")
    check_repeatable(model)
    recompute = any(tenant.settings.gradient_checkpointing for tenant in tenants)
    pack = _Pack(model, family, positions, finished, failed)
    with training_mode(model, pack.device, recompute):
        pack.tune(tenants)


def check_repeatable(model: Any) -> None:
    """Refuses a model that draws random numbers while it trains, found out by trying.

    Raises:
        ConfigError: it does.
    """
    device = next(model.parameters()).device
    with training_mode(model, device, recompute=False), torch.no_grad():
        before = _random_state(device)
        model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=device), use_cache=False)
        drawn = any(not torch.equal(one, two) for one, two in zip(before, _random_state(device), strict=True))
    if drawn:
        raise ConfigError(
            f"{type(model).__name__} trains with dropout, so data owners in one pass would get other random numbers "
            "than each alone, and another result.",
            "Tune them one by one, or on an emulator of a model whose config sets its dropout to 0.",
        )


@dataclass
class _Member:
    """A data owner that is tuning."""

    tenant: PackedTenant
    pairs: Pairs
    work: Optimization
    run: TuningRun


class _Pack:
    """The data owners that are still tuning, by name, and the model they share."""

    def __init__(
        self,
        model: Any,
        family: Family,
        positions: tuple[int, ...],
        finished: Callable[[str, Tuned], None],
        failed: Callable[[str, Exception], None],
    ) -> None:
        self.model, self.positions = model, positions
        self.device = next(model.parameters()).device
        self._layers = PackedLowRank(model, family, positions)
        self._finished, self._failed = finished, failed
        self._was_training = model.training
        self._members: dict[str, _Member] = {}
        self._random: dict[str, list[torch.Tensor]] = {}

    def tune(self, tenants: Sequence[PackedTenant]) -> None:
        """Tunes until none is left."""
        for tenant in tenants:
            with self._alone(tenant.name):
                self._members[tenant.name] = self._joined(tenant)
        loss = LabelledLoss(self.model)
        try:
            with self._layers.on():
                self._leave_if_done()
                while self._members:
                    self._pass(loss)
        finally:
            loss.close()

    def _joined(self, tenant: PackedTenant) -> _Member:
        settings = tenant.settings
        check_packable(settings)
        check_settings(settings, self.device, tenant.evaluate)
        identity, saved = {}, None
        if tenant.checkpoint is not None:
            identity = run_identity(self._fingerprint, self.positions, settings, tenant.start)
            saved = resumable(tenant.checkpoint, identity, tenant.resume)
        torch.manual_seed(settings.seed)
        pairs = self._layers.pairs(settings, tenant.start)
        work = Optimization(self.model, pairs.parameters, settings, LowRank.learning_rate, self.device)
        run = TuningRun(
            self.model,
            work,
            tenant.batches,
            settings,
            saved=saved,
            evaluate=self._with(pairs, tenant.evaluate) if tenant.evaluate is not None else None,
            checkpoint=tenant.checkpoint,
            identity=identity,
            on_progress=tenant.on_progress,
            stage=tenant.stage,
        )
        return _Member(tenant, pairs, work, run)

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(self.model)

    def _with(self, pairs: Pairs, evaluate: Callable[[], float]) -> Callable[[], float]:
        def evaluate_alone() -> float:
            with self._layers.everywhere(pairs):
                return evaluate()

        return evaluate_alone

    def _pass(self, loss: LabelledLoss) -> None:
        """One batch of each: forward and backward together, then each its own step."""
        drawn = []
        for member in list(self._members.values()):
            with self._alone(member.tenant.name):
                drawn.append((member, member.run.next_batch()))
        for group in self._groups(drawn):
            with self._layers.rows([(member.pairs, len(batch["input_ids"])) for member, batch in group]):
                with group[0][0].work.autocast():
                    nats = loss.each([batch for _, batch in group], self.device)
                parts = [member.work.part(own) for (member, _), own in zip(group, nats, strict=True)]
                torch.stack(parts).sum().backward()
        for member, _ in drawn:
            with self._alone(member.tenant.name):
                member.run.passed()
        self._leave_if_done()

    def _groups(self, drawn: Sequence[tuple[_Member, Batch]]) -> list[list[tuple[_Member, Batch]]]:
        """Those whose batches go through the model together: what it does to a row must not depend on the others."""
        groups: dict[tuple[str, bool], list[tuple[_Member, Batch]]] = {}
        turning_point = _rotary_turning_point(self.model)
        for member, batch in drawn:
            is_long = batch["input_ids"].shape[1] > turning_point
            groups.setdefault((member.tenant.settings.precision, is_long), []).append((member, batch))
        return list(groups.values())

    def _leave_if_done(self) -> None:
        for name, member in list(self._members.items()):
            if not member.run.done:
                continue
            with self._alone(name):
                member.run.settle()
                delta = member.pairs.delta(self.positions, member.work.weights.values)
                with self._bare():
                    self._finished(name, Tuned(delta, member.run.history))
                del self._members[name]

    @contextmanager
    def _bare(self) -> Iterator[None]:
        with self._layers.off():
            self.model.train(self._was_training)
            try:
                yield
            finally:
                self.model.train()

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One data owner's own doing: with its own random generators, and what goes wrong makes it leave alone."""
        if name in self._random:
            _set_random_state(self._random[name], self.device)
        try:
            yield
        except Exception as error:
            self._members.pop(name, None)
            self._failed(name, error)
        self._random[name] = _random_state(self.device)


def check_packable(settings: TuneSettings) -> None:
    """Refuses a method that cannot share a model in one pass.

    Raises:
        ConfigError: the method is not ``lora``.
    """
    if settings.method != LowRank.name:
        raise ConfigError(
            f"tune.method={settings.method}: data owners share a model only with tune.method=lora, whose parameters "
            "stand beside the frozen weights.",
            "Set tune.method to lora, or tune this data owner by itself.",
        )


def _rotary_turning_point(model: Any) -> float:
    """Length from which on a model turns all rows of a batch by other angles (LongRoPE, arXiv 2402.13753)."""
    parameters = getattr(text_config(model.config), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    lengths = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return float(min(lengths, default=float("inf")))


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: Sequence[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)

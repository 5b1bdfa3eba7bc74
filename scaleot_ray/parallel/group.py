"""A group of workers, as the process that needs them has it: found a place, watched, and started again when one dies.

Ray Train's TorchTrainer could start such a group too. This one is our own because of what surrounds it: a group waits
for its place for a stated time and then says what it asked for and what there is, while a trainer waits for ever; what
it keeps comes to the process that leads the build, in the very file that one process writes, so that a build goes on
with more workers, fewer or none, and only that process needs a disk; and the progress of steps is the build's own.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from types import TracebackType

import ray
import torch
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from scaleot_ray.config import ParallelSettings
from scaleot_ray.emulator.layer_replace_steps import Keep
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import ResourcesMissing, RunFailed, ScaleOTError
from scaleot_ray.parallel.stage_one import Assignment
from scaleot_ray.parallel.worker import Present, Worker
from scaleot_ray.processors import thread_environment
from scaleot_ray.progress import OnProgress, Progress
from scaleot_ray.resources.failure import actor_failure, has_died
from scaleot_ray.resources.nodes import living_nodes, what_nodes_have
from scaleot_ray.resources.processes import wait_for_end
from scaleot_ray.resources.session import Session

_LOOK_SECONDS = 0.2
_BLAME_SECONDS = 10.0
"""One that dies breaks the others' exchanges: so long after a first failure its cause is waited for."""

_LESS_MEMORY = (
    "Set parallel.zero to 3 or parallel.gradient_checkpointing to true, offload (parallel.deepspeed), lower "
    "stage_one.batch_size or stage_one.block_size, or use more or larger machines."
)
_ANSWER_SECONDS = 120.0
_END_SECONDS = 5.0


class _Lost(Exception):
    """A worker died, or the workers lost one another: a new group may come through."""

    def __init__(self, problem: ScaleOTError) -> None:
        super().__init__(str(problem))
        self.problem = problem


def take_steps(assignment: Assignment, session: Session, keep: Keep, on_progress: OnProgress | None) -> StageOne:
    """All steps of stage 1 by a group of workers.

    A worker that dies takes the group with it, which starts again from what was kept last.

    Args:
        assignment: the steps, and what they go on from.
        session: the Ray that workers start on.
        keep: stores states, here.
        on_progress: hears of ``stage 1``, and of a group that starts again.

    Raises:
        ResourcesMissing: there is no place for the group in time.
        RunFailed: it died too often without progress, or a worker failed in a way that would come again.
        ScaleOTError: a worker's own.
    """
    parallel, failed = assignment.parallel, 0
    while True:
        begun = assignment.begun.state.step

        def kept(state: StageOne, extra: dict[str, torch.Tensor]) -> None:
            nonlocal assignment
            keep(state, extra)
            assignment = replace(assignment, begun=replace(assignment.begun, state=state, extra=extra))

        try:
            with Group(parallel, session) as group:
                group.work(assignment, kept, on_progress)
            return assignment.begun.state
        except _Lost as lost:
            reached = assignment.begun.state.step
            failed = failed + 1 if reached == begun else 1
            if failed >= parallel.attempts:
                raise RunFailed(
                    f"{lost.problem.problem}\nThe group was started {failed} times without getting any further than "
                    f"step {reached} (parallel.attempts).",
                    lost.problem.remedy,
                ) from lost
            if on_progress is not None:
                again = f"{lost.problem.problem.splitlines()[0]} Stage 1 goes on from step {reached}"
                on_progress(Progress(again, 1, 1))


class Group:
    """Workers with a place for all of them; a context manager that leaves none behind.

    Args:
        parallel: how many, and what each claims.
        session: the Ray that they start on.

    Raises:
        ResourcesMissing: there is no place for them, or they do not answer, in time.
    """

    def __init__(self, parallel: ParallelSettings, session: Session) -> None:
        self._parallel, self._session = parallel, session
        self._place: PlacementGroup | None = None
        self._workers: list[ray.actor.ActorHandle] = []
        self._present: list[Present] = []

    def __enter__(self) -> Group:
        try:
            self._start(self._find_place())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def work(self, assignment: Assignment, keep: Keep, on_progress: OnProgress | None) -> None:
        """Has all workers make the steps, and hands on what the first one tells.

        Raises:
            _Lost: a worker died, or they lost one another.
            ScaleOTError: one failed in a way that would come again.
        """
        address = f"{self._present[0].node}:{self._present[0].port}"
        shared = ray.put(assignment)
        answers = {worker.work.remote(shared, address): rank for rank, worker in enumerate(self._workers)}
        waiting = list(answers)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_LOOK_SECONDS)
            for answer in ready:
                try:
                    ray.get(answer)
                except Exception as error:  # Ray raises many types here, the workers' own among them
                    with suppress(Exception):  # the first one may live, and have a state that is worth keeping
                        self._hand_on(keep, on_progress)
                    self._blame({answers[answer]: error}, {one: answers[one] for one in waiting})
            self._hand_on(keep, on_progress)

    def _hand_on(self, keep: Keep, on_progress: OnProgress | None) -> None:
        try:
            news = ray.get(self._workers[0].news.remote(), timeout=_ANSWER_SECONDS)
        except Exception as error:
            raise self._failure(0, error) from error
        if news.kept is not None:
            keep(*news.kept)
        for progress in news.progress:
            if on_progress is not None:
                on_progress(progress)

    def _blame(self, errors: dict[int, Exception], waiting: dict[ray.ObjectRef, int]) -> None:
        """Raises what is behind the first failure: a death, else an error of ours, else what came first."""
        deadline = time.monotonic() + _BLAME_SECONDS
        while waiting and time.monotonic() < deadline and not any(map(has_died, errors.values())):
            for answer in ray.wait(list(waiting), timeout=_LOOK_SECONDS)[0]:
                rank = waiting.pop(answer)
                try:
                    ray.get(answer)
                except Exception as error:
                    errors[rank] = error
        order = sorted(errors, key=lambda rank: (not has_died(errors[rank]), not _is_ours(errors[rank])))
        raise self._failure(order[0], errors[order[0]]) from errors[order[0]]

    def _failure(self, rank: int, error: Exception) -> Exception:
        present = self._present[rank]
        here = present.node == ray.util.get_node_ip_address()
        problem = actor_failure(
            error,
            f"worker {rank} of {len(self._workers)}",
            present.pid if here else None,
            self._session.logs,
            None if here else present.node,
            _LESS_MEMORY,
        )
        return _Lost(problem) if has_died(error) or _is_broken_exchange(error) else problem

    def _find_place(self) -> PlacementGroup:
        parallel = self._parallel
        claims: dict[str, float] = {"CPU": parallel.cpus}
        if parallel.gpus:
            claims["GPU"] = parallel.gpus
        if parallel.memory_gb is not None:
            claims["memory"] = parallel.memory_gb * 1e9
        self._place = place = placement_group([claims] * parallel.workers, strategy="PACK", name="scaleot stage 1")
        deadline = time.monotonic() + parallel.timeout
        while placement_group_table(place)["state"] != "CREATED":
            if time.monotonic() > deadline:
                each = ", ".join(f"{amount:g} {name}" for name, amount in claims.items())
                raise ResourcesMissing(
                    f"parallel: {parallel.workers} workers with {each} each found no place within "
                    f"{parallel.timeout:g} seconds; {what_nodes_have(living_nodes())}.",
                    "Set parallel.workers, parallel.cpus, parallel.gpus or parallel.memory_gb lower, wait until others "
                    "have ended (`ray status` shows what is taken), or raise parallel.timeout.",
                )
            time.sleep(_LOOK_SECONDS)
        return place

    def _start(self, place: PlacementGroup) -> None:
        parallel = self._parallel
        environment = thread_environment(parallel.cpus) | ({} if parallel.gpus else {"CUDA_VISIBLE_DEVICES": ""})
        self._workers = [
            Worker.options(  # type: ignore[attr-defined]
                num_cpus=parallel.cpus,
                num_gpus=parallel.gpus,
                memory=parallel.memory_gb * 1e9 if parallel.memory_gb is not None else None,
                runtime_env={"env_vars": environment},
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, rank),
            ).remote(rank, parallel.workers, parallel.cpus)
            for rank in range(parallel.workers)
        ]
        deadline = time.monotonic() + parallel.timeout
        for rank, worker in enumerate(self._workers):
            try:
                left = max(deadline - time.monotonic(), _LOOK_SECONDS)
                self._present.append(ray.get(worker.present.remote(), timeout=left))
            except GetTimeoutError as error:
                raise ResourcesMissing(
                    f"parallel: worker {rank} of {parallel.workers} has not answered within {parallel.timeout:g} "
                    "seconds.",
                    "Look at the node's load and disk; raise parallel.timeout.",
                ) from error
            except Exception as error:
                problem = actor_failure(error, f"worker {rank}", None, self._session.logs)
                raise (_Lost(problem) if has_died(error) else problem) from error

    def _end(self) -> None:
        for worker in self._workers:
            with suppress(Exception):  # the others are to end in any case
                ray.kill(worker, no_restart=True)
        # Those on this node hold memory that whoever comes next counts on.
        for present in self._present:
            if present.node == ray.util.get_node_ip_address():
                wait_for_end(present.pid, _END_SECONDS)
        if self._place is not None:
            remove_placement_group(self._place)


def _is_ours(error: Exception) -> bool:
    return isinstance(error, RayTaskError) and isinstance(error.cause, ScaleOTError)


def _is_broken_exchange(error: Exception) -> bool:
    """Whether workers lost one another, without one of them having died as far as anybody knows."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return isinstance(cause, torch.distributed.DistError) or "gloo" in str(cause)

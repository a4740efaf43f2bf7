"""Detect on workers: give groups of matrices to an executor, and collect the findings; the caller alone writes."""

from __future__ import annotations

import contextlib
import queue
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from dataclasses import dataclass, replace

from streamer.detection.matrices import cost
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.memory import detection_estimates, kept_bytes
from streamer.detection.options import DetectionOptions, RunOptions
from streamer.detection.task import Inputs, Task, TaskResult, detect_task
from streamer.errors import WorkerError
from streamer.events import Event, Monitor
from streamer.plan.batch import Batch, Use
from streamer.plan.memory import MemoryEstimate, check_budget, resident_bytes
from streamer.plan.targets import Target

TASK_COST = 1_000_000_000
"""Units of cost (see `detection.cost.cost`, about a second) from which on a task takes no more matrices."""

TASK_MATRICES = 8
"""Matrices of a task at most: a killed run loses those of the tasks that were under way."""

AT_ONCE = 1024
"""Tasks that an executor of unknown size is given at a time."""

POLLED = 0.1
"""Seconds between two looks for a request to stop."""

PATIENCE = 3.0
"""Seconds without a result after which a cluster is asked, and asked again, whether it has workers."""


class Cluster(Executor, ABC):
    """An executor whose workers come and go."""

    @abstractmethod
    def lacks(self) -> str:
        """Say what is lacking for a task to be taken, empty for nothing; asked while no result comes, and after a task was lost.

        Raises
        ------
        WorkerError
            If none will be taken any more.
        """


@dataclass(frozen=True)
class Workers:
    """Workers, and how much they are given.

    Attributes
    ----------
    open
        Opens an executor, whose exit stops what it runs where it is our own; called again after workers have died.
    at_once
        Tasks that are given out at a time.
    processes
        How many processes on this machine share the memory allowed; None where each has it for itself.
    """

    open: Callable[[], contextlib.AbstractContextManager[Executor]]
    at_once: int = AT_ONCE
    processes: int | None = None

    @classmethod
    def of(cls, executor: Executor) -> Workers:
        """Take an executor of the caller's, which stays open."""
        return cls(lambda: contextlib.nullcontext(executor))

    def shared(self, batch: Batch, options: DetectionOptions, resident: int) -> DetectionOptions:
        """Divide the memory allowed among this process and the workers on this machine.

        Findings are those of one process that is allowed a worker's share, and state that.

        Raises
        ------
        UsageError
            If it is too little; the message says how much would do.
        """
        if self.processes is None or options.max_memory is None:
            return options
        n = self.processes
        results = [kept_bytes(plan, target, options) for plan in batch.plans for target in plan.targets]
        own = resident_bytes(batch) + self.at_once * TASK_MATRICES * max(results, default=0)
        estimates = (e for plan in batch.plans for e in detection_estimates(plan, options, resident))
        needs = [MemoryEstimate(e.tensor, e.shape, own + n * _whole_mib(e.nbytes)) for e in estimates]
        check_budget(needs, options.max_memory)
        return replace(options, max_memory=(options.max_memory - own) // n >> 20 << 20)

    def detect(self, batch: Batch, todo: Sequence[Sequence[Use]], options: DetectionOptions, run: RunOptions, resident: int,
               counts: Sequence[int], begin: Callable[[int, Target], None],
               ) -> Generator[tuple[int, Target, MatrixFinding], None, None]:  # fmt: skip
        """Detect as `detect_in_turn` does, on workers; findings come as they are made.

        A task whose worker died is done again, once.

        Raises
        ------
        WorkerError
            If workers die, or cannot be reached, time and again.
        MismatchError
            If a worker has other inputs.
        """
        targets = [{target.tensor: target for target in plan.targets} for plan in batch.plans]
        tasks = _tasks(Inputs.of(batch, run), todo, options, run, resident, counts, self.at_once)
        with contextlib.closing(
            self._results(tasks, run.monitor, lambda i, tensor: begin(i, targets[i][tensor]))
        ) as results:
            for result in results:
                run.monitor.warn(result.warnings)
                for i, finding in result.findings:
                    yield i, targets[i][finding.tensor], finding

    def _results(
        self, tasks: Sequence[Task], monitor: Monitor, begin: Callable[[int, str], None]
    ) -> Generator[TaskResult, None, None]:
        """Give out the tasks, and yield results as they arrive; `begin` is told of the task that has been out for longest."""
        waiting, lost, broken = deque(tasks), set[Task](), False
        given: dict[Future[TaskResult], Task] = {}
        arrived: queue.SimpleQueue[Future[TaskResult]] = queue.SimpleQueue()
        with contextlib.ExitStack() as engine:
            executor = engine.enter_context(self.open())
            try:
                while waiting or given:
                    if broken and not given:  # all that it had has come back
                        engine.close()
                        executor, broken = engine.enter_context(self.open()), False
                    while waiting and not broken and len(given) < self.at_once:
                        task = waiting.popleft()
                        future = _submitted(executor, task)
                        given[future] = task
                        future.add_done_callback(arrived.put)
                    begin(*next(iter(given.values())).uses[0][0])
                    future = _next(arrived, executor, monitor)
                    task, fault = given.pop(future), _fault(future)
                    if fault is None:
                        result = future.result()
                        if result.error is not None:
                            raise result.error
                        yield result
                        del future, result  # its findings are written, and need no memory
                        continue
                    monitor.checkpoint()  # what ended the worker may have asked this process to stop as well
                    _lacks(executor)
                    said = f"{task.uses[0][0][1]}: its worker was lost ({type(fault).__name__}: {fault})"
                    if task in lost:
                        raise WorkerError(f"{said} for the second time; the same command goes on from here") from fault
                    if not broken:  # one loss for all that it had
                        monitor.emit(Event("warning", f"{said}; it is done again"))
                    lost.add(task)
                    waiting.appendleft(task)
                    broken = broken or isinstance(fault, BrokenExecutor)
            finally:
                for future in given:
                    future.cancel()


def _tasks(inputs: Inputs, todo: Sequence[Sequence[Use]], options: DetectionOptions, run: RunOptions, resident: int,
           counts: Sequence[int], at_once: int) -> list[Task]:  # fmt: skip
    """Group matrices into tasks, each on one number of threads, in the base's file order."""
    total = sum(cost(target, options) for uses in todo for _, target in uses)
    enough = min(TASK_COST, total // (4 * at_once))
    tasks: list[Task] = []
    for threads in sorted(set(counts)):
        matrices: list[tuple[tuple[int, str], ...]] = []
        work = 0
        for uses in todo:
            mine = [(i, target) for i, target in uses if counts[i] == threads]
            if mine:
                matrices.append(tuple((i, target.tensor) for i, target in mine))
                work += sum(cost(target, options) for _, target in mine)
            if matrices and (work >= enough or len(matrices) == TASK_MATRICES or uses is todo[-1]):
                tasks.append(Task(inputs, tuple(matrices), options, str(run.device), resident, threads))
                matrices, work = [], 0
    return tasks


def _submitted(executor: Executor, task: Task) -> Future[TaskResult]:
    """Give a task to an executor; one that takes none has failed it."""
    try:
        return executor.submit(detect_task, task)
    except Exception as e:  # each engine has its own
        failed: Future[TaskResult] = Future()
        failed.set_exception(e)
        return failed


def _next(arrived: queue.SimpleQueue[Future[TaskResult]], executor: Executor, monitor: Monitor) -> Future[TaskResult]:
    """Wait for a task to end, or for a request to stop; what a cluster lacks meanwhile is said, once."""
    said, asked = "", time.monotonic()
    while True:
        monitor.checkpoint()
        with contextlib.suppress(queue.Empty):
            return arrived.get(timeout=POLLED)
        if time.monotonic() - asked > PATIENCE:
            lacks = _lacks(executor)
            if lacks and lacks != said:
                monitor.emit(Event("warning", lacks))
            said, asked = lacks, time.monotonic()


def _lacks(executor: Executor) -> str:
    return executor.lacks() if isinstance(executor, Cluster) else ""


def _fault(future: Future[TaskResult]) -> BaseException | None:
    """Return what an executor failed a task with, None where it did not."""
    return CancelledError("cancelled") if future.cancelled() else future.exception()


def _whole_mib(nbytes: int) -> int:
    return -(-nbytes >> 20) << 20

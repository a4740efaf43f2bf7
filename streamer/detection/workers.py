"""Detect on workers: divide matrices into tasks, and hand on the findings as they come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from streamer.detection.device import choose_device
from streamer.detection.matrices import cost, detect_in_turn
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.memory import detection_estimates, kept_bytes
from streamer.detection.options import DetectionOptions, RunOptions
from streamer.events import Monitor
from streamer.plan.batch import Batch, Use
from streamer.plan.memory import resident_bytes
from streamer.plan.targets import Target
from streamer.workers.engine import Workers
from streamer.workers.task import Inputs, Task

TASK_COST = 1_000_000_000
"""Units of cost (see `detection.cost.cost`, about a second) from which on a task takes no more matrices."""

TASK_MATRICES = 8
"""Matrices of a task at most: a killed run loses those of the tasks that were under way."""


@dataclass(frozen=True)
class DetectTask(Task[list[tuple[int, MatrixFinding]]]):
    """A group of matrices; of it come their findings, with the numbers of their plans.

    Attributes
    ----------
    uses
        For each matrix its targets, each by its plan's number and its tensor.
    options, device, resident
        See `detect_in_turn`; the device by its name.
    """

    uses: tuple[tuple[tuple[int, str], ...], ...]
    options: DetectionOptions
    device: str
    resident: int

    @property
    def name(self) -> str:
        """Name the first matrix."""
        return self.uses[0][0][1]

    def do(self, batch: Batch, monitor: Monitor) -> list[tuple[int, MatrixFinding]]:
        """Detect."""
        plans = batch.plans
        targets = [{target.tensor: target for target in plan.targets} for plan in plans]
        todo = [[(i, targets[i][tensor]) for i, tensor in uses] for uses in self.uses]
        counts = [self.threads] * len(plans)
        run = RunOptions(choose_device(self.device), monitor=monitor)
        stream = detect_in_turn(plans, todo, self.options, run, self.resident, counts, lambda _plan, _target: None)
        with contextlib.closing(stream):
            found = [(i, finding) for i, _, finding in stream]
        for i in sorted({i for i, _ in found}):
            plans[i].check_unchanged()
        return found


def inputs_of(batch: Batch, run: RunOptions) -> Inputs:
    """State the inputs of a run."""
    return Inputs.of(batch, run.io, run.stated, run.architecture)


def shared(workers: Workers, batch: Batch, options: DetectionOptions, resident: int) -> DetectionOptions:
    """Divide the memory allowed among this process and its workers; see `Workers.share`."""
    results = [kept_bytes(plan, target, options) for plan in batch.plans for target in plan.targets]
    own = resident_bytes(batch) + workers.at_once * TASK_MATRICES * max(results, default=0)
    needs = (e for plan in batch.plans for e in detection_estimates(plan, options, resident))
    return replace(options, max_memory=workers.share(options.max_memory, own, needs))


def detect_on_workers(workers: Workers, batch: Batch, todo: Sequence[Sequence[Use]], options: DetectionOptions, run: RunOptions,
                      resident: int, counts: Sequence[int], begin: Callable[[int, Target], None],
                      ) -> Generator[tuple[int, Target, MatrixFinding], None, None]:  # fmt: skip
    """Detect as `detect_in_turn` does, on workers; findings come as they are made."""
    targets = [{target.tensor: target for target in plan.targets} for plan in batch.plans]
    tasks = _tasks(inputs_of(batch, run), todo, options, run, resident, counts, workers.at_once)

    def begin_task(number: int) -> None:
        i, tensor = tasks[number].uses[0][0]
        begin(i, targets[i][tensor])

    with contextlib.closing(workers.run(tasks, run.monitor, begin_task)) as results:
        for _, found in results:
            for i, finding in found:
                yield i, targets[i][finding.tensor], finding


def _tasks(inputs: Inputs, todo: Sequence[Sequence[Use]], options: DetectionOptions, run: RunOptions, resident: int,
           counts: Sequence[int], at_once: int) -> list[DetectTask]:  # fmt: skip
    """Group matrices into tasks, each on one number of threads, in the base's file order."""
    total = sum(cost(target, options) for uses in todo for _, target in uses)
    enough = min(TASK_COST, total // (4 * at_once))
    tasks: list[DetectTask] = []
    for threads in sorted(set(counts)):
        matrices: list[tuple[tuple[int, str], ...]] = []
        work = 0
        for uses in todo:
            mine = [(i, target) for i, target in uses if counts[i] == threads]
            if mine:
                matrices.append(tuple((i, target.tensor) for i, target in mine))
                work += sum(cost(target, options) for _, target in mine)
            if matrices and (work >= enough or len(matrices) == TASK_MATRICES or uses is todo[-1]):
                tasks.append(DetectTask(inputs, threads, tuple(matrices), options, str(run.device), resident))
                matrices, work = [], 0
    return tasks

"""Detect on workers: divide matrices into tasks and pass on findings as they arrive."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from streamer.detection.detection_memory import detection_estimates, kept_bytes
from streamer.detection.device import choose_device
from streamer.detection.matrices import detect_in_turn
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.options import DetectionOptions, Run
from streamer.detection.work import Begin, Found, Work
from streamer.events import Monitor
from streamer.plan.batch import AdapterBatch, Assignment, SharedGroup
from streamer.plan.memory_estimate import resident_bytes
from streamer.plan.targets import Target
from streamer.workers.engine import Workers
from streamer.workers.task import Inputs, Task

TASK_COST = 1_000_000_000
"""Units of cost (see `detection.cost.cost`; about a second) from which a task gets no more matrices."""

TASK_MATRICES = 8
"""Most matrices of a task: a killed run loses the matrices of its unfinished tasks."""


class MatrixName(NamedTuple):
    """An `Assignment` with its tensor's name instead of the target, for pickling."""

    plan: int
    tensor: str


@dataclass(frozen=True)
class DetectTask(Task[list[tuple[int, MatrixFinding]]]):
    """A group of matrices; its result is their findings with their plans' numbers.

    Attributes
    ----------
    groups
        The matrices; see `Work`.
    options, device, resident
        See `Work`; the device is given by name.
    """

    groups: tuple[tuple[MatrixName, ...], ...]
    options: DetectionOptions
    device: str
    resident: int

    @property
    def name(self) -> str:
        """Name the first matrix."""
        return self.groups[0][0].tensor

    def do(self, batch: AdapterBatch, monitor: Monitor) -> list[tuple[int, MatrixFinding]]:
        """Detect in the task's matrices."""
        plans, targets = batch.plans, _targets(batch)
        groups = [SharedGroup(Assignment(i, targets[i][tensor]) for i, tensor in one) for one in self.groups]
        work = Work(batch, groups, self.options, [self.threads] * len(plans), self.resident)
        with contextlib.closing(detect_in_turn(work, choose_device(self.device), monitor, lambda _: None)) as stream:
            found = [(one.plan, finding) for one, finding in stream]
        for i in sorted({i for i, _ in found}):
            plans[i].check_unchanged()
        return found


def inputs_of(batch: AdapterBatch, run: Run) -> Inputs:
    """Describe the inputs of a run."""
    return Inputs.of(batch, run.io, run.stated, run.architecture)


def shared(workers: Workers, batch: AdapterBatch, options: DetectionOptions, resident: int) -> DetectionOptions:
    """Divide the allowed memory among this process and its workers; see `Workers.budget`."""
    results = [kept_bytes(plan, target, options) for plan in batch.plans for target in plan.targets]
    own = resident_bytes(batch) + workers.at_once * TASK_MATRICES * max(results, default=0)
    needs = (e for plan in batch.plans for e in detection_estimates(plan, options, resident))
    return replace(options, max_memory=workers.budget(options.max_memory, own, needs))


def detect_on_workers(work: Work, workers: Workers, inputs: Inputs, device: torch.device,
                      monitor: Monitor, begin: Begin) -> Found:  # fmt: skip
    """Detect as `detect_in_turn` does, but on workers; findings arrive as they are made, and `begin` is called once per task."""
    targets, tasks = _targets(work.batch), dict(enumerate(_tasks(work, inputs, str(device), workers.at_once)))

    def begin_task(number: int) -> None:
        i, tensor = tasks[number].groups[0][0]
        begin(Assignment(i, targets[i][tensor]))

    with contextlib.closing(workers.run(tasks, monitor, begin_task)) as results:
        for _, found in results:
            for i, finding in found:
                yield Assignment(i, targets[i][finding.tensor]), finding


def _targets(batch: AdapterBatch) -> list[dict[str, Target]]:
    """Return each plan's targets by their tensors."""
    return [{target.tensor: target for target in plan.targets} for plan in batch.plans]


def _tasks(work: Work, inputs: Inputs, device: str, at_once: int) -> list[DetectTask]:
    """Group matrices into tasks, each with one number of threads, in the base's file order."""
    enough = min(TASK_COST, sum(map(work.cost, work.groups)) // (4 * at_once))
    tasks: list[DetectTask] = []
    for count in sorted(set(work.threads)):
        groups: list[tuple[MatrixName, ...]] = []
        done = 0
        for group in work.groups:
            mine = [one for one in group if work.threads[one.plan] == count]
            if mine:
                groups.append(tuple(MatrixName(i, target.tensor) for i, target in mine))
                done += work.cost(mine)
            if groups and (done >= enough or len(groups) == TASK_MATRICES or group is work.groups[-1]):
                tasks.append(DetectTask(inputs, count, tuple(groups), work.options, device, work.resident))
                groups, done = [], 0
    return tasks

"""Detection over a whole adapter: one matrix at a time, the next one read while the current one computes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from streamer import solvers
from streamer.budget import best_way, check_budget, detection_needs
from streamer.errors import NumericError, UsageError
from streamer.events import Event, Monitor
from streamer.findings import Findings, MatrixFinding, detection_digest, load_findings
from streamer.findings_writer import (
    FindingsWriter,
    inspect_findings_output,
    interrupted_run,
    journal_head,
    journal_of,
    most_bytes,
    remove_leftovers,
)
from streamer.intruders import Detection, DetectionOptions, detect
from streamer.linalg.operators import Dense, Matrix, RowBlocks
from streamer.plan import Plan
from streamer.staging import Staged, Stager, read_ahead
from streamer.storage.atomic import partials_of
from streamer.storage.transaction import allocated_bytes, check_space
from streamer.targets import Target


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:i`` as a device that is there.

    Raises
    ------
    UsageError
        If it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:i, found {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:i, found {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"device: {name} is not there; use cpu")
    return device


def cost(target: Target, options: DetectionOptions) -> int:
    """Units of work that detection spends on a matrix; see `solvers.cost`."""
    shape = target.module.shape
    return solvers.cost(shape, options.directions(shape), options.solver)


def detect_matrix(plan: Plan, target: Target, options: DetectionOptions, device: torch.device,
                  staged: Staged | None = None, monitor: Monitor | None = None) -> MatrixFinding:  # fmt: skip
    """Detect in one matrix; `staged` is its weight, where that has been read ahead.

    A matrix that the device has no memory for is computed on the CPU; the monitor is told.

    Raises
    ------
    NumericError
        If an input is not finite or the solver fails; the message names file and tensor.
    """
    began = time.perf_counter()
    staged = staged or Staged(plan.weights[target.tensor])
    found: Detection | None = None
    try:
        found = _detection(plan, target, options, device, staged)
    except torch.cuda.OutOfMemoryError:
        if device.type == "cpu":
            raise
    if found is None:  # outside of the handler, which holds on to what the device has
        if monitor is not None:
            monitor.emit(
                Event("warning", f"{target.tensor}: {device} has not enough memory for it; it is computed on the CPU")
            )
        found = _detection(plan, target, options, torch.device("cpu"), staged)
    module = target.module
    return MatrixFinding(target.tensor, module.name, module.shape, staged.weight.label, module.rank, module.scale, found,
                         time.perf_counter() - began)  # fmt: skip


def _detection(
    plan: Plan, target: Target, options: DetectionOptions, device: torch.device, staged: Staged
) -> Detection:
    """The same on this very device."""
    weight, way = staged.weight, best_way(plan, target, options)
    base: Matrix
    if way == "blocks":  # as it is stored, decoded a few rows at a time in each product
        base = RowBlocks(weight.matrix, weight.at_hand().rows, torch.empty(0, dtype=weight.compute, device=device))
    else:
        base = Dense(staged.whole(device).reshape(weight.matrix))
    delta = plan.delta(target, base.matrix if isinstance(base, Dense) else None)
    try:
        return detect(
            base.T if target.transposed else base,
            delta,
            options,
            target.module.rank,
            target.tensor,
            may_form=way == "dense",
        )
    except NumericError as e:
        raise NumericError(f"{weight.where}: tensor {target.tensor!r} with module {target.module.name!r}: {e}") from e


def detect_all(plan: Plan, options: DetectionOptions, device: torch.device, monitor: Monitor,
               skip: Callable[[str], bool] = lambda _: False) -> Iterator[MatrixFinding]:  # fmt: skip
    """Detect in every target, in the base's file order, but for those that `skip` knows already."""
    check_budget(detection_needs(plan, options), options.max_memory)
    todo = [t for t in plan.targets if not skip(t.tensor)]
    total = sum(cost(t, options) for t in plan.targets)
    done = total - sum(cost(t, options) for t in todo)

    stager = Stager(device)

    def load(target: Target) -> Staged | None:
        return None if best_way(plan, target, options) == "blocks" else stager.stage(plan.weights[target.tensor])

    # Behind a small matrix a large one is not read in time; what is mapped may wait, other memory is not to grow.
    mapped = device.type == "cpu" and not any(plan.weights[t.tensor].held_bytes for t in todo)
    with contextlib.closing(read_ahead(todo, load, 2 if mapped else 1)) as stream:
        for target, staged in stream:
            monitor.checkpoint()
            monitor.emit(Event("detect", target.tensor, done, total))
            yield detect_matrix(plan, target, options, device, staged, monitor)
            done += cost(target, options)
    monitor.emit(Event("detect", "", total, total))


def detect_to_file(plan: Plan, path: Path, options: DetectionOptions, device: torch.device, monitor: Monitor, *,
                   resume: bool = True, overwrite: bool = False) -> Findings:  # fmt: skip
    """Detect, journalling each matrix, and write the findings file; seconds are those of this run.

    Finished findings of this very plan are left as they are.
    """
    finished = plan_detection(plan, path, options, overwrite)
    if finished is not None:
        remove_leftovers(path)  # of a run that was killed just after the file got its name
        return finished
    head = Findings(plan.base_identity, plan.adapter_identity, options, ())
    tensors = [t.tensor for t in plan.targets]
    seconds: dict[str, float | None] = {}
    with FindingsWriter(path, head, tensors, plan.detection_stamps(), resume=resume, overwrite=overwrite,
                        before_rename=plan.check_unchanged) as writer:  # fmt: skip
        for finding in detect_all(plan, options, device, monitor, skip=writer.__contains__):
            writer.add(finding)
            seconds[finding.tensor] = finding.seconds
        monitor.checkpoint()
    findings = load_findings(path)
    return replace(findings, matrices=tuple(replace(m, seconds=seconds.get(m.tensor)) for m in findings))


def inspect_detection(plan: Plan, path: Path, options: DetectionOptions, overwrite: bool, resume: bool) -> str:
    """Preflight of `detect`, read-only: ``new``, ``resume`` or ``done``."""
    if plan_detection(plan, path, options, overwrite) is not None:
        return "done"
    head = Findings(plan.base_identity, plan.adapter_identity, options, ())
    start = journal_head(head, [t.tensor for t in plan.targets], plan.detection_stamps())
    return "resume" if resume and interrupted_run(path, start, overwrite) else "new"


def plan_detection(plan: Plan, path: Path, options: DetectionOptions, overwrite: bool) -> Findings | None:
    """Preflight of `detect`: the finished findings of this very plan, or None if they are still to be made."""
    check_budget(detection_needs(plan, options), options.max_memory)
    tensors = [t.tensor for t in plan.targets]
    digest = detection_digest(plan.base_identity, plan.adapter_identity, options, tensors)
    finished = inspect_findings_output(path, digest, overwrite, plan.inputs)
    if finished is None:
        plan.refuse_overwriting([path])
        # Of an interrupted run: what can be taken up counts, and what cannot is removed first.
        there = [journal_of(path), *partials_of(path.parent, {path.name, journal_of(path).name})]
        check_space(path, sum(findings_bytes(plan, options)) - sum(map(allocated_bytes, there)), at_most=True)
    return finished


def findings_bytes(plan: Plan, options: DetectionOptions) -> tuple[int, int]:
    """Bytes of the findings file and of the journal beside it, at most: all directions intruders."""
    head = Findings(plan.base_identity, plan.adapter_identity, options, ())
    return most_bytes(head, (_widest(plan, target, options) for target in plan.targets))


def _widest(plan: Plan, target: Target, options: DetectionOptions) -> MatrixFinding:
    """A finding that takes as many bytes as there could be: every direction an intruder, every figure at its longest."""
    module, weight = target.module, plan.weights[target.tensor]
    (m, n), k = module.shape, options.directions(module.shape)
    longest, every = -sys.float_info.max, tuple(range(k))
    U, S, Vh = (torch.empty(shape, dtype=weight.compute, device="meta") for shape in ((m, k), (k,), (k, n)))
    found = Detection(singular_values=(longest,) * k, similarity=(longest,) * k, similarity_low=(longest,) * k,
                      similarity_high=(longest,) * k, intruders=every, U=U, S=S, Vh=Vh, certified=False, degenerate=every,
                      solver=max(solvers.SOLVERS, key=len), escalated=False, steps=10**9, products=10**9, cutoff=longest,
                      delta_norm=longest, intruder_energy=longest, dropped_at_zero=longest)  # fmt: skip
    return MatrixFinding(target.tensor, module.name, module.shape, weight.label, module.rank, module.scale, found)

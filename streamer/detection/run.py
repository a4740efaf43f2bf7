"""Detection over whole adapters of one base: one matrix at a time, the next one read while the current one computes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from streamer.detection import solvers
from streamer.detection.findings import Findings, detection_digest, load_findings
from streamer.detection.findings_file import journal_of, remove_leftovers
from streamer.detection.findings_writer import (
    FindingsWriter,
    inspect_findings_output,
    interrupted_run,
    journal_head,
    most_bytes,
)
from streamer.detection.intruders import Detection, detect
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.memory import best_way, detection_estimates, kept_bytes
from streamer.detection.options import DetectionOptions
from streamer.detection.prefetch import PrefetchedWeight, Prefetcher, read_ahead
from streamer.errors import NumericError, OutputExistsError, UsageError
from streamer.events import Event, Monitor
from streamer.linalg.operators import Dense, Matrix, RowBlocks
from streamer.linalg.torch_state import threads
from streamer.plan.memory import check_budget
from streamer.plan.plan import Plan
from streamer.plan.sources import in_short
from streamer.plan.targets import Target
from streamer.storage.atomic import make_directory, partials_of
from streamer.storage.output_checks import allocated_bytes, check_space, touch


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
                  prefetched: PrefetchedWeight | None = None, monitor: Monitor | None = None) -> MatrixFinding:  # fmt: skip
    """Detect in one matrix; `prefetched` is its weight, where that has been read ahead.

    A matrix that the device has no memory for is computed on the CPU; the monitor is told.

    Raises
    ------
    NumericError
        If an input is not finite or the solver fails; the message names file and tensor.
    """
    began = time.perf_counter()
    prefetched = prefetched or PrefetchedWeight(plan.weights[target.tensor])
    found: Detection | None = None
    try:
        found = _detection(plan, target, options, device, prefetched)
    except RuntimeError as e:  # cuBLAS and cuSOLVER have no class of their own for it
        if device.type == "cpu" or not (isinstance(e, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(e)):
            raise
    if found is None:  # outside of the handler, which holds on to what the device has
        if monitor is not None:
            monitor.emit(
                Event("warning", f"{target.tensor}: {device} has not enough memory for it; it is computed on the CPU")
            )
        found = _detection(plan, target, options, torch.device("cpu"), prefetched)
    module = target.module
    return MatrixFinding(target.tensor, module.name, module.shape, prefetched.weight.label, module.rank, module.scaling, found,
                         time.perf_counter() - began)  # fmt: skip


def _detection(
    plan: Plan, target: Target, options: DetectionOptions, device: torch.device, prefetched: PrefetchedWeight
) -> Detection:
    """The same on this very device."""
    weight, way = prefetched.weight, best_way(plan, target, options)
    base: Matrix
    if way == "blocks":  # as it is stored, decoded a few rows at a time in each product
        base = RowBlocks(weight.matrix, weight.at_hand().rows, torch.empty(0, dtype=weight.compute, device=device))
    else:
        base = Dense(prefetched.whole(device).reshape(weight.matrix))
    delta = plan.delta(target, base.matrix if isinstance(base, Dense) else None)
    try:
        return detect(
            base.T if target.transposed else base,
            delta,
            options,
            target.module.rank,
            target.tensor,
            allow_dense=way == "dense",
        )
    except NumericError as e:
        raise NumericError(f"{weight.where}: tensor {target.tensor!r} with module {target.module.name!r}: {e}") from e


Known = Callable[[int, str], bool]
"""Whether a plan's findings on a matrix, by the plan's place among others and the tensor, are there already."""


def detect_all(plans: Sequence[Plan], options: DetectionOptions, device: torch.device, monitor: Monitor,
               known: Known = lambda _i, _tensor: False,
               counts: Sequence[int] = ()) -> Iterator[tuple[int, MatrixFinding]]:  # fmt: skip
    """Detect in every target of plans on one base, in the base's file order, each with its plan's place among them.

    A matrix that several plans change is read once for all of them.

    Parameters
    ----------
    counts
        On how many of torch's threads each plan's matrices are computed; by default on as many as there are.
    """
    counts = counts or [torch.get_num_threads()] * len(plans)
    _check_budgets(plans, options)
    todo = [[(i, t) for i, t in uses if not known(i, t.tensor)] for uses in matrices_of(plans)]
    total, of = sum(cost(t, options) for plan in plans for t in plan.targets), sum(len(plan.targets) for plan in plans)
    done, items = total - sum(cost(t, options) for uses in todo for _, t in uses), of - sum(map(len, todo))
    names = [plan.adapter.path.absolute().name if len(plans) > 1 else "" for plan in plans]

    stager = Prefetcher(device)

    def load(uses: list[tuple[int, Target]]) -> PrefetchedWeight | None:
        i, target = uses[0]
        whole = any(best_way(plans[i], t, options) != "blocks" for i, t in uses)
        return stager.stage(plans[i].weights[target.tensor]) if whole else None

    # Behind a small matrix a large one is not read in time; what is mapped may wait, other memory is not to grow.
    mapped = device.type == "cpu" and not any(plans[i].weights[t.tensor].held_bytes for uses in todo for i, t in uses)
    with contextlib.closing(read_ahead([uses for uses in todo if uses], load, 2 if mapped else 1)) as stream:
        for uses, prefetched in stream:
            for i, target in uses:
                monitor.checkpoint()
                monitor.emit(Event("detect", target.tensor, done, total, items, of, names[i]))
                with threads(counts[i]):
                    finding = detect_matrix(plans[i], target, options, device, prefetched, monitor)
                yield i, finding
                done, items = done + cost(target, options), items + 1
    monitor.emit(Event("detect", "", total, total, of, of))


def detect_in_memory(
    plans: Sequence[Plan], options: DetectionOptions, device: torch.device, monitor: Monitor
) -> list[Findings]:
    """Detect, and keep each plan's findings in memory, which the budget has to hold as well."""
    plans[0].company.kept += sum(kept_bytes(plan, t, options) for plan in plans for t in plan.targets)
    found: list[dict[str, MatrixFinding]] = [{} for _ in plans]
    for i, finding in detect_all(plans, options, device, monitor):
        found[i][finding.tensor] = finding
    return [
        replace(_head(p, options), matrices=tuple(mine[t.tensor] for t in p.targets))
        for p, mine in zip(plans, found, strict=True)
    ]


def _head(plan: Plan, options: DetectionOptions) -> Findings:
    """Findings without a matrix: what they are of, and how they are made."""
    base, adapter = plan.sources
    sources = {"base": in_short(base), "adapter": in_short(adapter)}
    return Findings(plan.base_identity, plan.adapter_identity, options, (), sources=sources)


def matrices_of(plans: Sequence[Plan]) -> list[list[tuple[int, Target]]]:
    """The targets of all plans in file order, those together that are the same bytes: an adapter may save a weight of its own."""
    found: dict[tuple[Any, ...], list[tuple[int, Target]]] = {}
    for i, plan in enumerate(plans):
        for target in plan.targets:
            tensors = plan.weights[target.tensor].tensors.values()
            where = tuple((str(stored.file.path), stored.info.start, stored.info.end) for stored in tensors)
            found.setdefault((plan.file_order(target), target.tensor, where), []).append((i, target))
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def detect_to_files(plans: Sequence[Plan], paths: Sequence[Path], options: DetectionOptions, device: torch.device,
                    monitor: Monitor, *, resume: bool = True, overwrite: bool = False) -> list[Findings]:  # fmt: skip
    """Detect, journalling each matrix, and write each plan's findings file; seconds are those of this run.

    Finished findings of these very plans are left as they are; the files' times become those of this run. Missing directories are made.
    """
    finished = _finished(plans, paths, options, overwrite)
    pairs = list(zip(plans, paths, strict=True))
    todo = [pair for pair, found in zip(pairs, finished, strict=True) if found is None]
    for (_, path), found in zip(pairs, finished, strict=True):
        if found is None:
            make_directory(path.parent)
        else:
            remove_leftovers(path)  # of a run that was killed just after the file got its name
            monitor.told(path, "present")
            if fault := touch([path]):
                monitor.emit(Event("warning", f"{fault}: its time stays; `make` may ask for it again"))
    seconds: dict[tuple[Path, str], float | None] = {}
    with contextlib.ExitStack() as stack:
        writers = []
        for plan, path in todo:
            head = _head(plan, options)
            tensors = [t.tensor for t in plan.targets]
            writer = FindingsWriter(path, head, tensors, plan.detection_stamps(), resume=resume, overwrite=overwrite,
                                    before_rename=plan.check_unchanged)  # fmt: skip
            writers.append(stack.enter_context(writer))
        if todo:
            pending = [plan for plan, _ in todo]
            counts, now = [writer.threads for writer in writers], torch.get_num_threads()
            for count in sorted({*counts} - {now}):
                many = f"{count} thread{'s' * (count > 1)}"
                monitor.emit(Event("note", f"goes on with {many}, as it began; --no-resume starts over with {now}"))

            def known(i: int, tensor: str) -> bool:
                return tensor in writers[i]

            for i, finding in detect_all(pending, options, device, monitor, known, counts):
                writers[i].add(finding)
                seconds[writers[i].path, finding.tensor] = finding.seconds
        monitor.checkpoint()
    for writer in writers:
        monitor.told(writer.path, "resumed" if writer.resumed else "written")

    def timed(path: Path) -> Findings:
        findings = load_findings(path)
        matrices = tuple(replace(m, seconds=seconds.get((path, m.tensor))) for m in findings)
        return replace(findings, matrices=matrices)

    return [timed(path) if found is None else found for path, found in zip(paths, finished, strict=True)]


def inspect_detections(
    plans: Sequence[Plan], paths: Sequence[Path], options: DetectionOptions, overwrite: bool, resume: bool
) -> list[str]:
    """Preflight of `detect`, read-only: ``new``, ``resume`` or ``done`` for each plan."""
    states = []
    finished = _finished(plans, paths, options, overwrite)
    for plan, path, found in zip(plans, paths, finished, strict=True):
        head = _head(plan, options)
        start = journal_head(head, [t.tensor for t in plan.targets], plan.detection_stamps())
        if found is not None:
            states.append("done")
        else:
            states.append("resume" if resume and interrupted_run(path, start, overwrite) else "new")
    return states


@contextlib.contextmanager
def naming_inputs(plan: Plan, paths: Sequence[Path], overwrite: bool) -> Iterator[None]:
    """Say of what even `overwrite` may not replace that it is an input, where it is one, rather than that it is foreign."""
    try:
        yield
    except OutputExistsError:
        if overwrite:
            plan.refuse_overwriting(paths)
        raise


def _finished(
    plans: Sequence[Plan], paths: Sequence[Path], options: DetectionOptions, overwrite: bool
) -> list[Findings | None]:
    """Preflight of `detect`: for each plan its finished findings, or None if they are still to be made; those must fit on the disk."""
    _check_budgets(plans, options)
    finished = []
    for plan, path in zip(plans, paths, strict=True):
        tensors = [t.tensor for t in plan.targets]
        digest = detection_digest(plan.base_identity, plan.adapter_identity, options, tensors)
        with naming_inputs(plan, [path], overwrite):
            found = inspect_findings_output(path, digest, overwrite, plan.inputs)
        if found is None:
            plan.refuse_overwriting([path])
        finished.append(found)
    todo = [(plan, path) for plan, path, found in zip(plans, paths, finished, strict=True) if found is None]
    if todo:
        _check_space(todo, options)
    return finished


def _check_space(todo: Sequence[tuple[Plan, Path]], options: DetectionOptions) -> None:
    """Refuse findings that might not fit on the disk, each with its journal beside it."""
    needed = 0
    for plan, path in todo:
        # Of an interrupted run: what can be taken up counts, and what cannot is removed first.
        names = {path.name, journal_of(path).name}
        there = [journal_of(path), *(partials_of(path.parent, names) if path.parent.is_dir() else ())]
        needed += sum(findings_bytes(plan, options)) - sum(map(allocated_bytes, there))
    first = todo[0][1]
    check_space(first.parent if len(todo) > 1 else first, needed, at_most=True)


def findings_bytes(plan: Plan, options: DetectionOptions) -> tuple[int, int]:
    """Bytes of the findings file and of the journal beside it, at most: all directions intruders."""
    head = _head(plan, options)
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
    return MatrixFinding(target.tensor, module.name, module.shape, weight.label, module.rank, module.scaling, found)


def _check_budgets(plans: Sequence[Plan], options: DetectionOptions) -> None:
    check_budget((need for plan in plans for need in detection_estimates(plan, options)), options.max_memory)

"""Detect in all matrices of adapters on one base: one at a time, the next one read while the current one computes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from streamer.adapters.batch import findings_of
from streamer.detection.cost import cost as solver_cost
from streamer.detection.findings import Findings, detection_digest, load_findings
from streamer.detection.findings_file import remove_leftovers
from streamer.detection.findings_size import FindingsSize, check_findings_space, findings_bytes, findings_head
from streamer.detection.findings_writer import FindingsWriter, inspect_findings_output, interrupted_run, journal_head
from streamer.detection.fingerprints import fingerprint
from streamer.detection.intruders import Detection, decide
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.memory import best_way, detection_estimates, float64_way, kept_bytes
from streamer.detection.options import DetectionOptions, RunOptions
from streamer.detection.prefetch import PrefetchedWeight, Prefetcher, read_ahead
from streamer.errors import NumericError, OutputExistsError
from streamer.events import Event, Monitor
from streamer.linalg.operators import Dense, Matrix, RowBlocks
from streamer.linalg.torch_state import threads
from streamer.plan.batch import Batch
from streamer.plan.memory import check_budget, resident_bytes
from streamer.plan.plan import Plan, make_batch
from streamer.plan.targets import Target
from streamer.storage.files import make_directory
from streamer.storage.output_checks import touch
from streamer.units import counted
from streamer.weights.base import StoredTensor


def cost(target: Target, options: DetectionOptions) -> int:
    """Estimate the units of work that detection spends on a matrix; see `detection.cost.cost`."""
    shape = target.module.shape
    return solver_cost(shape, options.directions(shape), options.solver)


def detect_matrix(plan: Plan, target: Target, options: DetectionOptions, device: torch.device, resident: int,
                  prefetched: PrefetchedWeight | None = None, monitor: Monitor | None = None) -> MatrixFinding:  # fmt: skip
    """Detect in one matrix; one that the device has no memory for is computed on the CPU, and the monitor is told.

    Parameters
    ----------
    resident
        Bytes that stay in memory between two steps, as the budget has to hold them too; see `resident_bytes`.
    prefetched
        The matrix' weight, where that has been read ahead.

    Raises
    ------
    NumericError
        If an input is not finite or the solver fails; the message names file and tensor.
    """
    began = time.perf_counter()
    prefetched = prefetched or PrefetchedWeight(plan.weights[target.tensor])
    tensors = plan.adapter.tensors
    if not plan.adapter.describes_model:  # whose matrix has no fingerprint, and is too large to be held
        tensors = {name: tensors[name].load() for name in target.module.tensor_names}
    found: Detection | None = None
    try:
        found = _detection(plan, target, tensors, options, device, resident, prefetched)
    except RuntimeError as e:  # cuBLAS and cuSOLVER have no class of their own for it
        if device.type == "cpu" or not (isinstance(e, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(e)):
            raise
    if found is None:  # outside of the handler, which holds on to what the device has
        if monitor is not None:
            monitor.emit(
                Event("warning", f"{target.tensor}: {device} has not enough memory for it; it is computed on the CPU")
            )
        found = _detection(plan, target, tensors, options, torch.device("cpu"), resident, prefetched)
    module = target.module
    printed = fingerprint(plan, target, tensors, prefetched.weight)
    return MatrixFinding(target.tensor, module.name, module.shape, prefetched.weight.label, module.rank, module.scaling, found,
                         time.perf_counter() - began, target.transposed, printed)  # fmt: skip


def _detection(plan: Plan, target: Target, tensors: Mapping[str, StoredTensor], options: DetectionOptions, device: torch.device,
               resident: int, prefetched: PrefetchedWeight) -> Detection:  # fmt: skip
    """Detect on this very device, once more in float64 where only rounding leaves a direction open and memory allows it."""
    way = best_way(plan, target, options, resident)
    found, rounded = _decisions(plan, target, tensors, options, device, prefetched, way)
    again = float64_way(plan, target, options, resident, found.solver) if rounded else None
    if again is None:
        return found
    weight = prefetched.weight
    prefetched = replace(prefetched, weight=replace(weight, compute=torch.float64))
    options = replace(options, solver=found.solver)
    precise, _ = _decisions(plan, target, tensors, options, device, prefetched, again[0])
    return replace(precise, **{key: getattr(precise, key).to(weight.compute) for key in ("U", "S", "Vh")},
                   escalated=found.escalated, steps=found.steps + precise.steps,
                   products=found.products + precise.products)  # fmt: skip


def _decisions(plan: Plan, target: Target, tensors: Mapping[str, StoredTensor], options: DetectionOptions, device: torch.device,
               prefetched: PrefetchedWeight, way: str) -> tuple[Detection, bool]:  # fmt: skip
    """Decide in the weight's computing dtype, in one of the ways of `working_bytes`; see `decide`."""
    weight = prefetched.weight
    base: Matrix
    if way == "blocks":  # as it is stored, decoded a few rows at a time in each product
        base = RowBlocks(weight.matrix, weight.at_hand().rows, torch.empty(0, dtype=weight.compute, device=device))
    else:
        base = Dense(prefetched.whole(device).reshape(weight.matrix))
    W0 = base.matrix if isinstance(base, Dense) else None
    delta = plan.delta(target, W0, double=weight.compute == torch.float64, tensors=tensors)
    try:
        oriented = base.T if target.transposed else base
        return decide(oriented, delta, options, target.module.rank, target.tensor, allow_dense=way == "dense")
    except NumericError as e:
        raise NumericError(f"{weight.where}: tensor {target.tensor!r} with module {target.module.name!r}: {e}") from e


def detect_all(batch: Batch, options: DetectionOptions, run: RunOptions, resident: int,
               writers: Sequence[FindingsWriter] = ()) -> Iterator[tuple[int, MatrixFinding]]:  # fmt: skip
    """Detect in every target of a batch, in the base's file order, and yield each finding with its plan's number.

    A matrix that several plans change is read once for all of them.

    Parameters
    ----------
    resident
        Bytes that stay in memory between two steps; see `resident_bytes`.
    writers
        Of each plan's findings: a matrix on which they are there already is passed over, and they say the number of torch's threads.
    """
    plans, device, monitor = batch.plans, run.device, run.monitor
    counts = [writer.threads for writer in writers] or [torch.get_num_threads()] * len(plans)
    _check_budgets(batch, options, resident)
    todo = [[(i, t) for i, t in uses if not writers or t.tensor not in writers[i]] for uses in batch.matrices()]
    total, of = sum(cost(t, options) for plan in plans for t in plan.targets), batch.matrix_count
    done, items = total - sum(cost(t, options) for uses in todo for _, t in uses), of - sum(map(len, todo))
    names = [plan.adapter.path.absolute().name if len(plans) > 1 else "" for plan in plans]

    stager = Prefetcher(device)

    def load(uses: list[tuple[int, Target]]) -> PrefetchedWeight | None:
        i, target = uses[0]
        weight = plans[i].weights[target.tensor]
        whole = weight.remote or any(best_way(plans[i], t, options, resident) != "blocks" for i, t in uses)
        return stager.stage(weight) if whole else None

    # Behind a small matrix a large one is not read in time; what is mapped may wait, other memory is not to grow.
    mapped = device.type == "cpu" and not any(plans[i].weights[t.tensor].held_bytes for uses in todo for i, t in uses)
    with contextlib.closing(read_ahead([uses for uses in todo if uses], load, 2 if mapped else 1)) as stream:
        for uses, prefetched in stream:
            for i, target in uses:
                monitor.checkpoint()
                monitor.emit(Event("detect", target.tensor, done, total, items, of, names[i]))
                with threads(counts[i]):
                    finding = detect_matrix(plans[i], target, options, device, resident, prefetched, monitor)
                yield i, finding
                done, items = done + cost(target, options), items + 1
    monitor.emit(Event("detect", "", total, total, of, of))


def detect_many(base: str | Path, adapters: Mapping[str, Path], output: str | Path | None, options: DetectionOptions,
                run: RunOptions) -> dict[str, Findings]:  # fmt: skip
    """Detect in adapters on one base, into memory, or into files where an output is named.

    Parameters
    ----------
    adapters
        By name; see `named_adapters`.

    Returns
    -------
    dict
        Findings by the adapters' names.
    """
    batch = make_batch(base, list(adapters.values()), run.io, run.base_is_residual, run.architecture)
    run.monitor.warn(batch.warnings)
    if output is None:
        found = detect_in_memory(batch, options, run)
    else:
        paths = [findings_of(output, name) for name in adapters]
        found = detect_to_files(batch, paths, options, run, resident_bytes(batch))
    return dict(zip(adapters, found, strict=True))


def detect_in_memory(batch: Batch, options: DetectionOptions, run: RunOptions) -> list[Findings]:
    """Detect, and keep each plan's findings in memory, which the budget has to hold as well."""
    kept = sum(kept_bytes(plan, t, options) for plan in batch.plans for t in plan.targets)
    found: list[dict[str, MatrixFinding]] = [{} for _ in batch.plans]
    for i, finding in detect_all(batch, options, run, resident_bytes(batch) + kept):
        found[i][finding.tensor] = finding
    return [
        replace(findings_head(p, options), matrices=tuple(mine[t.tensor] for t in p.targets))
        for p, mine in zip(batch.plans, found, strict=True)
    ]


def detect_to_files(batch: Batch, paths: Sequence[Path], options: DetectionOptions, run: RunOptions, resident: int,
                    sizes: Sequence[FindingsSize] = ()) -> list[Findings]:  # fmt: skip
    """Detect, journalling each matrix, and write each plan's findings file; seconds are those of this run.

    Finished findings of these very plans are left as they are; the files' times become those of this run. Missing directories are made.

    Parameters
    ----------
    resident
        Bytes that stay in memory between two steps; see `resident_bytes`.
    sizes
        `findings_bytes` of each plan, where the caller has them.
    """
    monitor, plans = run.monitor, batch.plans
    finished = _finished(batch, paths, options, run.overwrite, resident)
    pairs = list(zip(plans, paths, strict=True))
    todo = [pair for pair, found in zip(pairs, finished, strict=True) if found is None]
    _checked_sizes(batch, paths, options, finished, sizes)
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
            head = findings_head(plan, options)
            tensors = [t.tensor for t in plan.targets]
            writer = FindingsWriter(path, head, tensors, plan.detection_stamps(), resume=run.resume,
                                    overwrite=run.overwrite, before_rename=plan.check_unchanged)  # fmt: skip
            writers.append(stack.enter_context(writer))
        if todo:
            pending = Batch(batch.base, tuple(plan for plan, _ in todo))
            now = torch.get_num_threads()
            for count in sorted({writer.threads for writer in writers} - {now}):
                monitor.emit(
                    Event(
                        "note",
                        f"goes on with {counted(count, 'thread')}, as it began; --no-resume starts over with {now}",
                    )
                )
            for i, finding in detect_all(pending, options, run, resident, writers):
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
    batch: Batch, paths: Sequence[Path], options: DetectionOptions, run: RunOptions
) -> list[tuple[str, FindingsSize]]:
    """Check what `detect_to_files` would write, without writing: for each plan ``new``, ``resume`` or ``done``, and `findings_bytes`.

    Findings that are done have the size (0, 0).
    """
    states = []
    finished = _finished(batch, paths, options, run.overwrite, resident_bytes(batch))
    sizes = _checked_sizes(batch, paths, options, finished)
    for plan, path, found, size in zip(batch.plans, paths, finished, sizes, strict=True):
        state = "done"
        if found is None:
            tensors = [t.tensor for t in plan.targets]
            start = journal_head(findings_head(plan, options), tensors, plan.detection_stamps())
            state = "resume" if run.resume and interrupted_run(path, start, run.overwrite) else "new"
        states.append((state, size))
    return states


def _checked_sizes(batch: Batch, paths: Sequence[Path], options: DetectionOptions, finished: Sequence[Findings | None],
                   sizes: Sequence[FindingsSize] = ()) -> Sequence[FindingsSize]:  # fmt: skip
    """Compute `findings_bytes` of each plan, (0, 0) where findings are finished, and check that the disk has room."""
    pairs = list(zip(batch.plans, finished, strict=True))
    sizes = sizes or [findings_bytes(plan, options) if found is None else (0, 0) for plan, found in pairs]
    todo = [i for i, found in enumerate(finished) if found is None]
    if todo:
        check_findings_space([paths[i] for i in todo], [sizes[i] for i in todo])
    return sizes


@contextlib.contextmanager
def naming_inputs(plan: Plan, paths: Sequence[Path], overwrite: bool) -> Iterator[None]:
    """Name the input, where an output would replace one, in place of the refusal to replace a file of unknown origin."""
    try:
        yield
    except OutputExistsError:
        if overwrite:
            plan.refuse_overwriting(paths)
        raise


def _finished(
    batch: Batch, paths: Sequence[Path], options: DetectionOptions, overwrite: bool, resident: int
) -> list[Findings | None]:
    """Check before detection: for each plan its finished findings, or None if they are still to be made."""
    _check_budgets(batch, options, resident)
    finished = []
    for plan, path in zip(batch.plans, paths, strict=True):
        tensors = [t.tensor for t in plan.targets]
        digest = detection_digest(plan.base_identity, plan.adapter_identity, options, tensors)
        with naming_inputs(plan, [path], overwrite):
            found = inspect_findings_output(path, digest, overwrite, plan.inputs)
        if found is None:
            plan.refuse_overwriting([path])
        finished.append(found)
    return finished


def _check_budgets(batch: Batch, options: DetectionOptions, resident: int) -> None:
    needs = (need for plan in batch.plans for need in detection_estimates(plan, options, resident))
    check_budget(needs, options.max_memory)

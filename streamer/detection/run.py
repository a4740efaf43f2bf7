"""Detect in all matrices of adapters on one base, into memory or into files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_file import FindingsHead, remove_leftovers
from streamer.detection.findings_size import FindingsSize, check_findings_space, findings_bytes
from streamer.detection.findings_writer import FindingsWriter, inspect_findings_output, interrupted_run, journal_head
from streamer.detection.matrices import cost, detect_in_turn
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.memory import detection_estimates, kept_bytes
from streamer.detection.options import DetectionOptions, RunOptions
from streamer.detection.parts import finished_parts, remove_parts
from streamer.detection.workers import detect_on_workers
from streamer.errors import OutputExistsError
from streamer.events import Event
from streamer.plan.batch import Batch
from streamer.plan.memory import check_budget, resident_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.storage.files import make_directory
from streamer.storage.output_checks import touch
from streamer.units import counted


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
    plans, monitor = batch.plans, run.monitor
    counts = [writer.threads for writer in writers] or [torch.get_num_threads()] * len(plans)
    _check_budgets(batch, options, resident)

    todo = [[(i, t) for i, t in uses if not writers or t.tensor not in writers[i]] for uses in batch.matrices()]
    todo = [uses for uses in todo if uses]
    total, of = sum(cost(t, options) for plan in plans for t in plan.targets), batch.matrix_count
    done, items = total - sum(cost(t, options) for uses in todo for _, t in uses), of - sum(map(len, todo))
    names = [plan.adapter.path.absolute().name if len(plans) > 1 else "" for plan in plans]

    def begin(i: int, target: Target) -> None:
        monitor.checkpoint()
        monitor.emit(Event("detect", target.tensor, done, total, items, of, names[i]))

    if run.workers is None:
        stream = detect_in_turn(plans, todo, options, run, resident, counts, begin)
    else:
        stream = detect_on_workers(run.workers, batch, todo, options, run, resident, counts, begin)
    with contextlib.closing(stream):
        for i, target, finding in stream:
            yield i, finding
            done, items = done + cost(target, options), items + 1
    monitor.emit(Event("detect", "", total, total, of, of))


def detect_in_memory(batch: Batch, options: DetectionOptions, run: RunOptions) -> list[Findings]:
    """Detect, and keep each plan's findings in memory, which the budget has to hold as well."""
    kept = sum(kept_bytes(plan, t, options) for plan in batch.plans for t in plan.targets)
    found: list[dict[str, MatrixFinding]] = [{} for _ in batch.plans]
    for i, finding in detect_all(batch, options, run, resident_bytes(batch) + kept):
        found[i][finding.tensor] = finding
    made = [
        Findings.of(FindingsHead.of(p, options), (mine[t.tensor] for t in p.targets))
        for p, mine in zip(batch.plans, found, strict=True)
    ]
    run.monitor.warn(warning for findings in made for warning in findings.warnings)
    return made


def detect_to_files(batch: Batch, paths: Sequence[Path], options: DetectionOptions, run: RunOptions, resident: int,
                    sizes: Sequence[FindingsSize] = ()) -> list[Findings]:  # fmt: skip
    """Detect, journalling each matrix, and write each plan's findings file; seconds are those of this run.

    Finished findings of these very plans are left as they are; the files' times become those of this run. Missing directories are made.
    Parts of them that stand beside their place (see `parts`) are joined, and removed at the end.

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
    parts = [finished_parts(plan, path, options) if run.resume else [] for plan, path in todo]
    _checked_sizes(batch, paths, options, finished, sizes)
    for (plan, path), found in zip(pairs, finished, strict=True):
        if found is None:
            make_directory(path.parent)
        else:
            remove_leftovers(path)  # of a run that was killed just after the file got its name
            remove_parts(plan, path, options)
            monitor.told(path, "present")
            if fault := touch([path]):
                monitor.emit(Event("warning", f"{fault}: its time stays; `make` may ask for it again"))
    seconds: dict[tuple[Path, str], float | None] = {}
    with contextlib.ExitStack() as stack:
        writers = []
        for plan, path in todo:
            head = FindingsHead.of(plan, options)
            tensors = [t.tensor for t in plan.targets]
            writer = FindingsWriter(path, head, tensors, plan.detection_stamps(), resume=run.resume,
                                    overwrite=run.overwrite, before_rename=plan.check_unchanged)  # fmt: skip
            writers.append(stack.enter_context(writer))
        for writer, finding in ((w, f) for w, mine in zip(writers, parts, strict=True) for part in mine for f in part):
            if finding.tensor not in writer:
                writer.add(finding)
        if any(writer.resumed for writer in writers):
            begun_by = [
                (w, t.tensor) for w, (plan, _) in zip(writers, todo, strict=True) if w.resumed for t in plan.targets
            ]
            monitor.resuming(sum(tensor in writer for writer, tensor in begun_by), len(begun_by), "matrix")
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

    made = [timed(path) if found is None else found for path, found in zip(paths, finished, strict=True)]
    for (plan, path), joined in zip(todo, parts, strict=True):
        if joined:  # kept until here: the file that they are joined in has been read back and fits its digest
            remove_parts(plan, path, options)
    monitor.warn(warning for findings in made for warning in findings.warnings)
    return made


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
            start = journal_head(FindingsHead.of(plan, options), tensors, plan.detection_stamps())
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
        digest = FindingsHead.of(plan, options).digest(t.tensor for t in plan.targets)
        with naming_inputs(plan, [path], overwrite):
            found = inspect_findings_output(path, digest, overwrite, plan.inputs)
        if found is None:
            plan.refuse_overwriting([path])
        finished.append(found)
    return finished


def _check_budgets(batch: Batch, options: DetectionOptions, resident: int) -> None:
    needs = (need for plan in batch.plans for need in detection_estimates(plan, options, resident))
    check_budget(needs, options.max_memory)

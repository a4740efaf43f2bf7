"""Detect in all matrices of adapters on one base, into memory or into files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_file import FindingsHead, MatrixFinding, remove_leftovers
from streamer.detection.findings_writer import (
    FindingsSize,
    FindingsWriter,
    check_findings_space,
    findings_bytes,
    inspect_findings_output,
    interrupted_run,
    journal_head,
)
from streamer.detection.matrices import (
    Work,
    detect_in_turn,
    detect_on_workers,
    detection_estimates,
    inputs_of,
    kept_bytes,
)
from streamer.detection.options import DetectionOptions, Run
from streamer.errors import OutputExistsError
from streamer.events import Event
from streamer.plan.batch import AdapterBatch, Assignment, check_budget, resident_bytes
from streamer.plan.plan import Plan
from streamer.storage.files import make_directory
from streamer.storage.output_checks import touch
from streamer.units import counted


def detect_all(batch: AdapterBatch, options: DetectionOptions, run: Run, resident: int,
               writers: Sequence[FindingsWriter] = ()) -> Iterator[tuple[int, MatrixFinding]]:  # fmt: skip
    """Detect in every target of a batch, in the base's file order, and yield each finding with its plan's number.

    A matrix that several plans change is read once for all of them.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    writers
        Writers of each plan's findings: matrices that they already have are skipped, and they set the number of torch's threads.
    """
    plans, monitor = batch.plans, run.monitor
    threads = [writer.threads for writer in writers] or [torch.get_num_threads()] * len(plans)
    _check_budgets(batch, options, resident)
    groups = batch.matrices(lambda one: not writers or one.target.tensor not in writers[one.plan])
    work = Work(batch, groups, options, threads, resident)
    todo = [one for group in groups for one in group]
    total, of = work.cost(Assignment(i, t) for i, plan in enumerate(plans) for t in plan.targets), batch.matrix_count
    done, items = total - work.cost(todo), of - len(todo)
    names = [plan.adapter.path.absolute().name if len(plans) > 1 else "" for plan in plans]

    def begin(one: Assignment) -> None:
        monitor.checkpoint()
        monitor.emit(Event("detect", one.target.tensor, done, total, items, of, names[one.plan]))

    if run.workers is None:
        stream = detect_in_turn(work, run.device, monitor, begin)
    else:
        stream = detect_on_workers(work, run.workers, inputs_of(batch, run), run.device, monitor, begin)
    with contextlib.closing(stream):
        for one, finding in stream:
            yield one.plan, finding
            done, items = done + work.cost([one]), items + 1
    monitor.emit(Event("detect", "", total, total, of, of))


def detect_in_memory(batch: AdapterBatch, options: DetectionOptions, run: Run) -> list[Findings]:
    """Detect and keep each plan's findings in memory, which the budget includes."""
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


def detect_to_files(batch: AdapterBatch, paths: Sequence[Path], options: DetectionOptions, run: Run, resident: int,
                    sizes: Sequence[FindingsSize] = ()) -> list[Findings]:  # fmt: skip
    """Detect, journal each matrix, and write each plan's findings file; seconds are this run's.

    Finished findings of exactly these plans stay unchanged, but their modification times are updated. Missing directories are created.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    sizes
        `findings_bytes` of each plan, if the caller has computed them.
    """
    monitor, places = run.monitor, _places(batch, paths, options, run.overwrite, resident)
    todo = [place for place in places if place.finished is None]
    _check_space(places, sizes or _sizes(places))
    for one in places:
        if one.finished is None:
            make_directory(one.path.parent)
            continue
        remove_leftovers(one.path)  # of a run that was killed just after naming the file
        monitor.told(one.path, "present")
        if fault := touch([one.path]):
            monitor.emit(Event("warning", f"{fault}: its time stays; `make` may ask for it again"))
    seconds: dict[tuple[Path, str], float | None] = {}
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(one.writer(run)) for one in todo]
        begun = [(w, t) for w, one in zip(writers, todo, strict=True) if w.resumed for t in one.tensors]
        if begun:
            monitor.resuming(sum(tensor in writer for writer, tensor in begun), len(begun), "matrix")
        if todo:
            now = torch.get_num_threads()
            for count in sorted({writer.threads for writer in writers} - {now}):
                text = f"goes on with {counted(count, 'thread')}, as it began; --no-resume starts over with {now}"
                monitor.emit(Event("note", text))
            pending = AdapterBatch(batch.base, tuple(one.plan for one in todo))
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

    made = [timed(one.path) if one.finished is None else one.finished for one in places]
    monitor.warn(warning for findings in made for warning in findings.warnings)
    return made


def inspect_detections(
    batch: AdapterBatch, paths: Sequence[Path], options: DetectionOptions, run: Run
) -> list[tuple[str, FindingsSize]]:
    """Check without writing what `detect_to_files` would do: for each plan ``new``, ``resume`` or ``done``, and `findings_bytes`.

    Finished findings have the size (0, 0).
    """
    places = _places(batch, paths, options, run.overwrite, resident_bytes(batch))
    sizes = _sizes(places)
    _check_space(places, sizes)
    return [(one.state(run), size) for one, size in zip(places, sizes, strict=True)]


@dataclass(frozen=True)
class _Place:
    """A findings file to write, or an existing one if `finished`."""

    plan: Plan
    path: Path
    head: FindingsHead
    finished: Findings | None

    @property
    def tensors(self) -> list[str]:
        return [target.tensor for target in self.plan.targets]

    def writer(self, run: Run) -> FindingsWriter:
        return FindingsWriter(self.path, self.head, self.tensors, self.plan.detection_stamps(), resume=run.resume,
                              overwrite=run.overwrite, before_rename=self.plan.check_unchanged)  # fmt: skip

    def state(self, run: Run) -> str:
        if self.finished is not None:
            return "done"
        start = journal_head(self.head, self.tensors, self.plan.detection_stamps())
        return "resume" if run.resume and interrupted_run(self.path, start, run.overwrite) else "new"


def _sizes(places: Sequence[_Place]) -> list[FindingsSize]:
    """Compute `findings_bytes` of each plan, (0, 0) for finished findings."""
    return [findings_bytes(one.plan, one.head.options) if one.finished is None else (0, 0) for one in places]


def _check_space(places: Sequence[_Place], sizes: Sequence[FindingsSize]) -> None:
    """Check the free space on the disk."""
    todo = [(one.path, size) for one, size in zip(places, sizes, strict=True) if one.finished is None]
    if todo:
        check_findings_space(*zip(*todo, strict=True))


@contextlib.contextmanager
def naming_inputs(plan: Plan, paths: Sequence[Path], overwrite: bool) -> Iterator[None]:
    """If an output would replace an input, raise an error that names the input, instead of one about an unknown file."""
    try:
        yield
    except OutputExistsError:
        if overwrite:
            plan.refuse_overwriting(paths)
        raise


def _places(
    batch: AdapterBatch, paths: Sequence[Path], options: DetectionOptions, overwrite: bool, resident: int
) -> list[_Place]:
    """Check before detection where findings go and which are finished."""
    _check_budgets(batch, options, resident)
    places = []
    for plan, path in zip(batch.plans, paths, strict=True):
        head = FindingsHead.of(plan, options)
        with naming_inputs(plan, [path], overwrite):
            digest = head.digest(target.tensor for target in plan.targets)
            found = inspect_findings_output(path, digest, overwrite, plan.inputs)
        if found is None:
            plan.refuse_overwriting([path])
        places.append(_Place(plan, path, head, found))
    return places


def _check_budgets(batch: AdapterBatch, options: DetectionOptions, resident: int) -> None:
    needs = (need for plan in batch.plans for need in detection_estimates(plan, options, resident))
    check_budget(needs, options.max_memory)

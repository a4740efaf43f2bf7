"""Write outputs, one or several in step: each is a resumable transaction of its own, and of the base each tensor is read once.

An output's tensors are in the base's file order. Of several outputs the one that is furthest behind goes on, so that all of them ask for
a tensor before any asks for the next, and the system's cache has it for all but the first.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from streamer.detection.findings_file import remove_leftovers
from streamer.detection.memory import detection_estimates
from streamer.detection.options import Run, RunOptions
from streamer.detection.run import detect_to_files, naming_inputs
from streamer.detection.workers import inputs_of
from streamer.errors import FormatError
from streamer.events import Event, Monitor, OutputState
from streamer.linalg.torch_state import threads
from streamer.output.job import GivenFindings, Job
from streamer.output.metrics import journalled, totals
from streamer.output.model_card import CARD_NAME
from streamer.output.output_spec import OWN_FINDINGS, Writer
from streamer.output.record_view import WrittenView
from streamer.output.records import MitigatedMatrix, Record, Written, certified_count
from streamer.output.shard_task import PartialShard, ShardTask, describe, shard_source
from streamer.output.truncation import output_warnings
from streamer.plan.batch import Batch
from streamer.plan.memory import check_budget, resident_bytes
from streamer.storage.atomic_file import AtomicFile, remove_partials
from streamer.storage.checkpoint import FilePosition
from streamer.storage.header import TensorInfo
from streamer.storage.lock import locked
from streamer.storage.output_checks import check_space
from streamer.storage.output_plan import LOCK_NAME, RECORD_NAME, finished_record, inspect_output, missing_bytes
from streamer.storage.shard_writer import shard_steps
from streamer.storage.transaction import OutputDirectory, open_outputs, touch_output
from streamer.workers.engine import Workers, kept


def batch_of(writers: Sequence[Writer]) -> Batch:
    """Return the plans of outputs that are made from one base."""
    plans = [writer.spec.job.plan for writer in writers]
    return Batch(plans[0].base, tuple(plans))


def resident_of(writers: Sequence[Writer]) -> int:
    """Estimate the memory between any two steps of outputs that are written together."""
    return resident_bytes(batch_of(writers), sum(writer.spec.model_tensors for writer in writers))


def shared_memory(writers: Sequence[Writer], workers: Workers) -> int | None:
    """Divide the memory allowed among this process and its workers; see `Workers.share`."""
    resident, jobs = resident_of(writers), [writer.spec.job for writer in writers]
    needs = [need for writer in writers for need in writer.estimates(resident)]
    needs += [need for job in jobs if job.detects for need in detection_estimates(job.plan, job.detection, resident)]
    return workers.share(jobs[0].detection.max_memory, resident, needs)


def inspect_jobs(writers: Sequence[Writer], options: RunOptions) -> Sequence[str]:
    """Check before writing: ``new``, ``resume`` or ``done`` for each (see `inspect_output`), and whether all of them fit on the disk."""
    states, resident = [], resident_of(writers)
    for writer in writers:
        spec, job = writer.spec, writer.spec.job
        paths = [spec.path / name for name, _ in spec.output.files]
        with naming_inputs(job.plan, paths, options.overwrite):
            state = inspect_output(spec.output, options.overwrite, options.resume)
        if state != "done":
            job.plan.refuse_overwriting(paths)
            detecting = detection_estimates(job.plan, job.detection, resident) if job.detects else ()
            check_budget(itertools.chain(detecting, writer.estimates(resident)), job.detection.max_memory)
        states.append(state)
    if len(writers) > 1:
        outputs = [writer.spec.output for writer in writers]
        missing = sum(missing_bytes(out, state) for out, state in zip(outputs, states, strict=True) if state != "done")
        check_space(outputs[0].path.parent, missing, at_most=any(output.temporary for output in outputs))
    return states


def run_jobs(writers: Sequence[Writer], options: Run) -> list[Written]:
    """Write outputs that are made from one base, each as one resumable transaction, and return their records.

    A record is that of `streamer mitigate --json` and `streamer merge --json`; without `output` and `state` it stands in the output, as
    ``streamer.json``. A finished output of the same plan is left as it is; its files' times become those of this run.
    """
    monitor, states = options.monitor, inspect_jobs(writers, options)
    specs = [writer.spec for writer in writers]
    for line in dict.fromkeys(line for spec in specs for line in spec.warnings):
        monitor.emit(Event("warning", line))
    for spec in (spec for spec, state in zip(specs, states, strict=True) if state == "done"):
        monitor.emit(Event("note", f"{spec.path} holds this very output already; nothing to do"))
        lock = spec.path / LOCK_NAME
        if lock.exists():  # of a run that was killed as it ended
            with locked(lock):
                pass
        if fault := touch_output(spec.output):
            monitor.emit(Event("warning", f"{fault}: its time stays; `make` may ask for it again"))
    todo = [writer for writer, state in zip(writers, states, strict=True) if state != "done"]
    with open_outputs([writer.spec.output for writer in todo], options.overwrite, options.resume) as outs:
        runs = [_Run(writer, out, monitor) for writer, out in zip(todo, outs, strict=True)]
        elsewhere = None if options.workers is None else _Elsewhere(options, batch_of(todo)) if todo else None
        for line in dict.fromkeys(line for run in runs for line in (*run.spec.notes, *run.spec.advice)):
            monitor.emit(Event("note", line))
        for run in runs:
            run.look()
        if resumed := [run for run in runs if run.out.resumed]:
            done, of = sum(run.finished_items for run in resumed), sum(run.item_count for run in resumed)
            monitor.resuming(done, of, "tensor")
        _detect([run for run in runs if run.lacks_findings], options, resident_of(writers))
        with threads(), kept(options.workers):
            for run in runs:
                run.elsewhere = elsewhere
            _in_step(runs)
    said: dict[str, OutputState] = {"new": "written", "resume": "resumed", "done": "present"}
    written = [
        cast(Written, WrittenView(finished_record(spec.output), output=str(spec.path), state=said[state]))
        for spec, state in zip(specs, states, strict=True)
    ]
    for spec, record in zip(specs, written, strict=True):
        whose = f" (adapter {spec.path.name!r})" if len(specs) > 1 else ""
        try:
            warnings = output_warnings(spec, record["matrices"])
        except (KeyError, TypeError) as e:  # of an output that was there before, and whose record was changed since
            raise FormatError(
                f"{spec.path / RECORD_NAME}: its matrices are not as it was written; pass --overwrite to make it again"
            ) from e
        monitor.warn(f"{line}{whose}" for line in warnings)
    return written


class _Run:
    """Writes one output."""

    def __init__(self, writer: Writer, out: OutputDirectory, monitor: Monitor) -> None:
        self.writer, self.spec, self.out, self.monitor = writer, writer.spec, out, monitor
        self.job = writer.spec.job
        """The spec's; with the findings in hand, once they are made."""
        self.done = 0
        """Bytes that stand, those of the file in hand included."""
        self.items = 0
        """Tensors of the shards, and other files, that stand."""
        self._finished: set[str] = set()
        self.elsewhere: _Elsewhere | None = None
        """What writes shards in place of this process."""

    def look(self) -> None:
        """Find the files that an interrupted run has finished."""
        for name, _ in self.spec.output.files:
            self.monitor.checkpoint()
            if self.out.finished(name) is not None:
                self._finished.add(name)

    @property
    def lacks_findings(self) -> bool:
        """Test whether deltas are left to mitigate, and nothing is known about them."""
        return self.job.detects and not self.spec.shards.keys() <= self._finished

    @property
    def item_count(self) -> int:
        """Count the tensors of the shards, and other files, in all."""
        return sum(self._items(name) for name, _ in self.spec.output.files)

    @property
    def finished_items(self) -> int:
        """Count those that an interrupted run has finished."""
        return sum(map(self._items, self._finished))

    def _items(self, name: str) -> int:
        shards = self.spec.shards
        return len(shards[name].header.tensors) if name in shards else 1

    def steps(self, runs: Sequence[_Run]) -> Generator[FilePosition, None, None]:
        """Write everything, in order, the commit point last; pause before each tensor, at its position in the base.

        Parameters
        ----------
        runs
            All that are in step, this one among them: while one goes on, the others hold no pieces.
        """
        spec, out = self.spec, self.out
        check = self.job.plan.check_unchanged
        total, of = sum(run.spec.output.total_bytes for run in runs), sum(run.item_count for run in runs)
        adapter = self.job.plan.adapter.path.absolute().name if len(runs) > 1 else ""
        copies, texts = dict(spec.copies), {**spec.texts, **spec.finals}

        def emit(name: str) -> None:
            done, items = sum(run.done for run in runs), sum(run.items for run in runs)
            self.monitor.emit(Event("write", name, done, total, items, of, adapter))

        begun, last = 0, spec.output.files[-1][0]
        for name, size in spec.output.files:
            self.monitor.checkpoint()
            if self.elsewhere is not None and name in spec.shards and name != last and name not in self._finished:
                self._write_elsewhere(self.elsewhere, begun, emit)
            if name in self._finished or (name == CARD_NAME and spec.card is not None):
                self.items += self._items(name)  # the card comes with the commit point, when all is known that it says
            elif name in spec.shards:
                with contextlib.closing(self._shard(name)) as tensors:
                    for position, info, file in tensors:
                        if len(runs) > 1:
                            file.flush()
                        yield position
                        self.done = begun + info.start
                        emit(info.name)
                        self.items += 1
            else:
                emit(name)
                if name == last:
                    self._write_card(self._matrices())
                out.write(name, texts[name], check) if name in texts else out.copy(name, copies[name], check)
                self.items += 1
            begun += size
            self.done = begun
        matrices = self._matrices()
        self._write_card(matrices)
        emit("")
        discard_own_findings(out.path)
        record = self._record(matrices, sum(out.entry(name)["bytes"] for name, _ in spec.output.files))
        out.commit(cast(dict[str, Any], record))

    def _write_elsewhere(self, elsewhere: _Elsewhere, begun: int, emit: Callable[[str], None]) -> None:
        """Let workers write all shards but one that makes the output loadable; journal and name each as it comes."""
        sizes = dict(self.spec.output.files)
        names = [name for name in self.spec.shards if name not in self._finished and name != [*sizes][-1]]
        with contextlib.closing(elsewhere.write(self.job, self.out.path, names, emit)) as results:
            for name, one in results:
                self.job.plan.check_unchanged()
                self.out.take(name, one.partial, one.nbytes, one.sha256, matrices=one.matrices)
                self._finished.add(name)
                self.done = begun + sum(sizes[other] for other in names if other in self._finished)
        remove_partials(self.out.path, {*names})  # of workers that died

    def _matrices(self, last: list[MitigatedMatrix] | None = None) -> list[MitigatedMatrix]:
        """Collect the metrics of all matrices of finished files, and of the one in hand."""
        done = [name for name in self.spec.shards if last is None or name != self.spec.output.files[-1][0]]
        return [m for name in done for m in journalled(self.out.entry(name), self.out.path)] + (last or [])

    def _record(self, matrices: list[MitigatedMatrix], nbytes: int = 0) -> Record:
        record = self.spec.record(certified_count(matrices), totals(matrices, nbytes), matrices)
        record["warnings"] += output_warnings(self.spec, matrices)
        return record

    def _write_card(self, matrices: list[MitigatedMatrix]) -> None:
        """Write the card, just before the commit point; one that an interrupted run has written stays, being the same."""
        card = self.spec.card
        if card is not None and CARD_NAME not in self._finished:
            self.out.write(CARD_NAME, card.text(self._record(matrices)), self.job.plan.check_unchanged)
            self._finished.add(CARD_NAME)

    def _shard(self, name: str) -> Generator[tuple[FilePosition, TensorInfo, AtomicFile], None, None]:
        """Write a shard; give each of its tensors, before it is written, with its position and the file."""
        job, base = self.job, self.job.plan.base
        metrics: list[MitigatedMatrix] = []
        shard, source = shard_source(self.writer, job, name, metrics, self.monitor)

        def announce(nbytes: int, sha256: str) -> None:
            job.plan.check_unchanged()
            if name == self.spec.output.files[-1][0]:
                self._write_card(self._matrices(metrics))
            self.out.announce(name, nbytes, sha256, matrices=metrics)

        number = list(base.files).index(name) if name in base.files else 0
        stands = base.files[name].header.by_name if name in base.files else {}
        start = 0
        with contextlib.closing(shard_steps(self.out.path, shard, source, announce)) as tensors:
            for info, file in tensors:
                if info.name in stands:  # a new one, or one under another name, goes with the one before it
                    start = stands[info.name].start
                yield FilePosition(number, start), info, file


class _Elsewhere:
    """Workers that write shards of outputs, whose plans are those of a batch."""

    def __init__(self, options: Run, batch: Batch) -> None:
        assert options.workers is not None
        self._workers, self._monitor = options.workers, options.monitor
        self._inputs, self._plans = inputs_of(batch, options), batch.plans

    def write(
        self, job: Job, path: Path, names: Sequence[str], begin: Callable[[str], None]
    ) -> Generator[tuple[str, PartialShard], None, None]:
        """Write shards of a job into a directory, and yield each as it is complete."""
        number, described = next(i for i, plan in enumerate(self._plans) if plan is job.plan), describe(job)
        tasks = [ShardTask(self._inputs, 1, described, number, str(path.absolute()), name) for name in names]
        with contextlib.closing(self._workers.run(tasks, self._monitor, lambda i: begin(names[i]))) as results:
            for i, one in results:
                yield names[i], one


def _in_step(runs: Sequence[_Run]) -> None:
    """Let the run that is furthest behind go on, until all are done; the cache keeps what not all have had."""
    if not runs:
        return
    files = list(runs[0].job.plan.base.files.values())
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file.keeping_pages() if len(runs) > 1 else file.read_through())
        waiting: dict[Generator[FilePosition, None, None], FilePosition] = {}
        for run in runs:
            waiting[stack.enter_context(contextlib.closing(run.steps(runs)))] = FilePosition(-1, 0)
        while waiting:
            behind = min(waiting.values())
            for steps in [steps for steps, at in waiting.items() if at == behind]:
                if (position := next(steps, None)) is None:
                    del waiting[steps]
                else:
                    waiting[steps] = position
            if len(runs) > 1 and behind.file_index >= 0:
                file, following = files[behind.file_index], min(waiting.values(), default=None)
                inside = following is not None and following.file_index == behind.file_index
                file.release_pages(following.start if following and inside else file.header.data_bytes)


def _detect(runs: Sequence[_Run], options: Run, resident: int) -> None:
    """Detect into the output directories where findings are needed and none were given; resumable like everything."""
    if not runs:
        return
    for run in runs:
        if not run.out.resumed:
            discard_own_findings(run.out.path)
    jobs, batch = [run.job for run in runs], batch_of([run.writer for run in runs])
    paths = [run.out.path / OWN_FINDINGS for run in runs]
    options, sizes = replace(options, overwrite=False, resume=True), [job.findings_size for job in jobs]
    found = detect_to_files(batch, paths, jobs[0].detection, options, resident, sizes)
    for run, findings in zip(runs, found, strict=True):
        run.job = replace(run.job, findings=GivenFindings(findings))


def discard_own_findings(directory: Path) -> None:
    """Remove the findings that a job made for itself, finished or not."""
    path = directory / OWN_FINDINGS
    path.unlink(missing_ok=True)
    remove_leftovers(path)

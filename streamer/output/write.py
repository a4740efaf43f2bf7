"""Plan and write outputs, one or several in step: each is a resumable transaction, and each tensor of the base is read once.

An output's tensors are in the base's file order. Several outputs are written in step, so that all of them pull a tensor before any pulls
the next, and all but the first find it in the system's cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from streamer.detection.detect import detect_to_files, naming_inputs
from streamer.detection.options import Run
from streamer.errors import FormatError
from streamer.events import Event, Monitor, OutputState, Progress
from streamer.linalg.torch_state import threads
from streamer.output.job import OWN_FINDINGS, Job, Writer
from streamer.output.lora import refusal
from streamer.output.model_writer import ModelWriter
from streamer.output.record import CARD_NAME, MitigatedMatrix, Record, Written, WrittenView
from streamer.plan.plan import AdapterBatch, check_budget, resident_bytes
from streamer.storage import transaction
from streamer.storage.atomic_file import ShardFile, remove_partials
from streamer.storage.checkpoint import read_json_object
from streamer.storage.files import locked
from streamer.storage.header import TensorInfo
from streamer.storage.transaction import remove_leftovers
from streamer.workers import Inputs, SharedValue, Task, Workers, cached_in_process, kept_open


class PartialShard(NamedTuple):
    """A complete, durable shard: the name of its partial file, its size, its SHA-256 (hex), and the metrics of its matrices."""

    partial_name: str
    nbytes: int
    sha256: str
    matrices: list[MitigatedMatrix]


def write_part(
    batch: AdapterBatch,
    monitor: Monitor,
    described: SharedValue[dict[str, Any]],
    number: int,
    path: str,
    name: str,
) -> PartialShard:
    """Write a shard of a merged model in a worker.

    Parameters
    ----------
    described
        The output's `Job` without the plan, whose index is `number`.
    path, name
        The output's directory and the file's name.
    """
    plan, metrics = batch.plans[number], list[MitigatedMatrix]()
    key, make = (
        (described.digest, path),
        lambda: ModelWriter(Job(plan=plan, **described.value), Path(path)),
    )
    writer = cached_in_process("writer", key, make, lambda writer: writer.job.plan is plan)
    shard = writer.shard(name, writer.job)
    with threads(), ShardFile(Path(path), shard, renames=False) as file:
        for info in shard.header.tensors:
            file.add(info, writer.pieces(info, writer.job, metrics, monitor))
    plan.check_unchanged()
    return PartialShard(file.partial.name, file.written, file.sha256, metrics)


def batch_of(writers: Sequence[Writer]) -> AdapterBatch:
    """Return the plans of outputs made from one base."""
    return AdapterBatch(writers[0].job.plan.base, tuple(writer.job.plan for writer in writers))


def resident_of(writers: Sequence[Writer]) -> int:
    """Estimate the memory between any two steps of outputs that are written together."""
    return resident_bytes(batch_of(writers), sum(writer.model_tensors for writer in writers))


def shared_memory(writers: Sequence[Writer], workers: Workers) -> int | None:
    """Divide the allowed memory among this process and its workers; see `Workers.budget`."""
    resident = resident_of(writers)
    needs = (need for writer in writers for need in writer.needs(resident))
    return workers.budget(writers[0].job.detection.max_memory, resident, needs)


def inspect_jobs(writers: Sequence[Writer], options: Run) -> Sequence[str]:
    """Check before writing: return ``new``, ``resume`` or ``done`` for each (see `inspect_output`); refuse outputs that do not fit."""
    states, resident = [], resident_of(writers)
    for writer in writers:
        plan, paths = writer.job.plan, [writer.path / name for name, _ in writer.output.files]
        with naming_inputs(plan, paths, options.overwrite):
            state = transaction.inspect_output(writer.output, options.overwrite, options.resume)
        if state != "done":
            plan.refuse_overwriting(paths)
            check_budget(writer.needs(resident), writer.job.detection.max_memory)
        states.append(state)
    if len(writers) > 1:
        todo = [
            (w.output, state) for w, state in zip(writers, states, strict=True) if state != "done"
        ]
        missing = sum(transaction.missing_bytes(*arguments) for arguments in todo)
        at_most = any(writer.output.temporary for writer in writers)
        transaction.check_space(writers[0].path.parent, missing, at_most=at_most)
    return states


def run_jobs(writers: Sequence[Writer], options: Run) -> list[Written]:
    """Write outputs made from one base, each as one resumable transaction, and return their records.

    A record is the output of `streamer mitigate --json` or `streamer merge --json`; without `output` and `state` it is the output's
    ``streamer.json``. A finished output of the same plan stays unchanged, but its files' times are updated.
    """
    monitor, states = options.monitor, inspect_jobs(writers, options)
    for line in dict.fromkeys(line for writer in writers for line in writer.warnings):
        monitor.emit(Event("warning", line))
    for path, output in (
        (w.path, w.output) for w, state in zip(writers, states, strict=True) if state == "done"
    ):
        monitor.note(f"{path} holds this very output already; nothing to do")
        if any(
            (path / name).exists() for name in (transaction.LOCK_NAME, OWN_FINDINGS)
        ):  # of a run that was killed at its end
            with locked(path / transaction.LOCK_NAME):
                discard_own_findings(path)
        # For `make`: the files, then the commit point, the record and the directory.
        transaction.touch(
            [*(path / name for name, _ in output.files), path / transaction.RECORD_NAME, path],
            monitor,
        )
    todo = [writer for writer, state in zip(writers, states, strict=True) if state != "done"]
    with transaction.open_outputs(
        [writer.output for writer in todo], options.overwrite, options.resume
    ) as outs:
        of = sum(sum(w.items.values()) for w in todo)
        progress = Progress(monitor, "write", sum(w.output.total_bytes for w in todo), of)
        names = [w.job.plan.adapter.path.absolute().name if len(todo) > 1 else "" for w in todo]
        runs = [_Run(*parts, progress, monitor) for parts in zip(todo, outs, names, strict=True)]
        for line in dict.fromkeys(
            line for run in runs for line in (*run.writer.notes, *run.writer.advice)
        ):
            monitor.note(line)
        for run in runs:
            run.look()
        if resumed := [run for run in runs if run.out.resumed]:
            monitor.resuming(
                progress.items, sum(sum(run.writer.items.values()) for run in resumed), "tensor"
            )
        # Deltas remain to be mitigated, but their findings are missing.
        if unjudged := [
            run for run in runs if run.job.detects and any(map(run.is_missing, run.writer.shards))
        ]:
            # Into the output directories: resumable like everything else.
            for run in unjudged:
                if not run.out.resumed:
                    discard_own_findings(run.out.path)
            batch, paths = (
                batch_of([run.writer for run in unjudged]),
                [run.out.path / OWN_FINDINGS for run in unjudged],
            )
            resuming, detection = (
                replace(options, overwrite=False, resume=True),
                unjudged[0].job.detection,
            )
            detected = detect_to_files(batch, paths, detection, resuming, resident_of(writers))
            for run, findings in zip(unjudged, detected, strict=True):
                run.job = replace(run.job, findings=findings)
        inputs = (
            Inputs.of(batch_of(todo), options) if todo and options.workers is not None else None
        )
        with threads(), kept_open(options.workers):
            for number, run in enumerate(runs):
                run.write_small({**dict(run.writer.copies), **run.writer.texts})
                if options.workers is not None and inputs is not None:
                    run.write_elsewhere(options.workers, inputs, number)
            _write_shards(runs)
            for run in runs:
                run.finish()
    said: dict[str, OutputState] = {"new": "written", "resume": "resumed", "done": "present"}
    records = list[Written]()
    for writer, state in zip(writers, states, strict=True):
        path = writer.path / transaction.RECORD_NAME
        record = WrittenView(read_json_object(path), output=str(writer.path), state=said[state])
        whose = f" (adapter {writer.path.name!r})" if len(writers) > 1 else ""
        try:
            monitor.warn([f"{line}{whose}" for line in _warnings(writer, record["matrices"])])
        except (KeyError, TypeError) as e:  # an older output whose record was changed
            fault = "its matrices are not as it was written; pass --overwrite to make it again"
            raise FormatError(f"{path}: {fault}") from e
        records.append(cast(Written, record))
    return records


OpenShard = tuple[ShardFile, Callable[[TensorInfo], None]]
"""A shard's file, and what adds its next tensor."""


class _Run:
    """One output that is being written; `adapter` names it in events, and `progress` counts all outputs of the run.

    Attributes
    ----------
    job
        The writer's job, with the findings once they are made.
    """

    def __init__(
        self,
        writer: Writer,
        out: transaction.OutputDirectory,
        adapter: str,
        progress: Progress,
        monitor: Monitor,
    ) -> None:
        self.writer, self.job, self.out, self.monitor = writer, writer.job, out, monitor
        self._progress, self._adapter, self._finished = progress, adapter, set[str]()
        self._sizes = dict(self.writer.output.files)
        self._last = [*self._sizes][-1]

    def look(self) -> None:
        """Find the files that an interrupted run has finished."""
        for name in self._sizes:
            if self.is_missing(name) and self.out.finished(name) is not None:
                self._finish(name)

    def is_missing(self, name: str) -> bool:
        """Test whether a file must be written, unless asked to stop."""
        self.monitor.checkpoint()
        return name not in self._finished

    def _begin(self, name: str) -> None:
        self._progress.begin(name, self._adapter)

    def _finish(self, name: str) -> None:
        self._finished.add(name)
        self._progress.add(self._sizes[name], self.writer.items[name])

    def write_small(self, files: Mapping[str, Path | bytes]) -> None:
        """Write files other than shards, as copies or with the given contents."""
        for name in filter(self.is_missing, files):
            self._begin(name)
            if name == self._last:
                self._write_card(self._matrices())
            self._write(name, files[name])

    def _write(self, name: str, data: Path | bytes) -> None:
        with self.out.file(
            name, len(data) if isinstance(data, bytes) else self._sizes[name]
        ) as file:
            file.write(data) if isinstance(data, bytes) else file.copy(data)
            file.complete()
            self.job.plan.check_unchanged()
        self._finish(name)

    def write_elsewhere(self, workers: Workers, inputs: Inputs, number: int) -> None:
        """Let workers write all shards except one that makes the output loadable; journal and rename each as it arrives.

        Parameters
        ----------
        number
            Index of the plan in the batch that `inputs` describe.
        """
        names = [
            name for name in self.writer.shards if name not in self._finished and name != self._last
        ]
        if not names:
            return
        described = SharedValue(
            {f.name: getattr(self.job, f.name) for f in fields(Job) if f.name != "plan"}
        )
        step = partial(
            write_part, described=described, number=number, path=str(self.out.path.absolute())
        )
        tasks = {name: Task(inputs, 1, name, partial(step, name=name)) for name in names}
        with contextlib.closing(workers.run(tasks, self.monitor, self._begin)) as results:
            for name, part in results:
                self.job.plan.check_unchanged()
                self.out.take(
                    name, part.partial_name, part.nbytes, part.sha256, matrices=part.matrices
                )
                self._finish(name)
        for shard in (self.out.path / name for name in names):
            remove_partials(shard.parent, {shard.name})  # of workers that died

    @contextlib.contextmanager
    def shard(self, name: str) -> Iterator[OpenShard]:
        """Open a shard's file; at the end it is completed, journalled and renamed."""
        shard, metrics = self.writer.shard(name, self.job), list[MitigatedMatrix]()

        def add(info: TensorInfo) -> None:
            self._begin(info.name)
            file.add(info, self.writer.pieces(info, self.job, metrics, self.monitor))
            self._progress.add(info.nbytes)

        with ShardFile(self.out.path, shard) as file:
            yield file, add
            file.complete()
            self.job.plan.check_unchanged()
            self._progress.add(shard.nbytes - shard.header.data_bytes, 0)
            if name == self._last:
                self._write_card(self._matrices(metrics))
            self.out.announce(name, file.written, file.sha256, matrices=metrics)
        self._finished.add(name)

    def finish(self) -> None:
        """Write the last files, with the commit point at the end, and the record."""
        self.write_small(self.writer.finals)
        matrices = self._matrices()
        self._write_card(matrices)
        self._begin("")
        discard_own_findings(self.out.path)
        record = self._record(
            matrices, sum(self.out.entry(name)["bytes"] for name, _ in self.writer.output.files)
        )
        self.out.commit(cast(dict[str, Any], record))

    def _matrices(self, last: list[MitigatedMatrix] | None = None) -> list[MitigatedMatrix]:
        """Collect the metrics of all matrices in finished files and in the current one."""
        done = [name for name in self.writer.shards if last is None or name != self._last]
        return [m for name in done for m in self.out.entry(name).get("matrices", [])] + (last or [])

    def _record(self, matrices: list[MitigatedMatrix], nbytes: int = 0) -> Record:
        record = self.writer.record(matrices, nbytes)
        record["warnings"] += _warnings(self.writer, matrices)
        return record

    def _write_card(self, matrices: list[MitigatedMatrix]) -> None:
        """Write the card just before the commit point; a card that an interrupted run has written is the same and stays."""
        card = self.writer.card
        if card is not None and CARD_NAME not in self._finished:
            self._write(CARD_NAME, card.text(self._record(matrices)))


def _write_shards(runs: Sequence[_Run]) -> None:
    """Write all shards; those made from one file of the base are written in step, and its cache keeps pages that some still need.

    All outputs pull a tensor before any pulls the next; a new tensor, or one under another name, follows the previous one.
    """
    files, several = runs[0].job.plan.base.files if runs else {}, len(runs) > 1
    with contextlib.ExitStack() as stack:
        for base in files.values():
            stack.enter_context(base.read_through(by_several=several))
        for name in dict.fromkeys([*files, *(name for run in runs for name in run.writer.shards)]):
            group = [run for run in runs if name in run.writer.shards and run.is_missing(name)]
            # Shards that are not made from one file of the base start with its first file.
            base = files.get(name, next(iter(files.values())))
            # Of each tensor to write: where the base's tensor starts, its place in its shard, and the shard's number.
            steps = list[tuple[int, int, int]]()
            starts = (
                {info.name: info.start for info in base.header.tensors} if name in files else {}
            )
            with contextlib.ExitStack() as opened:
                # The context entered last is left first, and the first run must finish first.
                shards = [opened.enter_context(run.shard(name)) for run in reversed(group)][::-1]
                for number, (file, _) in enumerate(shards):
                    start = 0
                    for place, info in enumerate(file.plan.header.tensors):
                        start = starts.get(info.name, start)
                        steps.append((start, place, number))
                for start, place, number in sorted(steps):
                    file, add = shards[number]
                    if several:
                        base.release_pages(start)
                    add(file.plan.header.tensors[place])
                    if several:
                        file.flush()  # so that it holds no pieces while the others continue
                if several and group:
                    base.release_pages(base.header.data_bytes)


MOST_LOST = 0.01
"""Largest share of a mitigated delta's Frobenius norm that may be lost without a warning."""


def truncation_warnings(
    matrices: Sequence[MitigatedMatrix], remedy: Callable[[], str]
) -> list[str]:
    """Report how many matrices lose more than `MOST_LOST`, and which loses most; return an empty list if none does.

    Parameters
    ----------
    remedy
        Describes what to do instead.
    """
    lost = [m for m in matrices if m["dropped"] > MOST_LOST]
    if not lost:
        return []
    worst = max(lost, key=lambda m: m["dropped"])
    return [
        f"lost in projection: more than {100 * MOST_LOST:g} % of the delta in {len(lost)} of "
        f"{len(matrices)} matrices, most in {worst['tensor']!r} ({100 * worst['dropped']:.2f} %); {remedy()}"
    ]


def _warnings(writer: Writer, matrices: Sequence[MitigatedMatrix]) -> list[str]:
    """Warn about losses of an output on disk.

    The paper's method adds a direction for each intruder that it scales, so a delta of rank r with q intruders needs a rank of r + q.
    The method ``project`` stays within the adapter's own columns.
    """
    job = writer.job
    if isinstance(
        writer.to_lora, float
    ):  # the requested share of the energy states what may be lost
        return []

    def remedy() -> str:
        if not all(t.module.low_rank for t in job.plan.targets):
            return "a larger --to-lora loses less, and `streamer merge` nothing"
        paper = not job.method.keeps_rank
        q = {m["tensor"]: len(m["intruders"]) if paper else 0 for m in matrices}
        rank = max(t.module.rank + q.get(t.tensor, 0) for t in job.plan.targets)
        ways = ["`--method project`"] if paper and writer.to_lora is None else []
        if not refusal(job):
            ways.append(f"`--to-lora {rank}`")
        return f"{', '.join(ways)} or `streamer merge` loses nothing".removeprefix(" or ")

    return truncation_warnings(matrices, remedy)


def discard_own_findings(directory: Path) -> None:
    """Remove the findings that a job made for itself, finished or not."""
    path = directory / OWN_FINDINGS
    path.unlink(missing_ok=True)
    remove_leftovers(path)

"""Plan and write outputs, one or several in step: each is a resumable transaction, and each tensor of the base is read once.

An output's tensors are in the base's file order. Several outputs are written in step, so that all of them pull a tensor before any pulls
the next, and all but the first find it in the system's cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from streamer.detection.detect import detect_to_files, naming_inputs
from streamer.errors import FormatError
from streamer.events import Event, Monitor, OutputState, Progress
from streamer.linalg.torch_state import threads
from streamer.output.factors import adapter_layout
from streamer.output.form import Form
from streamer.output.layout import OWN_FINDINGS, Command, Output
from streamer.output.lora import lora_layout, refusal
from streamer.output.merged import merged_layout
from streamer.output.mitigation import Mitigation
from streamer.output.record import CARD_NAME, MitigatedMatrix, Record, Written, WrittenView
from streamer.plan.plan import AdapterBatch, check_budget, resident_bytes
from streamer.run import Run
from streamer.storage import transaction
from streamer.storage.atomic_file import Piece, ShardFile, remove_partials
from streamer.storage.checkpoint import TensorFile, read_json_object
from streamer.storage.files import locked
from streamer.storage.header import TensorInfo
from streamer.storage.transaction import remove_leftovers
from streamer.workers import SharedValue, Task, TaskInputs, Workers, cached_in_process, kept_open


def plan_output(command: Command, mitigation: Mitigation, form: Form, path: Path) -> Output:
    """Lay out a merged model, an adapter of the original's kind, or a LoRA adapter."""
    if command == "merge":
        layout = merged_layout(mitigation, form)
    elif form.to_lora is not None:
        layout = lora_layout(mitigation, form)
    else:
        layout = adapter_layout(mitigation, form)
    return Output(path, layout, form, mitigation)


def add_tensor(
    file: ShardFile, info: TensorInfo, output: Output, monitor: Monitor
) -> list[MitigatedMatrix]:
    """Make and write the next tensor of a shard, unless a stop is requested, and return the metrics of the matrices mitigated for it."""
    metrics: list[MitigatedMatrix] = []
    making = output.layout.recipes[info.name].make(output.mitigation)

    def pieces() -> Iterator[Piece]:
        while True:
            try:
                piece = next(making)
            except StopIteration as end:
                metrics.extend(end.value)
                return
            monitor.checkpoint()
            yield piece

    file.add(info, pieces())
    return metrics


class PartialShard(NamedTuple):
    """A complete, durable shard: the name of its partial file, its size, its SHA-256 (hex), and the metrics of its matrices."""

    partial_name: str
    nbytes: int
    sha256: str
    matrices: list[MitigatedMatrix]


@dataclass(frozen=True)
class Described:
    """What workers need to know about an output besides its plan: the command, the other fields of its `Mitigation`, and its form."""

    command: Command
    mitigation: Mapping[str, Any]
    form: Form

    @classmethod
    def of(cls, output: Output) -> Described:
        """Describe an output."""
        mitigation = output.mitigation
        names = [f.name for f in fields(mitigation) if f.name != "plan"]
        values = {name: getattr(mitigation, name) for name in names}
        return cls(output.layout.command, values, output.form)


def write_part(
    batch: AdapterBatch,
    monitor: Monitor,
    described: SharedValue[Described],
    number: int,
    path: str,
    name: str,
) -> PartialShard:
    """Write a shard in a worker.

    Parameters
    ----------
    described
        The output, the index of whose plan is `number`.
    path, name
        The output's directory and the file's name.
    """
    plan = batch.plans[number]

    def make() -> Output:
        value = described.value
        mitigation = Mitigation(plan=plan, **value.mitigation)
        return plan_output(value.command, mitigation, value.form, Path(path))

    key = described.digest, path
    output = cached_in_process("output", key, make, lambda output: output.plan is plan)
    shard = output.shard(name)
    metrics: list[MitigatedMatrix] = []
    with threads(), ShardFile(Path(path), shard, renames=False) as file:
        for info in shard.header.tensors:
            metrics += add_tensor(file, info, output, monitor)
    plan.check_unchanged()
    return PartialShard(file.partial.name, file.written, file.sha256, metrics)


def batch_of(outputs: Sequence[Output]) -> AdapterBatch:
    """Return the plans of outputs made from one base."""
    return AdapterBatch(outputs[0].plan.base, tuple(output.plan for output in outputs))


def resident_of(outputs: Sequence[Output]) -> int:
    """Estimate the memory between any two steps of outputs that are written together."""
    tensors = sum(output.layout.model_tensors for output in outputs)
    return resident_bytes(batch_of(outputs), tensors)


def shared_memory(outputs: Sequence[Output], workers: Workers) -> int | None:
    """Divide the allowed memory among this process and its workers; see `Workers.budget`."""
    resident = resident_of(outputs)
    needs = (need for output in outputs for need in output.needs(resident))
    return workers.budget(outputs[0].mitigation.detection.max_memory, resident, needs)


def inspect_outputs(outputs: Sequence[Output], options: Run) -> Sequence[str]:
    """Check before writing: return ``new``, ``resume`` or ``done`` for each (see `inspect_output`); refuse outputs that do not fit."""
    states = []
    resident = resident_of(outputs)
    for output in outputs:
        paths = [output.path / name for name, _ in output.on_disk.files]
        with naming_inputs(output.plan, paths, options.overwrite):
            state = transaction.inspect_output(output.on_disk, options.overwrite, options.resume)
        if state != "done":
            output.plan.refuse_overwriting(paths)
            check_budget(output.needs(resident), output.mitigation.detection.max_memory)
        states.append(state)
    if len(outputs) > 1:
        todo = [(o, state) for o, state in zip(outputs, states, strict=True) if state != "done"]
        missing = sum(transaction.missing_bytes(output.on_disk, state) for output, state in todo)
        at_most = any(output.on_disk.temporary for output in outputs)
        transaction.check_space(outputs[0].path.parent, missing, at_most=at_most)
    return states


def write_outputs(outputs: Sequence[Output], options: Run) -> list[Written]:
    """Write outputs made from one base, each as one resumable transaction, and return their records.

    A record is the output of `streamer mitigate --json` or `streamer merge --json`; without `output` and `state` it is the output's
    ``streamer.json``. A finished output of the same plan stays unchanged, but its files' times are updated.
    """
    monitor = options.monitor
    states = inspect_outputs(outputs, options)
    for line in dict.fromkeys(line for output in outputs for line in output.layout.warnings):
        monitor.emit(Event("warning", line))
    todo = []
    for output, state in zip(outputs, states, strict=True):
        if state == "done":
            _renew(output, monitor)
        else:
            todo.append(output)
    if todo:
        _write(todo, resident_of(outputs), options)
    several = len(outputs) > 1
    return [_written(*pair, several, monitor) for pair in zip(outputs, states, strict=True)]


def _renew(output: Output, monitor: Monitor) -> None:
    """Update the times of a finished output, and remove what a run that was killed at its end has left."""
    path = output.path
    monitor.note(f"{path} holds this very output already; nothing to do")
    if any((path / name).exists() for name in (transaction.LOCK_NAME, OWN_FINDINGS)):
        with locked(path / transaction.LOCK_NAME):
            discard_own_findings(path)
    # For `make`: the files, then the commit point, the record and the directory.
    files = [path / name for name, _ in output.on_disk.files]
    transaction.touch([*files, path / transaction.RECORD_NAME, path], monitor)


def _write(outputs: Sequence[Output], resident: int, options: Run) -> None:
    """Write unfinished outputs: detect what is missing, then write their files, with `resident` bytes in memory between two steps."""
    monitor = options.monitor
    plans = [output.on_disk for output in outputs]
    with transaction.open_outputs(plans, options.overwrite, options.resume) as outs:
        items = sum(sum(output.items.values()) for output in outputs)
        nbytes = sum(plan.total_bytes for plan in plans)
        progress = Progress(monitor, "write", nbytes, items)
        several = len(outputs) > 1
        names = [o.plan.adapter.path.absolute().name if several else "" for o in outputs]
        runs = [_Run(*parts, progress, monitor) for parts in zip(outputs, outs, names, strict=True)]
        layouts = [output.layout for output in outputs]
        for line in dict.fromkeys(line for made in layouts for line in (*made.notes, *made.advice)):
            monitor.note(line)
        for run in runs:
            run.look()
        if resumed := [run for run in runs if run.out.resumed]:
            of = sum(sum(run.output.items.values()) for run in resumed)
            monitor.resuming(progress.items, of, "tensor")
        _detect_missing(runs, resident, options)
        inputs = None if options.workers is None else options.task_inputs(batch_of(outputs))
        with threads(), kept_open(options.workers):
            for number, run in enumerate(runs):
                run.write_small({**run.output.copies, **run.output.layout.texts})
                if options.workers is not None and inputs is not None:
                    run.write_elsewhere(options.workers, inputs, number)
            _write_shards(runs)
            for run in runs:
                run.finish()


def _detect_missing(runs: Sequence[_Run], resident: int, options: Run) -> None:
    """Make the findings of outputs that lack them and still have deltas to mitigate; into their directories, resumable like all else."""
    unjudged = [
        run
        for run in runs
        if run.output.mitigation.detects and any(map(run.is_missing, run.output.layout.shards))
    ]
    if not unjudged:
        return
    for run in unjudged:
        if not run.out.resumed:
            discard_own_findings(run.out.path)
    batch = batch_of([run.output for run in unjudged])
    paths = [run.out.path / OWN_FINDINGS for run in unjudged]
    resuming = replace(options, overwrite=False, resume=True)
    detection = unjudged[0].output.mitigation.detection
    detected = detect_to_files(batch, paths, detection, resuming, resident)
    for run, findings in zip(unjudged, detected, strict=True):
        run.output = run.output.judged_by(findings)


SAID: dict[str, OutputState] = {"new": "written", "resume": "resumed", "done": "present"}


def _written(output: Output, state: str, several: bool, monitor: Monitor) -> Written:
    """Read the record of a finished output, and warn about its losses."""
    path = output.path / transaction.RECORD_NAME
    record = WrittenView(read_json_object(path), output=str(output.path), state=SAID[state])
    whose = f" (adapter {output.path.name!r})" if several else ""
    try:
        monitor.warn([f"{line}{whose}" for line in _warnings(output, record["matrices"])])
    except (KeyError, TypeError) as e:  # an older output whose record was changed
        fault = "its matrices are not as it was written; pass --overwrite to make it again"
        raise FormatError(f"{path}: {fault}") from e
    return cast(Written, record)


OpenShard = tuple[ShardFile, Callable[[TensorInfo], None]]
"""A shard's file, and what adds its next tensor."""


class _Run:
    """One output that is being written; `adapter` names it in events, and `progress` counts all outputs of the run."""

    def __init__(
        self,
        output: Output,
        out: transaction.OutputDirectory,
        adapter: str,
        progress: Progress,
        monitor: Monitor,
    ) -> None:
        self.output = output
        self.out = out
        self.monitor = monitor
        self._progress = progress
        self._adapter = adapter
        self._finished: set[str] = set()
        self._sizes = dict(output.on_disk.files)
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
        self._progress.add(self._sizes[name], self.output.items[name])

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
            self.output.plan.check_unchanged()
        self._finish(name)

    def write_elsewhere(self, workers: Workers, inputs: TaskInputs, number: int) -> None:
        """Let workers write all shards except one that makes the output loadable; journal and rename each as it arrives.

        Parameters
        ----------
        number
            Index of the plan in the batch that `inputs` describe.
        """
        names = [
            name
            for name in self.output.layout.shards
            if name not in self._finished and name != self._last
        ]
        if not names:
            return
        step = partial(
            write_part,
            described=SharedValue(Described.of(self.output)),
            number=number,
            path=str(self.out.path.absolute()),
        )
        tasks = {name: Task(inputs, 1, name, partial(step, name=name)) for name in names}
        with contextlib.closing(workers.run(tasks, self.monitor, self._begin)) as results:
            for name, part in results:
                self.output.plan.check_unchanged()
                self.out.take(
                    name, part.partial_name, part.nbytes, part.sha256, matrices=part.matrices
                )
                self._finish(name)
        for shard in (self.out.path / name for name in names):
            remove_partials(shard.parent, {shard.name})  # of workers that died

    @contextlib.contextmanager
    def shard(self, name: str) -> Iterator[OpenShard]:
        """Open a shard's file; at the end it is completed, journalled and renamed."""
        shard = self.output.shard(name)
        metrics: list[MitigatedMatrix] = []

        def add(info: TensorInfo) -> None:
            self._begin(info.name)
            metrics.extend(add_tensor(file, info, self.output, self.monitor))
            self._progress.add(info.nbytes)

        with ShardFile(self.out.path, shard) as file:
            yield file, add
            file.complete()
            self.output.plan.check_unchanged()
            self._progress.add(shard.nbytes - shard.header.data_bytes, 0)
            if name == self._last:
                self._write_card(self._matrices(metrics))
            self.out.announce(name, file.written, file.sha256, matrices=metrics)
        self._finished.add(name)

    def finish(self) -> None:
        """Write the last files, with the commit point at the end, and the record."""
        self.write_small(self.output.layout.finals)
        matrices = self._matrices()
        self._write_card(matrices)
        self._begin("")
        discard_own_findings(self.out.path)
        record = self._record(
            matrices, sum(self.out.entry(name)["bytes"] for name, _ in self.output.on_disk.files)
        )
        self.out.commit(cast(dict[str, Any], record))

    def _matrices(self, last: list[MitigatedMatrix] | None = None) -> list[MitigatedMatrix]:
        """Collect the metrics of all matrices in finished files and in the current one."""
        done = [name for name in self.output.layout.shards if last is None or name != self._last]
        return [m for name in done for m in self.out.entry(name).get("matrices", [])] + (last or [])

    def _record(self, matrices: list[MitigatedMatrix], nbytes: int = 0) -> Record:
        record = self.output.record(matrices, nbytes)
        record["warnings"] += _warnings(self.output, matrices)
        return record

    def _write_card(self, matrices: list[MitigatedMatrix]) -> None:
        """Write the card just before the commit point; a card that an interrupted run has written is the same and stays."""
        card = self.output.card
        if card is not None and CARD_NAME not in self._finished:
            self._write(CARD_NAME, card.text(self._record(matrices)))


def _write_shards(runs: Sequence[_Run]) -> None:
    """Write all shards; those made from one file of the base are written in step, and its cache keeps pages that some still need."""
    files = runs[0].output.plan.base.files
    several = len(runs) > 1
    with contextlib.ExitStack() as stack:
        for base in files.values():
            stack.enter_context(base.read_through(by_several=several))
        for name in dict.fromkeys([*files, *(n for run in runs for n in run.output.layout.shards)]):
            group = [
                run for run in runs if name in run.output.layout.shards and run.is_missing(name)
            ]
            # Shards that are not made from one file of the base start with its first file.
            base = files.get(name, next(iter(files.values())))
            infos = base.header.tensors if name in files else ()
            starts = {info.name: info.start for info in infos}
            _write_in_step(group, name, base, starts, several)


def _write_in_step(
    runs: Sequence[_Run], name: str, base: TensorFile, starts: Mapping[str, int], several: bool
) -> None:
    """Write the shards of one name: all outputs pull a tensor of the base before any pulls the next.

    Parameters
    ----------
    starts
        Where the base's tensors start in the file from which the shards are made, if it is one.
    several
        Whether the run writes several outputs.
    """
    with contextlib.ExitStack() as opened:
        # The context entered last is left first, and the first run must finish first.
        shards = [opened.enter_context(run.shard(name)) for run in reversed(runs)][::-1]
        for start, place, number in _steps([file for file, _ in shards], starts):
            file, add = shards[number]
            if several:
                base.release_pages(start)
            add(file.plan.header.tensors[place])
            if several:
                file.flush()  # so that it holds no pieces while the others continue
        if several and runs:
            base.release_pages(base.header.data_bytes)


def _steps(shards: Sequence[ShardFile], starts: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """Order the tensors of shards: where the base's tensor starts, the place in its shard, and the shard's number.

    A new tensor, or one under another name, follows the previous one.
    """
    steps = []
    for number, file in enumerate(shards):
        start = 0
        for place, info in enumerate(file.plan.header.tensors):
            start = starts.get(info.name, start)
            steps.append((start, place, number))
    return sorted(steps)


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


def _warnings(output: Output, matrices: Sequence[MitigatedMatrix]) -> list[str]:
    """Warn about losses of an output on disk.

    The paper's method adds a direction for each intruder that it scales, so a delta of rank r with q intruders needs a rank of r + q.
    The method ``project`` stays within the adapter's own columns.
    """
    plan = output.plan
    if isinstance(output.form.to_lora, float):  # the requested share states what may be lost
        return []

    def remedy() -> str:
        if not all(t.module.low_rank for t in plan.targets):
            return "a larger --to-lora loses less, and `streamer merge` nothing"
        paper = not output.mitigation.method.keeps_rank
        q = {m["tensor"]: len(m["intruders"]) if paper else 0 for m in matrices}
        rank = max(t.module.rank + q.get(t.tensor, 0) for t in plan.targets)
        ways = ["`--method project`"] if paper and output.form.to_lora is None else []
        if not refusal(plan):
            ways.append(f"`--to-lora {rank}`")
        return f"{', '.join(ways)} or `streamer merge` loses nothing".removeprefix(" or ")

    return truncation_warnings(matrices, remedy)


def discard_own_findings(directory: Path) -> None:
    """Remove the findings that a run made for itself, finished or not."""
    path = directory / OWN_FINDINGS
    path.unlink(missing_ok=True)
    remove_leftovers(path)

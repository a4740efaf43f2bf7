"""Write outputs, one or several in step: each is a resumable transaction, and each tensor of the base is read once.

An output's tensors are in the base's file order. Several outputs are zipped by position (`in_step`), so that all of them pull a tensor
before any pulls the next, and all but the first find it in the system's cache.

Open and check all inputs of outputs, and plan the outputs; nothing is written.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

from streamer.adapters.finetuned import One, Several
from streamer.detection.detect import detect_to_files, naming_inputs
from streamer.detection.findings import Findings, lacking, load_findings, matched_findings
from streamer.detection.matrices import detection_estimates, inputs_of
from streamer.detection.options import DetectionOptions, Run
from streamer.errors import FormatError, MismatchError, OutputError, UsageError
from streamer.events import Event, Monitor, OutputState
from streamer.json_types import check
from streamer.linalg.torch_state import threads
from streamer.methods import Method, NullSpace, RegMean
from streamer.methods.files import FactorSet, InputMap
from streamer.output.adapter_writer import AdapterWriter, LoraWriter, refusal
from streamer.output.job import Job, MitigatedMatrix, Record, Written, truncation_warnings
from streamer.output.model_writer import ModelWriter
from streamer.output.output_spec import CARD_NAME, OWN_FINDINGS, OutputSpec, Writer, WrittenView
from streamer.plan.plan import AdapterBatch, Plan, check_budget, make_batch, resident_bytes
from streamer.storage.atomic_file import Piece, ShardFile, remove_partials, write_shard
from streamer.storage.checkpoint import read_json_object
from streamer.storage.files import difference, locked, touch
from streamer.storage.header import TensorInfo
from streamer.storage.journal import remove_leftovers
from streamer.storage.tensor_file import TensorFile
from streamer.storage.transaction import (
    LOCK_NAME,
    RECORD_NAME,
    OutputDirectory,
    check_space,
    inspect_output,
    missing_bytes,
    open_outputs,
)
from streamer.units import counted, listed
from streamer.workers import Carried, Inputs, Task, Workers, keep_last, kept


class MadeShard:
    """Tensors of an output's file, in file order; the pieces of each are made as they are pulled.

    Attributes
    ----------
    plan
        The file's plan, with complete metadata.
    metrics
        Metrics of each matrix mitigated so far.
    """

    def __init__(self, writer: Writer, job: Job, name: str, monitor: Monitor) -> None:
        ((key, value),) = job.stamp(writer.spec.command, writer.written).items()
        self.plan = writer.spec.shards[name].with_metadata(key, value)
        self.metrics: list[MitigatedMatrix] = []
        self._writer, self._job, self._monitor = writer, job, monitor

    def __iter__(self) -> Iterator[tuple[TensorInfo, Iterator[Piece]]]:
        return ((info, self._pieces(info)) for info in self.plan.header.tensors)

    def _pieces(self, info: TensorInfo) -> Iterator[Piece]:
        for piece in self._writer.tensor_bytes(info, self._job, self.metrics):
            self._monitor.checkpoint()
            yield piece


def in_step(shards: list[MadeShard], starts: dict[str, int]) -> Iterator[tuple[int, int, TensorInfo, Iterator[Piece]]]:
    """Zip shards by position, so that all pull a tensor before any pulls the next.

    Parameters
    ----------
    starts
        Positions in a file of the base: each tensor's first byte.

    Returns
    -------
    For each tensor
        The position, the index of the shard, the tensor, and its pieces.
    """
    order: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        start = 0
        for nth, info in enumerate(shard.plan.header.tensors):
            start = starts.get(info.name, start)  # a new tensor, or one under another name, follows the previous one
            order.append((start, nth, number))
    tensors = [*map(iter, shards)]
    return ((start, number, *next(tensors[number])) for start, _, number in sorted(order))


PartialShard = tuple[str, int, str, list[MitigatedMatrix]]
"""A complete, durable shard: the name of its partial file, its bytes, its SHA-256 (hex), and the metrics of its matrices."""


_writers: dict[tuple[str, int], ModelWriter] = {}


@dataclass(frozen=True)
class ShardTask(Task[PartialShard]):
    """A shard of a merged model.

    Attributes
    ----------
    described
        The output's `Job` without the plan.
    number
        The plan's index.
    path, shard
        The output's directory and the file's name.
    """

    described: Carried[Mapping[str, Any]]
    number: int
    path: str
    shard: str

    @property
    def name(self) -> str:
        """Return the file's name."""
        return self.shard

    def do(self, batch: AdapterBatch, monitor: Monitor) -> PartialShard:
        """Write the shard."""
        key, plan = (self.described.digest, self.number), batch.plans[self.number]
        writer = _writers.get(key)
        if writer is None or writer.spec.job.plan is not plan:
            writer = _writers[key] = ModelWriter(Job(plan=plan, **self.described.value), Path(self.path))
            keep_last(_writers)
        shard = MadeShard(writer, writer.spec.job, self.shard, monitor)
        with threads():
            file = write_shard(Path(self.path), shard.plan, shard, renames=False)
        plan.check_unchanged()
        return file.partial.name, file.written, file.sha256, shard.metrics


def batch_of(writers: Sequence[Writer]) -> AdapterBatch:
    """Return the plans of outputs made from one base."""
    return AdapterBatch(writers[0].spec.job.plan.base, tuple(writer.spec.job.plan for writer in writers))


def resident_of(writers: Sequence[Writer]) -> int:
    """Estimate the memory between any two steps of outputs that are written together."""
    return resident_bytes(batch_of(writers), sum(writer.spec.model_tensors for writer in writers))


def shared_memory(writers: Sequence[Writer], workers: Workers) -> int | None:
    """Divide the allowed memory among this process and its workers; see `Workers.budget`."""
    resident, jobs = resident_of(writers), [writer.spec.job for writer in writers]
    needs = [need for writer in writers for need in writer.estimates(resident)]
    needs += [need for job in jobs if job.detects for need in detection_estimates(job.plan, job.detection, resident)]
    return workers.budget(jobs[0].detection.max_memory, resident, needs)


def inspect_jobs(writers: Sequence[Writer], whole: Run) -> Sequence[str]:
    """Check before writing: return ``new``, ``resume`` or ``done`` for each (see `inspect_output`); refuse outputs that do not fit."""
    states, resident = [], resident_of(writers)
    for writer in writers:
        spec, job = writer.spec, writer.spec.job
        paths = [spec.path / name for name, _ in spec.output.files]
        with naming_inputs(job.plan, paths, whole.overwrite):
            state = inspect_output(spec.output, whole.overwrite, whole.resume)
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


def run_jobs(writers: Sequence[Writer], whole: Run) -> list[Written]:
    """Write outputs made from one base, each as one resumable transaction, and return their records.

    A record is the output of `streamer mitigate --json` or `streamer merge --json`; without `output` and `state` it is the output's
    ``streamer.json``. A finished output of the same plan stays unchanged, but its files' times are updated.
    """
    monitor, states = whole.monitor, inspect_jobs(writers, whole)
    specs = [writer.spec for writer in writers]
    for line in dict.fromkeys(line for spec in specs for line in spec.warnings):
        monitor.emit(Event("warning", line))
    for spec in (spec for spec, state in zip(specs, states, strict=True) if state == "done"):
        monitor.emit(Event("note", f"{spec.path} holds this very output already; nothing to do"))
        lock = spec.path / LOCK_NAME
        if lock.exists():  # of a run that was killed at its end
            with locked(lock):
                pass
        # For `make`: the files, then the commit point, the record and the directory.
        if fault := touch([*(spec.path / name for name, _ in spec.output.files), spec.path / RECORD_NAME, spec.path]):
            monitor.emit(Event("warning", f"{fault}: its time stays; `make` may ask for it again"))
    todo = [writer for writer, state in zip(writers, states, strict=True) if state != "done"]
    with open_outputs([writer.spec.output for writer in todo], whole.overwrite, whole.resume) as outs:
        runs: list[_Run] = []
        runs += [_Run(writer, out, monitor, runs) for writer, out in zip(todo, outs, strict=True)]
        inputs = inputs_of(batch_of(todo), whole) if todo and whole.workers is not None else None
        for line in dict.fromkeys(line for run in runs for line in (*run.spec.notes, *run.spec.advice)):
            monitor.emit(Event("note", line))
        for run in runs:
            run.look()
        if resumed := [run for run in runs if run.out.resumed]:
            done, of = sum(run.items for run in resumed), sum(run.item_count for run in resumed)
            monitor.resuming(done, of, "tensor")
        # Deltas remain to be mitigated, but their findings are missing.
        if unjudged := [run for run in runs if run.job.detects and any(map(run.is_missing, run.spec.shards))]:
            _detect(unjudged, whole, resident_of(writers))
        with threads(), kept(whole.workers):
            for number, run in enumerate(runs):
                run.write_small({**dict(run.spec.copies), **run.spec.texts})
                if whole.workers is not None and inputs is not None:
                    run.write_elsewhere(whole.workers, inputs, number)
            if runs:
                _write_shards(runs)
            for run in runs:
                run.finish()
    said: dict[str, OutputState] = {"new": "written", "resume": "resumed", "done": "present"}
    written = [
        cast(Written, WrittenView(read_json_object(spec.path / RECORD_NAME), output=str(spec.path), state=said[state]))
        for spec, state in zip(specs, states, strict=True)
    ]
    for spec, record in zip(specs, written, strict=True):
        whose = f" (adapter {spec.path.name!r})" if len(specs) > 1 else ""
        try:
            warnings = _warnings(spec, record["matrices"])
        except (KeyError, TypeError) as e:  # an older output whose record was changed
            raise FormatError(
                f"{spec.path / RECORD_NAME}: its matrices are not as it was written; pass --overwrite to make it again"
            ) from e
        monitor.warn(f"{line}{whose}" for line in warnings)
    return written


MATRIX_KEYS = get_type_hints(MitigatedMatrix, include_extras=True)


def journalled(entry: dict[str, Any], path: Path) -> list[MitigatedMatrix]:
    """Return and check the journalled metrics of a finished file's matrices."""
    metrics: list[MitigatedMatrix] = entry.get("matrices", [])
    try:
        for m in metrics:
            check(m, MATRIX_KEYS)
            if not all(
                m[key] < 1e100 for key in ("delta_norm", "delta_norm_after", "dropped")
            ):  # a square may overflow
                raise TypeError
    except (KeyError, TypeError):
        raise OutputError(
            f"{path}: the journal's figures of {entry['file']} are not of this version; --no-resume starts over"
        ) from None
    return metrics


class _Run:
    """One output that is being written.

    Parameters
    ----------
    runs
        All outputs in step, including this one: events count what all have written.
    """

    def __init__(self, writer: Writer, out: OutputDirectory, monitor: Monitor, runs: Sequence[_Run]) -> None:
        self.writer, self.spec, self.out, self.monitor, self._runs = writer, writer.spec, out, monitor, runs
        self.job = writer.spec.job
        """The spec's job, with the findings once they are made."""
        self.done = self.items = 0
        """Bytes written, including the current file; number of shards' tensors and other files written."""
        self._finished: set[str] = set()
        self._sizes, shards = dict(self.spec.output.files), self.spec.shards
        self._items = {name: len(shards[name].header.tensors) if name in shards else 1 for name in self._sizes}
        self.nbytes, self.item_count = sum(self._sizes.values()), sum(self._items.values())
        self._last = [*self._sizes][-1]

    def look(self) -> None:
        """Find the files that an interrupted run has finished."""
        for name in self._sizes:
            if self.is_missing(name) and self.out.finished(name) is not None:
                self._finish(name)

    def _emit(self, name: str) -> None:
        done, total = sum(run.done for run in self._runs), sum(run.nbytes for run in self._runs)
        items, of = sum(run.items for run in self._runs), sum(run.item_count for run in self._runs)
        adapter = self.job.plan.adapter.path.absolute().name if len(self._runs) > 1 else ""
        self.monitor.emit(Event("write", name, done, total, items, of, adapter))

    def is_missing(self, name: str) -> bool:
        """Test whether a file must be written, unless asked to stop."""
        self.monitor.checkpoint()
        return name not in self._finished

    def _finish(self, name: str) -> None:
        self._finished.add(name)
        self.items += self._items[name]
        self.done += self._sizes[name]

    def write_small(self, files: Mapping[str, Path | bytes]) -> None:
        """Write files other than shards, as copies or with the given contents."""
        for name, data in files.items():
            if self.is_missing(name):
                self._emit(name)
                if name == self._last:
                    self._write_card(self._matrices())
                self._write(name, data)

    def _write(self, name: str, data: Path | bytes) -> None:
        with self.out.file(name, len(data) if isinstance(data, bytes) else self._sizes[name]) as file:
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
        names = [name for name in self.spec.shards if name not in self._finished and name != self._last]
        if not names:
            return
        path, options = str(self.out.path.absolute()), {f.name: getattr(self.job, f.name) for f in fields(Job)}
        described: Carried[Mapping[str, Any]] = Carried({k: value for k, value in options.items() if k != "plan"})
        tasks = {name: ShardTask(inputs, 1, described, number, path, name) for name in names}
        with contextlib.closing(workers.run(tasks, self.monitor, self._emit)) as results:
            for name, (partial, nbytes, sha256, matrices) in results:
                self.job.plan.check_unchanged()
                self.out.take(name, partial, nbytes, sha256, matrices=matrices)
                self._finish(name)
        for shard in (self.out.path / name for name in names):
            remove_partials(shard.parent, {shard.name})  # of workers that died

    @contextlib.contextmanager
    def shard(self, name: str) -> Iterator[tuple[MadeShard, ShardFile]]:
        """Open a shard and its file; at the end of the block the file is completed, journalled and renamed."""
        shard, self._start = MadeShard(self.writer, self.job, name, self.monitor), self.done
        with ShardFile(self.out.path, shard.plan) as file:
            yield shard, file
            file.complete()
            self.job.plan.check_unchanged()
            self.done = self._start + self._sizes[name]
            if name == self._last:
                self._write_card(self._matrices(shard.metrics))
            self.out.announce(name, file.written, file.sha256, matrices=shard.metrics)
        self._finished.add(name)

    def begin_tensor(self, tensor: TensorInfo) -> None:
        """Report that a shard's tensor comes next."""
        self.done = self._start + tensor.start
        self._emit(tensor.name)
        self.items += 1

    def finish(self) -> None:
        """Write the last files, with the commit point at the end, and the record."""
        self.write_small(self.spec.finals)
        matrices = self._matrices()
        self._write_card(matrices)
        self._emit("")
        discard_own_findings(self.out.path)
        record = self._record(matrices, sum(self.out.entry(name)["bytes"] for name, _ in self.spec.output.files))
        self.out.commit(cast(dict[str, Any], record))

    def _matrices(self, last: list[MitigatedMatrix] | None = None) -> list[MitigatedMatrix]:
        """Collect the metrics of all matrices in finished files and in the current one."""
        done = [name for name in self.spec.shards if last is None or name != self._last]
        return [m for name in done for m in journalled(self.out.entry(name), self.out.path)] + (last or [])

    def _record(self, matrices: list[MitigatedMatrix], nbytes: int = 0) -> Record:
        record = self.spec.record(matrices, nbytes)
        record["warnings"] += _warnings(self.spec, matrices)
        return record

    def _write_card(self, matrices: list[MitigatedMatrix]) -> None:
        """Write the card just before the commit point; a card that an interrupted run has written is the same and stays."""
        card = self.spec.card
        if card is not None and CARD_NAME not in self._finished:
            self._write(CARD_NAME, card.text(self._record(matrices)))


def _write_shards(runs: Sequence[_Run]) -> None:
    """Write all shards; those made from one file of the base are written in step. The cache keeps pages that some still need."""
    files = runs[0].job.plan.base.files
    with contextlib.ExitStack() as stack:
        for base in files.values():
            stack.enter_context(base.read_through(by_several=len(runs) > 1))
        for name in dict.fromkeys([*files, *(name for run in runs for name in run.spec.shards)]):
            if group := [run for run in runs if name in run.spec.shards and run.is_missing(name)]:
                # Shards that are not made from one file of the base start with its first file.
                _write_in_step(group, name, files, len(runs) > 1)


def _write_in_step(runs: Sequence[_Run], name: str, files: Mapping[str, TensorFile], keeps_pages: bool) -> None:
    base_file = files.get(name, next(iter(files.values())))
    with contextlib.ExitStack() as stack:
        # The context entered last is left first, and the first run must finish first.
        opened = [stack.enter_context(run.shard(name)) for run in reversed(runs)][::-1]
        starts = {info.name: info.start for info in base_file.header.tensors} if name in files else {}
        for start, number, tensor, pieces in in_step([shard for shard, _ in opened], starts):
            if keeps_pages:
                base_file.release_pages(start)
            runs[number].begin_tensor(tensor)
            file = opened[number][1]
            file.add(tensor, pieces)
            if keeps_pages:
                file.flush()  # so that it holds no pieces while the others continue
        if keeps_pages:
            base_file.release_pages(base_file.header.data_bytes)


def _detect(runs: Sequence[_Run], whole: Run, resident: int) -> None:
    """Detect into the output directories, because findings are needed but not given; resumable like everything else."""
    for run in runs:
        if not run.out.resumed:
            discard_own_findings(run.out.path)
    jobs, batch = [run.job for run in runs], batch_of([run.writer for run in runs])
    paths = [run.out.path / OWN_FINDINGS for run in runs]
    own = replace(whole, overwrite=False, resume=True)
    found = detect_to_files(batch, paths, jobs[0].detection, own, resident, [job.findings_size for job in jobs])
    for run, findings in zip(runs, found, strict=True):
        run.job = replace(run.job, findings=findings)


def _warnings(spec: OutputSpec, matrices: Sequence[MitigatedMatrix]) -> list[str]:
    """Warn about losses of an output on disk.

    The paper's method adds a direction for each intruder that it scales, so a delta of rank r with q intruders needs a rank of r + q.
    The method ``project`` stays within the adapter's own columns.
    """
    job = spec.job
    if isinstance(spec.to_lora, float):  # the requested share of the energy states what may be lost
        return []

    def remedy() -> str:
        if not all(t.module.low_rank for t in job.plan.targets):
            return "a larger --to-lora loses less, and `streamer merge` nothing"
        paper = not job.method.keeps_rank
        q = {m["tensor"]: len(m["intruders"]) if paper else 0 for m in matrices}
        rank = max(t.module.rank + q.get(t.tensor, 0) for t in job.plan.targets)
        ways = ["`--method project`"] if paper and spec.to_lora is None else []
        if not refusal(job):
            ways.append(f"`--to-lora {rank}`")
        return f"{', '.join(ways)} or `streamer merge` loses nothing".removeprefix(" or ")

    return truncation_warnings(matrices, remedy)


def discard_own_findings(directory: Path) -> None:
    """Remove the findings that a job made for itself, finished or not."""
    path = directory / OWN_FINDINGS
    path.unlink(missing_ok=True)
    remove_leftovers(path)


FindingsOrPath = Findings | Mapping[str, Findings] | str | Path | None
"""Findings as a user gives them: for one adapter, or for several by name, as objects or as the path of their file or directory."""


@dataclass(frozen=True)
class OutputOptions:
    """Options that determine the form of outputs, models or adapters; the others are keywords in `api`, which explains them."""

    merges: bool
    to_lora: int | float | None = None
    dequantize: bool = False
    model_card: bool = True
    measured: tuple[str, ...] = ()


def prepare_outputs(base_path: str | Path, adapters: One | Several, output: Path, findings: Sequence[Findings | None],
                    method: Method, detection: DetectionOptions, form: OutputOptions, run: Run) -> list[Writer]:  # fmt: skip
    """Plan the output of each adapter, and pass on the warnings of the inputs.

    Parameters
    ----------
    output
        The output of one adapter, or the directory for the outputs of several.
    findings
        See `open_jobs`.
    """
    jobs = open_jobs(base_path, adapters, findings, method, detection, form, run)
    writers: list[Writer] = []
    for job, path in zip(jobs, adapters.directories(output), strict=True):
        if form.merges:
            writers.append(ModelWriter(job, path))
        else:
            writers.append(AdapterWriter(job, path) if form.to_lora is None else LoraWriter(job, path, form.to_lora))
    run.monitor.warn(batch_of(writers).warnings)
    return writers


def open_jobs(base_path: str | Path, adapters: One | Several, findings: Sequence[Findings | None], method: Method,
              detection: DetectionOptions, form: OutputOptions, run: Run) -> list[Job]:  # fmt: skip
    """Open and check all inputs of mitigations.

    Parameters
    ----------
    findings
        Findings for each adapter, see `load_given`; None if the job detects.
    """
    if isinstance(method, RegMean) and isinstance(adapters, Several) and len(adapters.paths) > 1:
        raise UsageError(
            f"{method.coefficients.name}: coefficients belong to one adapter, found {len(adapters.paths)}: "
            f"{listed(adapters.by_name)}; take them one at a time, each with its own"
        )
    batch = make_batch(base_path, adapters.paths, run.io, run.stated, run.architecture)
    fitting = []
    for plan, found in zip(batch.plans, findings, strict=True):
        fitting.append(None if found is None else fitting_findings(plan, found, detection))
        run.monitor.warn(() if found is None else found.warnings)
        if isinstance(method, RegMean):
            check_coefficients(plan, method.coefficients)
        if isinstance(method, NullSpace):
            run.monitor.warn(check_map(plan, method.map))
    return [
        Job(plan, method, detection, run.device, found, form.dequantize, form.model_card, form.measured)
        for plan, found in zip(batch.plans, fitting, strict=True)
    ]


def load_given(findings: FindingsOrPath, adapters: One | Several) -> list[Findings | None]:
    """Load the findings for each adapter; None for each if none are given.

    Raises
    ------
    UsageError
        If some are missing or have the wrong form.
    """
    if findings is None:
        return [None for _ in adapters.paths]
    if isinstance(adapters, One):
        if isinstance(findings, Mapping):
            raise UsageError(
                f"findings: expected findings on one adapter, found a dict of {len(findings)}; give one of them"
            )
        return [findings if isinstance(findings, Findings) else load_findings(findings)]
    if isinstance(findings, Mapping):
        without = [name for name in adapters.by_name if name not in findings]
        if without:
            raise UsageError(f"findings: has none for adapter {without[0]!r}; run detect on it")
        return [findings[name] for name in adapters.by_name]
    if isinstance(findings, Findings) or not Path(findings).is_dir():
        where = "findings" if isinstance(findings, Findings) else findings
        raise UsageError(f"{where}: expected findings on several adapters: the directory that detect wrote for them")
    return [load_findings(Path(findings) / f"{name}.safetensors") for name in adapters.by_name]


def check_coefficients(plan: Plan, coefficients: FactorSet) -> None:
    """Refuse coefficients that were fitted to another base or adapter, or not to all of its matrices.

    Raises
    ------
    MismatchError
        Names the one that differs, and how.
    UsageError
        If they are not valid coefficients; see `FactorSet.check`.
    """
    coefficients.check()
    name, facts = coefficients.name, coefficients.facts
    for what, here in (("base", {**plan.base_identity}), ("adapter", {**plan.adapter_identity})):
        if not isinstance(facts.get(what), dict):
            raise MismatchError(
                f"{name}: coefficients do not say which {what} they were fitted to; fit them to this one"
            )
        if facts[what] != here:
            raise MismatchError(
                f"{name}: coefficients of another {what} ({difference(facts[what], here)}); fit them to this one with `streamer fit`"
            )
    check_counts(plan, coefficients)


def check_counts(plan: Plan, coefficients: FactorSet) -> None:
    """Refuse coefficients for other matrices than an adapter's, or of other shapes.

    Raises
    ------
    MismatchError
        States how many matrices they do not fit, and the first.
    """
    ranks = {t.tensor: (t.module.shape[1], t.module.factor_rank) if t.module.low_rank else None for t in plan.targets}
    shapes = {tensor: tuple(factor.shape) for tensor, factor in coefficients.matrices.items()}
    wrong = [tensor for tensor in {**ranks, **shapes} if tensor not in ranks or ranks[tensor] != shapes.get(tensor, ())]
    if wrong:
        raise MismatchError(
            f"{coefficients.name}: coefficients do not fit {len(wrong)} of the adapter's matrices, {wrong[0]!r} first; fit them to this "
            "adapter with `streamer fit`"
        )


def check_map(plan: Plan, inputs: InputMap) -> list[str]:
    """Refuse a map of another base, and warn of matrices that it lacks, whose deltas stay.

    Raises
    ------
    MismatchError
        If it maps another base, or has none of the adapter's matrices.
    """
    refuse_other_base(inputs, inputs.facts["base"], {**plan.base_identity})
    return lacking_inputs(plan, inputs)


def refuse_other_base(inputs: InputMap, theirs: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a map of another base, by both identities."""
    if theirs != here:
        raise MismatchError(
            f"{inputs.name}: is a map of another base ({difference(theirs, here)}); make one of this base with `streamer map`"
        )


def lacking_inputs(plan: Plan, inputs: InputMap) -> list[str]:
    """Warn of matrices whose inputs a map lacks; refuse the map if it lacks all."""
    lacks = [t.tensor for t in plan.targets if inputs.find(t.tensor, t.module.shape[1]) is None]
    if not lacks:
        return []
    names = listed(map(repr, lacks))
    if len(lacks) == len(plan.targets):
        raise MismatchError(f"{inputs.name}: has the inputs of none of the adapter's matrices, {names}")
    return [f"the map has no inputs of {counted(len(lacks), 'matrix')}, {names}: what the adapter adds there stays"]


def fitting_findings(plan: Plan, findings: Findings, options: DetectionOptions) -> Findings:
    """Check that findings cover the matrices of a plan; findings for a model in memory get the names of the base's files."""
    name = findings.name
    if findings.base.get("in_memory"):
        findings = matched_findings(plan, findings, name)
    findings.check_matches(plan.base_identity, plan.adapter_identity, options)
    shapes = {m.tensor: m.shape for m in findings}
    missing = [t.tensor for t in plan.targets if shapes.get(t.tensor) != t.module.shape]
    if missing:
        raise lacking(name, len(missing), len(plan.targets), repr(missing[0]))
    return findings

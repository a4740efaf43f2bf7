"""Write a findings file through a journal with a record for each matrix, so that a killed run resumes.

Estimate the largest size of findings on disk, and check the free space before the first matrix is read.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from streamer import __version__
from streamer.detection import solvers
from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_file import (
    ARRAYS,
    FindingsHead,
    MatrixFinding,
    check_figures,
    check_findings_name,
    check_findings_path,
    journal_of,
    lock_of,
    matrix_entries,
    plan_findings_file,
    refuse_foreign,
)
from streamer.detection.intruders import Detection
from streamer.detection.options import DetectionOptions, MatrixFigures
from streamer.errors import FormatError, OutputError, OutputExistsError
from streamer.linalg.torch_state import thread_count
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.storage.atomic_file import Buffer, Piece, ShardFile, partials_of, remove_partials
from streamer.storage.files import locked
from streamer.storage.header import Header, TensorInfo, layout, parse_header
from streamer.storage.journal import Journal, may_resume
from streamer.storage.output_checks import allocated_bytes, check_space, is_placeholder
from streamer.weights.base import as_bytes

OFFSETS_BYTES = 16 * 14
"""Upper bound of the additional bytes for a matrix's tensor offsets in a large file, compared with a record."""


class FindingsWriter:
    """Writer of a findings file that is locked, resumable after each matrix, and gets its name only when complete.

    ``with FindingsWriter(path, findings, tensors, stamps) as w: w.add(…)``; leaving the block without an exception writes the
    file and removes the journal; an exception keeps the journal.

    Parameters
    ----------
    path
        The file.
    head
        Inputs and options of the findings.
    tensors
        Names of all base tensors, in file order.
    stamps
        Stamps of the inputs; a journal with other stamps is refused.
    resume
        Whether to continue an interrupted run; False starts over.
    overwrite
        Whether to replace a finished file, and the journal of another run.
    before_rename
        Called before the file gets its name; may raise to prevent that.

    Attributes
    ----------
    threads
        Number of torch's threads for the matrices: the number with which the run began, even if it is resumed elsewhere, because
        the last bits of findings depend on it.
    """

    def __init__(self, path: Path, head: FindingsHead, tensors: Sequence[str], stamps: Mapping[str, Sequence[int]], *,
                 resume: bool, overwrite: bool, before_rename: Callable[[], None]) -> None:  # fmt: skip
        self.path = path
        self._head = head
        self._tensors = tensors
        self._start = journal_head(head, tensors, stamps)
        self._resume, self._overwrite = resume, overwrite
        self._before_rename = before_rename
        self._records: dict[str, int] = {}
        self.resumed = False

    def __enter__(self) -> FindingsWriter:
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(lock_of(self.path), self.path))
            remove_partials(self.path.parent, {self.path.name})
            self._journal = Journal(journal_of(self.path))
            stack.callback(self._journal.close)
            self._take_up()
            self._lock = stack.pop_all()
        return self

    def _take_up(self) -> None:
        begun = self._resume and interrupted_run(self.path, self._start, self._overwrite)
        self.resumed = begun and len(self._journal) > 1  # without any matrix, this run chooses the number of threads
        if not self.resumed:
            self._journal.begin(self._start)
        for i in range(1, len(self._journal)):
            self._records[self._figures(i)["tensor"]] = i
        self.threads = thread_count(json.loads(self._journal[0]).get("threads"))

    def _figures(self, i: int) -> MatrixFigures:
        header = _record_header(self._journal[i])
        with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
            figures: MatrixFigures = json.loads(header.metadata["matrix"])
            check_figures(figures)
            if header.by_name.keys() == {f"{figures['tensor']}/{key}" for key in ARRAYS}:
                return figures
        raise self._journal.foreign(i)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._records

    def add(self, finding: MatrixFinding) -> None:
        """Append one matrix durably to the journal."""
        arrays = finding.arrays()
        _, raw = _layout(finding, arrays)
        self._journal.append(raw + b"".join(as_bytes(t) for t in arrays.values()))
        self._records[finding.tensor] = len(self._journal) - 1

    def _write(self) -> None:
        order = [self._records[tensor] for tensor in self._tensors]
        matrices: list[MatrixFigures] = []
        entries, home = [], {}
        for i in order:
            matrices.append(self._figures(i))
            for info in _record_header(self._journal[i]).tensors:
                entries.append((info.name, info.dtype, info.shape))
                home[info.name] = i
        plan = plan_findings_file(self.path.name, self._head, matrices, entries)

        def source(info: TensorInfo) -> Iterator[Buffer]:
            raw = self._journal[home[info.name]]
            header = _record_header(raw)
            own = header.by_name[info.name]
            yield raw[header.data_start + own.start : header.data_start + own.end]

        with ShardFile(self.path.parent, plan.sealed(source)) as file:
            for info in plan.header.tensors:
                file.add(info, map(Piece, source(info)))
            file.complete()
            self._before_rename()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write()
                self._journal.remove()
        finally:
            self._lock.close()


def _layout(finding: MatrixFinding, arrays: Mapping[str, Tensor]) -> tuple[Header, bytes]:
    """Lay out a matrix's record: its header, and the header's bytes."""
    return layout(matrix_entries(finding.tensor, arrays), {"matrix": json.dumps(finding.figures())})


def most_bytes(head: FindingsHead, widest: Iterable[MatrixFinding]) -> tuple[int, int]:
    """Compute the largest sizes of a findings file and its journal, in bytes.

    Parameters
    ----------
    head
        Inputs and options of the findings.
    widest
        The largest possible finding for each matrix; tensors without values (``meta``) suffice.
    """
    known = [head.base, head.adapter, dict(head.sources), head.options.as_dict()]
    file = journal = 4096 + 2 * len(json.dumps(known))
    for finding in widest:
        record = _layout(finding, finding.arrays())[0].file_bytes
        file += record + OFFSETS_BYTES
        journal += record + 40
    return file, journal


def journal_head(head: FindingsHead, tensors: Sequence[str], stamps: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Make the first record of a journal: the run's identity, and its number of threads, on which the last bits depend."""
    return {
        "plan": head.digest(tensors),
        "version": __version__,
        "stamps": dict(stamps),
        "threads": torch.get_num_threads(),
    }


def interrupted_run(path: Path, start: dict[str, Any], overwrite: bool) -> bool:
    """Test, without writing, whether an interrupted run with this `journal_head` can be resumed here.

    Raises
    ------
    OutputError, InputChangedError
        If another run was interrupted here, or its inputs have changed.
    """
    found = next(Journal.peek(journal_of(path)), {})
    ours = {"plan", "stamps"} <= found.keys()
    return ours and may_resume(path, found, start, overwrite=overwrite, journal=journal_of(path))


def _record_header(raw: bytes) -> Header:
    """Read the header of a record, which is a safetensors file for one matrix."""
    n = 8 + int.from_bytes(raw[:8], "little")
    return parse_header(raw[:n], len(raw), "journal")


def inspect_findings_output(path: Path, digest: str, overwrite: bool, inputs: Sequence[Path] = ()) -> Findings | None:
    """Find the finished findings of exactly this plan, without writing; return None if they do not exist yet.

    Parameters
    ----------
    path
        The findings file; its directory may be missing, and an empty file counts as none.
    digest
        See `FindingsHead.digest`.
    overwrite
        Whether existing findings at the path may be replaced; any other file may not.
    inputs
        Input directories and files that must not contain the output.

    Raises
    ------
    OutputError
        If another file exists at the path, or it cannot be written.
    """
    check_findings_path(path)
    check_findings_name(path)
    for source in inputs:
        if source.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputError(f"{path}: lies inside the input {source}; choose an output outside it")
    if not path.exists() or is_placeholder(path):
        return None
    refuse_foreign(path)
    if overwrite:
        return None
    try:
        findings = load_findings(path)
    except FormatError as e:
        raise OutputExistsError(
            f"{path}: holds findings that cannot be read; choose another output, or pass --overwrite", path
        ) from e
    if findings.made_from() != digest:
        raise OutputExistsError(
            f"{path}: holds findings of other inputs or options; choose another output, or pass --overwrite", path
        )
    return findings


FindingsSize = tuple[int, int]
"""Bytes of a findings file and of the journal beside it."""


def check_findings_space(paths: Sequence[Path], sizes: Sequence[FindingsSize]) -> None:
    """Refuse findings that might not fit on the disk together with their journals.

    Raises
    ------
    StorageError
        If they might not fit.
    """
    needed = 0
    for path, size in zip(paths, sizes, strict=True):
        # Files of an interrupted run: usable ones are reused, and the others are removed first.
        names = {path.name, journal_of(path).name}
        there = [journal_of(path), *(partials_of(path.parent, names) if path.parent.is_dir() else ())]
        needed += sum(size) - sum(map(allocated_bytes, there))
    check_space(paths[0].parent if len(paths) > 1 else paths[0], needed, at_most=True)


def findings_bytes(plan: Plan, options: DetectionOptions) -> FindingsSize:
    """Compute the largest size of findings, with every direction an intruder. Needs about 1 s for 10,000 matrices."""
    return most_bytes(FindingsHead.of(plan, options), (_widest(plan, target, options) for target in plan.targets))


def _widest(plan: Plan, target: Target, options: DetectionOptions) -> MatrixFinding:
    """Make a finding of the largest possible size: every direction an intruder, every figure as long as possible."""
    module, weight = target.module, plan.weights[target.tensor]
    (m, n), k = module.shape, options.directions(module.shape)
    longest, every = -sys.float_info.max, tuple(range(k))
    U, S, Vh = (torch.empty(shape, dtype=weight.compute, device="meta") for shape in ((m, k), (k,), (k, n)))
    found = Detection(singular_values=(longest,) * k, similarity=(longest,) * k, similarity_low=(longest,) * k,
                      similarity_high=(longest,) * k, base_singular_values=(longest,) * k, intruders=every, U=U, S=S,
                      Vh=Vh, certified=False, degenerate=every, solver=max(solvers.SOLVERS, key=len), escalated=False,
                      steps=10**9, products=10**9, cutoff=longest,
                      delta_norm=longest, intruder_energy=longest, dropped_at_zero=longest, precision="float64")  # fmt: skip
    return MatrixFinding(target.tensor, module.name, module.shape, weight.label, module.rank, module.scaling, found,
                         transposed=False, fingerprint="f" * 64)  # fmt: skip

"""Prepare runs on texts: what evaluations, fits and maps share, from open inputs to one file and a journal beside it."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import numpy as np
import torch

from streamer import __version__
from streamer.detection.detect import naming_inputs
from streamer.errors import FormatError, InputError, NumericError, OutputExistsError
from streamer.json_types import JsonObject
from streamer.linalg.torch_state import full_float32, thread_count, threads
from streamer.measuring.batches import Limits, Work
from streamer.measuring.facts import differences, in_words, of_others, with_digest
from streamer.measuring.statistics import MEASURES, Floats
from streamer.methods import UNCHANGED
from streamer.methods.files import SealedKind
from streamer.plan.plan import AdapterBatch, Plan, resident_bytes
from streamer.run import Run
from streamer.storage import transaction
from streamer.storage.transaction import Journal, ResumableFile, states_of
from streamer.streaming.generation import Snapshot
from streamer.streaming.resume import States
from streamer.streaming.sweep import SweepModel
from streamer.streaming.variants import ADAPTER, BASE, Variant, VariantSet
from streamer.units import counted

Arrays = Mapping[str, Floats]
"""Sums of a sweep, by name."""


def pack_arrays(name: str, arrays: Arrays) -> bytes:
    """Pack arrays behind a line of JSON that names them."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # in numpy's stub any name could be `allow_pickle`
    return json.dumps(name).encode() + b"\n" + file.getvalue()


def unpack_arrays(payload: bytes) -> tuple[str, Arrays]:
    """Unpack the name and arrays from what `pack_arrays` returned."""
    line, _, raw = payload.partition(b"\n")
    with np.load(io.BytesIO(raw)) as arrays:
        return json.loads(line), dict(arrays)


class Records:
    """Records of a run in its journal, if it has one: each is read only when it is asked for.

    Attributes
    ----------
    threads
        Number of torch threads with which the run began.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._at: dict[str, int] = {}
        begun: Any = None
        if journal is not None:
            begun = json.loads(journal[0]).get("threads")
            self._at = {unpack_arrays(journal[i])[0]: i for i in range(1, len(journal))}
        self.threads = thread_count(begun)

    def find(self, name: str) -> Arrays | None:
        """Find the arrays recorded under a key."""
        if self._journal is None or name not in self._at:
            return None
        return unpack_arrays(self._journal[self._at[name]])[1]

    def add(self, name: str, arrays: Arrays) -> None:
        """Record the results of a sweep durably."""
        if self._journal is not None:
            self._at[name] = len(self._journal)
            self._journal.append(pack_arrays(name, arrays))

    def _saved(self) -> tuple[Path, str] | None:
        """Return the file from which a killed sweep resumes, and what identifies the run; None without a journal."""
        if self._journal is None:
            return None
        return states_of(self._journal.path), hashlib.sha256(self._journal[0]).hexdigest()

    def snapshot(self) -> Snapshot | None:
        """Return the file from which a killed run of generation resumes; None without a journal."""
        saved = self._saved()
        return saved and Snapshot(*saved)

    def states(self, sweep: str, *fit: Any) -> States | None:
        """Return the file from which a killed sweep resumes; None without a journal.

        Parameters
        ----------
        fit
            What saves and restores the factors of a fit; see `States`.
        """
        if (saved := self._saved()) is None:
            return None
        path, run = saved
        return States(path, f"{run} {sweep}", *fit)


Computed = TypeVar("Computed")

ENDS = (Variant(BASE, None), Variant(ADAPTER, UNCHANGED))
"""The variants between which all others lie."""


def model_of(plan: Plan, variants: Sequence[Variant], dtype: str, run: Run) -> SweepModel:
    """Build the model that runs variants which need no findings."""
    rounds = dtype == "bf16"
    return SweepModel(VariantSet(plan, (*variants,), None, False, rounds, run.model_device))


@dataclass(frozen=True, eq=False)
class Prepared(ABC, Generic[Computed]):
    """A run on texts whose inputs are open and checked; nothing is written until it writes its result at its end, in one file.

    Attributes
    ----------
    max_memory
        Budget in bytes; None for no budget.
    model
        Model that runs, and supplies sizes.
    kind
        Kind of the file, if it is a sealed one.
    noun, same, example
        Words for messages: such a file, such as ``a map``; this result, such as ``this very map``; and a possible name of its file.
    """

    run: Run
    max_memory: int | None
    model: SweepModel

    kind: ClassVar[SealedKind | None] = None
    noun: ClassVar[str]
    same: ClassVar[str]
    example: ClassVar[str]

    @property
    def plan(self) -> Plan:
        """Return the plan of the model."""
        return self.model.job.plan

    @property
    @abstractmethod
    def facts(self) -> JsonObject:
        """Return inputs and options as JSON, with a digest of everything that determines the result; see `with_digest`."""

    @abstractmethod
    def compute(self, records: Records, output: Path | None) -> Computed:
        """Run to the end and return the result; `records` holds those of an interrupted run, and receives this run's."""

    @abstractmethod
    def sweeps(self, known: Computed | None = None) -> list[Work]:
        """List the sweeps of a run that does not stop early, to which earlier results are known."""

    @abstractmethod
    def written_bytes(self, known: Computed | None) -> tuple[int, int]:
        """Estimate the bytes of the file, and of temporary files."""

    @staticmethod
    @abstractmethod
    def read(path: Path) -> Any:
        """Read a result from its file."""

    def known(self, path: Path | None) -> Computed | None:
        """Return the earlier results in the file, to which this run adds."""
        return None

    def save(self, result: Any, path: Path) -> None:
        """Write a result to its file; `inspect` has permitted it for any existing file."""
        result.save(path, overwrite=True)  # a fit, or a map

    def is_whole(self, path: Path) -> bool:
        """Test whether the file at a path is the complete result; raise `OutputExistsError` if it belongs to others, see `of_others`."""
        try:
            recorded = self.read(path).facts
        except FormatError as e:
            if self.kind is not None and self.kind.is_at(path):
                raise OutputExistsError(f"{e}, or pass --overwrite", path) from e
            raise
        if recorded.get("plan") != self.facts["plan"]:
            self.refuse_others(path, recorded)
            raise of_others(path, self.noun)
        return True

    def refuse_others(self, path: Path, recorded: JsonObject, except_for: str = "") -> None:
        """Refuse a file of other inputs or options than this run's, apart from one of the texts.

        Raises
        ------
        OutputExistsError
            If it is one, by the facts in it.
        """
        if not {"plan", "texts", "configs"} <= recorded.keys():
            raise of_others(path, self.noun)
        ours = self.facts
        if except_for:
            texts = {**ours["texts"], except_for: recorded["texts"].get(except_for)}
            ours = {**ours, "texts": texts}
        if differing := differences(ours, recorded):
            raise of_others(path, self.noun, differing)

    def warn(self) -> None:
        """Warn of texts that give a poor result."""

    def run_facts(self, path: Path) -> tuple[JsonObject, str]:
        """Return the facts that the journal holds, and text that distinguishes inputs which differ only in rounding.

        The budget decides what runs together, and so the last bits, but nothing that makes a finished result another one.
        """
        return with_digest({**self.facts, "max_memory": self.max_memory}), ""

    @property
    def solving_bytes(self) -> int:
        """Estimate the memory of what a sweep does between layers."""
        return 0

    @property
    def resident(self) -> int:
        """Estimate the bytes that stay in memory between two steps."""
        return resident_bytes(AdapterBatch(self.plan.base, (self.plan,)))

    @cached_property
    def limits(self) -> Limits:
        """Choose how the first sweep fits the budget."""
        return self.limits_of(self.sweeps()[0])

    def limits_of(self, work: Work) -> Limits:
        """Choose how a sweep fits the budget."""
        return work.limits(self.model.size, self.resident + self.solving_bytes, self.max_memory)

    def inspect(self, path: Path) -> Literal["new", "resume", "done"]:
        """Check, without writing, that the result can be written, and whether it exists, was begun, or is still to be made.

        Raises
        ------
        OutputExistsError
            If the path holds something else, or a result or an interrupted run of other inputs or options, which `overwrite` replaces.
        OutputError, InputChangedError
            If no file can be written there, or the path is an input, or if another version or other inputs began the run.
        UsageError
            If the budget is too small.
        """
        transaction.refuse_symlink(path.parent)
        transaction.check_file_path(path, self.example, transaction.journal_of(path).name)
        transaction.refuse_within_output(path)
        for work in self.sweeps():
            self.limits_of(work)
        if path.exists() and not transaction.is_placeholder(path):
            with naming_inputs(self.plan, [path], self.run.overwrite):
                try:
                    if self.is_whole(path) and not self.run.overwrite:
                        return "done"
                except OutputExistsError:
                    if not self.run.overwrite:
                        raise
                except InputError:
                    raise transaction.not_own(path, self.noun) from None
        self.plan.refuse_overwriting([path])
        return "resume" if self._resumable(path).is_begun() else "new"

    def result(self, output: Path | None) -> Computed:
        """Return the result, from its file if that holds it already; write it if an output is given.

        The file is locked while a journal beside it receives records; if the run fails, the journal stays, unless the inputs are at fault.
        """
        if output is None:
            return self._compute(Records(), None)
        if self.inspect(output) == "done":
            return self.keep_finished(output)
        with self._resumable(output).begun((InputError, NumericError)) as (journal, resumed):
            result = self._compute(Records(journal), output)
            self.plan.check_unchanged()
            self.save(result, output)
        self.run.monitor.outputs[output] = "resumed" if resumed else "written"
        return result

    def _compute(self, records: Records, output: Path | None) -> Computed:
        """Compute in full float32, with the number of threads with which the run began; emit a note if torch now has another number."""
        count = records.threads
        if count != torch.get_num_threads():
            words = f"goes on with {counted(count, 'thread')}, as it began; --no-resume starts over"
            self.run.monitor.note(words)
        with threads(count), full_float32():
            return self.compute(records, output)

    def keep_finished(self, path: Path) -> Computed:
        """Keep a file that is complete, say so, and return what it holds; see `touch_finished`."""
        note = f"{path} holds {self.same} already; nothing to do"
        transaction.touch_finished(path, self.run.monitor, note)
        return cast(Computed, self.read(path))

    def _resumable(self, path: Path) -> ResumableFile:
        """Describe the file and its journal, whose head has the run, the names of its sums, and the threads and torch behind their bits."""
        facts, inputs = self.run_facts(path)
        bits = [inputs, str(self.run.model_device), "torch", torch.__version__, *MEASURES]
        head = {
            "plan": facts["plan"],
            "facts": facts,
            "version": __version__,
            "stamps": self.plan.detection_stamps(),
            "bits": " ".join(bits).strip(),
            "threads": torch.get_num_threads(),
        }

        def differing(found: JsonObject) -> str:
            same = found.get("version") == __version__ and "facts" in found
            return in_words(differences(facts, found["facts"])) if same else ""

        return ResumableFile(path, head, self.run.resume, self.run.overwrite, differing=differing)

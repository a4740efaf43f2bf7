"""Write a result in one file, with its run's journal beside it, and check whether it exists or was begun.

Describe the models that an evaluation measured.

Describe what determines a run on texts as facts, which its file and its journal hold, and compare them with the facts found there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from streamer import __version__
from streamer.adapters.adapter_config import NEUTRAL, stated_options
from streamer.detection.detect import naming_inputs
from streamer.detection.options import Run
from streamer.errors import FormatError, InputError, NumericError, OutputExistsError
from streamer.events import Event
from streamer.linalg.torch_state import full_float32, thread_count, threads
from streamer.measuring.statistics import ARRAYS, Floats
from streamer.methods import METHODS, MethodName
from streamer.methods.files import SealedKind
from streamer.plan.plan import Plan
from streamer.storage.transaction import (
    Journal,
    ResumableFile,
    check_file_path,
    holds,
    is_placeholder,
    journal_of,
    left,
    not_own,
    refuse_symlink,
    refuse_within_output,
    states_of,
)
from streamer.streaming.model import LoadedModel, require_transformers
from streamer.streaming.sweep import States
from streamer.streaming.values import Variant
from streamer.units import counted, listed
from streamer.workers import kept

BASE_ROW, ADAPTER_ROW = 0, 1
"""Row numbers of the first two variants."""

ORDER = (None, *METHODS)


@dataclass(frozen=True)
class EvaluatedVariant:
    """A model that was evaluated; `VariantRecord` explains the attributes."""

    name: str
    method: MethodName | None
    mitigation_lambda: float | None
    keep: float | None = None

    @classmethod
    def of(cls, variant: Variant) -> EvaluatedVariant:
        """Describe a variant that was run."""
        return cls(variant.name, variant.method, variant.mitigation_lambda, variant.keep)

    @property
    def order(self) -> tuple[int, float]:
        """Return the sort key for tables: the base and the adapter come first, then each method from its mildest variant on."""
        method = ORDER.index(self.method) if self.method in ORDER else len(ORDER)
        return method, -(self.mitigation_lambda or self.keep or 0.0)


Facts = Mapping[str, Any]

Configs = Annotated[dict[str, Any], "Configs: of the base, as transformers writes what its class reads; of the adapter, what determines "
    "its deltas."]  # fmt: skip

IDENTIFYING = ("architecture", "files", "weights_sha256", "base_is_residual", "lora_b_layout", "ignored_keys")
"""Keys that identify a base or an adapter, in findings and in evaluations, besides its config."""

OPTIONS = ("projected", "dtype", "holdout", "seed", "vectors")
"""Facts that options of the same names decide."""

DETECTION = ("detection", "scale", "findings", "intruders")
"""Keys that matter only to variants that scale intruders; without such variants `detection` is null."""


def same_input(one: Facts, other: Facts) -> bool:
    """Test whether two descriptions identify the same base, or the same adapter, wherever it is stored."""
    return all(one.get(key) == other.get(key) for key in (*IDENTIFYING, "config_sha256"))


def model_facts(model: LoadedModel, **inputs: Facts) -> dict[str, Any]:
    """Describe what determines a model's losses, except texts and variants; `inputs` are the identities of ``base`` and ``adapter``."""
    stated = model.job.plan.adapter.config.values.items()
    of_adapter = {key: value for key, value in stated if key not in NEUTRAL and value not in (None, [], {})}
    return {
        "version": __version__,
        "transformers": require_transformers().__version__,
        **inputs,
        "configs": {what: model.config if what == "base" else of_adapter for what in inputs},
        "dtype": "bf16" if model.job.rounds_products else "float32",
    }


def writable(plan: Plan) -> dict[str, bool]:
    """Describe how `mitigate` and `merge` can write an adapter's variants."""
    names = plan.weights.quantized_names
    return {
        "factored": not plan.adapter.describes_model and all(target.module.factors for target in plan.targets),
        "quantized": any(name in names and not plan.weights.requantizes(name) for name in plan.by_weight),
    }


def input_options(facts: Mapping[str, Any]) -> list[str]:
    """List the command-line options that make a command read the inputs as these facts do: as a residual, and with which model class."""
    words = stated_options(facts["adapter"])
    return words + (["--architecture", facts["base"]["architecture"]] if "architecture" in facts["base"] else [])


def differences(mine: Facts, theirs: Facts) -> list[str]:
    """Name the differences between the facts of two runs of one command; variants of such evaluations are not comparable."""
    found = []
    for what, config in mine["configs"].items():
        stated = theirs.get("configs", {}).get(what, {})
        if any(mine[what].get(key) != theirs[what].get(key) for key in IDENTIFYING):
            found.append(what)
        elif "configs" not in theirs:
            found.append(f"no config of the {what}, as of an earlier version")
        elif keys := [key for key in {**config, **stated} if config.get(key) != stated.get(key)]:
            found.append(f"the {what}'s config: {listed(keys)}")
    here, there = _texts(mine), _texts(theirs)
    for name in dict.fromkeys([*here, *there]):
        if name not in here or name not in there:
            found.append(f"{name} {'is asked for' if name in here else 'is not asked for'}")
        elif here[name]["sha256"] != there[name]["sha256"]:
            own, other = (
                f"{one['sequences']} sequences of {one['length']} tokens" for one in (here[name], there[name])
            )
            found.append(name + (f": {own}, not {other}" if own != other else ""))
    found += [f"--{option}" for option in OPTIONS if mine.get(option) != theirs.get(option)]
    found += ["version of transformers"] if mine["transformers"] != theirs["transformers"] else []
    if mine.get("detection") is not None and theirs.get("detection") is not None:
        options = {"--top-k": "top_k", "--epsilon": "threshold_epsilon", "--solver": "solver"}
        found += [name for name, key in options.items() if mine["detection"][key] != theirs["detection"][key]]
        found += ["--select"] if mine["scale"] != theirs["scale"] else []
        found += ["findings"] if len({facts["findings"] for facts in (mine, theirs) if "findings" in facts}) > 1 else []
    digests = {one["keep"]: one["sha256"] for one in theirs.get("coefficients", ())}
    others = [one for one in mine.get("coefficients", ()) if digests.get(one["keep"], one["sha256"]) != one["sha256"]]
    maps = len({facts["map"]["sha256"] for facts in (mine, theirs) if "map" in facts}) > 1
    return found + (["coefficients"] if others else []) + (["map"] if maps else [])


def _texts(facts: Facts) -> dict[str, Any]:
    """Return the texts' facts by the names used in messages."""
    texts: Any = facts["texts"]
    if isinstance(texts, list):
        return {f"text {one['name']}": one for one in texts}
    two = {f"{name} text": texts[name] for name in texts if name != "others"}
    return two | {f"other text {one['name']}": one for one in texts.get("others", ())}


def joined_facts(mine: Facts, theirs: Facts) -> dict[str, Any]:
    """Join the facts of a run with the facts of the evaluation that it adds to; only detection, coefficients and map may differ."""
    tree = {**theirs, "version": mine["version"]}
    if theirs["detection"] is None:
        tree |= {key: mine[key] for key in DETECTION if key in mine}
    sets = {one["keep"]: one for one in [*theirs.get("coefficients", ()), *mine.get("coefficients", ())]}
    if sets:
        tree["coefficients"] = list(sets.values())
    if "map" in mine:
        tree["map"] = mine["map"]
    return with_digest(tree)


def with_digest(facts: Facts, **others: Any) -> dict[str, Any]:
    """Add the digest of all facts except streamer's version, and of other things that decide a result."""
    tree = {key: value for key, value in facts.items() if key not in ("version", "plan")}
    told = json.dumps(tree | others, sort_keys=True)
    return {**facts, "plan": hashlib.sha256(told.encode()).hexdigest()}


State = Literal["new", "resume", "done"]

Arrays = Mapping[str, Floats]
"""Sums of a sweep, by name."""


@dataclass(frozen=True)
class ResultFile:
    """A file that a run on texts writes at its end.

    Attributes
    ----------
    path
        Path of the file.
    one, same, example
        Words for messages: its kind, such as ``an evaluation``; this result, such as ``this very evaluation``; and a possible file name.
    plan, run
        Plan of the inputs, and options of the run.
    facts
        Inputs and options, with a digest of everything that determines the run; see `with_digest`.
    is_whole
        Tests whether the file at a path is the complete result. Raises `StreamerError` if the file is of another kind, and
        `OutputExistsError` if it belongs to other inputs or options (see `of_others`).
    bits
        Text that distinguishes inputs which differ only in rounding.
    """

    path: Path
    one: str
    same: str
    example: str
    plan: Plan
    run: Run
    facts: Mapping[str, Any]
    is_whole: Callable[[Path], bool]
    bits: str = ""

    @property
    def head(self) -> dict[str, Any]:
        """Make the journal's first record: the run, the names of its sums, and the threads and torch that determine their bits."""
        bits = f"{self.bits} {self.run.model_device} torch {torch.__version__} {' '.join(ARRAYS)}".strip()
        return {"plan": self.facts["plan"], "facts": self.facts, "version": __version__, "stamps": self.plan.detection_stamps(),
                "bits": bits, "threads": torch.get_num_threads()}  # fmt: skip

    def check_path(self) -> None:
        """Refuse a path at which no file can be written."""
        refuse_symlink(self.path)
        refuse_symlink(self.path.parent)
        check_file_path(self.path, self.example, journal_of(self.path).name)
        refuse_within_output(self.path)

    @property
    def resumable(self) -> ResumableFile:
        """Describe the file and its journal."""
        return ResumableFile(self.path, self.head, self.run.resume, self.run.overwrite, differing=self._differing)

    def _differing(self, found: Mapping[str, Any]) -> str:
        """Describe the differences from the run with this head."""
        same = found.get("version") == __version__ and "facts" in found
        return in_words(differences(self.facts, found["facts"])) if same else ""

    def state(self) -> State:
        """Check, without writing, whether the result exists, was begun, or is still to be made.

        Raises
        ------
        OutputExistsError
            If the path holds something else, or a result or an interrupted run of other inputs or options, which `overwrite` replaces.
        OutputError, InputChangedError
            If the path is an input, or if another version or other inputs began the run.
        """
        if self.path.exists() and not is_placeholder(self.path):
            with naming_inputs(self.plan, [self.path], self.run.overwrite):
                if self._stands():
                    return "done"
        self.plan.refuse_overwriting([self.path])
        return "resume" if self.resumable.is_begun() else "new"

    def _stands(self) -> bool:
        try:
            return self.is_whole(self.path) and not self.run.overwrite
        except OutputExistsError:
            if self.run.overwrite:
                return False
            raise
        except InputError:
            raise not_own(self.path, self.one) from None

    @contextlib.contextmanager
    def written(self) -> Iterator[JournalRecords]:
        """Lock the file, open the journal and yield its records; the caller writes the file, and then the journal is removed.

        If the caller raises, the journal stays, unless the inputs are at fault.
        """
        with self.resumable.begun((InputError, NumericError)) as (journal, resumed):
            yield JournalRecords(journal, thread_count(json.loads(journal[0]).get("threads")))
        self.run.monitor.told(self.path, "resumed" if resumed else "written")

    def left(self) -> None:
        """Keep a file that is complete, and say so; see `left`."""
        left(self.path, self.run.monitor, f"{self.path} holds {self.same} already; nothing to do")


def of_others(path: Path, one: str, differing: Sequence[str] = ()) -> OutputExistsError:
    """Make the error for a file that holds a result of other inputs or options, with the differences."""
    return holds(path, f"{one} of other inputs or options{in_words(differing)}")


def in_words(differing: Sequence[str]) -> str:
    """Put differences into parentheses."""
    return f" ({listed(differing)})" if differing else ""


def stands(path: Path, kind: SealedKind, facts: Mapping[str, Any], load: Callable[[Path], Any]) -> bool:
    """Test whether the file of a fit or a map is the result of these facts; see `ResultFile.is_whole`."""
    try:
        theirs = load(path).facts
    except FormatError as e:
        if kind.is_at(path):
            raise OutputExistsError(f"{e}, or pass --overwrite", path) from e
        raise
    if theirs.get("plan") != facts["plan"]:
        raise of_others(path, kind.what, differences(facts, theirs) if {"plan", "configs"} <= theirs.keys() else ())
    return True


def pack(name: str, arrays: Arrays) -> bytes:
    """Pack arrays as a line of JSON with their shapes, followed by their compressed bytes, so that unpacking restores the same bits."""
    head = {"key": name, "shapes": {array: list(values.shape) for array, values in arrays.items()}}
    return b"\n".join(
        [
            json.dumps(head).encode(),
            zlib.compress(b"".join(values.astype("<f8").tobytes() for values in arrays.values()), 1),
        ]
    )


def unpack(payload: bytes) -> tuple[str, dict[str, Floats]]:
    """Unpack the name and arrays from what `pack` returned."""
    line, _, raw = payload.partition(b"\n")
    head, values, at = json.loads(line), np.frombuffer(zlib.decompress(raw), "<f8").astype(np.float64), 0
    arrays = {}
    for name, shape in head["shapes"].items():
        size = int(np.prod(shape, dtype=int))
        arrays[name] = values[at : at + size].reshape(shape)
        at += size
    return head["key"], arrays


class Records:
    """Records of a run without a journal: nothing is kept, because nothing is asked for twice.

    Attributes
    ----------
    threads
        Number of torch threads with which the run began.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()

    def find(self, name: str) -> Arrays | None:
        """Find the arrays that an interrupted run recorded under a key."""
        return None

    def add(self, name: str, arrays: Arrays) -> None:
        """Record the results of a sweep."""

    def states(self, sweep: str) -> States | None:
        """Return the file from which a killed sweep resumes; None without a journal."""
        return None


class JournalRecords(Records):
    """Records in a journal, including an interrupted run's records; each is read only when asked for."""

    def __init__(self, journal: Journal, threads: int) -> None:
        self._journal, self.threads = journal, threads
        self._at = {unpack(journal[i])[0]: i for i in range(1, len(journal))}

    def find(self, name: str) -> Arrays | None:
        """Find the arrays recorded under a key."""
        at = self._at.get(name)
        return None if at is None else unpack(self._journal[at])[1]

    def add(self, name: str, arrays: Arrays) -> None:
        """Record the results of a sweep durably."""
        self._at[name] = len(self._journal)
        self._journal.append(pack(name, arrays))

    def states(self, sweep: str) -> States:
        """Return the file from which this run's sweep resumes."""
        return States(states_of(self._journal.path), f"{hashlib.sha256(self._journal[0]).hexdigest()} {sweep}")


@contextlib.contextmanager
def computing(count: int, run: Run) -> Iterator[None]:
    """Compute in full float32, with the number of threads with which the run began; emit a note if torch now has another number."""
    if count != torch.get_num_threads():
        words = f"goes on with {counted(count, 'thread')}, as it began; --no-resume starts over"
        run.monitor.emit(Event("note", words))
    with threads(count), full_float32(), kept(run.workers):
        yield

"""Keep the sums of passes in memory or in a journal, and tell whether an evaluation is whole, was begun, or lacks variants."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from streamer.detection.memory import detection_estimates
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.identity import differences
from streamer.evaluation.prepare import Prepared
from streamer.evaluation.result_file import ResultFile, RunJournal, State, of_others
from streamer.evaluation.statistics import MEASURES, SequenceSums
from streamer.evaluation.steps import missing, shrink_to_place, was_placed
from streamer.plan.memory import check_budget
from streamer.storage.output_checks import is_taken

ONE = "an evaluation"


def result_file(prepared: Prepared, output: Path) -> ResultFile:
    """Describe the file of an evaluation."""

    def is_whole(path: Path) -> bool:
        standing, wanted, keep = _load(prepared, path), prepared.options.variants, prepared.options.keep
        return not missing(wanted, standing) and (was_placed(standing, keep) or shrink_to_place(standing, keep) is None)

    # What an earlier run measured is not in the journal of this one.
    earlier = hashlib.sha256(output.read_bytes()).hexdigest() if is_taken(output) and output.is_file() else ""
    bits = f"{prepared.findings.bits if prepared.findings else ''} {earlier}".strip()
    return ResultFile(output, ONE, "this very evaluation", "evaluation.json", prepared.plan, prepared.run, prepared.digest,
                      is_whole, bits)  # fmt: skip


def measured_before(prepared: Prepared, output: Path) -> Evaluation | None:
    """Load the evaluation to which variants are added; None if the file is new or replaced."""
    return _load(prepared, output) if is_taken(output) and not prepared.run.overwrite else None


def _load(prepared: Prepared, path: Path) -> Evaluation:
    """Load an evaluation; refuse one whose variants are not comparable with those of this run."""
    standing = load_evaluation(path)
    if differing := differences(prepared.facts, standing.facts):
        raise of_others(path, ONE, differing)
    return standing


def inspect(prepared: Prepared, output: Path) -> State:
    """Check, read-only, whether an evaluation can be written to a file, and whether it stands there or was begun."""
    plan, file = prepared.plan, result_file(prepared, output)
    file.check_path()
    prepared.passes(2)  # raises if the budget does not hold one sequence
    if prepared.needs_findings and prepared.findings is None:
        check_budget(detection_estimates(plan, prepared.detection, prepared.resident), prepared.detection.max_memory)
    return file.state()


class InMemory:
    """Sums of passes of this run alone, none of which is asked for twice.

    Attributes
    ----------
    one_length
        Whether the passes have sequences of one length each; None until the logits have been checked.
    taken_up
        Passes that an interrupted run has recorded.
    """

    taken_up = 0

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.one_length: bool | None = None

    def decide(self, one_length: bool) -> None:
        """Keep what the check of the logits has found."""
        self.one_length = one_length

    def find(self, number: int, variants: Sequence[str]) -> SequenceSums | None:
        """Find what an interrupted run recorded of a pass, by its number among those of the same variants."""
        return None

    def add(self, number: int, variants: Sequence[str], sums: SequenceSums) -> None:
        """Record the sums of a pass."""


class Journalled(InMemory):
    """Sums of passes that a journal keeps, those of an interrupted run among them."""

    def __init__(self, own: RunJournal) -> None:
        super().__init__()
        self._journal, self.threads = own.journal, own.threads
        self._sums: dict[tuple[int, tuple[str, ...]], SequenceSums] = {}
        for record in map(json.loads, own.records()):
            if "one_length" in record:
                self.one_length = record["one_length"]
                continue
            self._sums[record["pass"], tuple(record["variants"])] = SequenceSums(
                *(np.array(record[key], np.float64) for key in ("tokens", *MEASURES))
            )
        self.taken_up = len(self._sums)

    def decide(self, one_length: bool) -> None:
        """Keep what the check of the logits has found, durably: a run that takes this one up divides the work alike."""
        self._journal.append(json.dumps({"one_length": one_length}).encode())
        super().decide(one_length)

    def find(self, number: int, variants: Sequence[str]) -> SequenceSums | None:
        """Find what was recorded of a pass."""
        return self._sums.get((number, tuple(variants)))

    def add(self, number: int, variants: Sequence[str], sums: SequenceSums) -> None:
        """Record the sums of a pass, durably; floats are written so that they are read as the same bits."""
        arrays = {"tokens": sums.tokens.tolist(), **{name: getattr(sums, name).tolist() for name in MEASURES}}
        self._journal.append(json.dumps({"pass": number, "variants": list(variants), **arrays}).encode())
